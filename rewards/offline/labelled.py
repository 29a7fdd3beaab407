"""Completions with thoughts that people or a generator have labelled good or wrong.

Rows are records of corpus.records with meta["label"] (the completion is the response, or the chain and answer), or
JSONL lines `{"question", "completion", "label"}` with the optional fields of rewards.offline.rows. `mode` is "think" by
default, and `images` lie beside the file. A label is good, correct, true or 1, or bad, wrong, false or 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.model.prompts import shown, target_text
from core.model.videos import Decoded
from corpus.records import load_records
from rewards.example import Example
from rewards.offline.rows import EMPTY, Line, RowError, completion_of_row, example_of_row, read_lines

LABELS = {
    **dict.fromkeys(("good", "correct", "true", "1", "1.0"), True),
    **dict.fromkeys(("bad", "wrong", "false", "0", "0.0"), False),
}


class AuditError(ValueError):
    """The rows are unusable, or the judge did not answer. The message gives a remedy."""


@dataclass(frozen=True)
class Labelled:
    """A completion, and whether its thought is good."""

    completion: str
    example: Example
    good: bool


def load_labelled(path: Path, rows: int | None = None) -> list[Labelled]:
    """The labelled rows of a JSONL file, or of any source that corpus.records reads.

    Raises AuditError naming file and row for a row without a label, a question or a completion.
    """
    if path.suffix == ".jsonl":
        labelled = [_of_line(path, line) for line in read_lines(path) if line.problem != EMPTY][:rows]
    else:
        labelled = [
            _of_record(path, place, record) for place, record in enumerate(load_records(path, rows=rows))
        ]
    if not labelled:
        raise AuditError(f"{path}: the file has no rows")
    return labelled


def _of_line(path: Path, line: Line) -> Labelled:
    where, folder = f"{path}:{line.number}", path.resolve().parent
    try:
        if line.row is None:
            raise RowError(line.problem)
        example = example_of_row({"gold": "", **line.row, "kind": "none"}, line.number, folder, "think")
        if not example.question:
            raise RowError('no "question"')
        completion = completion_of_row(line.row, example)
    except RowError as error:
        raise AuditError(f"{where}: {error}") from None
    for name in line.row.get("images") or ():
        if not (folder / name).resolve().is_relative_to(folder):
            raise AuditError(f"{where}: image {name!r} lies outside {folder}; put it beside the file")
    try:
        example = replace(example, images=tuple(example.images))
    except (OSError, ValueError) as error:
        raise AuditError(f"{where}: images: {type(error).__name__}: {error}") from None
    return Labelled(completion, example, _label(line.row.get("label"), where, "label"))


def _of_record(path: Path, place: int, record: Mapping[str, Any]) -> Labelled:
    where = f"{path}: row {place} ({record['id']!r})"
    good = _label(record["meta"].get("label"), where, 'meta["label"]')
    try:
        completion = target_text(record)
    except ValueError as error:
        raise AuditError(f"{where}: {error}") from None
    return Labelled(completion, Example.of(record, Decoded(shown(record))), good)


def _label(value: Any, where: str, field: str) -> bool:
    word = str(value).strip().lower()
    if word not in LABELS:
        raise AuditError(f"{where}: {field}={value!r:.60}: it must be one of {', '.join(LABELS)}")
    return LABELS[word]
