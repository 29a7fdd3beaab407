"""`posttrain rewards test`: a reward on a data set's gold answers and on corrupted ones (rewards.selftest)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from core.strict import ConfigError
from rewards.example import Example
from rewards.offline.rows import RowError, example_of_row, printable, read_lines
from rewards.offline.score import load
from rewards.selftest import Failure, self_test

SHOWN = 50
"""Failures that are printed."""


class SelfTestFailed(RuntimeError):
    """A reward does not earn what it should; the failures were printed."""


class Examples(Sequence[Example]):
    """Rows of a data set as a reward sees them, made when they are asked for; `numbers` is where they stand."""

    def __init__(
        self, rows: Sequence[Any], numbers: Sequence[int], example_of: Any, mode: str | None
    ) -> None:
        self.rows, self.numbers, self._example_of, self._mode = rows, numbers, example_of, mode

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        example = self._example_of(self.rows[index])
        return dataclasses.replace(example, mode=self._mode) if self._mode else example


def load_examples(data: str, split: str, rows: int | None, seed: int, mode: str | None) -> Examples:
    """A data set: JSONL with the fields of rewards.offline.rows, or records (Parquet file, folder or hub id).

    Raises ConfigError for a line that is no row or a missing file, RecordError for bad records.
    """
    if not data.endswith((".jsonl", ".json")):
        from core.model.pictures import Decoded

        records = _records(data, split, rows, seed)
        return Examples(records, records.numbers, lambda row: Example.of(row, Decoded(row["images"])), mode)
    path = Path(data)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    examples, numbers = [], []
    for line in read_lines(path):
        try:
            if line.row is None:
                raise RowError(line.problem)
            examples.append(example_of_row(line.row, line.number, path.parent, mode))
        except RowError as error:
            raise ConfigError(f"{path}: line {line.number}: {error}") from None
        numbers.append(line.number)
    return Examples(examples, numbers, lambda example: example, mode)


def _records(data: str, split: str, rows: int | None, seed: int) -> Any:
    from corpus.records import RecordError, load_records

    try:
        return load_records(data, split, rows=rows, seed=seed)
    except RecordError:
        if rows is None:
            raise
        return load_records(
            data, split
        )  # it may have fewer rows than asked for; if not that, this raises too
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None


def run(
    name: str,
    data: str,
    params: Mapping[str, Any],
    *,
    rows: int | None,
    seed: int,
    mode: str | None,
    split: str,
) -> None:
    """The command. Raises SelfTestFailed if anything did not earn what it should, ConfigError if nothing was tested."""
    reward = load(name, params, [Path.cwd()])
    examples = load_examples(data, split, rows, seed, mode)
    try:
        failures = self_test(reward, examples, rows, seed, name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for failure in failures[:SHOWN]:
        print(f"{data}: {_line(failure, examples.numbers)}")
    if len(failures) > SHOWN:
        print(f"... and {len(failures) - SHOWN} more")
    tested = len(examples) if rows is None else min(rows, len(examples))
    failed = len({failure.row for failure in failures})
    if failures:
        raise SelfTestFailed(f"{name}: {len(failures)} failures on {failed} of {tested} rows")
    print(f"{name}: {tested} rows; gold answers, empty and corrupted ones earn what they should")


def _line(failure: Failure, numbers: Sequence[int]) -> str:
    return printable(str(dataclasses.replace(failure, row=numbers[failure.row])), 2000)
