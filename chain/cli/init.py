"""`posttrain init`: makes a user's recipe folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command


def add(commands: Any) -> None:
    """Add the subcommand to the command line."""
    init = command(commands, "init", _init, "make a recipe folder of your own, with a reward and its test")
    init.add_argument("folder", type=Path, metavar="DIR", help="folder to make; must not exist")
    init.add_argument(
        "--from",
        dest="base",
        choices=("demo", "smoke", "sailvl2_2b"),
        default="demo",
        help="recipe to start from; demo and smoke train the tiny core; default: %(default)s",
    )
    init.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="your rows: Parquet records, or any format that `data import` reads",
    )


def _init(options: argparse.Namespace) -> None:
    from chain.init import init

    print("\n".join(init(options.folder, options.base, options.data)))
