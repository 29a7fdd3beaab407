"""Error messages for the user: one clear line, both from the runner and from its child processes."""

from __future__ import annotations

import os
import shutil
import traceback
from contextlib import suppress
from pathlib import Path

from core.files import read_json, write_json
from sailvl2_posttrain.names import PACKAGES, ROOT

ERROR = "error.json"
"""File in a stage's folder: the error of the rank that failed first."""
FULL_BYTES = 32 * 2**20
"""A disk with less free space counts as full. The smallest checkpoint with optimizer states is larger."""


def words_of(error: BaseException) -> str | None:
    """The message of an error that our code raised for the user; None for any other error, which is a bug.

    Our own exception classes are for the user. A ValueError or OSError is for the user if one of our modules raised it.
    """
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and any(Path(frames[-1].filename).is_relative_to(ROOT / name) for name in PACKAGES)
    return str(error) if isinstance(error, ValueError | OSError) and inside else None


def leave(error: BaseException, folder: Path) -> None:
    """Write the error that ends this process to `folder` for the runner, unless another rank has written one."""
    words = words_of(error)
    text = words or " ".join(traceback.format_exception_only(error)[-1].split())
    # Writing fails on a full disk. The runner detects a full disk itself (`disk_is_full`).
    if not (folder / ERROR).exists():
        found = {"text": text, "bug": words is None, "rank": os.environ.get("RANK", "0")}
        with suppress(OSError):
            write_json(folder / ERROR, found)


def disk_is_full(folder: Path) -> str | None:
    """A message if the disk of `folder` is full, else None. On a full disk, serializers raise misleading errors."""
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
