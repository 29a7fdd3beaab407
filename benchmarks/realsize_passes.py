"""The trainers' passes at real shapes, for benchmarks.realsize: random cores as shapes, and batches of any size."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.fake import Memory
from core.training.config import LearnerConfig
from rl.config import RLConfig
from sft.config import Phase, SFTConfig

TEXT_ID = 15
"""The token of all texts; values do not change shapes."""


@dataclass(frozen=True)
class Batch:
    """Rows of a GRPO update: groups of completions of one length, each of a prompt with tiles."""

    groups: int
    group_size: int
    prompt: int
    """Tokens, image tokens included."""
    tiles: int
    completion: int

    @property
    def rows(self) -> int:
        return self.groups * self.group_size


def fake_core(size: str, layers: tuple[int, int] | None = None) -> Any:
    """A core in bfloat16 and its processor, without weights; `layers` of tower and language model."""
    from core import SailVL2ForConditionalGeneration, register

    register()
    drawn = _blueprint(size)
    config = deepcopy(drawn.config)
    if layers:
        config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = layers
        if hasattr(config.text_config, "layer_types"):
            config.text_config.layer_types = config.text_config.layer_types[: layers[1]]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return SailVL2ForConditionalGeneration(config), drawn.processor
    finally:
        torch.set_default_dtype(before)


@cache
def _blueprint(size: str) -> Any:
    from core.model.sizes import blueprint

    return blueprint(size, words=["A"], dtype="bfloat16")


def single(learner: LearnerConfig) -> dict[str, Any]:
    """The learner as one process without DeepSpeed, whose passes make the same tensors.

    Under DeepSpeed a bfloat16 model computes in its own type and not under autocast, as a float32 one does here.
    """
    changes: dict[str, Any] = {"deepspeed": None, "processes": 1, "threads": 1}
    return changes | ({"dtype": "float32"} if learner.deepspeed else {})


def _in_place() -> Any:
    """Inside, a model stays where it is: torch cannot move fake parameters."""
    return patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)


def rl_trainer(cfg: RLConfig, model: Any, processor: Any, *, stock: bool = False) -> Any:
    """Our trainer of an RL stage on this model, or with `stock` TRL's."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from core.training.model import apply_freeze, peft_config
    from rl.algorithm import trl_config
    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer, reward_function

    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update=single(cfg.learner))})
    if cfg.learner.lora is None:
        apply_freeze(model, cfg.learner.freeze)
    hand_over: Callable[..., Any] = lambda *_: {}  # noqa: E731
    ours: Any = partial(SharedPasses, token_budget=10**9)
    no_feed: Any = None
    make: Any = (
        partial(GRPOTrainer, rollout_func=hand_over)
        if stock
        else partial(RolloutTrainer, feed=no_feed, passes=ours)
    )
    with tempfile.TemporaryDirectory() as folder, _in_place():
        trainer = make(
            model=model,
            processing_class=processor,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * cfg.mini_batch}),
            reward_funcs=[reward_function(term.name) for term in cfg.rewards]
            + ([reward_function("overlong")] if cfg.overlong else []),
            args=trl_config(cfg, Path(folder), seed=0),
            peft_config=peft_config(cfg.learner),
        )
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if cfg.learner.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def rl_batch(trainer: Any, batch: Batch) -> dict[str, Any]:
    """A micro-batch as TRL's loss receives it: real token ids, fake pixels."""
    from rl.shared_prefix.tiles import TileStore

    core = trainer.processing_class
    side = trainer.model.config.vision_config.image_size
    per_tile = trainer.model.config.image_seq_length
    tokens = [core.image_token_id] * per_tile * batch.tiles
    text = batch.prompt - len(tokens)
    if text < 1:
        raise ValueError(f"a prompt of {batch.prompt} tokens cannot hold {batch.tiles} tiles of {per_tile}")
    prompts = torch.tensor([tokens + [TEXT_ID] * text] * batch.rows)
    if batch.groups > 1:  # prompts of different groups differ
        prompts[:, -1] += torch.arange(batch.groups).repeat_interleave(batch.group_size)
    completions = torch.full((batch.rows, batch.completion), TEXT_ID)
    mask = torch.ones_like(completions)
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.zeros(batch.rows),
        "old_per_token_logps": torch.zeros(batch.rows, batch.completion),
        "sampling_per_token_logps": torch.zeros(batch.rows, batch.completion),
        "importance_sampling_ratio": torch.ones(batch.rows, batch.completion),
        "num_items_in_batch": mask.sum(),
    }
    if not batch.tiles:
        return inputs
    inputs |= {"num_images": [1] * batch.rows, "num_tiles": [batch.tiles] * batch.rows}
    dtype = trainer.model.dtype
    if getattr(trainer, "passes", None) is None:
        return inputs | {"pixel_values": torch.zeros(batch.rows * batch.tiles, 3, side, side, dtype=dtype)}
    store = trainer.passes.tiles = TileStore(core.image_processor)
    every = batch.groups * batch.tiles
    store._pixels = [torch.zeros(1, 3, side, side, dtype=dtype) for _ in range(every)]
    numbers = torch.arange(every).view(batch.groups, batch.tiles).repeat_interleave(batch.group_size, 0)
    return inputs | {"pixel_values": numbers.reshape(-1, 1, 1, 1)}


def rl_old(trainer: Any, inputs: dict[str, Any], batch: Batch, rows: int) -> None:
    """The pass for the old policy's log-probabilities, `rows` at a time in TRL."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.ones_like(ids)
    images = {name: inputs[name] for name in ("pixel_values", "num_images", "num_tiles") if name in inputs}
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch.completion, batch_size=rows, **images
        )


def rl_update(trainer: Any, inputs: dict[str, Any]) -> None:
    """Loss and gradients of a micro-batch."""
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()


def sft_trainer(cfg: SFTConfig, phase: Phase, model: Any, processor: Any, *, packed: bool = True) -> Any:
    """TRL's trainer of an SFT phase on this model, as sft.train makes it."""
    import numpy as np

    from sft import train
    from sft.packing import ByRows, Plan

    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update=single(cfg.learner))})
    optim = phase.optim.model_copy(update={"max_steps": 1, "epochs": None, "global_batch_size": 2})
    phase = phase.model_copy(update={"optim": optim.model_copy(update={"micro_batch_size": 1})})
    plan = (
        Plan(np.array([[4, 0]] * 2), ByRows(2), budget=8, ranks=1, seed=0, max_updates=1) if packed else None
    )
    lessons = [lesson(processor, 0, 4)] * 2
    with (
        tempfile.TemporaryDirectory() as folder,
        _in_place(),
        patch.object(train, "load_model", lambda *_: model),
        patch.object(train, "load_processor", lambda *_: processor),
        patch.object(train, "blank_lesson", lambda *_: lesson(processor, 1, 4)),
    ):
        trainer = train.phase_trainer(cfg, phase, lessons, plan, start=None, folder=folder, seed=0)  # type: ignore[arg-type]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if cfg.learner.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def lesson(processor: Any, tiles: int, tokens: int, answer: int | None = None) -> dict[str, Any]:
    """A prepared row of `tokens` tokens, image tokens included, of which the last `answer` are trained."""
    side, per_tile = processor.image_processor.size["height"], processor.image_seq_length
    image = [processor.image_token_id] * per_tile * tiles
    ids = torch.tensor([TEXT_ID, *image, *[TEXT_ID] * max(1, tokens - len(image) - 1)])
    labels = ids.masked_fill(ids == processor.image_token_id, -100)
    if answer is not None:
        labels[:-answer] = -100
    pixels = torch.zeros(tiles, 3, side, side, dtype=torch.bfloat16) if tiles else None
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def sft_update(trainer: Any, inputs: dict[str, Any]) -> None:
    """Loss and gradients of a micro-batch."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=torch.tensor(1))
    loss.backward()


class Rank:
    """The tensors that one rank of the learner holds beside its model, as DeepSpeed 0.19 and torch's AdamW make them.

    Args:
        model: the model, whose weights are counted.
        learner: ZeRO stage, ranks, offload.
        accumulates: whether gradients of earlier passes wait.
        memory: the counter.
    """

    def __init__(self, model: Any, learner: LearnerConfig, accumulates: bool, memory: Memory) -> None:
        self.memory, self.learner = memory, learner
        for each in (*model.parameters(), *model.buffers()):
            memory.label(each, "weights")
        self.trained = [one for one in model.parameters() if one.requires_grad]
        self.zero = learner.deepspeed.zero_stage if learner.deepspeed else 0
        self.count = sum(one.numel() for one in self.trained)
        self.part = -(-self.count // learner.processes) if self.zero else self.count
        self.kept: list[torch.Tensor] = []
        self.offloads = bool(learner.deepspeed and learner.deepspeed.offloads)
        self.masters: Sequence[torch.Tensor] = self.trained
        if self.zero and not self.offloads:
            self.masters = [torch.nn.Parameter(torch.zeros(self.part))]
            memory.label(self.masters[0], "optimizer")
        if not self.offloads:
            self.optimizer = torch.optim.AdamW(self.masters, lr=1e-6, foreach=True)
            with memory.counted_as("optimizer"):  # the first step makes the moments
                for one in self.masters:
                    one.grad = torch.zeros_like(one)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self._gradients(accumulates)
        memory.restart()

    def _gradients(self, accumulates: bool) -> None:
        """Buffers of gradients; under ZeRO-2 a gradient is copied to a bucket as soon as it exists."""
        zero = self.learner.deepspeed
        if self.zero < 2 or zero is None:
            for one in self.trained:
                one.register_post_accumulate_grad_hook(
                    lambda tensor: self.memory.label(tensor.grad, "gradients")
                )
            return
        dtype = self.trained[0].dtype
        with self.memory.counted_as("buffers"):
            self.kept += [torch.zeros(zero.bucket_elements, dtype=dtype) for _ in range(2)]
        if accumulates and not self.offloads:
            with self.memory.counted_as("gradients"):
                self.kept.append(torch.zeros(self.part, dtype=dtype))

        def reduced(tensor: torch.Tensor) -> None:
            if (
                self.offloads and tensor.grad is not None
            ):  # a copy in the communication type, on its way to the host
                self.memory.label(tensor.grad.clone(), "buffers")
            tensor.grad = None

        for one in self.trained:
            one.register_post_accumulate_grad_hook(reduced)

    def step(self) -> Counter[str]:
        """The peak of the optimizer's step by kind; nothing on the device if its states are offloaded."""
        self.memory.restart()
        if self.offloads:
            return self.memory.peak
        if self.zero:
            with self.memory.counted_as("gradients"):
                self.masters[0].grad = torch.zeros(self.part)
        with self.memory.counted_as("step"):
            self.optimizer.step()
        return self.memory.peak
