"""`posttrain rewards test`: tests a reward on a data set's gold answers and on corrupted answers (rewards.selftest)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from core.strict import ConfigError
from rewards.adapters import check_columns
from rewards.example import Example
from rewards.mix import cell_of
from rewards.offline.rows import RowError, example_of_row, printable, read_lines
from rewards.offline.score import load
from rewards.selftest import Failure, chosen_rows, self_test

SHOWN = 10
"""Most lines about failures; there is one line per kind of completion."""
CLAIMS = {
    "answer": "gold answers score 1, empty and corrupted answers score 0",
    "form": "gold answers earn 1 and empty ones 0",
    "runs": "every completion gets a verdict",
    "skip": "gold answers earn 1 and empty ones 0",
}
"""Level of the reward (rewards.selftest) -> result of a test without failures."""


class SelfTestFailed(RuntimeError):
    """A reward gives wrong scores. The failures were printed."""


class Examples(Sequence[Example]):
    """Rows of a data set as examples, created on each access. `numbers` are their positions in the file."""

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

    def take(self, places: Sequence[int]) -> Examples:
        """The rows at these indices."""
        return Examples(
            [self.rows[place] for place in places],
            [self.numbers[place] for place in places],
            self._example_of,
            self._mode,
        )


def load_examples(data: str, split: str, rows: int | None, seed: int, mode: str | None) -> Examples:
    """A data set: JSONL with the fields of rewards.offline.rows, or records (Parquet file, folder or hub address).

    Raises ConfigError for a bad line or a missing file, RecordError for bad records.
    """
    if not data.endswith((".jsonl", ".json")):
        from core.model.prompts import shown
        from core.model.videos import Decoded

        records = _records(data, split, rows, seed)
        return Examples(records, records.numbers, lambda row: Example.of(row, Decoded(shown(row))), mode)
    path = Path(data)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
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
        # The set may have fewer rows than requested. Any other fault raises again here.
        return load_records(data, split)
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
    """The command. Raises SelfTestFailed if a score is wrong, and ConfigError if nothing was tested."""
    found = tested(name, data, params, rows=rows, seed=seed, mode=mode, split=split)
    for line in found.failures:
        print(f"{data}: {line}")
    if found.failures:
        raise SelfTestFailed(f"{name}: {found.summary}")
    print("\n".join(f"{name}: {line}" for line in found.claims))


class Tested(NamedTuple):
    """The result of a test."""

    failures: list[str]
    """A line for each kind of completion with wrong scores."""
    summary: str
    """The number of failures; "" without failures."""
    claims: list[str]
    """The claims that hold if nothing failed."""


def tested(
    name: str,
    data: str,
    params: Mapping[str, Any],
    *,
    rows: int | None,
    seed: int,
    mode: str | None,
    split: str,
) -> Tested:
    """The test of a reward on `rows` rows of a data set, drawn by the seed.

    Raises ConfigError if nothing was tested.
    """
    reward = load(name, params, [Path.cwd()])
    found = load_examples(data, split, rows, seed, mode)
    examples = found.take(chosen_rows(found, getattr(reward, "contract_of", None), rows, seed))
    try:
        check_columns(reward, name, examples)
        failures = self_test(reward, examples, None, seed, name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    failed = len({failure.row for failure in failures})
    summary = f"{len(failures)} failures on {failed} of {len(examples)} rows" if failures else ""
    lines = [*_by_case(failures, examples.numbers)]
    return Tested(lines, summary, [*_claims(getattr(reward, "self_test", "answer"), examples)])


def _by_case(failures: Sequence[Failure], numbers: Sequence[int]) -> Iterator[str]:
    """One line per kind of completion with wrong scores: the number of rows, and the first failure."""
    cases: dict[str, list[Failure]] = {}
    for failure in failures:
        cases.setdefault(failure.case, []).append(failure)
    for case, same in list(cases.items())[:SHOWN]:
        first = dataclasses.replace(same[0], row=numbers[same[0].row])
        yield printable(f"{case}: {_rows(len(same))}; the first: {first}", 2000)


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _claims(level: str, examples: Sequence[Example]) -> Iterator[str]:
    """The result of a test without failures, with the number of rows."""
    unruled = sum(cell_of(example)[1] == "judged" for example in examples) if level == "answer" else 0
    if unruled < len(examples):
        yield f"{_rows(len(examples) - unruled)}; {CLAIMS[level]}"
    if unruled:
        yield f"{_rows(unruled)} of verifier judge or none got a verdict; rules cannot check these rows"
