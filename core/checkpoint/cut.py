"""Cuts the tensors of one layout from those of another, one tensor at a time, for import and export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.shards import BYTES, Tensors
from core.checkpoint.stream import write_stream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A tensor of the source or, with `index`, a part of it along its first axes."""

    name: str
    index: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Target:
    """A tensor to write: pieces of the source, stacked along the first axis; a single piece keeps its shape."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def write_targets(
    source: Tensors, targets: Sequence[Target], out: Path, max_shard_bytes: int, **options: Any
) -> None:
    """Write `targets`, cut from `source`, to the folder `out`; `options` as for `write_stream`."""
    total = sum(prod(target.shape) * BYTES[source.entries[target.pieces[0].name].dtype] for target in targets)
    write_stream(cut(source, targets), out, total_bytes=total, max_shard_bytes=max_shard_bytes, **options)


def cut(source: Tensors, targets: Sequence[Target]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each target, in their order.

    A tensor that is copied unchanged stays mapped from its file, which the system can drop; each of the source's files
    closes after the last target that needs it.
    """
    import torch

    def files(target: Target) -> set[str]:
        return {source.entries[piece.name].file for piece in target.pieces}

    last = {file: number for number, target in enumerate(targets) for file in files(target)}
    given: set[str] = set()
    opened: dict[str, tuple[Any, ExitStack]] = {}
    with ExitStack() as everything:
        for number, target in enumerate(targets):
            for file in files(target) - opened.keys():
                opened[file] = _open(source, file, everything)
            parts = [
                _part(opened[source.entries[piece.name].file][0], piece, given) for piece in target.pieces
            ]
            yield target.name, (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(target.shape)
            for file in files(target):
                if last[file] == number:
                    opened[file][1].close()


def _open(source: Tensors, file: str, everything: ExitStack) -> tuple[Any, ExitStack]:
    from safetensors import safe_open

    stack = everything.enter_context(ExitStack())
    return stack.enter_context(safe_open(source.folder / file, "pt")), stack


def _part(file: Any, piece: Piece, given: set[str]) -> torch.Tensor:
    if piece.index:
        return file.get_slice(piece.name)[piece.index]
    tensor: torch.Tensor = file.get_tensor(piece.name)
    if piece.name in given:  # safetensors refuses to write one memory under two names
        return tensor.clone()
    given.add(piece.name)
    return tensor
