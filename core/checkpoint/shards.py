"""The tensors of a checkpoint folder, read and written file by file: memory for one file, whatever the model's size.

A folder is untrusted: safetensors only, nothing outside the folder is opened, and every disagreement between
index and files is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from core.files import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the data types that weights may have, by their names in safetensors files."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_JSON_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs"

Progress = Callable[[str, int, int], None]
"""Told the name of a piece of work, the bytes done and the bytes in all."""


class LayoutError(ValueError):
    """A checkpoint folder is not what its layout says; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Entry:
    """One tensor's place and type."""

    file: str
    dtype: str
    """As in safetensors files: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk; 0 for a data type that weights cannot have."""
        return prod(self.shape) * BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Piece:
    """A tensor of the source or, with `index`, a part of it along its first axes."""

    name: str
    index: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Target:
    """A tensor to write: pieces of the source, one below the other, in a shape of its own."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Tensors:
    """The tensors of a folder's safetensors files by name, in the files' order, opened but not read.

    Raises LayoutError, with a line per problem, for a folder without safetensors, an index that names files
    outside the folder or disagrees with them, unreadable headers, a name in two files, and data types that
    are no floating-point number.
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
                # As bytes: a NaN equals itself, and zeros of different sign are different weights.
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


def write_tensors(
    source: Tensors, targets: Sequence[Target], out: Path, *, max_shard_bytes: int, progress: Progress
) -> None:
    """Write `targets`, cut from `source`, as safetensors files of at most `max_shard_bytes` and their index.

    A tensor larger than that gets a file of its own. Memory: one file plus one tensor, of which all that is
    copied unchanged is mapped from the source and can be dropped by the system.
    """
    from safetensors.torch import save_file

    shards = _shards(source, targets, max_shard_bytes)
    names = [_shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    total = sum(_nbytes(source, target) for target in targets)
    done, weight_map = 0, dict[str, str]()
    progress("weights", done, total)
    for file, shard in zip(names, shards, strict=True):
        with ExitStack() as stack:
            opened = _Opened(source, stack)
            tensors = {target.name: opened.assemble(target) for target in shard}
            save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        del tensors, opened
        done += sum(_nbytes(source, target) for target in shard)
        progress("weights", done, total)
    if len(names) > 1:
        parameters = sum(prod(target.shape) for target in targets)
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def listed(what: str, problems: Sequence[str]) -> str:
    """An error's text: what is wrong, and a line for each problem.

    Names of tensors and files are a stranger's words: what could drive a terminal is replaced.
    """
    plain = ("".join(mark if mark.isprintable() else "\ufffd" for mark in problem) for problem in problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{what}; {count}:\n" + "\n".join(f"  {problem}" for problem in plain)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises LayoutError if it is none, or absurdly large."""
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


def own_file(path: Path) -> Path:
    """`path`, if it is a file of its own folder. Raises LayoutError for a link that leads elsewhere.

    Folders of the Hugging Face cache are links into `blobs` beside `snapshots`; those are the folder's own.
    """
    if not path.is_file():
        raise LayoutError(f"{path}: there is no such file; download the checkpoint again")
    target, folder = path.resolve(), path.parent.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise LayoutError(
            f"{path}: a link to {target}, outside the checkpoint; replace it by the file if you trust it"
        )
    return path


class _Opened:
    """The source's files, mapped at first use until the stack closes."""

    def __init__(self, source: Tensors, stack: ExitStack) -> None:
        self._source, self._stack, self._files = source, stack, dict[str, Any]()
        self._given: set[str] = set()

    def assemble(self, target: Target) -> Any:
        import torch

        parts = [self._part(piece) for piece in target.pieces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(target.shape)

    def _part(self, piece: Piece) -> Any:
        from safetensors import safe_open

        file = self._source.entries[piece.name].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._source.folder / file, "pt"))
        opened = self._files[file]
        if piece.index:
            return opened.get_slice(piece.name)[piece.index]
        tensor = opened.get_tensor(piece.name)
        if piece.name in self._given:  # safetensors refuses to write one memory under two names
            return tensor.clone()
        self._given.add(piece.name)
        return tensor


def _nbytes(source: Tensors, target: Target) -> int:
    return prod(target.shape) * BYTES[source.entries[target.pieces[0].name].dtype]


def _shards(source: Tensors, targets: Sequence[Target], max_bytes: int) -> list[list[Target]]:
    shards: list[list[Target]] = []
    room = 0
    for target in targets:
        size = _nbytes(source, target)
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(target)
        room -= size
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _weight_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise LayoutError(f"{folder}: no folder; give one with config.json and *.safetensors")
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not present and not (folder / INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise LayoutError(
                f"{folder}: weights in {', '.join(pickles)}, which are pickles and run code when read; download "
                "the safetensors files, or convert them yourself where you trust their origin: "
                "safetensors.torch.save_file(torch.load(file, weights_only=True), ...)"
            )
        raise LayoutError(f"{folder}: no *.safetensors; download the checkpoint's weights")
    if not (folder / INDEX).exists():
        return [own_file(folder / name).name for name in present]
    problems = []
    indexed = sorted(set(_weight_map(folder).values()))
    for name in indexed:
        if name != Path(name).name or not name.endswith(".safetensors"):
            problems.append(f"{INDEX} names {name!r}, which is no safetensors file of this folder")
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
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                part = opened.get_slice(name)
                yield name, Entry(path.name, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        problems.append(f"{path.name}: not a whole safetensors file ({error}); download it again")
