"""Resuming an interrupted training from transformers' own checkpoints (weights, optimizer, schedule, random states).

This file adds four rules. A checkpoint counts once it is whole; only then is the previous one removed. Only the same
training may resume from it. Log lines of the interrupted run after the checkpoint are dropped, because those updates
are repeated. A log line is written with each checkpoint, so no logged average spans a checkpoint, and a resumed run
logs the same values as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.check import NonFinite
from core.files import read_json, require_room, sync_tree, write_json
from core.manifest import hash_config

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger(__name__)

FOLDER = "unfinished"
"""Folder in a stage's folder with the checkpoints of an unfinished training."""
MARK = "whole.json"
"""File that is written last: a checkpoint without it is incomplete."""


def identity(**facts: Any) -> str:
    """A hash of the facts that two trainings must share if one resumes from the other's checkpoints."""
    return hash_config(facts)[:16]


class Unfinished:
    """The checkpoints of an unfinished training: the last whole one, if any, and the progress at that point.

    Args:
        folder: the folder of the checkpoints.
        count: the unit of progress that is counted beside `updates`.
    """

    def __init__(self, folder: Path, count: str) -> None:
        self.folder = folder
        self.checkpoint: Path | None = None
        self.done = {"updates": 0, count: 0}
        for mark in Path(folder).glob(f"checkpoint-*/{MARK}"):
            facts = read_json(mark)
            if facts["updates"] > self.done["updates"]:
                self.checkpoint, self.done = mark.parent, facts

    def train(self, trainer: Any) -> None:
        """Train, starting from the checkpoint if there is one."""
        if self.checkpoint is None:
            trainer.train()
            return
        log.info("resuming after %s", ", ".join(f"{count} {what}" for what, count in self.done.items()))
        _allow_numbered_cpus()
        trainer.train(resume_from_checkpoint=str(self.checkpoint))


def forget(out: Path) -> None:
    """Remove the checkpoints in `out` of a finished stage."""
    if (out / FOLDER).exists():
        shutil.rmtree(out / FOLDER)


def checkpoint_bytes(weights: int, moved: int, *, deepspeed: bool) -> int:
    """Bytes of one checkpoint with optimizer states.

    Args:
        weights: bytes of the saved weights.
        moved: number of trained parameters, each with AdamW's two moments in float32.
        deepspeed: whether float32 master weights and a second copy of the weights are saved as well.
    """
    return 2 * weights + moved * 12 if deepspeed else weights + moved * 8


def _needed(model: Any, *, deepspeed: bool) -> int:
    """`checkpoint_bytes` of a model in training; under LoRA only the adapters count, as only they are saved."""
    adapters = hasattr(model, "peft_config")
    sizes = [(one, getattr(one, "ds_numel", one.numel())) for one in model.parameters()]
    weights = sum(size * one.element_size() for one, size in sizes if one.requires_grad or not adapters)
    moved = sum(size for one, size in sizes if one.requires_grad)
    return checkpoint_bytes(weights, moved, deepspeed=deepspeed)


def marker(
    facts: Callable[[], Mapping[str, int]], add: Callable[[Path], None] | None = None
) -> TrainerCallback:
    """A callback that marks each checkpoint as whole, with its `facts`, and removes the previous one.

    `add` writes further state into the checkpoint's folder on rank 0. The callback raises NonFinite and does not mark
    the checkpoint if the weights hold NaN or infinity.
    """
    from transformers import TrainerCallback

    class Marker(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if args.save_strategy == "steps" and state.global_step % state.save_steps == 0:
                control.should_log = True
            if control.should_save and state.is_world_process_zero:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                needed = _needed(model, deepspeed=args.deepspeed is not None)
                require_room(Path(args.output_dir), needed, "a checkpoint with optimizer states (save_every)")

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            import torch

            _refuse_nonfinite(model, state.global_step)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()  # each rank has written its part
            if not state.is_world_process_zero:
                return
            new = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if add:
                add(new)
            sync_tree(new)
            write_json(new / MARK, {"updates": state.global_step, **facts()})
            for old in new.parent.glob("checkpoint-*"):
                if old != new:
                    shutil.rmtree(old)

    return Marker()


def _refuse_nonfinite(model: Any, step: int) -> None:
    """Raise NonFinite for NaN or infinity among the weights that this rank holds, on any device."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(end.isfinite() for end in torch.aminmax(parameter.detach())):
            raise NonFinite(
                f"{name} is not finite after update {step}: its checkpoint is not kept; lower optim.learning_rate"
            )


@lru_cache(maxsize=1)  # torch rejects a second entry of the same priority
def _allow_numbered_cpus() -> None:
    """Let torch load states to `cpu:0`, the device that transformers uses for CPU ranks without DeepSpeed."""
    import torch

    torch.serialization.register_package(
        1000, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def drop_lines_after(path: Path, key: str, last: int) -> None:
    """Keep the lines of a JSONL file whose `key` is at most `last`.

    A torn last line of the interrupted run is dropped too.
    """
    if not path.exists():
        return
    kept = path.with_name(f".{path.name}.kept")
    with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
        out.writelines(line for line in lines if line.endswith("\n") and json.loads(line)[key] <= last)
        out.flush()
        os.fsync(out.fileno())
    kept.replace(path)
