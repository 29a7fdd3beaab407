"""`posttrain data`: a recipe's own sets, foreign files as records, curation, and a look at a set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command, count, load, overrides, recipe_argument


def add(commands: Any) -> None:
    """Add the family to the command line."""
    summary = "generate, import, curate and show data"
    family = commands.add_parser("data", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    data = family.add_subparsers(metavar="COMMAND", required=True, help="what to do")
    generate = command(data, "generate", _generate, "generate a recipe's data")
    recipe_argument(generate)
    generate.add_argument(
        "--force", action="store_true", help="generate even if the data exist and are unchanged"
    )
    taken = command(
        data, "import", _import, "convert files of other formats to records, which every stage reads"
    )
    taken.add_argument(
        "source",
        help=".json, .jsonl, .csv, .tsv, .parquet or .tar file, a folder of one kind, or a data set on the hub: "
        "hf://datasets/owner/name@revision/folder",
    )
    taken.add_argument("--split", default="train", help="split of a data set on the hub; default: train")
    taken.add_argument(
        "destination", type=Path, help="Parquet file; rejected rows go to a .rejected.jsonl beside it"
    )
    taken.add_argument(
        "--format", default="auto", help="llava, openai, swift, vlmeval, columns, records; default: auto"
    )
    taken.add_argument("--images", type=Path, help="folder of the pictures; default: the source's")
    taken.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="columns whose names do not match a field: question=q answer=a",
    )
    taken.add_argument(
        "--system", choices=("keep", "strip", "refuse"), default="keep", help="system messages"
    )
    taken.add_argument(
        "--turns",
        choices=("keep", "first", "split", "refuse"),
        default="keep",
        help="treatment of conversations with several exchanges",
    )
    taken.add_argument("--rows", type=count, help="import only the first N rows")
    taken.add_argument("--strict", action="store_true", help="stop at the first row that cannot be imported")
    _add_curate(data)
    _add_show(data)


def _add_curate(data: Any) -> None:
    curate = command(
        data, "curate", _curate, "run a curation: filter, rewrite and sample rows, with a report"
    )
    curate.add_argument("curation", type=Path, help="YAML file, or a folder with curation.yaml")
    overrides(curate, "override values")
    curate.add_argument(
        "--plan", action="store_true", help="check the curation and estimate its time; run nothing"
    )
    curate.add_argument(
        "--rows", type=count, help="with --plan: rows to estimate for, in place of the input's"
    )


def _add_show(data: Any) -> None:
    show = command(data, "show", _show, "show statistics and rows of a set, in the terminal and on a page")
    show.add_argument("set", help="Parquet file, folder or hub address of records; or a set of --recipe")
    show.add_argument("--n", type=count, default=12, help="rows on the page; default: %(default)s")
    show.add_argument("--recipe", type=Path, help="recipe with the set, the stages' limits and the core")
    show.add_argument(
        "--model", type=Path, help="checkpoint whose processor counts tokens; default: the recipe's core"
    )
    show.add_argument("--split", default="train", help="default: %(default)s")
    show.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
    show.add_argument(
        "--tokens", metavar="ROW", help="print one row (id, or number from 0) as the model sees it"
    )
    show.add_argument(
        "--out", type=Path, default=Path("data-show.html"), help="the page; default: %(default)s"
    )


def _show(options: argparse.Namespace) -> None:
    from chain.recipe import load_recipe
    from chain.show import Shown, tables
    from core.console import new_console
    from core.files import write_text

    recipe = load_recipe(options.recipe) if options.recipe else None
    shown, console = Shown(options.set, recipe, options.model, options.split, options.runs_dir), new_console()
    if options.tokens is not None:
        for line in shown.tokens(options.tokens):
            console.print(line, soft_wrap=True)
        return
    statistics = shown.statistics()
    for table in tables(statistics):
        console.print(table)
    write_text(options.out, shown.page(options.n, statistics))
    console.print(f"page: {options.out}", markup=False, soft_wrap=True)


def _curate(options: argparse.Namespace) -> None:
    from chain.curation.config import load_curation

    curation = load_curation(options.curation, options.overrides)
    if options.plan:
        from chain.curation.plan import plan

        print(plan(curation, options.rows))
        return
    from chain.curation.run import curate

    curate(curation)


def _generate(options: argparse.Namespace) -> None:
    from chain.run import data

    print(data(load(options), runs_dir=options.runs_dir, force=options.force))


def _import(options: argparse.Namespace) -> None:
    from chain.imports import imported
    from chain.recipe import ForeignSet
    from core.strict import ConfigError, parse

    columns = dict(pair.partition("=")[::2] for pair in options.columns)
    if not all(columns.values()):
        raise ConfigError(
            f"--columns {' '.join(options.columns)}: write FIELD=COLUMN, such as question=query"
        )
    given = {
        "path": options.source,
        "split": options.split,
        "format": options.format,
        "columns": columns,
        "strict": options.strict,
    }
    given |= {
        "images": options.images and str(options.images),
        "system": options.system,
        "turns": options.turns,
    }
    for line in imported(parse(ForeignSet, given, "data import"), options.destination, options.rows):
        print(line)
