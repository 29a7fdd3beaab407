"""Scripted batches for a learner without engine or collector: groups of random completions, and the trainer of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rl.rollout.served import Served

QUESTIONS = (
    "compute A plus B",
    "largest digit in cell A minus smallest digit in cell B",
    "yes",
    "compute C minus D",
)


@dataclass(frozen=True)
class Scripted:
    """One group: its question, images (by seed; `wide` ones make several tiles, `odd` ones differ in size) and
    completion lengths.
    """

    question: int
    images: tuple[int, ...]
    lengths: tuple[int, ...]
    wide: bool = False
    odd: bool = False
    cut: tuple[int, ...] = ()
    """Completions without an end: truncated."""


def picture(seed: int, wide: bool, odd: bool = False) -> Image.Image:
    shape = (30 + 37 * seed, 150 - 29 * seed, 3) if odd else (56, 112, 3) if wide else (56, 56, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def scripted_rows(processor: Any, groups: Sequence[Scripted]) -> list[dict[str, Any]]:
    """TRL rows with `prompt_ids`, `completion_ids` and made-up sampler log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for group in groups:
        images = [picture(seed, group.wide, group.odd) for seed in group.images]
        text = QUESTIONS[group.question]
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        prompt_ids = processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"][0]
        for index, length in enumerate(group.lengths):
            ids = torch.randint(15, 40, (length,), generator=generator).tolist()
            if index not in group.cut:
                ids[-1] = processor.tokenizer.eos_token_id
            rows.append(
                {
                    "prompt": [{"role": "user", "content": text}],
                    "images": list(images),
                    "prompt_ids": list(prompt_ids),
                    "completion_ids": ids,
                    "logprobs": (-3.5 + 0.5 * torch.randn(length, generator=generator)).tolist(),
                    "score": float(torch.rand((), generator=generator)),
                }
            )
    return rows


class Rows:
    """A feed of given rows."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.given = list(rows)

    def rows(self, trainer: Any, count: int) -> list[dict[str, Any]]:
        return self.given


def stock(rows: list[dict[str, Any]]) -> tuple[type, dict[str, Any]]:
    """TRL's own trainer of these rows, and its arguments."""
    from trl import GRPOTrainer

    def hand_over(prompts, trainer):
        return {name: [row[name] for row in rows] for name in ("prompt_ids", "completion_ids", "logprobs")}

    return GRPOTrainer, {"rollout_func": hand_over}


def shared(rows: list[dict[str, Any]], **own: Any) -> tuple[type, dict[str, Any]]:
    """Our trainer with the shared prefix."""
    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer

    return RolloutTrainer, {"feed": Rows(rows), "passes": partial(SharedPasses, **own)}


def _arguments(out: Path, rows: int, config: dict[str, Any]) -> Any:
    """GRPOConfig for one batch of `rows` completions on a CPU, with `config` over the defaults."""
    from trl import GRPOConfig

    defaults = {
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": rows,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 64,
        "temperature": 0.7,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "mask_truncated_completions": True,
        "epsilon_high": 0.28,
        "router_aux_loss_coef": 0.0,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return GRPOConfig(**{**defaults, **config})


def learner(
    side: Any, core: Path, groups: Sequence[Scripted], out: Path, *, lora=None, own=None, **config: Any
) -> Any:
    """The trainer of a side (`stock` or `shared`) on the core at `core`, and its batch of the groups.

    `own` are arguments of SharedPasses, `config` goes to GRPOConfig. The importance-sampling correction is on, as with
    a rollout engine, and a batch is for two updates: there are old log-probabilities.
    """
    import os

    from datasets import Dataset

    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from rl.trainer import ban_tokens

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    freeze = config.pop("freeze", ())
    model, processor = load_model(core, LearnerConfig(deepspeed=None)), load_processor(core)
    if any(group.wide for group in groups):
        processor.image_processor.max_patches = 4
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(freeze)))
    ban_tokens(model, [processor.image_token_id])
    rows = scripted_rows(processor, groups)
    cls, arguments = side(rows, **(own or {}))

    def score(score, **_):
        return score

    trainer = cls(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * len(rows)}),
        reward_funcs=[score],
        peft_config=lora,
        **arguments,
        args=_arguments(out, len(rows), config),
    )
    if trainer.args.gradient_checkpointing:  # else only trainer.train() turns it on
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions(rows)
    return trainer, inputs


def backward(trainer: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients by parameter name."""
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of all of `theirs`."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name].float() - theirs[name].float()).square().sum()) for name in theirs)
    return (difference / sum(float(theirs[name].float().square().sum()) for name in theirs)) ** 0.5


class Given:
    """A rank of a feed that has one batch for every rank."""

    client = None

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = list(groups)

    def settle(self) -> None:
        pass

    def probe(self, guard: Any) -> list:
        return []

    def checked(self, *_: Any) -> None:
        pass

    def batch(self, figures: Any) -> list[dict[str, Any]]:
        from rl.feed import trl_rows

        return [row for group in self.groups for row in trl_rows(group)]


class NoServers:
    """A weight push and a parity guard where there are no servers."""

    def __init__(self) -> None:
        self.served = Served()

    def push(self, model: Any, what: Any = None) -> None:
        """Goes nowhere."""
        with self.served.update(what):
            pass

    def check(self, *_: Any) -> float:
        return 0.0
