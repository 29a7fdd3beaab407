"""Suites of benchmarks: which lmms-eval task, which prompt, which metric, and where each choice comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from core.strict import ConfigError, Name, Strict, nearest, parse

FOLDER = Path(__file__).parent / "suites"
MEAN = "mean"
"""Metric of a benchmark whose score is the mean of its samples' scores."""
Extract = Literal["box", "contract", "whole"]


class Benchmark(Strict):
    """One benchmark: a task of lmms-eval with our changes."""

    yaml: str | None = None
    """File of the task, relative to lmms-eval's `tasks` folder. None: `task` is a task of an --include folder."""
    task: str | None = None
    """Name of a task of an --include folder."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Keys of the task's file that differ here, such as `doc_to_text`."""
    metric: str
    """The harness's metric that is the benchmark's score; mean: the mean of the samples' scores."""
    scale: float = 100.0
    """Factor from the metric to points; 1 if the metric is in points."""
    score: str
    """Where a sample's score is in the harness's log: a path such as `llm_as_judge_eval.true_false`, or two paths with
    ` = ` between them, which are compared."""
    judge: bool = False
    """Whether the task's scoring asks a judge."""
    extract: Extract = "box"
    """The part of a completion that the harness scores. box: of a thinking completion the box after the thought, else
    the last box, else everything; contract: the answer by this project's format contract, "" without one; whole:
    everything."""
    tiles: int | None = Field(default=None, ge=1, le=64)
    """Most tiles of an image (the image processor's max_patches). With it the prompt follows the model's authors'
    wrapper: at most 64 tiles over all images, and several images stand before the text as "Image-1: " lines, without
    MSAC's second scale. None: images as in training."""
    enlarge_first: bool = False
    """Whether the first image is sent at twice its width and height."""
    frames: int | None = Field(default=None, ge=1, le=1024)
    """Frames that are sampled of a video; None: the benchmark has no videos."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest completion, tokens; None: the command's."""
    source: str
    """Where prompt and settings come from."""


class Suite(Strict):
    """A named list of benchmarks, with the scores that others have published."""

    about: str
    benchmarks: dict[Name, Benchmark] = Field(min_length=1)
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Model -> benchmark -> published score in points."""

    def only(self, names: Sequence[str]) -> Suite:
        """The suite with these benchmarks alone, or all if none is named. Raises ConfigError for an unknown name."""
        for name in names:
            if name not in self.benchmarks:
                raise ConfigError(f"only: {name}: no such benchmark; {nearest(name, self.benchmarks)}")
        kept = {name: one for name, one in self.benchmarks.items() if name in (names or self.benchmarks)}
        return self.model_copy(update={"benchmarks": kept})

    @property
    def has_caps(self) -> bool:
        """Whether a benchmark has a tile cap, so that every request must name its own."""
        return any(one.tiles for one in self.benchmarks.values())


def load_suite(name: str) -> Suite:
    """The suite of that name, or of a YAML file. Raises ConfigError."""
    known = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    file = known.get(name, Path(name))
    if not file.is_file():
        raise ConfigError(f"--suite {name}: no such suite and no such file; {nearest(name, known)}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    suite = parse(Suite, values, str(file))
    for key, one in suite.benchmarks.items():
        if (one.yaml is None) == (one.task is None):
            raise ConfigError(f"{file}: benchmarks.{key}: give exactly one of yaml and task")
    return suite
