"""The part of a run that a stage's preparation and evaluation can access."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain.pool import Pool
from chain.recipe import Recipe
from core.strict import ConfigError, Strict
from corpus.records import DataSource, Records
from rl.limits import askable

Progress = Callable[[str], None]
Scores = dict[str, dict[str, Any]]
"""Name of an evaluation set -> its figures (rl.scores.summary)."""


@dataclass(frozen=True)
class Context:
    """The part of a run that one stage can access."""

    recipe: Recipe
    stage: str
    config: Strict
    """The stage's config."""
    model: Path | None
    """Checkpoint folder: for `prepare` the stage's initial checkpoint, for `evaluate` the trained checkpoint."""
    out: Path
    """Output folder: for `prepare` the folder of the sets, for `evaluate` the folder of the finished stage."""
    sets: Mapping[str, str]
    """Data set name -> Parquet file, folder or address on the hub."""
    folders: Mapping[str, Path]
    """Stage name -> folder, for the stages before this one."""
    pool: Pool
    progress: Progress = lambda text: None
    """Shows a short progress text. Frequent calls are cheap."""

    def askable(self, max_completion_tokens: int) -> Callable[[DataSource, Records], Records]:
        """A function that drops the rows of a source that exceed the servers' limits; see rl.limits."""
        pool = self.recipe.servers
        assert pool, "Recipe checks it"
        return lambda source, records: askable(records, source, pool, self.policy, max_completion_tokens)

    @property
    def policy(self) -> Path:
        """The checkpoint folder to sample from. Raises ConfigError if there is none."""
        if self.model is None:
            raise ConfigError(
                f"{self.stage} does not start from a checkpoint, so it has no policy to sample from"
            )
        return self.model
