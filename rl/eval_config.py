"""Configuration of the held-out evaluation: named sets, each with its mode, its verifier and its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from core.strict import Name, Strict, nearest
from corpus.records import VERIFIERS, DataSource
from rl.config import Mode, Params

_SETS = "evaluation sets have names: write sets: {NAME: {set: ..., mode: ...}}"


class EvalSet(DataSource):
    """One held-out set: a column of the table."""

    mode: Mode | None = None
    """Mode in which every row is asked. None: the rows' own mode, which must be the same for all."""
    verifier: str | None = None
    """Verifier that grades every row. None: each row's own."""
    use: str | None = None
    """A reward that decides whether a completion is right, in place of the verifier: a built-in one, such as a judge,
    `package.module:Name` or `file.py:Name`."""
    params: Params = Field(default_factory=dict)
    """Parameters of `use`."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest completion of this set, tokens. None: the evaluation's."""
    draws: int = Field(default=0, ge=0, le=1024)
    """Sampled completions per row, for pass@k and majority@k. 0: the greedy completion alone."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled completions."""

    @field_validator("verifier")
    @classmethod
    def _known_verifier(cls, value: str | None) -> str | None:
        if value is not None and value not in VERIFIERS:
            raise ValueError(f"no such verifier; {nearest(value, VERIFIERS)}")
        return value

    @model_validator(mode="after")
    def _params_have_a_reward(self) -> EvalSet:
        if self.params and self.use is None:
            raise ValueError("params are parameters of `use`, which is missing")
        return self


class BenchEvery(Strict):
    """A subset of public benchmarks that RL stages ask their current policy while they train, by lmms-eval.

    The learner waits meanwhile. Images are tiled as in training, whatever the suite's tile caps. A benchmark that fails
    is logged, and training goes on.
    """

    batches: int = Field(ge=1)
    """Rollout batches between two looks; the first look is at the stage's first batch."""
    suite: str
    """Built-in suite (docs/bench.md) or a YAML file."""
    only: tuple[Name, ...] = ()
    """Benchmarks of the suite; empty: all."""
    limit: int = Field(default=32, ge=1)
    """First questions of each benchmark."""
    mode: Literal["thinking", "direct"] = "thinking"
    data: dict[Name, str] = Field(default_factory=dict)
    """Benchmark -> local copy of its data set."""
    include: tuple[str, ...] = ()
    """Folders of lmms-eval tasks that the suite names."""
    judge: str | None = None
    """Base URL of an OpenAI-compatible judge, for benchmarks that ask one."""
    judge_model: str = "gpt-4o-mini"
    judge_key_env: str | None = None
    """Environment variable with the judge's key."""
    harness: str = ".venv-bench/bin/python"
    """Python of lmms-eval's environment, which `make bench-setup` makes; relative to the working directory."""


class EvalConfig(Strict):
    """Evaluation on the held-out sets through the rollout servers."""

    refused: ClassVar[dict[str, str]] = {
        "thinking": f"{_SETS}, here sets: {{thinking: {{set: ..., mode: think}}}}",
        "direct": f"{_SETS}, here sets: {{direct: {{set: ..., mode: direct}}}}",
    }

    sets: dict[Name, EvalSet] = Field(min_length=1)
    """Name of a column -> its set. null drops a set of an extended recipe."""
    max_completion_tokens: int = Field(ge=1)
    """Longest completion, tokens, for sets that do not say otherwise."""
    samples: int = Field(default=12, ge=0)
    """Number of held-out rows, over all sets, that the report shows with their images."""
    blind: bool = False
    """Whether rows with images are asked a second time with grey images. The second accuracy shows how much of a score
    needs no image."""

    every: BenchEvery | None = None
    """Public benchmarks whose curves over training the RL stages log as `bench/<name>`."""

    @field_validator("sets", mode="before")
    @classmethod
    def _drop_null(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: one for name, one in value.items() if one is not None}

    def longest(self, name: str) -> int:
        """Longest completion of one set, tokens."""
        return self.sets[name].max_completion_tokens or self.max_completion_tokens
