"""The curations that make a recipe's sets, and their time, estimated as `posttrain data curate --plan` does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chain.curation.config import Curation, load_curation
from chain.curation.plan import BASIS, estimate
from chain.recipe import Recipe
from core.strict import ConfigError


def curations(recipe: Recipe) -> dict[str, Curation]:
    """Set name -> the curation that makes it. Raises ConfigError for one that cannot be read or makes another set."""
    found = {}
    for name, file in recipe.data.curated.items():
        path = recipe.place(file)
        if not path.exists():
            raise ConfigError(f"data.curated.{name} = {file!r}: there is no such file; {recipe.looked()}")
        found[name] = load_curation(path)
        if found[name].output != recipe.data.sets[name]:
            raise ConfigError(
                f"data.curated.{name} = {file!r}: this curation writes {found[name].output}, and data.sets.{name} is "
                f"{recipe.data.sets[name]}: make them equal"
            )
    return found


def lines(recipe: Recipe) -> Iterator[str]:
    """A line for each curation."""
    for at, (name, curation) in enumerate(curations(recipe).items()):
        found = estimate(curation)
        if not at:
            yield f"sets that curations make before the run (posttrain data curate FILE; {found.cores} cores; {BASIS}):"
        yield f"  {name}: {found.rows:,} rows, {found.total()}; {recipe.data.curated[name]}"


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The estimates for programs: rows, seconds without models, and requests to models."""
    found = {name: estimate(curation) for name, curation in curations(recipe).items()}
    return {
        name: {
            "rows": one.rows,
            "seconds": one.seconds,
            "requests": sum(step.requests for step in one.steps),
        }
        for name, one in found.items()
    }
