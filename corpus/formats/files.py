"""Reads rows from files in constant memory: JSON, JSONL, CSV, TSV, Parquet, WebDataset shards."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.strict import ConfigError
from corpus.formats.fields import Rejected, Root
from corpus.hub import SUFFIXES, HubFiles, HubFolder, address_hint, hub_set
from corpus.parquet import check_expansion, rows_at_once

Row = tuple[int, dict[str, Any] | Rejected]
"""Number of a row in its file, from 0, and the row, or the reason why it cannot be read."""
MAX_CELL = 64 << 20
"""Most characters of a row or cell; a 40 MB picture in base64 fits."""
_CHUNK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_PICTURES = ("jpg", "jpeg", "png", "webp")
_VIDEOS = ("mp4", "webm", "avi", "mov", "mkv")


def files_of(source: str | Path, split: str = "train") -> Sequence[Path]:
    """The data files of a source: the file itself, a folder's files sorted by name, or a hub data set's (corpus.hub).

    `split` chooses among a hub data set's files. Raises ConfigError without any file.
    """
    if isinstance(source, str) and (address := hub_set(source)):
        return HubFiles(address, split)
    given, source = str(source), Path(source).expanduser()
    if not source.exists():
        raise ConfigError(f"{source}: there is no such file or folder{address_hint(given)}")
    if source.is_file():
        if source.suffix not in SUFFIXES:
            packed = (
                "; unpack it first" if source.suffix in (".gz", ".zip", ".tgz", ".bz2", ".xz", ".zst") else ""
            )
            raise ConfigError(f"{source}: a data file ends in {', '.join(SUFFIXES)}{packed}")
        return [source]
    files = _data_files(source.iterdir()) or _data_files(source.rglob("*"))
    if not files:
        raise ConfigError(f"{source}: holds no file that ends in {', '.join(SUFFIXES)}")
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"{source}: holds files of several kinds ({', '.join(sorted(kinds))}); name one of them"
        )
    return files


def root_of(source: str | Path, files: Sequence[Path], images: str | None = None) -> Root:
    """The folder of a source's pictures and videos: `images` (a path, or an address on the hub), else the source's.

    Raises ConfigError if `images` does not exist.
    """
    if images is not None:
        address = hub_set(images)
        if address is None and not Path(images).expanduser().is_dir():
            raise ConfigError(f"{images}: there is no such folder of pictures")
        return HubFolder(address) if address else Path(images).expanduser()
    if isinstance(files, HubFiles):
        return files.folder()
    source = Path(source).expanduser()
    return source if source.is_dir() else source.parent


def _data_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for file in paths if file.suffix in SUFFIXES and file.is_file())


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of one file. Raises ConfigError if the file itself cannot be read."""
    readers = {
        **{".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".tar": _shard},
        **{".csv": lambda file: _table(file, ","), ".tsv": lambda file: _table(file, "\t")},
    }
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None
    except (csv.Error, tarfile.TarError) as error:
        raise ConfigError(f"{file}: {error}") from None


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        number = 0
        while line := lines.readline(MAX_CELL):
            if len(line) == MAX_CELL:
                while line and not line.endswith("\n"):
                    line = lines.readline(MAX_CELL)
                yield (
                    number,
                    Rejected("row", "is too long", f"more than {MAX_CELL} characters", "leave it out"),
                )
                number += 1
            elif line.strip():
                yield number, _object(line)
                number += 1


def _object(line: str) -> dict[str, Any] | Rejected:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return Rejected("row", "must be JSON", f"{line[:60]}: {error}", "write one JSON object on a line")
    if isinstance(row, dict | Rejected):
        return row
    return Rejected("row", "must be an object", row, "write one object on a line")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Rejected:
    """An object's keys and values. JSON leaves open which value of a repeated key counts, so it is refused."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    return Rejected("row", "a key is repeated", twice, "keep one of its values")


def _json(file: Path) -> Iterator[Row]:
    """The items of a JSON array, parsed one by one, so that the whole array is never in memory."""
    decoder, number, at = json.JSONDecoder(object_pairs_hook=_unique), 0, 0
    with file.open(encoding="utf-8-sig") as source:
        buffer = source.read(_CHUNK)
        if not buffer.lstrip().startswith("["):
            raise ConfigError(
                f"{file}: a .json file is an array of rows; name it .jsonl if it has one on each line"
            )
        at = buffer.index("[") + 1
        while True:
            at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]  # it matches the empty text
            if buffer.startswith("]", at):
                return
            try:
                row, end = decoder.raw_decode(buffer, at)
                if end == len(buffer):  # a number may continue in the next chunk
                    raise ValueError
            except RecursionError:
                raise ConfigError(f"{file}: row {number} is nested too deeply") from None
            except ValueError:
                buffer, at = buffer[at:], 0
                more = source.read(max(_CHUNK, len(buffer)))
                if not more or len(buffer) > MAX_CELL:
                    raise ConfigError(
                        f"{file}: row {number} is not a complete JSON value: {buffer[:60]!r}"
                    ) from None
                buffer += more
                continue
            at = end
            bad = Rejected("row", "must be an object", row, "write an array of objects")
            yield number, row if isinstance(row, dict | Rejected) else bad
            number += 1


def _table(file: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    with file.open(encoding="utf-8-sig", newline="") as source:
        reader = csv.DictReader(source, delimiter=delimiter)
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                found = f"{len(row)} cells for {len(reader.fieldnames or ())} columns"
                yield (
                    number,
                    Rejected(
                        "row", "needs a cell for each column", found, "quote cells that hold delimiters"
                    ),
                )
            else:
                yield number, dict(row)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: not readable as Parquet ({error})") from None
    with reader:
        check_expansion(reader, file)
        number = 0
        for batch in reader.iter_batches(batch_size=min(64, rows_at_once([file]))):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _shard(file: Path) -> Iterator[Row]:
    """The samples of a WebDataset shard: adjacent files with the same name up to the first dot, keyed by extension."""
    number, key, sample = 0, None, dict[str, Any]()
    with tarfile.open(file, "r|*") as members:
        for member in members:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if (folder, stem) != key and sample:
                yield number, _merged(sample)
                number, sample = number + 1, {}
            key = (folder, stem)
            if member.size > MAX_CELL:
                raise ConfigError(
                    f"{file}: {member.name} has {member.size} bytes, at most {MAX_CELL} are read"
                )
            content = members.extractfile(member)
            sample[ending.lower()] = content.read() if content else b""
    if sample:
        yield number, _merged(sample)


def _merged(sample: dict[str, Any]) -> dict[str, Any] | Rejected:
    """A sample as one row: the fields of its .json, text files as text, other files as bytes."""
    row: dict[str, Any] = {}
    for ending, content in sample.items():
        if ending == "json":
            fields = _object(content.decode("utf-8", "replace"))
            if isinstance(fields, Rejected):
                return fields
            row |= fields
        else:
            row[ending] = content.decode("utf-8", "replace") if ending in ("txt", "cls") else content
    pictures = [content for ending, content in sample.items() if ending in _PICTURES]
    if pictures:  # the pictures are in the shard, so file names in .json are ignored
        row = {name: value for name, value in row.items() if name not in ("image", *_PICTURES)} | {
            "images": pictures
        }
    if clips := [content for ending, content in sample.items() if ending in _VIDEOS]:
        row = {name: value for name, value in row.items() if name not in ("video", *_VIDEOS)} | {
            "videos": clips
        }
    return row
