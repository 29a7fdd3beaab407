"""Writes records to one Parquet file, which `corpus.reading` can load."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from core.files import fsync
from core.model.pictures import Picture
from core.strict import nearest
from corpus.parquet import features
from corpus.reading import SCAN_ROWS, check_all, report
from corpus.schema import FIELDS, JSON_FIELDS, Problem, Record, RecordError, completed, picture_of


def write_records(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write records to one Parquet file, whole or not at all; return their number.

    A picture is a path (text or `Path`), a file's bytes, `{"bytes": ...}` or a PIL image. Files are stored unchanged;
    a PIL image is stored as the model sees it, as PNG. Memory holds some hundred rows at a time. Raises RecordError if
    a row breaks a rule, with its row (from 0), field, rule and remedy: what is written can be loaded.
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
        """Write records as one row group; small groups let a reader of single rows decompress little."""
        import pyarrow as pa

        if records:
            plain = [_stored(record) for record in records]
            self._file.write_table(pa.Table.from_pylist(plain, schema=self._schema))
            self.rows += len(plain)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._file.close()
            if kind is None:
                fsync(self._draft)
                self._draft.replace(self.path)
        finally:
            self._draft.unlink(missing_ok=True)


def prepared(row: Any) -> Record | Problem:
    """The row with all fields and its pictures as `Picture`s, or the problem that prevents it."""
    if not isinstance(row, Mapping):
        return Problem(
            "row", "must be a mapping", f"{row!r:.60}", "give a dict with the fields of the schema"
        )
    unknown = next((name for name in row if name not in FIELDS), None)
    if unknown is not None:
        return Problem(str(unknown), "unknown field", repr(unknown), nearest(str(unknown), FIELDS))
    record = completed(row)
    images = record["images"]
    if not isinstance(images, list | tuple):
        remedy = "write a list, [] for a text-only row"
        return Problem("images", "must be a list", f"{type(images).__name__} {images!r:.60}", remedy)
    pictures = []
    for place, image in enumerate(images):
        try:
            pictures.append(_picture(image))
        except (TypeError, ValueError, OSError) as error:
            found = f"images[{place}]: {type(image).__name__}: {error}"
            remedy = "give a path, the bytes of a file, or a PIL image (Image.fromarray of an array)"
            return Problem("images", "must decode", f"{found:.240}", remedy)
    return {**record, "images": pictures}


def _picture(image: Any) -> Picture:
    return Picture(Path(image).read_bytes()) if isinstance(image, str | Path) else picture_of(image)


def _stored(record: Record) -> Record:
    """The record in the form that Parquet stores."""
    import json

    texts = {
        name: record[name]
        if isinstance(record[name], str)
        else json.dumps(record[name], ensure_ascii=False, allow_nan=False, sort_keys=True)
        for name in JSON_FIELDS
    }
    images = [{"bytes": image.data, "path": None} for image in record["images"]]
    return {**record, "images": images, **texts}
