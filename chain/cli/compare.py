"""`posttrain compare`: evaluations of the same questions, paired."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chain.cli.options import command

if TYPE_CHECKING:
    from rich.table import Table

    from chain.compare.paired import Comparison


def add(commands: Any) -> None:
    """Add the command to the command line."""
    added = command(commands, "compare", _compare, "compare evaluations of the same questions")
    added.add_argument("base", type=Path, help="a stage's folder, a run, or the output of eval or bench")
    added.add_argument("others", type=Path, nargs="+", help="evaluations to compare with the first")
    added.add_argument("--html", type=Path, help="page with the changed questions; default: compare.html")
    added.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="CONDITION",
        help='"SET >= base - POINTS" or "SET >= POINTS"; the exit code is 1 if a condition fails',
    )


def _compare(options: argparse.Namespace) -> None:
    from chain.compare.answers import read_all
    from chain.compare.gate import Gate, check
    from chain.compare.page import page
    from chain.compare.paired import compare
    from core.console import new_console
    from core.files import write_text

    gates = [Gate.parse(text) for text in options.gate]
    base, *others = read_all([options.base, *options.others])
    comparisons = [compare(base, other) for other in others]
    console, file = new_console(), options.html or Path("compare.html")
    for one in comparisons:
        console.print(_table(one))
        if any(one.measures.values()):
            console.print(_measures(one))
    write_text(file, page(comparisons, base))
    console.print(f"changed questions: {file}", markup=False, soft_wrap=True)
    check(gates, comparisons)


def _table(comparison: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{comparison.other} against {comparison.base}"
    rows = Table(title=title, box=box.SIMPLE_HEAD, caption=_caption(comparison))
    for place, heading in enumerate(("", "n", "base", "other", "difference, 95%", "wins", "losses", "p")):
        rows.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for name, found in {"": comparison.sets, **comparison.groups}.items():
        if name:
            rows.add_row(f"by {name}", style="dim")
        for one in found:
            span = f"{100 * one.difference:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
            shares = f"{one.base:.3f}", f"{one.other:.3f}"
            rows.add_row(one.name, str(one.n), *shares, span, str(one.wins), str(one.losses), f"{one.p:.2g}")
    return rows


def _measures(comparison: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    rows = Table(box=box.SIMPLE_HEAD, caption="over all questions of each; docs/compare.md explains the rows")
    for place, heading in enumerate(("", "base", "other")):
        rows.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for name, found in comparison.measures.items():
        rows.add_row(name, style="dim")
        for one in found:
            rows.add_row(one.name, *("-" if x is None else f"{x:.3g}" for x in (one.base, one.other)))
    return rows


def _caption(comparison: Comparison) -> str:
    left: Sequence[int] = comparison.unpaired
    missing = f"; not paired: {left[0]} of base, {left[1]} of other" if any(left) else ""
    return f"difference in points, bootstrap interval; p: McNemar's exact test{missing}"
