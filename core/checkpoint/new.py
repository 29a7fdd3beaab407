"""Writes cores of any size with random weights, tensor by tensor, in memory for one weight file."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.checkpoint.shards import Progress, silent
from core.checkpoint.stream import SHARD_BYTES, write_stream
from core.files import PARTIAL, atomic_dir
from core.manifest import Began, hash_config
from core.model.layout import empty_model, on_disk
from core.model.shape import Parameters, count
from core.model.sizes import WORDS, Blueprint, blueprint
from core.model.tokenizer import generation_config
from core.strict import ConfigError

if TYPE_CHECKING:
    import torch

    from core.model.configuration import SailVL2Config

Layout = Literal["native", "released"]
_BYTES = {"float32": 4, "bfloat16": 2}
_FILES_BYTES = 8 << 20
"""Bytes of disk space for the files beside the weights; the padded tokenizer is the largest, at 4 MB."""


class DiskFull(RuntimeError):
    """The disk has less room than a core needs."""


@dataclass(frozen=True)
class Plan:
    """The parameters and disk space of a core, before anything is written."""

    size: str
    layout: Layout
    blueprint: Blueprint
    parameters: Parameters
    weight_bytes: int
    disk_bytes: int
    """Peak disk space: the released layout is written from a native core beside it, which is then removed."""
    free_bytes: int


def plan_core(
    size: str, dst: Path, *, words: Sequence[str] = WORDS, dtype: str | None = None, layout: Layout = "native"
) -> Plan:
    """The core that `new_core` would write, computed from shapes alone.

    Raises ConfigError for an unknown size, and for a `dst` that exists.
    """
    if dst.exists():
        raise ConfigError(f"{dst}: exists already; name another folder, or remove it")
    drawn = blueprint(size, words=words, dtype=dtype)
    parameters = count(drawn.config)
    weights = parameters.total * _BYTES[str(drawn.config.dtype).removeprefix("torch.")]
    disk = weights + _FILES_BYTES
    if layout == "released":
        tied = parameters.embeddings if drawn.config.tie_word_embeddings else 0  # written out there
        disk += (parameters.total + tied) * weights // parameters.total + _FILES_BYTES
    place = next(folder for folder in dst.absolute().parents if folder.is_dir())
    return Plan(size, layout, drawn, parameters, weights, disk, shutil.disk_usage(place).free)


def new_core(
    plan: Plan,
    dst: Path,
    *,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write the core of a plan with random weights to the folder `dst`, whole or not at all; returns `dst`.

    The distributions are those of transformers' initialisation. The same plan and seed give the same weights, whatever
    torch's random state was before. Raises DiskFull before anything is written.
    """
    if plan.disk_bytes > plan.free_bytes:
        raise DiskFull(
            f"{dst}: a core of size {plan.size} takes {plan.disk_bytes / 1e9:.1f} GB and "
            f"{plan.free_bytes / 1e9:.1f} GB are free there; free some space, name a folder on another disk, or "
            "choose a smaller size"
        )
    if plan.layout == "native":
        with atomic_dir(dst) as folder:
            _write_native(plan, folder, seed, max_shard_bytes, progress)
        return dst
    from core.checkpoint.released import export_released

    native = dst.with_name(f"{dst.name}.native{PARTIAL}")
    shutil.rmtree(native, ignore_errors=True)
    native.mkdir(parents=True)
    try:
        _write_native(plan, native, seed, max_shard_bytes, progress)
        export_released(native, dst, max_shard_bytes=max_shard_bytes, progress=progress)
    finally:
        shutil.rmtree(native)
    return dst


def _write_native(plan: Plan, folder: Path, seed: int, max_shard_bytes: int, progress: Progress) -> None:
    began = Began()
    config = plan.blueprint.config
    config.architectures = ["SailVL2ForConditionalGeneration"]
    write_stream(
        fresh_tensors(config, seed),
        folder,
        total_bytes=plan.weight_bytes,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    config.save_pretrained(folder)
    generation_config(plan.blueprint.tokenizer).save_pretrained(folder)
    plan.blueprint.processor.save_pretrained(folder)
    values = config.to_dict()
    began.manifest(
        stage="core new",
        fingerprint=hash_config({"size": plan.size, "config": values, "seed": seed}),
        config_hash=hash_config(values),
        seed=seed,
    ).write(folder)


def fresh_tensors(config: SailVL2Config, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Freshly initialised weights by their names in a native checkpoint, created lazily.

    Memory: the tensors of one module (of one layer's experts, for a mixture of experts). Each module has its own
    random generator, seeded by its name.
    """
    from transformers import PreTrainedModel

    model = empty_model(config)
    tied = set(model.all_tied_weights_keys)
    models = {place: part for place, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    for place, module in model.named_modules():
        names = [f"{place}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if not names or tied.intersection(names):
            continue
        # The innermost model around a module initialises it, with that model's configuration.
        owner = models[max((at for at in models if f"{place}.".startswith(f"{at}." if at else "")), key=len)]
        for name, tensor in zip(names, _initialised(owner, module, f"{seed} {place}"), strict=True):
            yield from on_disk(name, tensor)


def _initialised(owner: Any, module: torch.nn.Module, seed: str) -> list[torch.Tensor]:
    """The parameters of one module of an empty model, initialised as its model would; the module stays empty."""
    import torch

    module.to_empty(device="cpu", recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
        owner._init_weights(module)
    tensors = [parameter.detach() for parameter in module.parameters(recurse=False)]
    module.to_empty(device="meta", recurse=False)
    return tensors
