"""`posttrain run --seeds` and `--sweep`: one run after another, then one table over all of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from chain.members import Cell, Member


def run_members(options: argparse.Namespace) -> None:
    """Bring every member's run up to date, print the table and write it to the folder of all runs."""
    from chain.members import as_json, compared, over_key, over_seeds
    from chain.run import run
    from core.console import new_console
    from core.files import write_json
    from core.strict import ConfigError

    if options.seeds:
        if options.seed is not None:
            raise ConfigError("--seed with --seeds: give one of the two")
        members = over_seeds(options.recipe, options.overrides, options.seeds, options.name)
    else:
        members = over_key(options.recipe, options.overrides, options.sweep, options.seed, options.name)
    console = new_console()
    for member in members:
        console.print(
            f"{member.label}: {options.runs_dir / member.recipe.name}", markup=False, soft_wrap=True
        )
        run(
            member.recipe,
            runs_dir=options.runs_dir,
            from_=options.from_,
            until=options.until,
            force=options.force,
            ray=options.ray,
        )
    found = compared(members, options.runs_dir, "member" if options.seeds else "question")
    console.print(_table(members, found, bool(options.seeds)))
    file = options.runs_dir / f"{members[0].recipe.name}.members.json"
    write_json(file, as_json(members, found))
    console.print(f"table: {file}", markup=False, soft_wrap=True)


def _table(members: Sequence[Member], found: dict[str, dict[str, Cell]], seeds: bool) -> Table:
    from rich import box
    from rich.table import Table

    labels = ", ".join(member.label for member in members)
    test = (
        "p: paired t-test over the seeds, against the stage before"
        if seeds
        else f"p: McNemar's exact test, {members[-1].label} against {members[0].label}"
    )
    table = Table(
        title=f"held-out accuracy: {labels}",
        caption=f"mean ± standard deviation; {test}",
        box=box.SIMPLE_HEAD,
    )
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    for place, heading in enumerate(("stage", *names)):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for stage, row in found.items():
        table.add_row(stage, *(_text(row.get(name)) for name in names))
    return table


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    values = " ".join(f"{value:.3f}" for value in cell.values)
    p = "" if cell.p is None else f", p={cell.p:.2g}"
    return f"{cell.mean:.3f} ± {cell.spread:.3f} ({values}){p}"
