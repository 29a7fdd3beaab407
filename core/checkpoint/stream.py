"""The only writer of weight files: it streams named tensors into safetensors files and their index.

Training, soup, merge, import, export, new cores and the transfer of weights to rollout servers all use it. So weights
with NaN or infinity are never written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoint.check import NonFinite, nonfinite_tensor
from core.checkpoint.shards import INDEX, SINGLE, Progress, silent
from core.files import write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
"""Largest weight file in bytes; a single tensor may exceed it."""


def write_stream(
    tensors: Iterable[tuple[str, torch.Tensor]],
    out: Path,
    *,
    total_bytes: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Progress = silent,
) -> None:
    """Write named CPU tensors to the folder `out` in the order they come, as safetensors files and their index.

    A file takes tensors up to `max_shard_bytes`; a larger tensor gets a file of its own. Memory: one file plus
    one tensor. `total_bytes` is the size of all tensors, for `progress` alone.

    Raises NonFinite at the first tensor with NaN or infinity unless `allow_nonfinite`.
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
        if not allow_nonfinite and (what := nonfinite_tensor(tensor)):
            raise NonFinite(
                f"{out}: {name} holds {what}: such weights are not written; use an earlier checkpoint"
            )
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
