"""Helpers that several subcommands share: adding a subcommand, common options, and reading their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chain.recipe import Recipe


def command(commands: Any, name: str, do: Any, summary: str) -> argparse.ArgumentParser:
    """Add one subcommand, which calls `do(options)`."""
    added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    added.set_defaults(do=do)
    # Accepted before and after the command. Without a default, it does not overwrite the former.
    added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return added


def recipe_argument(added: argparse.ArgumentParser) -> None:
    """The recipe's folder, and the options of every command that reads a recipe."""
    added.add_argument("recipe", type=Path, help="recipe folder, such as recipes/demo")
    recipe_options(added)


def recipe_option(added: argparse.ArgumentParser) -> None:
    """`--recipe FOLDER`, for commands whose positional argument is a checkpoint."""
    added.add_argument("--recipe", type=Path, default=Path("recipes/demo"), help="default: %(default)s")
    recipe_options(added)


def overrides(added: argparse.ArgumentParser, about: str) -> None:
    """The option `--set KEY=VALUE ...`."""
    added.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help=about
    )


def recipe_options(added: argparse.ArgumentParser) -> None:
    """Options of every command that reads a recipe."""
    overrides(added, "override values, e.g. rlvr.rollout.group_size=16 rlvr.rewards.0.weight=0.9")
    added.add_argument(
        "--seed", type=int, help="seed in place of the recipe's; the run is then runs/<name>-seed<N>"
    )
    added.add_argument("--name", help="name of the run's folder in place of the recipe's")
    added.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")


def load(options: argparse.Namespace) -> Recipe:
    """The recipe that the options name."""
    from chain.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides, options.seed, options.name)


def count(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    if not text.isdigit() or len(text) > 18 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: write a whole number of at least 1")
    return int(text)


def above_0(text: str) -> float:
    """An option's value as a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: write a number above 0, such as 2")
    return number


def assigned(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML. Raises ConfigError."""
    from chain.yaml_files import read_value
    from core.strict import ConfigError

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"--param {text!r}: write KEY=VALUE")
    try:
        return key, read_value(value)
    except ValueError as error:
        raise ConfigError(f"--param {text!r}: {value!r} is not a YAML value ({error})") from None
