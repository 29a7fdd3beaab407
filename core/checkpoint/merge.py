"""Merges a LoRA adapter into the weights of its core, tensor by tensor, in memory for one weight file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoint import released_files
from core.checkpoint.adapters import Adapter, AdapterError, check_base, check_fits, read_adapter
from core.checkpoint.check import check_checkpoint, check_finite
from core.checkpoint.shards import (
    BYTES,
    INDEX,
    Entry,
    Progress,
    Tensors,
    copy_own,
    printable,
    read_object,
    silent,
    weights_hash,
)
from core.checkpoint.stream import SHARD_BYTES, write_stream
from core.files import atomic_dir, hash_tree
from core.manifest import MANIFEST, Began, hash_config
from core.model.names import MODULES, module_of
from core.strict import ConfigError

if TYPE_CHECKING:
    import torch

_NOT_COPIED = (INDEX, MANIFEST, "start.json")
"""Files of a checkpoint folder that record how it was made."""


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    core: Path
    modules: dict[str, int]
    """Number of changed linear layers, by part of the core."""
    replaced: int
    """Number of parameters that the adapter replaces whole."""
    checked_base: bool
    """Whether the adapter records the weights that it was trained on, and they are this core's."""

    def text(self) -> str:
        """The result as text for the terminal."""
        parts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.modules.items())
        lines = [
            f"merged into {self.core}: linear layers changed: {parts}; whole parameters: {self.replaced}"
        ]
        if not self.checked_base:
            lines.append(
                "The adapter does not record the weights it was trained on: only names and shapes were compared."
            )
        return printable("\n".join(lines))


def merge_adapter(
    adapter: Path,
    dst: Path,
    *,
    core: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Merged:
    """Write the core of the adapter at `adapter`, with the adapter merged in, to the folder `dst`.

    `core` is the core that the adapter was trained on; default: the core that the adapter names. The result keeps the
    core's data type, configuration, processor, tokenizer and template, and is written whole or not at all. It equals
    peft's merge_and_unload bit for bit in float32 and bfloat16.

    Raises ConfigError if `dst` exists; AdapterError, with a line per mismatch, if the adapter belongs to another core
    or cannot be merged; NonFinite for NaN or infinity.
    """
    if dst.exists():
        raise ConfigError(f"{dst}: exists already; name another folder, or remove it")
    began = Began()
    opened = read_adapter(adapter)
    check_finite(adapter)
    start = core or _named_core(opened)
    base = _open(start)
    check_fits(opened, base, start)
    progress("reading the core", 0, base.nbytes)
    weights = weights_hash(start)
    checked = check_base(opened, start, weights)
    with atomic_dir(dst) as folder:
        merge_weights(opened, base, folder, max_shard_bytes=max_shard_bytes, progress=progress)
        _copy_files(start, folder)
        inputs = {"core": weights, "adapter": hash_tree(adapter)}
        config_hash = hash_config(read_object(start / "config.json"))
        began.manifest(
            stage="core merge",
            fingerprint=hash_config({**inputs, "config": config_hash}),
            config_hash=config_hash,
            inputs=inputs,
        ).write(folder)
    counts: dict[str, int] = dict.fromkeys(MODULES, 0)
    for module in opened.pairs:
        counts[module_of(f"{module}.")] += 1
    return Merged(start, counts, len(opened.whole), checked)


def merge_weights(
    adapter: Adapter,
    base: Tensors,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Merge an adapter into the weights of its core and write files and index to the folder `out`.

    The core's weights are converted to `dtype` (default: their own), and each sum is rounded to it once. Raises
    NonFinite if a sum is not finite.
    """
    size = None if dtype is None else dtype.itemsize
    total = sum(_nbytes(entry, size) for entry in base.entries.values())
    write_stream(
        _merged_tensors(adapter, base, dtype),
        out,
        total_bytes=total,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _merged_tensors(
    adapter: Adapter, base: Tensors, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from safetensors import safe_open

    (file,) = adapter.tensors.files
    with safe_open(adapter.folder / file, "pt") as lora:
        for name, weight in base:
            tensor = weight if dtype is None else weight.to(dtype)
            module = name.removesuffix(".weight")
            if name in adapter.whole:
                tensor = lora.get_tensor(adapter.whole[name]).to(tensor.dtype)
            elif module in adapter.pairs:
                a, b = (lora.get_tensor(half).float() for half in adapter.pairs[module])
                # Product and sum in float32, rounded once: peft's order of operations, for the same bits.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor = tensor.to(wide).add(b @ a * adapter.scaling(module)).to(tensor.dtype)
            yield name, tensor


def _nbytes(entry: Entry, itemsize: int | None) -> int:
    return entry.nbytes if itemsize is None else entry.nbytes // BYTES[entry.dtype] * itemsize


def _named_core(adapter: Adapter) -> Path:
    named = adapter.base.get("path") or adapter.config.get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise AdapterError(
            f"{adapter.folder}: names its core as {named!r}, but no such folder exists; give the core by --core"
        )
    return Path(named)


def _open(core: Path) -> Tensors:
    if read_object(core / "config.json").get("model_type") != "sailvl2":
        raise AdapterError(
            f"{core}: not a native core (model_type sailvl2); `posttrain core import` makes one"
        )
    check_checkpoint(core)
    return Tensors(core)


def _copy_files(core: Path, out: Path) -> None:
    """Copy every file of a checkpoint folder except its weights and the records of how it was made."""
    for path in sorted(core.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
            copy_own(path, out / path.name)
    released_files.hand_on(core, out)
