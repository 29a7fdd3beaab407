"""The part of a run that a stage's preparation and evaluation see."""

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
"""`{"thinking": {accuracy, n, ci95, format_rate, mean_tokens}, "direct": {...}}`."""


@dataclass(frozen=True)
class Context:
    """The part of a run that one stage sees."""

    recipe: Recipe
    stage: str
    config: Strict
    """The stage's own part of the recipe."""
    model: Path | None
    """Checkpoint folder: before training the one that the stage starts from, after it the stage's own."""
    out: Path
    """Folder to write to: for `prepare` the sets' folder, for `evaluate` the finished stage's."""
    sets: Mapping[str, str]
    """Data set name -> Parquet file, folder or hub id."""
    folders: Mapping[str, Path]
    """Folders of the stages before this one."""
    pool: Pool
    progress: Progress = lambda text: None
    """Takes a short progress text; cheap to call often."""

    def askable(self, max_completion_tokens: int) -> Callable[[DataSource, Records], Records]:
        """Leaves out the rows of a source that the servers cannot be asked; see rl.limits."""
        pool = self.recipe.servers
        assert pool, "Recipe checks it"
        return lambda source, records: askable(records, source, pool, self.policy, max_completion_tokens)

    @property
    def policy(self) -> Path:
        """The checkpoint folder to sample from. Raises ConfigError if there is none."""
        if self.model is None:
            raise ConfigError(f"{self.stage} starts from no checkpoint, so there is no policy to sample from")
        return self.model
