"""Rows of untrusted JSONL files. A line that is not an object gets an error, and the other lines are still read.

A row of stored completions, as `posttrain score` reads it:

| field | value |
|---|---|
| completion | str, the model's text |
| gold (or answer) | str, the gold answer |
| prompt (or question) | str, optional; the text without images |
| kind (or verifier) | one of rewards.answer.KINDS, optional: how the answer is compared |
| mode | think or direct, optional; else `--mode`; else think if the prompt or the completion holds a think tag |
| id | optional; else line-<number> |
| meta | object, optional: answers, choices |
| images | paths, optional, relative to the file's folder; opened when a reward accesses them |
| chain, source | str, optional |

A prompt that ends in <think> has opened the thought, so its completion is read as if it began with that tag.
completions.jsonl of an RL stage has these fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from core.strict import nearest
from rewards.answer import KINDS
from rewards.example import MODES, Example
from rewards.extract import CLOSE, OPEN

MAX_LINE_BYTES = 64 << 20
"""Longer lines are refused."""
EMPTY = "an empty line"
"""The problem of a line without text."""
DEFAULT_KIND = "auto"


class RowError(ValueError):
    """A line is not a valid row. The message gives the reason."""


@dataclass(frozen=True)
class Line:
    """One line of a file."""

    number: int
    """From 1."""
    size: int
    """Bytes."""
    row: dict[str, Any] | None
    """None if the line is not a JSON object."""
    problem: str = ""
    """Why not."""


def read_lines(path: Path) -> Iterator[Line]:
    """Every line of a file, with blank lines. Holds one line in memory at a time."""
    group: tuple[Any, ...] = ()
    meta: Any = None
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            size = len(line)
            while not line.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                size += len(rest)
                line = rest[-1:]
            if size > MAX_LINE_BYTES:
                yield Line(number, size, None, f"longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            try:
                row = parse_object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            except RowError as error:
                yield Line(number, size, None, str(error))
                continue
            # An RL stage writes a row's meta with the first of its completions (rl.record).
            own = row.get("batch"), row.get("id")
            if "meta" in row:
                group, meta = own, row["meta"]
            elif None not in own and own == group:
                row["meta"] = meta
            yield Line(number, size, row)


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line as a JSON object. Raises RowError for any other value, for NaN, and for numbers out of range."""
    if not line.strip():
        raise RowError(EMPTY)
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise RowError("not usable JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of more digits than Python reads
        raise RowError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"a JSON {_json_type(value)}, not an object")
    return value


def example_of_row(row: Mapping[str, Any], number: int, folder: Path, mode: str | None = None) -> Example:
    """The row as an example; `mode` applies to rows without a mode. Raises RowError."""
    gold = _text(row, "gold", "answer")
    if gold is None:
        raise RowError('no "gold": the gold answer is missing')
    prompt = _text(row, "prompt", "question") or ""
    kind = _known(row, ("kind", "verifier"), KINDS) or DEFAULT_KIND
    identity = row.get("id")
    if not isinstance(identity, str | int | None):
        raise RowError(f'"id" is a JSON {_json_type(identity)}: write text')
    return Example(
        id=f"line-{number}" if identity is None else str(identity),
        question=prompt,
        answer=gold,
        mode=mode_of_row(row, mode)[0],
        verifier=kind,
        images=cast(Any, Pictures(_paths(row), folder)),
        chain=_text(row, "chain"),
        source=_text(row, "source") or "",
        meta=_meta(row),
    )


def mode_of_row(row: Mapping[str, Any], mode: str | None = None) -> tuple[str, str]:
    """The mode of a row, and its source: "its own", "--mode", or "its tags". Raises RowError.

    >>> mode_of_row({"completion": "4"}), mode_of_row({"mode": "think", "completion": "4"}, "direct")
    (('direct', 'its tags'), ('think', 'its own'))
    """
    named = _known(row, ("mode",), MODES)
    if named:
        return named, "its own"
    if mode:
        return mode, "--mode"
    prompt = _text(row, "prompt", "question") or ""
    tagged = OPEN in prompt or any(tag in str(row.get("completion")) for tag in (OPEN, CLOSE))
    return "think" if tagged else "direct", "its tags"


def completion_of_row(row: Mapping[str, Any], example: Example) -> str:
    """The completion, with the opening think tag if the prompt ends in that tag. Raises RowError."""
    completion = _text(row, "completion")
    if completion is None:
        raise RowError('no "completion"')
    opened = example.mode == "think" and example.question.rstrip().endswith(OPEN)
    return OPEN + completion if opened else completion


class Pictures(Sequence[Any]):
    """Pictures by path, opened on access. Most rewards do not use pictures."""

    def __init__(self, paths: Sequence[str], folder: Path) -> None:
        self.paths, self.folder = paths, folder

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        from core.model.pictures import Picture

        if isinstance(index, slice):
            return Pictures(self.paths[index], self.folder)
        return Picture((self.folder / self.paths[index]).read_bytes()).rgb()


def printable(text: str, chars: int = 80) -> str:
    """A text for the terminal: one shortened line without control characters and unprintable characters."""
    cut = text if len(text) <= chars else f"{text[: chars - 1]}…"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


def _text(row: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        value = row.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise RowError(f'"{name}" is a JSON {_json_type(value)}: write text')
            return value
    return None


def _known(row: Mapping[str, Any], names: Sequence[str], known: Sequence[str]) -> str | None:
    value = _text(row, *names)
    if value is not None and value not in known:
        raise RowError(f'"{names[0]}" is {value!r:.80}; {nearest(value[:80], known)}')
    return value


def _paths(row: Mapping[str, Any]) -> list[str]:
    paths = row.get("images") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise RowError('"images" is not a list of paths')
    return paths


def _meta(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row.get("meta")
    if isinstance(meta, str):
        meta = parse_object(meta.encode("utf-8", "surrogatepass")) if meta.strip() else {}
    if not isinstance(meta, dict | None):
        raise RowError(f'"meta" is a JSON {_json_type(meta)}, not an object')
    return meta or {}


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
