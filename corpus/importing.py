"""Converts foreign files to one Parquet file of records; rows that do not fit go to a list of rejected rows."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from core.files import fsync
from core.strict import ConfigError
from corpus.formats.fields import Rejected
from corpus.formats.files import files_of, root_of, rows_of
from corpus.formats.gold import kind_of
from corpus.formats.table import Format, Options, known, recognised
from corpus.reading import SCAN_ROWS, check_all
from corpus.schema import Problem, Record, RecordError, completed
from corpus.writing import RecordFile

_LOOK = 20
"""Number of first rows from which a format is recognised."""


@dataclass
class Summary:
    """The result of an import."""

    format: str
    mapping: Mapping[str, str]
    """Field of a record -> the part of a row that it comes from."""
    read: int = 0
    written: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Broken rule -> number of rejected rows."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Kind of gold answer (number, choice, expression, text, none) -> number of records."""
    animated: int = 0
    first: list[Record] = field(default_factory=list)
    """The first three records."""


def import_set(
    source: str | Path,
    destination: Path,
    *,
    format_: str = "auto",
    options: Options | None = None,
    split: str = "train",
    rows: int | None = None,
    strict: bool = False,
) -> Summary:
    """Write the rows of a file or folder as records to `destination`, a Parquet file, whole or not at all.

    Rejected rows go to `<destination>.rejected.jsonl` with file, row (from 0), field, rule, found value and remedy.
    Memory holds some hundred rows, and the pictures of a VLMEvalKit TSV.

    Args:
        source: a .json, .jsonl, .csv, .tsv, .parquet or .tar file, a folder of one kind of them, or a data set on the
            hub (text: `hf://datasets/owner/name[@revision][/folder]`).
        destination: ends in .parquet.
        format_: name of a format (corpus.formats.table), or "auto".
        options: the folder of the pictures (default: the source's folder), columns, system messages, turns.
        split: split of a data set on the hub.
        rows: read at most this many first rows.
        strict: stop at the first row that does not fit.

    Raises ConfigError for files that cannot be read; RecordError if no row fits, or with `strict` if any does not.
    """
    if destination.suffix != ".parquet":
        raise ConfigError(
            f"{destination}: records are written as Parquet; name it {destination.name}.parquet"
        )
    files = files_of(source, split)
    options = options or Options(root=root_of(source, files))
    look = _first(files[0])
    name = recognised(look, files[0]) if format_ == "auto" else format_
    chosen = known(name)
    summary, convert = (
        Summary(name, _mapping(look, chosen, options, f"{files[0]}: as {name}")),
        chosen.converter(options),
    )
    every = ((file, number, row) for file in files for number, row in rows_of(file))
    numbered = islice(every, rows)
    notes = destination.with_suffix(".rejected.jsonl")
    draft = notes.with_name(f".{notes.name}.{os.getpid()}")
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        with RecordFile(destination) as out, draft.open("w", encoding="utf-8") as rejected:
            writer = _Writer(summary, out, rejected, strict, destination.stem)
            while part := list(islice(numbered, SCAN_ROWS)):
                writer.add([(file, number, list(_converted(row, convert))) for file, number, row in part])
            rejected.flush()
            fsync(draft)
            draft.replace(notes)
            if not summary.written:
                counts = ", ".join(f"{count} x {rule}" for rule, count in summary.rejected.most_common())
                raise RecordError(f"{source}: no row fits the format {name}: {counts}; each row: {notes}")
    finally:
        draft.unlink(missing_ok=True)
    return summary


def _first(file: Path) -> list[dict[str, Any]]:
    """The first rows of a file that can be read. Raises ConfigError if there are rows, and none of them can."""
    first = [row for _, row in islice(rows_of(file), _LOOK)]
    found = [row for row in first if isinstance(row, dict)]
    if first and not found:
        raise ConfigError(f"{file}: none of its first {len(first)} rows can be read; row 0: {first[0]}")
    return found


def _mapping(
    look: Sequence[dict[str, Any]], chosen: Format, options: Options, where: str
) -> Mapping[str, str]:
    """The mapping of the first row that has one, because a row may lack a value. Raises ConfigError if none has."""
    problem: Rejected | None = None
    for row in look:
        try:
            return chosen.mapping(row, options)
        except Rejected as error:
            problem = problem or error
    if problem:
        raise ConfigError(f"{where}: {problem}")
    return {}


def _converted(row: Any, convert: Any) -> Iterator[Record | Problem]:
    if isinstance(row, Rejected):
        yield row.problem
        return
    try:
        yield from convert(row)
    except Rejected as error:
        yield error.problem


class _Writer:
    """Checks converted rows, writes the good ones and records the others as rejected."""

    def __init__(self, summary: Summary, out: RecordFile, rejected: IO[str], strict: bool, name: str) -> None:
        self.summary, self.out, self.rejected, self.strict, self.name = summary, out, rejected, strict, name
        self.made, self.made_ids, self.seen = 0, list[str](), set[str]()

    def add(self, rows: list[tuple[Path, int, list[Record | Problem]]]) -> None:
        """Take some rows of the source, each as its records or problems."""
        every = [(file, number, one) for file, number, made in rows for one in made]
        self.summary.read += len(rows)
        bad = [(at, one) for at, (_, _, one) in enumerate(every) if isinstance(one, Problem)]
        records = {
            at: self._finished(one) for at, (_, _, one) in enumerate(every) if not isinstance(one, Problem)
        }
        found = check_all(list(records.items()), self.seen)
        self.seen.difference_update(self.made_ids)  # generated ids are unique; given ids are all compared
        self.made_ids.clear()
        for at, problem in sorted([*bad, *found.bad]):
            self._reject(*every[at][:2], problem)
        good = [records[at] for at in found.good]
        self.out.add(good)
        self.summary.written += len(good)
        self.summary.animated += found.animated
        self.summary.first += good[: 3 - len(self.summary.first)]
        self.summary.kinds.update(kind_of(row["answer"], row["verifier"] == "choice")[0] for row in good)

    def _finished(self, made: Record) -> Record:
        """The record with an id, and with the verifier for its gold answer."""
        options = made.pop("options", False)
        record = completed(made)
        self.made += 1
        if record["id"] is None:
            self.made_ids.append(f"{self.name}-{self.made - 1}")
            record["id"] = self.made_ids[-1]
        if record["verifier"] is None:
            record["verifier"] = kind_of(record["answer"], options)[1]
        return record

    def _reject(self, file: Path, number: int, problem: Problem) -> None:
        if self.strict:
            raise RecordError(f"{file}: row {number}: {problem}")
        self.summary.rejected[f"{problem.field}: {problem.rule}"] += 1
        line = {"file": str(file), "row": number, **problem._asdict()}
        self.rejected.write(json.dumps(line, ensure_ascii=True) + "\n")
