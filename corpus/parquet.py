"""Parquet files of records: their Arrow schema, and a check of a file before it is decoded.

Every file of a folder is cast to the same schema. A file that would expand far beyond its size is refused, because
repeated values compress gigabytes to kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.strict import nearest
from corpus.schema import FIELDS, REQUIRED, TEXTS, RecordError

MAX_EXPANSION = 1000
"""Largest ratio of a file's size in memory to its size on disk."""
ALWAYS_ALLOWED = 256 << 20
"""Size in memory, in bytes, that is always allowed."""
_AT_ONCE = 64 << 20
"""Approximate number of bytes that are decoded at a time."""


def features() -> Any:
    """The columns as features of `datasets`: text, or lists of encoded pictures or videos."""
    from datasets import Features, Image, List, Value

    # A batch of videos may have more bytes than an array with offsets of 32 bits can hold.
    videos = List({"bytes": Value("large_binary"), "path": Value("string")})
    media = {"images": List(Image()), "videos": videos}
    return Features({name: media.get(name) or Value("string") for name in FIELDS})


def rows_at_once(files: Sequence[Path]) -> int:
    """The number of rows to decode at a time, so that long rows do not fill the memory."""
    import pyarrow.parquet as pq

    sizes = [
        _uncompressed(pq.read_metadata(file)) / max(1, pq.read_metadata(file).num_rows) for file in files
    ]
    return int(min(1000, max(1, _AT_ONCE // max(1, *sizes, 1))))


def check_file(file: Path) -> None:
    """Raises RecordError for a file that is not Parquet, has wrong columns or types, or would expand too far."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        complaint = "not readable as Parquet; convert other formats: posttrain data import"
        raise RecordError(f"{file}: {complaint} ({type(error).__name__}: {error})") from None
    with reader:
        check_columns(reader.schema_arrow.names, str(file))
        for column in reader.schema_arrow:
            _check_type(column, file)
        check_expansion(reader, file)


def check_columns(columns: Iterable[str], source: str) -> None:
    """Raises RecordError for unknown columns and for missing ones."""
    names = list(columns)
    for name in names:
        if name not in FIELDS:
            raise RecordError(
                f"{source}: unknown column {name!r}; {nearest(name, FIELDS)}. Rename or remove it, or map the "
                "columns: posttrain data import"
            )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise RecordError(f"{source}: columns missing: {', '.join(missing)}; the file has {', '.join(names)}")


def _check_type(column: Any, file: Path) -> None:
    if column.name in TEXTS:
        if not _is_text(column.type):
            raise RecordError(
                f"{file}: column {column.name!r} holds {column.type}: it must be a string; write text"
            )
    elif not _is_media(column.type):
        raise RecordError(
            f"{file}: column {column.name!r} holds {column.type}: it must be a list of files, each {{bytes, path}} or "
            "bytes"
        )


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _is_media(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_null(kind):
        return True
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return False
    item = kind.value_type
    if types.is_struct(item):
        names = {item.field(place).name for place in range(item.num_fields)}
        return "bytes" in names and names <= {"bytes", "path"}
    return types.is_binary(item) or types.is_large_binary(item) or types.is_null(item)


def check_expansion(reader: Any, file: Path) -> None:
    """Raises RecordError if the rows of an open Parquet file would exceed the allowed size in memory.

    The file's metadata usually bound the size. If they do not, its columns are read in small parts.
    """
    limit = max(ALWAYS_ALLOWED, MAX_EXPANSION * file.stat().st_size)
    known, unknown = 0, []
    for group in range(reader.metadata.num_row_groups):
        for place in range(reader.metadata.num_columns):
            chunk = reader.metadata.row_group(group).column(place)
            size = chunk.total_uncompressed_size
            if chunk.has_dictionary_page and size * chunk.num_values > ALWAYS_ALLOWED // 100:
                unknown.append((group, chunk.path_in_schema.split(".")[0], size * chunk.num_values))
            else:
                known += size
    if known + sum(bound for *_, bound in unknown) <= limit:
        return
    for group, column, bound in unknown:
        rows = reader.metadata.row_group(group).num_rows
        at_once = max(1, min(1000, _AT_ONCE * rows // bound))
        for batch in reader.iter_batches(batch_size=at_once, row_groups=[group], columns=[column]):
            known += _expanded(batch.column(0))
            if known > limit:
                break
        if known > limit:
            break
    if known > limit:
        raise RecordError(
            f"{file}: {file.stat().st_size} bytes that would take more than {limit >> 20} MiB in memory (at most "
            f"{MAX_EXPANSION} times the file); it repeats a value very often: write the rows to several files"
        )


def _expanded(column: Any) -> int:
    """Bytes of an array if every row stores its own value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column, pa.DictionaryArray):
        return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return column.nbytes


def _uncompressed(metadata: Any) -> int:
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
