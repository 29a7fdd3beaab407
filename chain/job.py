"""A stage's work as a file: the function to call, its configuration and its job, each stored with its type."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.strict import ConfigError, Strict, parse
from core.training.job import Job

DONE = ".done"
"""Marker in a step's folder: the process has finished its work, and the folder only needs its final name."""


class Typed(Strict):
    """A configuration stored with the name of its type, from which `read` restores it."""

    type: str
    """`package.module:Class`."""
    values: dict[str, Any]

    @classmethod
    def of(cls, config: Strict) -> Typed:
        """The configuration with its type's name. Defaults are not stored, because some keys must not be given."""
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


def load(import_string: str, folders: Sequence[Path] = ()) -> Callable[..., Any]:
    """Import the object that `package.module:name` names. Raises ConfigError naming the missing part and the remedy.

    `folders` are searched after all installed packages, so that they cannot shadow one.
    """
    module_name, _, attribute = import_string.partition(":")
    sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{import_string}: {error}. Searched: installed packages and "
            f"{', '.join(map(str, folders)) or 'no folder'}"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{import_string}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)
