"""Files and folders that a crash cannot leave half-written.

A stage writes into `<name>.partial`. The folder is renamed to `<name>` only when every file in it is on disk. So a
folder without the suffix is complete, even after a crash of the machine.
"""

import glob
import hashlib
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import BaseModel

log = logging.getLogger(__name__)

PARTIAL = ".partial"
_CHUNK_BYTES = 1 << 20
ESCAPE = "backslashreplace"
"""How the writers encode half of a surrogate pair, which UTF-8 cannot hold."""
SAME = ".same"
"""File in a partial folder that identifies the block which may continue there."""


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader sees the old text or the new text, never a part."""
    with writing(path) as file:
        file.write(text)


@contextmanager
def writing(path: Path) -> Iterator[IO[str]]:
    """A text file that becomes `path` when the block ends, or is dropped if the block raises.

    Half of a surrogate pair is written as `\\udc80`, which JSON reads back as the same character.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    try:
        with draft.open("w", encoding="utf-8", errors=ESCAPE) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync(path.parent)


def _draft(path: Path) -> Path:
    """The path at which this process writes the new text. Removes drafts of killed processes of this host."""
    start = f".{path.name}.{platform.node()}."
    for stale in path.parent.glob(f"{glob.escape(start)}*"):
        process = stale.name.removeprefix(start)
        if process.isdigit() and not psutil.pid_exists(int(process)):
            stale.unlink(missing_ok=True)
    return path.with_name(f"{start}{os.getpid()}")


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document as `write_text` does. Raises ValueError for NaN and infinity, which JSON cannot hold."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=plain) + "\n")


def read_json(path: Path) -> Any:
    """The document in a file written by `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a JSONL file, in one write, so that a reader following the file sees whole lines.

    NaN and infinity become null: a diverged loss must not end the run that has to report it. A torn last line
    from a killed writer is dropped first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, default=plain)
    except ValueError:
        line = json.dumps(_finite(json.loads(json.dumps(record, default=plain))), ensure_ascii=False)
    _drop_torn_end(path)
    with path.open("a", encoding="utf-8", errors=ESCAPE) as file:
        file.write(line + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; [] if the file does not exist.

    A torn last line (no line end, invalid JSON) is skipped with a warning. Any other bad line raises ValueError
    with file and line.
    """
    if not path.exists():
        return []
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except ValueError as error:  # not JSON, or not UTF-8
                if not line.endswith(b"\n"):
                    log.warning("%s:%d: the last line is torn; it is skipped", path, number)
                    break
                raise ValueError(f"{path}:{number}: not a JSON line ({error})") from None
    return records


class NoRoom(RuntimeError):
    """A disk has too little room for the next write; the message gives the folder, the need and the free space."""


def require_room(folder: Path, needed: float, what: str) -> None:
    """Raise NoRoom unless the disk of `folder`, which must exist, has `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoom(
            f"{folder}: {what} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; make room, or "
            "choose another --runs-dir"
        )


def _drop_torn_end(path: Path) -> None:
    """Cut a file after its last whole line."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        log.warning("%s: the last line was torn; it is dropped", path)
        file.truncate(whole)


@contextmanager
def atomic_dir(path: Path, *, same: str | None = None) -> Iterator[Path]:
    """A folder to fill, `<name>.partial`, which becomes `path` when the block ends without an exception.

    After an exception the partial folder stays for inspection. The next start removes it, unless a block with the same
    value of `same` left it: then the new block continues in it. A folder already at `path` is replaced at the end, in
    two renames.
    """
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".old")
    mark = partial / SAME
    goes_on = same is not None and mark.exists() and mark.read_text(encoding="utf-8") == same
    for stale in (old,) if goes_on else (partial, old):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir(parents=True, exist_ok=True)
    if same is not None:
        write_text(mark, same)
    readable = partial.stat().st_mode & 0o666
    yield partial
    for file in partial.rglob("*.safetensors"):
        file.chmod(readable)  # temporary files are readable by their owner only, whatever the umask
    sync_tree(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    (path / SAME).unlink(
        missing_ok=True
    )  # last: until the rename it identifies the block that owns the folder
    fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def sync_tree(path: Path) -> None:
    """Flush every file and folder in a folder to disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tree(path: Path) -> str:
    """One SHA-256 over a folder's relative file names and contents; for a file, the file's SHA-256.

    Raises FileNotFoundError if there is nothing at `path`.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: nothing to hash here")
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A value that json.dumps cannot write, converted to one that it can."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # a numpy or torch scalar or array
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value: {value!r:.80}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
