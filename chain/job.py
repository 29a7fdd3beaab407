"""A stage's work as a file: which function does it, its configuration and its job, each with the type it had."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.strict import ConfigError, Strict, parse
from core.training.job import Job

DONE = ".done"
"""In a step's folder: its process has done all its work. What is missing is the folder's final name."""


class Typed(Strict):
    """A configuration that can be read back without knowing its type."""

    type: str
    """`package.module:Class`."""
    values: dict[str, Any]

    @classmethod
    def of(cls, config: Strict) -> Typed:
        """The configuration with its type's name. Defaults stay out: some keys may not be given at all."""
        kind = type(config)
        return cls(
            type=f"{kind.__module__}:{kind.__qualname__}",
            values=config.model_dump(mode="json", exclude_unset=True),
        )

    def read(self, where: str) -> Any:
        """The configuration. Raises ConfigError naming `where`."""
        kind: Any = load(self.type)
        return parse(kind, self.values, where)


class Task(Strict):
    """A call of `train(cfg, job)` that another process makes (chain/worker.py)."""

    train: str
    """`package.module:function`."""
    config: Typed
    job: Typed
    stage: str
    vllm: bool = False
    """Whether the process may import vLLM."""

    @classmethod
    def of(cls, train: str, config: Strict, job: Job, vllm: bool = False) -> Task:
        """The call `train(config, job)`."""
        return cls(train=train, config=Typed.of(config), job=Typed.of(job), stage=job.stage, vllm=vllm)

    def run(self) -> Path:
        """Make the call here."""
        return load(self.train)(self.config.read(self.stage), self.job.read("job"))


def load(import_string: str) -> Callable[..., Any]:
    """The object a `package.module:name` names. Raises ConfigError naming what is missing, and the remedy."""
    module_name, _, attribute = import_string.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{import_string}: {error}. The working directory is not searched: install the package "
            "(pip install -e .) or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{import_string}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)
