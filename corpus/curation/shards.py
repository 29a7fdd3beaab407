"""Shards: runs of row groups of Parquet files. Texts go from step to step in small files; media stay at the source.

A step's file for one shard has a row for each row that the step received: `row` (its number in the shard), the texts,
the pictures' hashes, and `reason` and `detail` if the step dropped it. The next step reads the rows without a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.model.pictures import Picture
from core.model.videos import Caps, Clip, sampled
from corpus.curation.base import Dropped, Outcome
from corpus.curation.similar import HASH_PX, picture_hashes, reduced
from corpus.parquet import check_file
from corpus.schema import (
    FIELDS,
    JSON_FIELDS,
    MEDIA,
    TEXTS,
    Record,
    clip_of,
    completed,
    json_of,
    picture_of,
    problem_of,
)

if TYPE_CHECKING:
    import numpy as np

SHARD_BYTES = 64 << 20
"""A shard ends when its row groups have this many uncompressed bytes; a single group may be larger."""
_HASHED_FRAMES = Caps(frames=3)
"""Of a video's sampled frames, those whose hashes are compared."""
HASHES, ROW, REASON, DETAIL = "hashes", "row", "reason", "detail"


class Shard(NamedTuple):
    """Some row groups of one file of one set."""

    set: str
    file: str
    first: int
    """The first row group."""
    groups: int
    rows: int
    prefix: str = ""
    """Put before each id, so that ids of several sets differ."""


def shards_of(name: str, files: Sequence[Path], rows: int, prefix: str = "") -> Iterator[Shard]:
    """The files' row groups in order, in shards of at least `rows` rows or SHARD_BYTES bytes where a file has them.

    Raises RecordError for a file that is not Parquet or does not have the columns of records.
    """
    import pyarrow.parquet as pq

    for file in files:
        check_file(file)
        metadata = pq.read_metadata(file)
        first = held = size = 0
        for group in range(metadata.num_row_groups):
            held += metadata.row_group(group).num_rows
            size += metadata.row_group(group).total_byte_size
            if held >= rows or size >= SHARD_BYTES or group == metadata.num_row_groups - 1:
                yield Shard(name, str(file), first, group + 1 - first, held, prefix)
                first, held, size = group + 1, 0, 0


class Source:
    """The rows of a shard in their file. Pictures and videos are read when the first one is used."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def _table(self, columns: Sequence[str]) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.shard.file) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            groups = list(range(self.shard.first, self.shard.first + self.shard.groups))
            return file.read_row_groups(groups, columns=present, use_threads=False)

    @cached_property
    def _media(self) -> dict[str, tuple[Any, Any]]:
        """For each column of media: where each row's files begin (rows + 1,), and the files' bytes."""
        import pyarrow as pa
        import pyarrow.types as types

        found = {}
        table = self._table(MEDIA)
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if types.is_null(column.type):
                continue
            # Nulls become empty lists, so that the offsets alone tell a row's files.
            column = column.fill_null([]) if column.null_count else column
            items = column.values
            files = items.field("bytes") if types.is_struct(items.type) else items
            found[name] = column.offsets.to_pylist(), files if not types.is_null(files.type) else pa.nulls(0)
        return found

    def media(self, row: int) -> dict[str, list[Any]]:
        """The pictures and videos of a row by column; they are read and decoded when they are used."""
        return {name: self._files(name, row) for name in MEDIA}

    def _files(self, name: str, row: int) -> list[Any]:
        if name not in self._media:
            return []
        offsets = self._media[name][0]
        reads = [partial(self._bytes, name, place) for place in range(offsets[row], offsets[row + 1])]
        return [Picture(read) if name == "images" else Clip(read) for read in reads]

    def _bytes(self, name: str, place: int) -> bytes:
        data = self._media[name][1][place].as_py()
        return picture_of(data).data if name == "images" else clip_of(data).data

    def records(self) -> list[Record]:
        """All rows of the shard with their media, unchecked."""
        texts = self._table(TEXTS).to_pylist()
        return [completed({**text, **self.media(row)}) for row, text in enumerate(texts)]


def checked(shard: Shard) -> tuple[list[Record], list[Outcome]]:
    """The shard's rows as they are stored, and their outcomes under the rules of corpus.schema, with hashes."""
    outcomes: list[Outcome] = []
    pixels: list[np.ndarray] = []
    records = Source(shard).records()
    for record in records:
        if isinstance(record["id"], str) and record["id"].strip():
            record["id"] = shard.prefix + record["id"]
        seen: list[np.ndarray] = []
        parsed = {**record, **_parsed(record)}
        problem = problem_of(parsed, partial(_see, seen), partial(_watch, seen))
        if problem:
            outcomes.append(Dropped(f"{problem.field}: {problem.rule}", problem.found))
            continue
        outcomes.append({**parsed, "source": record["source"] or shard.set, HASHES: len(seen)})
        pixels += seen
    hashes = iter(picture_hashes(pixels))
    for outcome in outcomes:
        if not isinstance(outcome, Dropped):
            outcome[HASHES] = list(islice(hashes, outcome[HASHES]))
    return records, outcomes


def _see(seen: list[np.ndarray], picture: Picture) -> None:
    """Decode a picture and keep its reduced pixels for the hash."""
    seen.append(reduced(picture.grey(HASH_PX)))


def _watch(seen: list[np.ndarray], clip: Clip) -> None:
    """Decode a clip and keep the reduced pixels of some evenly spread frames for the hashes."""
    frames = clip.decode()
    numbers = sampled(len(frames), None, _HASHED_FRAMES)
    seen += [reduced(frames[number].convert("L")) for number in numbers]


def _parsed(record: Record) -> Record:
    """The JSON fields, parsed once instead of by each rule; a broken one stays text, which the rules refuse."""
    found = {}
    for name in JSON_FIELDS:
        with suppress(ValueError):
            found[name] = json_of(record[name])
    return found


def write_outcomes(
    path: Path, numbers: Sequence[int], before: Sequence[Record], after: Sequence[Outcome]
) -> None:
    """Write one shard's file, whole or not at all. `before` gives the texts of dropped rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from core.files import fsync

    rows = []
    for number, old, new in zip(numbers, before, after, strict=True):
        drop = new if isinstance(new, Dropped) else None
        row = old if isinstance(new, Dropped) else new
        texts = {name: _text(row.get(name)) for name in TEXTS if name not in JSON_FIELDS}
        texts |= {name: _json(row.get(name)) for name in JSON_FIELDS}
        rows.append(
            {ROW: number, **texts, HASHES: row.get(HASHES)}
            | {REASON: drop and drop.reason, DETAIL: drop and drop.detail}
        )
    fields = [(ROW, pa.int64()), *((name, pa.string()) for name in TEXTS), (HASHES, pa.list_(pa.binary()))]
    schema = pa.schema([*fields, (REASON, pa.string()), (DETAIL, pa.string())])
    draft = path.with_suffix(".draft")
    pq.write_table(pa.Table.from_pylist(rows, schema), draft, compression="zstd")
    fsync(draft)
    draft.replace(path)


def _text(value: Any) -> str | None:
    """A text that can be stored. Other values, which a dropped row may hold, are shown as text."""
    if value is None:
        return None
    return str(value).encode("utf-8", "replace").decode()


def _json(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return _text(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)


def read_outcomes(path: Path, shard: Shard) -> tuple[list[int], list[Record]]:
    """The rows that a step kept: their numbers in the shard, and the rows with their media."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, use_threads=False)
    kept = table.filter(pc.is_null(table[REASON])).drop_columns([REASON, DETAIL]).to_pylist()
    source, numbers, rows = Source(shard), [], []
    for row in kept:
        number = row.pop(ROW)
        numbers.append(number)
        parsed = {name: json.loads(row[name]) for name in JSON_FIELDS}
        rows.append({**row, **source.media(number), **parsed})
    return numbers, rows


def plain(row: Record) -> Record:
    """A working row as a record, in the schema's order."""
    return {name: row[name] for name in FIELDS}
