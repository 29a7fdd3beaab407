"""Loads a native core for training: checks it, freezes modules, configures LoRA adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.checkpoint.check import check_checkpoint, check_code
from core.model.names import LORA_TARGETS, MODULES, Module, module_of
from core.strict import nearest
from core.training.config import LearnerConfig

log = logging.getLogger(__name__)


def load_model(path: Path, cfg: LearnerConfig) -> Any:
    """The native core at `path`, ready to train on the CPU or a GPU of this process.

    Plain PyTorch always keeps float32 weights, because updates of 1e-6 vanish in bfloat16 weights; it computes in
    bfloat16 under autocast. DeepSpeed keeps float32 master weights itself, and under LoRA the core's weights are not
    trained (peft's adapters are float32). In these two cases the weights have `dtype`.

    Raises LayoutError for a checkpoint that brings code or holds NaN or infinity (core/checkpoint/check.py).
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    import core

    check_checkpoint(path)
    core.register()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(cfg.threads)
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.bfloat16 if cfg.half else torch.float32, trust_remote_code=False
    )


def load_processor(path: Path) -> Any:
    """The processor saved with a native core. Raises ForeignCode if loading it could run code from the folder."""
    from transformers import AutoProcessor

    import core

    check_code(path)
    core.register()
    return AutoProcessor.from_pretrained(path, trust_remote_code=False)


def opens_thought(path: Path) -> bool:
    """Whether the chat template of the native core at `path` ends the prompt of a thinking row with `<think>`.

    A completion then begins inside its thought. The template is rendered only if it holds the tag at all. Raises as
    `load_processor`, and core.deadline.TooSlow for a template that does not end.
    """
    from core.model.prompts import THINK_CONTRACT, messages

    template = path / "chat_template.jinja"
    if not template.is_file() or "<think>" not in template.read_text(encoding="utf-8").replace(
        THINK_CONTRACT, ""
    ):
        return False
    chat = messages({"question": "2 + 2?", "mode": "think"})
    prompt = load_processor(path).apply_chat_template([chat], add_generation_prompt=True, tokenize=False)[0]
    return bool(prompt.rstrip().endswith("<think>"))


def apply_freeze(model: Any, freeze: Sequence[Module]) -> dict[str, int]:
    """Freeze modules of a native core; log and return the number of trainable parameters of each module.

    Raises ValueError for an unknown module, and if no parameter would train.
    """
    for name in freeze:
        if name not in MODULES:
            raise ValueError(f"freeze: unknown module {name!r}; {nearest(name, MODULES)}")
    counts: dict[str, int] = dict.fromkeys(MODULES, 0)
    for parameter_name, parameter in model.named_parameters():
        module = module_of(parameter_name)
        parameter.requires_grad_(module not in freeze)
        if parameter.requires_grad:
            counts[module] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a part here
    if not any(counts.values()):
        raise ValueError(f"freeze={list(freeze)}: no parameter would train; leave a module out")
    log.info("trainable parameters: %s", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return counts


def peft_config(cfg: LearnerConfig) -> Any:
    """peft's LoraConfig for the learner, or None for full-parameter training."""
    if cfg.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=cfg.lora.r,
        lora_alpha=cfg.lora.alpha,
        lora_dropout=cfg.lora.dropout,
        target_modules=LORA_TARGETS[cfg.lora.targets],
        task_type="CAUSAL_LM",
    )
