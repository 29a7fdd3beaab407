"""Converts values of other data sets to fields of a record: pictures, questions with placeholders, answers."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.model.pictures import Picture
from core.model.prompts import IMAGE, VIDEO
from core.model.videos import Clip
from corpus.hub import HubFolder
from corpus.schema import PLACEHOLDER, Problem, clip_of
from corpus.writing import frames_of

Root = Path | HubFolder
"""The folder of a source's pictures and videos."""
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
    """A text, or a finite number as text. Raises Rejected for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise Rejected(field, "must be a finite number or a text", value, "leave the row out, or write text")
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return str(int(value)) if whole else str(value)
    raise Rejected(field, "must be a text", value, "map another column, or write text")


def reply_text(value: Any, field: str) -> str:
    """The text of a reply. Raises Rejected for other values, and for a placeholder: a reply shows no pictures."""
    said = text(value, field)
    if mark := PLACEHOLDER.search(said):
        raise Rejected(
            field, "a reply holds a placeholder", mark[0], "leave the row out, or remove the placeholder"
        )
    return said


def pictures(value: Any, root: Root, field: str = "images") -> list[Picture]:
    """The pictures of a cell: one or a list of file names, data URLs, bytes, base64 or {"bytes", "path"}; [] for null.

    Files must lie below `root`; the network is never used. Raises Rejected.
    """
    return [_picture(one, root, field) for one in _each(value)]


def videos(value: Any, root: Root, field: str = "videos") -> list[Clip]:
    """The videos of a cell: one or a list of file names, names of folders of frames, lists of frames, bytes or
    {"bytes", "path"}; [] for null.

    Files must lie below `root`; the network is never used. Raises Rejected.
    """
    return [_video(one, root, field) for one in _each(value)]


def _each(value: Any) -> list[Any]:
    every = value if isinstance(value, list | tuple) else [value]
    return [one for one in every if one is not None and one != ""]


def _picture(value: Any, root: Root, field: str) -> Picture:
    value = _stored(value, field)
    if isinstance(value, bytes | Picture):
        return Picture.of(value)
    if value.startswith("data:"):
        head, _, data = value.partition(",")
        if not head.endswith(";base64"):
            raise Rejected(
                field, "a data URL must be in base64", value[:40], "write data:image/png;base64,..."
            )
        return _base64(data, field)
    if len(value) > 512 and "://" not in value:
        return _base64(value, field)
    file = _below(root, value, field)
    if not file.is_file():
        raise _missing(field, "the picture does not exist", value, root)
    return Picture(file.read_bytes)


def _video(value: Any, root: Root, field: str) -> Clip:
    if isinstance(value, list | tuple):
        return _frames([_picture(one, root, field) for one in value], value, field)
    value = _stored(value, field)
    if isinstance(value, bytes | Clip):
        return clip_of(value)
    path = _below(root, value, field)
    if path.is_dir():
        return _frames(frames_of(path), value, field)
    if not path.is_file():
        raise _missing(field, "the video does not exist", value, root)
    return Clip(path.read_bytes)


def _frames(pictures: Sequence[Picture], value: Any, field: str) -> Clip:
    if not pictures:
        raise Rejected(field, "a video has no frames", value, "give a file, or at least one frame")
    return Clip.of_frames(pictures)


def _missing(field: str, rule: str, name: str, root: Root) -> Rejected:
    """The problem of a file that is not below `root`."""
    remedy = f"searched below {root}; name the folder: --images"
    if isinstance(root, HubFolder) and (archives := root.archives()):
        names = ", ".join(archives[:3])
        remedy = f"it may be in an archive of {root} ({names}): unpack it, and name the folder: --images"
    return Rejected(field, rule, name, remedy)


def _stored(value: Any, field: str) -> Any:
    """The bytes, the text or the object in a cell."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if not isinstance(value, str | bytes | Picture | Clip):
        remedy = "give file names, data URLs or bytes"
        raise Rejected(field, "must be pictures or videos", value, remedy)
    return value


def _below(root: Root, name: str, field: str) -> Path:
    """The path of a file or folder below `root`; a file on the hub is downloaded. Raises Rejected."""
    if "://" in name and not name.startswith("file://"):
        remedy = "download it and give its file name"
        raise Rejected(field, "files are not fetched from the network", name, remedy)
    if isinstance(root, HubFolder):
        found = root.file(name)
        if found is None:
            raise _missing(field, "the file does not exist", name, root)
        return found
    path = (root / name.removeprefix("file://")).resolve()
    if not path.is_relative_to(root.resolve()):
        remedy = f"put the files below {root}, or name their folder: --images"
        raise Rejected(field, "a file lies outside the image folder", name, remedy)
    return path


def _base64(value: str, field: str) -> Picture:
    try:
        return Picture(base64.b64decode(value, validate=True))
    except binascii.Error as error:
        raise Rejected(field, "must be base64", f"{value[:40]}: {error}", "encode the file again") from None


class Asked(NamedTuple):
    """The text of a user's turn with its marks, and the number of its pictures and videos."""

    text: str
    images: int
    videos: int = 0


def questions(turns: Sequence[Asked]) -> list[str]:
    """The user's turns with `<image>` and `<video>` at the places of pictures and videos.

    Without marks, pictures and then videos come before the first turn; so marks that say the same are removed.
    Raises Rejected as `_marked`.
    """
    texts = [_marked(turn) for turn in turns]
    first = IMAGE * sum(turn.images for turn in turns) + VIDEO * sum(turn.videos for turn in turns)
    leading = re.match(rf"(?:(?:{IMAGE}|{VIDEO})\s*)*", texts[0])
    if leading and "".join(leading[0].split()) == first and texts[0][leading.end() :]:
        texts[0] = texts[0][leading.end() :]
    return texts


def _marked(turn: Asked) -> str:
    """A text with one mark for each picture and video. A text without marks of a kind gets them in front.

    Raises Rejected for marks of sounds, and for marks that do not fit the number of pictures or videos.
    """
    marks = [mark[0] for mark in PLACEHOLDER.finditer(turn.text)]
    for mark in marks:
        if "audio" in mark.casefold():
            raise Rejected("question", "sounds are not read", mark, "leave the row out")
    words, front = turn.text, ""
    for kind, ours, count in (("images", IMAGE, turn.images), ("videos", VIDEO, turn.videos)):
        own = [mark for mark in marks if ("video" in mark.casefold()) == (ours == VIDEO)]
        if not own:
            front += ours * count
            continue
        numbers = [int(found[0]) for mark in own if (found := _NUMBER.search(mark))]
        if numbers and numbers not in (list(range(1, count + 1)), list(range(count))):
            remedy = f"name each of the {kind} once, in order"
            raise Rejected("question", "numbered placeholders are out of order", numbers, remedy)
        if len(own) != count:
            counts = f"{len(own)} placeholders, {count} {kind}"
            remedy = "write one placeholder for each, or none"
            raise Rejected("question", f"placeholders and {kind} differ in number", counts, remedy)
        for mark in dict.fromkeys(own):
            words = words.replace(mark, ours)
    return front + words.strip()


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
