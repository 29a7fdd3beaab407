"""Errors that are meant for the user: one clear line, from the runner and from its children alike."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from core.files import read_json, write_json

OURS = ("chain", "core", "corpus", "recipes", "rewards", "rl", "sft")
ERROR = "error.json"
"""In a stage's folder: what ended its process, as the rank that failed first saw it."""
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
    if not (folder / ERROR).exists():
        write_json(folder / ERROR, {"text": text, "bug": words is None, "rank": os.environ.get("RANK", "0")})


def left(folder: Path) -> tuple[str, bool] | None:
    """The text of the error that a child left in `folder`, and whether it is a bug; None if there is no error."""
    if not (folder / ERROR).exists():
        return None
    found = read_json(folder / ERROR)
    return found["text"], found["bug"]
