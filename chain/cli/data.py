"""`posttrain data generate` and `data import`: a recipe's own sets, and foreign files as records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command, count, load, recipe_argument


def add(commands: Any) -> None:
    """Add the family to the command line."""
    summary = "generate a recipe's data, or import foreign files"
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
        "owner/name, or hf://datasets/owner/name@revision/folder",
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
