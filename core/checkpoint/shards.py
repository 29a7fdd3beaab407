"""Reads and writes the tensors of a checkpoint folder file by file, in memory for one file.

A folder is untrusted: only safetensors files are read, no file outside the folder is opened, and every disagreement
between index and files is reported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import sha256_file

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the data types that weights may have, by their names in safetensors files."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_JSON_BYTES = 64 << 20
_PIECE_BYTES = 1 << 18
_LFS_POINTER = b"version https://git-lfs"

Progress = Callable[[str, int, int], None]
"""Progress callback; its arguments are the name of the work, the bytes done and the bytes in total."""


def silent(work: str, done: int, total: int) -> None:
    """The `Progress` that shows nothing."""


def printable(text: str) -> str:
    """`text` with every character that could control a terminal written as an escape: `\\x1b[31m`, `\\u202e`.

    File, key and tensor names of a checkpoint are untrusted text. Line ends stay; a tab becomes a space.
    """
    return "".join(
        mark if mark.isprintable() or mark == "\n" else mark.encode("unicode_escape").decode()
        for mark in text.replace("\t", " ")
    )


class LayoutError(ValueError):
    """A checkpoint folder breaks its layout; the message lists every problem in printable characters."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Entry:
    """One tensor's place and type."""

    file: str
    dtype: str
    """Data type as safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk; 0 for a data type that is not allowed for weights."""
        return prod(self.shape) * BYTES.get(self.dtype, 0)


class Tensors:
    """The tensors of a folder's safetensors files by name, in the files' order, opened but not read.

    Raises LayoutError, with a line per problem, for a folder without safetensors, an index that names files outside
    the folder or disagrees with the files, unreadable headers, a name in two files, and data types other than floating
    point.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.entries: dict[str, Entry] = {}
        problems: list[str] = []
        for file in self.files:
            for name, entry in _header(folder / file, problems):
                if name in self.entries:
                    problems.append(f"{name}: in {self.entries[name].file} and in {file}")
                self.entries[name] = entry
                if entry.dtype not in BYTES:
                    problems.append(
                        f"{name}: data type {entry.dtype} in {file}; weights are one of {', '.join(BYTES)}"
                    )
        problems += self._index_problems()
        if problems:
            raise LayoutError(listed(f"{folder}: the weights cannot be read", problems))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, file by file. Tensors are memory-mapped and stay valid after their file is closed."""
        from safetensors import safe_open

        for file in self.files:
            with safe_open(self.folder / file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    yield name, opened.get_tensor(name)

    def bits(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and numbers of each tensor, piece by piece, as flat unsigned integers of the numbers' width.

        A piece is valid until the next one is read. Reading into a buffer of the cache's size is twice as fast as
        mapping the file.
        """
        import numpy as np

        buffer = np.empty(_PIECE_BYTES, "u1")
        for file in self.files:
            with (self.folder / file).open("rb", buffering=0) as opened:
                first = 8 + int.from_bytes(opened.read(8), "little")
                places = json.loads(opened.read(first - 8))
                for name, entry in (
                    (name, entry) for name, entry in self.entries.items() if entry.file == file
                ):
                    at, end = places[name]["data_offsets"]
                    opened.seek(first + at)
                    while at < end:
                        piece = buffer[: min(_PIECE_BYTES, end - at)]
                        at += _read_into(opened, piece)
                        yield name, piece.view(f"u{BYTES[entry.dtype]}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same bytes, compared a few rows at a time."""
        import torch
        from safetensors import safe_open

        entry = self.entries[one]
        if (entry.dtype, entry.shape) != (self.entries[other].dtype, self.entries[other].shape):
            return False
        rows = max(1, (8 << 20) // max(prod(entry.shape[1:]), 1))
        with ExitStack() as stack:
            here, there = (
                stack.enter_context(safe_open(self.folder / self.entries[name].file, "pt")).get_slice(name)
                for name in (one, other)
            )
            return all(
                # Compare bytes: a NaN then equals itself, and zeros of different sign differ.
                torch.equal(*(part[first : first + rows].view(torch.uint8) for part in (here, there)))
                for first in range(0, entry.shape[0], rows)
            )

    def _index_problems(self) -> Iterator[str]:
        if not (self.folder / INDEX).exists():
            return
        weight_map = _weight_map(self.folder)
        for name, file in weight_map.items():
            if name not in self.entries:
                yield f"{name}: {INDEX} says {file}, which does not hold it"
            elif self.entries[name].file != file:
                yield f"{name}: {INDEX} says {file}, it is in {self.entries[name].file}"
        for name, entry in self.entries.items():
            if name not in weight_map:
                yield f"{name}: in {entry.file}, not in {INDEX}"


def listed(what: str, problems: Sequence[str]) -> str:
    """An error's text: a summary, and a line for each problem; a line break inside a name is escaped."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{what}; {count}:\n" + "\n".join("  " + problem.replace("\n", "\\n") for problem in problems)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises LayoutError for another value or a file of over 64 MiB."""
    own_file(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise LayoutError(f"{path}: {path.stat().st_size} bytes, at most {_MAX_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise LayoutError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def own_file(path: Path, home: Path | None = None) -> Path:
    """`path`, if it is a file of the checkpoint folder `home` (default: its own folder).

    Raises LayoutError for a link out of the folder: a copy of it would publish a private file. Files in the Hugging
    Face cache are links into `blobs` beside `snapshots`; those links are allowed.
    """
    if not path.is_file():
        raise LayoutError(f"{path}: the file is missing; download the checkpoint again")
    target, folder = path.resolve(), (home or path.parent).resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise LayoutError(
            f"{path}: a link to {target}, outside the checkpoint; replace the link by the file if you trust it"
        )
    return path


def copy_own(path: Path, out: Path, home: Path | None = None) -> None:
    """Copy a file of the checkpoint folder `home` to the path `out`. Raises LayoutError as `own_file`.

    All copies from one checkpoint folder to another whose names come from the first use this function.
    """
    own_file(path, home)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out)


def weights_hash(path: Path) -> str:
    """One SHA-256 over the safetensors files of a checkpoint: two checkpoints with equal weights share it.

    Raises FileNotFoundError if there are none.
    """
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no safetensors file; a checkpoint of this project has one")
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _read_into(file: Any, piece: np.ndarray) -> int:
    """Fill `piece` from an unbuffered file; return the bytes read. Raises LayoutError if the file is shorter."""
    done = 0
    while done < len(piece):
        count = file.readinto(piece[done:])
        if not count:
            raise LayoutError(f"{file.name}: became shorter while it was read")
        done += count
    return done


def _weight_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise LayoutError(f"{folder}: not a folder; give one with config.json and *.safetensors")
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not present and not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise LayoutError(
                f"{folder}: weights in {', '.join(pickles)}, which are pickles and run code when read; download "
                "the safetensors files, or convert them yourself if you trust their origin: "
                "safetensors.torch.save_file(torch.load(file, weights_only=True), ...)"
            )
        raise LayoutError(f"{folder}: no *.safetensors; download the checkpoint's weights")
    if not (folder / INDEX).exists():
        return [own_file(folder / name).name for name in present]
    problems = []
    indexed = sorted(set(_weight_map(folder).values()))
    for name in indexed:
        if name != Path(name).name or not name.endswith(".safetensors"):
            problems.append(f"{INDEX} names {name!r}, which is not a safetensors file of this folder")
            continue
        try:
            own_file(folder / name)
        except LayoutError as error:
            problems.append(str(error))
    problems += [
        f"{name}: not in {INDEX}; move it out of the folder" for name in present if name not in indexed
    ]
    if problems:
        raise LayoutError(listed(f"{folder}: index and files disagree", problems))
    return indexed


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise LayoutError(f"{folder / INDEX}: no weight_map from tensor names to file names")
    return weight_map


def _header(path: Path, problems: list[str]) -> Iterator[tuple[str, Entry]]:
    """The tensors of one file; what is wrong with the file goes to `problems`."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        problems.append(f"{path.name}: a Git LFS pointer, not the weights; run `git lfs pull` there")
        return
    try:
        with safe_open(path, "np") as opened:  # names do not need torch
            for name in opened.keys():  # noqa: SIM118  # no mapping
                part = opened.get_slice(name)
                yield name, Entry(path.name, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        problems.append(f"{path.name}: not a whole safetensors file ({error}); download it again")
