"""Tensors as they are made, one after another, into the weight files of a checkpoint: memory for one file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoint.shards import INDEX, SINGLE, Progress
from core.files import write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
"""Bytes of a weight file, at most, unless a single tensor is larger."""


def write_stream(
    tensors: Iterable[tuple[str, torch.Tensor]],
    out: Path,
    *,
    total_bytes: int,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda work, done, total: None,
) -> None:
    """Write named tensors to the folder `out` in the order they come, as safetensors files and their index.

    A file takes tensors up to `max_shard_bytes`; a larger tensor gets a file of its own. Memory: one file plus
    one tensor. `total_bytes` is what the tensors will come to, for `progress` alone.
    """
    from safetensors.torch import save_file

    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = done = parameters = 0

    def flush() -> None:
        save_file(held, out / _draft(len(files)), metadata={"format": "pt"})
        files.append(list(held))
        held.clear()
        progress("weights", done, total_bytes)

    progress("weights", 0, total_bytes)
    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        done += tensor.nbytes
        parameters += tensor.numel()
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = SINGLE if len(files) == 1 else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (out / _draft(number)).rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        metadata = {"total_parameters": parameters, "total_size": done}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _draft(number: int) -> str:
    return f"model-{number + 1:05d}.draft"
