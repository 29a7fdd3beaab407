"""Records from Parquet files and hub data sets: checked at the start, read from disk when indexed.

A bad row stops the load with its file, row number (from 0), field, rule and remedy. With on_bad="drop" it is dropped
instead, counted by rule and logged. No row is dropped silently.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.model.pictures import Picture
from core.model.videos import Caps, Clip
from corpus.hub import address_hint, hub_set
from corpus.parquet import check_columns, check_file, features, rows_at_once
from corpus.schema import (
    JSON_FIELDS,
    MEDIA,
    DataSource,
    OnBad,
    Problem,
    Record,
    RecordError,
    clip_of,
    completed,
    json_of,
    picture_of,
    problem_of,
)

log = logging.getLogger(__name__)

SCAN_ROWS = 256
_SHOWN_PROBLEMS = 5


class Records(Sequence[Record]):
    """Checked records. Text is read when a record is indexed, a picture when it is used.

    `dropped` counts the dropped rows by the rule they broke ({} unless on_bad="drop"). `animated` is the number of rows
    with an animated picture, of which the model sees the first frame.
    """

    def __init__(self, table: Table, found: Scan, strip_system: bool = False) -> None:
        self._table, self._scan, self._indices, self._strip = table, found, sorted(found.good), strip_system
        self.dropped = dict(Counter(f"{problem.field}: {problem.rule}" for _, problem in found.bad))
        self.animated = found.animated

    def place(self, index: int) -> str:
        """The origin of a record for messages: its file and its row there, from 0."""
        return self._table.place(self._indices[index])

    def only(self, kept: Sequence[int]) -> Records:
        """The records with these indices."""
        found = self._scan._replace(good=[self._indices[index] for index in kept])
        return Records(self._table, found, self._strip)

    @property
    def numbers(self) -> Sequence[int]:
        """Each record's row number in the file, from 0."""
        return self._indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(row) for row in self._indices[index]]
        return self._row(self._indices[index])

    def __iter__(self) -> Iterator[Record]:
        return (self._row(row) for row in self._indices)

    def _row(self, number: int) -> Record:
        (record,) = self._table.records([number])
        media = {
            "images": [picture_of(image) for image in record["images"]],
            "videos": [clip_of(video, self._table.caps) for video in record["videos"]],
        }
        parsed = {name: json_of(record[name]) for name in JSON_FIELDS}
        return {**record, **media, **parsed, **({"system": None} if self._strip else {})}


def load_records(
    source: str | Path,
    split: str = "train",
    rows: int | None = None,
    seed: int | None = None,
    on_bad: OnBad = "raise",
    system: Literal["keep", "strip"] = "keep",
    caps: Caps = Caps(),  # noqa: B008
) -> Records:
    """The records of a Parquet file, a folder of Parquet files, or a dataset on the hub.

    Args:
        source: path, or address on the hub (hf://datasets/owner/name). In a folder the files `<split>*.parquet` are
            read; without any, all files for "train".
        split: split of the set.
        rows: number of rows: the first ones, or with a seed a random draw in the file's order.
        seed: seed of the draw.
        on_bad: "raise" stops at bad rows; "drop" drops them and counts them in `Records.dropped`.
        system: "strip" removes the rows' system messages.
        caps: the most frames that are sampled from a video.

    Raises RecordError for bad rows, unknown columns, or fewer good rows than requested; FileNotFoundError if `source`
    does not exist.
    """
    table = _open(str(source), split, caps)
    order: Sequence[int] = range(len(table))
    if rows is not None and seed is not None:
        order = _shuffled(len(table), seed)
    found = _scan(table, order, rows)
    if found.bad and on_bad == "raise":
        raise RecordError(report(found.bad, table.place))
    records = Records(table, found, system == "strip")
    if found.bad:
        log.warning("%s: dropped %d rows: %s", source, len(found.bad), records.dropped)
    if records.animated:
        log.warning("%s: %d rows have an animation; the model sees its first frame", source, records.animated)
    if rows is not None and len(records) < rows:
        raise RecordError(
            f"{source}: rows={rows} were requested, but it has {len(records)} usable rows "
            f"({len(table)} rows, {len(found.bad)} dropped); ask for fewer or bring more data"
        )
    if not records:
        raise RecordError(f"{source}: split {split!r} has no usable rows")
    return records


def load_source(
    source: DataSource, sets: Mapping[str, str | Path], seed: int | None, on_bad: OnBad = "raise"
) -> Records:
    """The rows that a stage takes of a named set, see `load_records`."""
    caps = Caps(source.frames, source.fps)
    return load_records(sets[source.set], source.split, source.rows, seed, on_bad, source.system, caps)


class Scan(NamedTuple):
    """The result of checking rows."""

    good: list[int]
    """Their numbers."""
    bad: list[tuple[int, Problem]]
    animated: int
    """Number of good rows with an animated picture."""


def check_all(rows: Sequence[tuple[int, Record]], seen: set[str]) -> Scan:
    """Splits numbered rows into good ones and problems; `seen` collects ids across calls."""
    found = Scan([], [], 0)
    # Decoding pictures is most of the work and releases the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(problem_of, (record for _, record in rows)))
    animated = 0
    for (number, record), problem in zip(rows, problems, strict=True):
        if problem is None and record["id"] in seen:
            problem = Problem("id", "must be unique", repr(record["id"]), "rename one of the two rows")
        if problem:
            found.bad.append((number, problem))
            continue
        seen.add(record["id"])
        found.good.append(number)
        animated += any(getattr(image, "animated", False) for image in record["images"])
    return found._replace(animated=animated)


def report(bad: Sequence[tuple[int, Problem]], place: Callable[[int], str]) -> str:
    """A message with the first problems and their places, and the number of bad rows by rule."""
    lines = [f"{place(number)}: {problem}" for number, problem in bad[:_SHOWN_PROBLEMS]]
    if len(bad) > _SHOWN_PROBLEMS:
        counts = Counter(f"{problem.field}: {problem.rule}" for _, problem in bad)
        lines.append(f"... and {len(bad) - _SHOWN_PROBLEMS} more bad rows; all of them: {dict(counts)}")
    return "\n".join(lines)


class Table:
    """Memory-mapped rows on disk. Texts are read by row number, pictures and videos when they are used."""

    def __init__(self, dataset: Any, locate: Callable[[int], tuple[str, int]], caps: Caps) -> None:
        self.column_names, self._locate, self.caps = dataset.column_names, locate, caps
        arrow = dataset.with_format("arrow")
        self._texts = arrow.select_columns([name for name in self.column_names if name not in MEDIA])
        self._media = {name: arrow.select_columns([name]) for name in MEDIA if name in self.column_names}

    def __len__(self) -> int:
        return len(self._texts)

    def place(self, number: int) -> str:
        """The row's file and its number there, for messages."""
        file, row = self._locate(number)
        return f"{file}: row {row}"

    def records(self, numbers: Sequence[int]) -> list[Record]:
        """The rows with these numbers, unchecked."""
        texts = self._texts[list(numbers)].to_pylist()
        rows = zip(numbers, texts, strict=True)
        return [
            completed({**text, **{name: self._files(name, number) for name in self._media}})
            for number, text in rows
        ]

    def _files(self, name: str, number: int) -> list[Any]:
        cell = self._media[name][number][name][0]
        count = len(cell) if cell.is_valid and hasattr(cell, "values") else None
        if count is None:  # not a list: the check of the row reports it
            return cell.as_py() or []
        reads = [partial(self._bytes, name, number, place) for place in range(count)]
        return [Picture(read) if name == "images" else Clip(read, self.caps) for read in reads]

    def _bytes(self, name: str, number: int, place: int) -> bytes:
        stored = self._media[name][number][name][0][place].as_py()
        return picture_of(stored).data if name == "images" else clip_of(stored).data


def _scan(table: Table, order: Sequence[int], wanted: int | None) -> Scan:
    """Check rows in the given order until `wanted` are good."""
    found, seen = Scan([], [], 0), set[str]()
    goal, looked_at = len(order) if wanted is None else wanted, 0
    while looked_at < len(order) and len(found.good) < goal:
        numbers = list(order[looked_at : looked_at + min(SCAN_ROWS, goal - len(found.good))])
        looked_at += len(numbers)
        part = check_all(list(zip(numbers, table.records(numbers), strict=True)), seen)
        found = Scan(found.good + part.good, found.bad + part.bad, found.animated + part.animated)
    return found


def _open(source: str, split: str, caps: Caps) -> Table:
    """The rows of a source. Raises as `load_records`."""
    import datasets
    import pyarrow

    path = Path(source)
    if path.exists():
        files = _files(path, split)
        for file in files:
            check_file(file)
        dataset = _quietly(
            lambda: datasets.load_dataset(
                "parquet",
                data_files={split: [str(file) for file in files]},
                split=split,
                features=features(),
                batch_size=rows_at_once(files),
            ),
            f"{source}: not readable as Parquet; convert other formats: posttrain data import",
        )
        pyarrow.default_memory_pool().release_unused()  # used by the conversion; the rows are on disk now
        return Table(dataset, _locator(files), caps)
    address = hub_set(source)
    if address is None:
        raise FileNotFoundError(f"{source}: there is no such file or folder{address_hint(source)}")
    dataset = _quietly(
        lambda: datasets.load_dataset(
            address.repo, revision=address.revision, data_dir=address.folder or None, split=split
        ),
        f"{source}: no file or folder here, and the hub does not serve split {split!r} of it",
    )
    check_columns(dataset.column_names, source)
    return Table(dataset, lambda row: (f"{source}[{split}]", row), caps)


def _quietly(load: Callable[[], Any], complaint: str) -> Any:
    """The result of `load`, without progress bars in the log; a failure is raised with the complaint in front."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        return load()
    except Exception as error:  # datasets wraps errors of Arrow, the network and the hub in its own types
        cause = error.__cause__ or error
        raise RecordError(f"{complaint} ({type(cause).__name__}: {cause})") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    every = sorted(path.glob("*.parquet"))
    named = [file for file in every if re.match(rf"{re.escape(split)}([-.]|$)", file.stem)]
    files = named or (every if split == "train" else [])
    if not files:
        there = ", ".join(file.name for file in every) or "no Parquet file"
        raise FileNotFoundError(f"{path}: no file for split {split!r} ({there}); name it {split}.parquet")
    return files


def _locator(files: Sequence[Path]) -> Callable[[int], tuple[str, int]]:
    import pyarrow.parquet as pq

    def locate(row: int) -> tuple[str, int]:
        for file in files:
            count = pq.read_metadata(file).num_rows
            if row < count:
                return str(file), row
            row -= count
        raise IndexError(row)

    return locate


def _shuffled(count: int, seed: int) -> list[int]:
    import random

    return random.Random(seed).sample(range(count), count)
