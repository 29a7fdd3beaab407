"""Writes records to one Parquet file, which `corpus.reading` can load."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from core.files import fsync
from core.model.pictures import Picture
from core.model.videos import Clip
from core.strict import nearest
from corpus.parquet import features
from corpus.reading import SCAN_ROWS, check_all, report
from corpus.schema import (
    FIELDS,
    JSON_FIELDS,
    MEDIA,
    Problem,
    Record,
    RecordError,
    clip_of,
    completed,
    picture_of,
)


def write_records(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write records to one Parquet file, whole or not at all; return their number.

    A picture is a path (text or `Path`), a file's bytes, `{"bytes": ...}` or a PIL image; a video is the path of a file
    or of a folder of frames, a file's bytes, or a list of pictures. Files are stored unchanged; a PIL image is stored
    as the model sees it, as PNG. Memory holds some hundred rows at a time. Raises RecordError if
    a row breaks a rule, with its row (from 0), field, rule and remedy, so a written file can always be loaded.
    """
    path = Path(path)
    seen, bad = set[str](), list[tuple[int, Problem]]()
    numbered = enumerate(rows)
    with RecordFile(path) as file:
        while part := list(islice(numbered, SCAN_ROWS)):
            taken = [(number, prepared(row)) for number, row in part]
            bad += [(number, row) for number, row in taken if isinstance(row, Problem)]
            good = [(number, row) for number, row in taken if not isinstance(row, Problem)]
            bad += check_all(good, seen).bad
            if not bad:
                file.add([row for _, row in good])
        if bad:
            raise RecordError(report(sorted(bad), lambda row: f"{path}: row {row}"))
        if not file.rows:
            raise RecordError(f"{path}: there are no rows to write")
    return file.rows


class RecordFile:
    """A Parquet file to which checked records are added. It appears when the block ends without an exception."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._draft = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> RecordFile:
        import pyarrow.parquet as pq

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = features().arrow_schema
        self._file = pq.ParquetWriter(self._draft, self._schema)
        return self

    def add(self, records: Sequence[Record]) -> None:
        """Write records as one row group; small groups let a reader of single rows decompress little.

        A record with videos ends its group, because its files may be large.
        """
        import pyarrow as pa

        group: list[Record] = []
        for number, record in enumerate(records, start=1):
            group.append(_stored(record))
            if record["videos"] or number == len(records):
                self._file.write_table(pa.Table.from_pylist(group, schema=self._schema))
                self.rows += len(group)
                group = []

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._file.close()
            if kind is None:
                fsync(self._draft)
                self._draft.replace(self.path)
        finally:
            self._draft.unlink(missing_ok=True)


def prepared(row: Any) -> Record | Problem:
    """The row with all fields, its pictures as `Picture`s and videos as `Clip`s, or the problem that prevents it."""
    if not isinstance(row, Mapping):
        return Problem(
            "row", "must be a mapping", f"{row!r:.60}", "give a dict with the fields of the schema"
        )
    unknown = next((name for name in row if name not in FIELDS), None)
    if unknown is not None:
        return Problem(str(unknown), "unknown field", repr(unknown), nearest(str(unknown), FIELDS))
    record = completed(row)
    for name in MEDIA:
        media = record[name]
        if not isinstance(media, list | tuple):
            remedy = f"write a list, [] for a row without {name}"
            return Problem(name, "must be a list", f"{type(media).__name__} {media!r:.60}", remedy)
        record[name] = []
        for place, one in enumerate(media):
            try:
                record[name].append(_picture(one) if name == "images" else _clip(one))
            except (TypeError, ValueError, OSError) as error:
                found = f"{name}[{place}]: {type(one).__name__}: {error}"
                return Problem(name, "must decode", f"{found:.240}", _GIVE[name])
    return record


_GIVE = {
    "images": "give a path, the bytes of a file, or a PIL image (Image.fromarray of an array)",
    "videos": "give the path of a file or of a folder of frames, the bytes of a file, or a list of frames",
}


def _picture(image: Any) -> Picture:
    return Picture(Path(image).read_bytes()) if isinstance(image, str | Path) else picture_of(image)


def _clip(video: Any) -> Clip:
    if isinstance(video, str | Path):
        path = Path(video)
        return Clip.of_frames(frames_of(path)) if path.is_dir() else Clip(path.read_bytes())
    return (
        Clip.of_frames([_picture(one) for one in video])
        if isinstance(video, list | tuple)
        else clip_of(video)
    )


def frames_of(folder: Path) -> list[Picture]:
    """The frames in a folder: its files, sorted by the numbers and the words of their names."""
    files = [file for file in folder.iterdir() if file.is_file()]
    parts = {
        file: [
            (part.isdigit(), int(part) if part.isdigit() else 0, part)
            for part in re.split(r"(\d+)", file.name)
        ]
        for file in files
    }
    return [Picture(file.read_bytes) for file in sorted(files, key=parts.__getitem__)]


def _stored(record: Record) -> Record:
    """The record in the form that Parquet stores."""
    import json

    texts = {
        name: record[name]
        if isinstance(record[name], str)
        else json.dumps(record[name], ensure_ascii=False, allow_nan=False, sort_keys=True)
        for name in JSON_FIELDS
    }
    media = {name: [{"bytes": one.data, "path": None} for one in record[name]] for name in MEDIA}
    return {**record, **media, **texts}
