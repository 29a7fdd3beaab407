"""The configuration of a curation: one YAML file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from chain.places import Placed
from chain.recipe import IMPORT_STRING, CoreConfig, ForeignSet, GenerateConfig
from chain.yaml_files import Folder, read_file, read_value
from core.strict import ConfigError, Name, Strict, nearest, parse
from core.training.config import LearnerConfig, Optim
from corpus.curation.steps import Step

GENERATED = "generated"
"""The place of a set that `generate` writes; `generated/<path>` is another file that it writes."""
FILE = "curation.yaml"
"""The file of a curation that has a folder of its own."""


class Server(Strict):
    """A model that steps ask: an OpenAI-compatible server that runs already, or one that the curation starts."""

    base_url: str | None = None
    """The server's API root, ending in /v1 for vLLM."""
    core: CoreConfig | None = None
    """A core that the curation serves with vLLM, with a token of its own."""
    start: str | None = Field(default=None, pattern=IMPORT_STRING)
    """`package.module:function`: called without arguments, it returns a context manager that yields a base_url."""
    model: str = "policy"
    """Name of the model on the server."""
    api_key_env: str | None = None
    """Environment variable with the API key; None: a dummy key is sent."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of a served core."""
    max_model_tokens: int = Field(default=4096, ge=8)
    """Most tokens of a prompt and its completion, for a served core."""
    max_concurrency: int = Field(default=64, ge=1)
    """Requests in flight."""
    timeout_s: float = Field(default=300, gt=0)
    """Time limit of one request."""
    max_retries: int = Field(default=4, ge=0)
    run_s: float | None = Field(default=None, gt=0)
    """Seconds that the curation may wait for this model in one run; None: no limit."""
    run_calls: int | None = Field(default=None, ge=1)
    """Most requests of one run."""
    run_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one run."""
    requests_per_s: float | None = Field(default=None, gt=0)
    """Requests that the server answers in a second, for the estimate of `--plan`."""

    @model_validator(mode="after")
    def _one_origin(self) -> Server:
        given = [name for name in ("base_url", "core", "start") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"given: {', '.join(given) or 'nothing'}; give one of base_url, core and start")
        return self


class Incremental(Strict):
    """The incremental check: two small SFT runs of equal length, without and with the new data.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, SAIL-Instruction2: new data passes an incremental check. The report
    does not say how it is measured; the loss on validation rows is ours.
    """

    core: CoreConfig
    """The start of both runs."""
    base: Name
    """Set of `extra` that both runs train on."""
    validation: Name
    """Set of `extra` whose loss decides."""
    max_tokens: int = Field(ge=8)
    """Longest row."""
    optim: Optim
    """Optimizer and length; max_steps, so that both runs have the same number of updates."""
    learner: LearnerConfig = LearnerConfig()
    on_worse: Literal["warn", "refuse"] = "warn"
    """Whether to warn or to refuse the data if the loss with them is not lower."""

    @model_validator(mode="after")
    def _same_length(self) -> Incremental:
        if self.optim.max_steps is None or self.optim.global_batch_size is None:
            raise ValueError(
                "optim needs max_steps and global_batch_size, so that both runs have equal updates"
            )
        return self


class Curation(Placed):
    """A curation, resolved."""

    name: Name
    """Default: the name of the file or of its folder."""
    about: str = ""
    """One line for the report."""
    seed: int = Field(default=0, ge=0)
    generate: GenerateConfig | None = None
    """Sets that are made before the first step."""
    sets: dict[Name, str | ForeignSet] = Field(min_length=1)
    """The input: set name -> Parquet file or folder of records, or a set in another format, which is imported. Paths
    are searched in the file's folder, then in the working directory."""
    held_out: dict[Name, str | ForeignSet] = Field(default_factory=dict)
    """Sets whose rows must not leak: held-out sets, and the benchmarks that are evaluated."""
    extra: dict[Name, str | ForeignSet] = Field(default_factory=dict)
    """Sets that the incremental check names; they are not curated."""
    rows: int | None = Field(default=None, ge=1)
    """Rows of the input, for the estimate of `--plan` and `posttrain plan` while the sets are not on this machine."""
    output: str = Field(min_length=1)
    """Folder that the curated rows are written to, as Parquet files of records; a recipe names it as a set. It is
    relative to the working directory."""
    models: dict[Name, Server] = Field(default_factory=dict)
    """The models that steps name."""
    steps: tuple[Step, ...] = Field(min_length=1)
    """Run in this order."""
    incremental: Incremental | None = None
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: Ray Data. Steps that ask a model run in this process in both cases."""
    ray_address: str | None = None
    """Address of a Ray cluster whose nodes share the file system; None: Ray starts on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes; None: one per CPU core."""
    shard_rows: int = Field(default=2048, ge=1)
    """Rows of one shard, the unit of work and of resumption; a shard has at least one row group of a file."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Curation:
        for number, step in enumerate(self.steps):
            for model in step.models():
                if model not in self.models:
                    raise ValueError(
                        f"steps[{number}] ({step.op}): model {model!r}: {nearest(model, self.models)}"
                    )
            if step.op == "decontaminate" and not self.held_out:
                raise ValueError("decontaminate needs held_out: the sets whose rows must not leak")
        generated = self.generate.sets if self.generate else ()
        for group in ("sets", "held_out", "extra"):
            for name, place in getattr(self, group).items():
                if place == GENERATED and name not in generated:
                    raise ValueError(
                        f"{group}.{name}: generated: generate.sets has {', '.join(generated) or 'no set'}"
                    )
        if self.incremental:
            for name in (self.incremental.base, self.incremental.validation):
                if name not in self.extra:
                    raise ValueError(f"incremental: {name!r} is not in extra; {nearest(name, self.extra)}")
        return self

    def every(self) -> dict[str, str | ForeignSet]:
        """All sets by name."""
        return {**self.sets, **self.held_out, **self.extra}


def load_curation(path: Path, overrides: Iterable[str] = ()) -> Curation:
    """The curation in a YAML file, or in the file curation.yaml of a folder, with `a.b=value` overrides.

    The key `extends` names a file beside it whose keys it takes over; mappings are merged. Raises ConfigError with
    file, key, value and rule.
    """
    file = path / FILE if path.is_dir() else path
    folders = [file.parent]
    if not file.exists():
        raise ConfigError(
            f"{file}: there is no such file; a curation is a YAML file, or a folder with {FILE}"
        )
    folder = Folder(file)
    values = _read(file)
    if base := values.pop("extends", None):
        below = file.parent / str(base)
        folder.merge(_read(below), str(below))
        folders.append(below.parent)
    folder.merge({"name": path.resolve().stem, **values}, str(file))
    for assignment in overrides:
        folder.override(assignment, {})
    curation = parse(Curation, folder.values, folder.where)
    curation.read_from(folders)
    return curation


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_value(read_file(file))
    except ValueError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a curation holds a mapping; this file holds a {type(values).__name__}")
    return values
