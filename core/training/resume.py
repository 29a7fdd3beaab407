"""Where an interrupted training goes on: transformers' own checkpoints (weights, optimizer, schedule, random states).

What is left to see to: a checkpoint counts once it is whole, the one before goes only then, it is gone on with by the
same training alone, and what the interrupted run logged after it is dropped, as those updates are made again.
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

from core.files import read_json, sync_tree, write_json
from core.manifest import hash_config

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger(__name__)

FOLDER = "unfinished"
"""In a stage's folder: the checkpoints of a training that is under way."""
MARK = "whole.json"
"""Written last: a checkpoint without it was being written when its process ended."""


def identity(**facts: Any) -> str:
    """Of a training: what another must have in common with it to go on from its checkpoints."""
    return hash_config(facts)[:16]


class Unfinished:
    """A training's checkpoints: the last whole one, if there is one, and how far the training was then.

    Args:
        folder: where they lie.
        count: what is counted beside `updates`.
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
        """Train, from the checkpoint if there is one."""
        if self.checkpoint is None:
            trainer.train()
            return
        log.info("goes on after %s", ", ".join(f"{count} {what}" for what, count in self.done.items()))
        _allow_numbered_cpus()
        trainer.train(resume_from_checkpoint=str(self.checkpoint))


def forget(out: Path) -> None:
    """Remove what a stage in `out` would have gone on from: it is finished."""
    if (out / FOLDER).exists():
        shutil.rmtree(out / FOLDER)


def marker(
    facts: Callable[[], Mapping[str, int]], add: Callable[[Path], None] | None = None
) -> TrainerCallback:
    """A callback that marks each checkpoint as whole, with its `facts`, and removes the one before.

    `add` puts into the checkpoint's folder, on rank 0, what the trainer does not know of.
    """
    from transformers import TrainerCallback

    class Marker(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            import torch

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


@lru_cache(maxsize=1)  # torch takes no second entry of one priority
def _allow_numbered_cpus() -> None:
    """Have torch load states for `cpu:0`, where transformers sends them if ranks are CPUs without DeepSpeed."""
    import torch

    torch.serialization.register_package(
        1000, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def drop_lines_after(path: Path, key: str, last: int) -> None:
    """Keep a JSONL file's lines whose `key` is at most `last`; of its last line the interrupted run may have written a
    part."""
    if not path.exists():
        return
    kept = path.with_name(f".{path.name}.kept")
    with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
        out.writelines(line for line in lines if line.endswith("\n") and json.loads(line)[key] <= last)
        out.flush()
        os.fsync(out.fileno())
    kept.replace(path)
