"""Converts values of other data sets to fields of a record: pictures, questions with placeholders, answers."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.model.pictures import Picture
from core.model.prompts import IMAGE
from corpus.schema import PLACEHOLDER, Problem

_NUMBER = re.compile(r"\d+")
_BOX = re.compile(r"\\boxed\s*\{")
_ANSWER_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_WORDS = re.compile(
    r"(?:^|\b)(?:the\s+)?(?:final\s+)?answer(?:\s+is|:)\s*:?\s*(.+?)\s*\.?\s*$", re.IGNORECASE
)
_SHORT = 60
"""Most characters of an assistant's turn that counts as the gold answer as a whole."""


class Rejected(ValueError):
    """A row that does not fit its format; `problem` gives the field and the broken rule."""

    def __init__(self, field: str, rule: str, found: Any, remedy: str) -> None:
        self.problem = Problem(field, rule, f"{found!r:.120}", remedy)
        super().__init__(str(self.problem))


def text(value: Any, field: str) -> str:
    """A text, or a number as text. Raises Rejected for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else str(value)
    raise Rejected(field, "must be a text", value, "map another column, or write text")


def pictures(value: Any, root: Path, field: str = "images") -> list[Picture]:
    """The pictures of a cell: one or a list of file names, data URLs, bytes, base64 or {"bytes", "path"}; [] for null.

    Files must lie below `root`; the network is never used. Raises Rejected.
    """
    if value is None or value == "":
        return []
    every = value if isinstance(value, list | tuple) else [value]
    return [_picture(one, root, field) for one in every if one is not None]


def _picture(value: Any, root: Path, field: str) -> Picture:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes | Picture):
        return Picture.of(value)
    if not isinstance(value, str):
        remedy = "give file names, data URLs or bytes"
        raise Rejected(field, "must be pictures", value, remedy)
    if value.startswith("data:"):
        return _base64(value.partition("base64,")[2], field)
    if "://" in value and not value.startswith("file://"):
        raise Rejected(
            field, "pictures are not fetched from the network", value, "download it and give its file name"
        )
    if len(value) > 512:
        return _base64(value, field)
    file = (root / value.removeprefix("file://")).resolve()
    if not file.is_relative_to(root.resolve()):
        remedy = f"put the pictures below {root}, or name their folder: --images"
        raise Rejected(field, "a picture lies outside the image folder", value, remedy)
    if not file.is_file():
        raise Rejected(
            field, "the picture does not exist", value, f"searched below {root}; name the folder: --images"
        )
    return Picture(file.read_bytes)


def _base64(value: str, field: str) -> Picture:
    try:
        return Picture(base64.b64decode(value, validate=True))
    except binascii.Error as error:
        raise Rejected(field, "must be base64", f"{value[:40]}: {error}", "encode the file again") from None


def questions(turns: Sequence[tuple[str, int]]) -> list[str]:
    """The user's turns with `<image>` at the place of each picture, or without marks if all pictures come first.

    Args:
        turns: the text of each turn, and the number of its pictures.

    Raises Rejected as `_marked`.
    """
    texts = [_marked(words, images) for words, images in turns]
    every = sum(images for _, images in turns)
    leading = re.match(rf"(?:{IMAGE}\s*)*", texts[0])
    # Without marks, pictures come before the first turn's text.
    if leading and leading[0].count(IMAGE) == every and texts[0][leading.end() :]:
        texts[0] = texts[0][leading.end() :]
    return texts


def _marked(words: str, images: int) -> str:
    """A text with one `<image>` per picture. Text without marks gets them in front.

    Raises Rejected for marks of videos and sounds, and for marks that do not fit the number of pictures.
    """
    marks = [mark[0] for mark in PLACEHOLDER.finditer(words)]
    for mark in marks:
        if re.search("video|audio", mark, re.IGNORECASE):
            raise Rejected("question", "videos and sounds are not read", mark, "leave the row out")
    if not marks:
        return IMAGE * images + words.strip()
    numbers = [int(found[0]) for mark in marks if (found := _NUMBER.search(mark))]
    if numbers and numbers not in (list(range(1, images + 1)), list(range(images))):
        remedy = "name each picture once, in order"
        raise Rejected("question", "numbered placeholders are out of order", numbers, remedy)
    if len(marks) != images:
        counts = f"{len(marks)} placeholders, {images} pictures"
        remedy = "write one placeholder for each picture, or none"
        raise Rejected("question", "placeholders and pictures differ in number", counts, remedy)
    return PLACEHOLDER.sub(IMAGE, words).strip()


def gold_of(reply: str) -> str:
    r"""The gold answer at the end of an assistant's turn; "" for a longer text without one.

    >>> gold_of(r"So \boxed{\frac{1}{2}}."), gold_of("The answer is: B."), gold_of("A red bus."), gold_of("x" * 99)
    ('\\frac{1}{2}', 'B', 'A red bus.', '')
    """
    boxes = list(_BOX.finditer(reply))
    if boxes:
        return _braced(reply, boxes[-1].end())
    if tag := _ANSWER_TAG.search(reply):
        return tag[1]
    last = reply.strip().rsplit("\n", 1)[-1]
    if said := _ANSWER_WORDS.search(last):
        return said[1]
    return reply.strip() if len(reply.strip()) <= _SHORT and "\n" not in reply.strip() else ""


def _braced(reply: str, start: int) -> str:
    depth = 1
    for at in range(start, len(reply)):
        depth += {"{": 1, "}": -1}.get(reply[at], 0)
        if not depth:
            return reply[start:at].strip()
    return ""


def named(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first name for which the row has a value; None if there is none."""
    return next((name for name in names if row.get(name) not in (None, "", [])), None)
