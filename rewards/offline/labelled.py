"""Completions with thoughts that people or a generator have labelled good or wrong.

Rows are records of corpus.records with meta["label"] (the completion is the response, or the chain and answer), or
JSONL lines `{"question", "completion", "label"}`, optionally with `id`, `gold`, `mode` ("think" by default) and
`images` (paths beside the file). A label is good, correct, true or 1, or bad, wrong, false or 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.model.prompts import shown, target_text
from core.model.videos import Decoded
from corpus.records import load_records
from rewards.example import Example

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
        labelled = [_of_line(path, number, line) for number, line in _lines(path)][:rows]
    else:
        labelled = [
            _of_record(path, place, record) for place, record in enumerate(load_records(path, rows=rows))
        ]
    if not labelled:
        raise AuditError(f"{path}: the file has no rows")
    return labelled


def _lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    lines: list[tuple[int, Mapping[str, Any]]] = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise AuditError(f"{path}:{number}: not a JSON line ({error})") from None
            if not isinstance(line, dict):
                raise AuditError(
                    f"{path}:{number}: a line must be an object with question, completion and label"
                )
            lines.append((number, line))
    return lines


def _of_line(path: Path, number: int, line: Mapping[str, Any]) -> Labelled:
    where = f"{path}:{number}"
    for name in ("question", "completion"):
        if not isinstance(line.get(name), str):
            raise AuditError(f"{where}: {name}={line.get(name)!r:.60}: it must be text")
    images = line.get("images") or []
    if not isinstance(images, list):
        raise AuditError(f"{where}: images={images!r:.60}: it must be a list of paths")
    mode = line.get("mode", "think")
    if mode not in ("think", "direct"):
        raise AuditError(f'{where}: mode={mode!r}: it must be "think" or "direct"')
    example = Example(
        id=str(line.get("id", number)),
        question=line["question"],
        answer=str(line.get("gold", "")),
        mode=mode,
        verifier="none",
        images=tuple(_image(path, image, where) for image in images),
    )
    return Labelled(line["completion"], example, _label(line.get("label"), where, "label"))


def _image(path: Path, name: Any, where: str) -> Any:
    """The picture at a path relative to the file's folder. Paths that leave this folder are refused."""
    from core.model.pictures import Picture

    folder = path.resolve().parent
    file = (folder / str(name)).resolve()
    if not file.is_relative_to(folder):
        raise AuditError(f"{where}: image {name!r} lies outside {folder}; put it beside the file")
    try:
        return Picture(file.read_bytes()).rgb()
    except (OSError, ValueError) as error:
        raise AuditError(f"{where}: image {name!r}: {type(error).__name__}: {error}") from None


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
