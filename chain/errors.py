"""Errors that are meant for the user: one clear line, from the runner and from its children alike."""

from __future__ import annotations

import os
import shutil
import traceback
from contextlib import suppress
from pathlib import Path

from core.files import read_json, write_json

OURS = ("chain", "core", "corpus", "recipes", "rewards", "rl", "sft")
ERROR = "error.json"
"""In a stage's folder: what ended its process, as the rank that failed first saw it."""
FULL_BYTES = 32 * 2**20
"""A disk with less room is full: the smallest checkpoint with optimizer states is larger."""
_ROOT = Path(__file__).resolve().parents[1]


def words_of(error: BaseException) -> str | None:
    """The message of an error that our code raised for the user; None for anything else, which is a bug.

    Our own classes always are. A ValueError or OSError is if one of our modules raised it itself.
    """
    if type(error).__module__.partition(".")[0] in OURS:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and any(Path(frames[-1].filename).is_relative_to(_ROOT / name) for name in OURS)
    return str(error) if isinstance(error, ValueError | OSError) and inside else None


def leave(error: BaseException, folder: Path) -> None:
    """Write down in `folder`, for the runner, what ends this process, unless another rank has."""
    words = words_of(error)
    text = words or " ".join(traceback.format_exception_only(error)[-1].split())
    # On a full disk nothing can be written; the runner finds that out by itself (`disk_is_full`).
    if not (folder / ERROR).exists():
        found = {"text": text, "bug": words is None, "rank": os.environ.get("RANK", "0")}
        with suppress(OSError):
            write_json(folder / ERROR, found)


def disk_is_full(folder: Path) -> str | None:
    """A line about the disk of `folder` if it is full: serializers name their own trouble then, not the disk."""
    free = shutil.disk_usage(folder).free
    if free >= FULL_BYTES:
        return None
    return f"{folder}: the disk is full ({free / 2**20:.0f} MiB are free); make room, or choose another --runs-dir"


def left(folder: Path) -> tuple[str, bool] | None:
    """The text of the error that a child left in `folder`, and whether it is a bug; None if there is no error."""
    if not (folder / ERROR).exists():
        return None
    found = read_json(folder / ERROR)
    return found["text"], found["bug"]
