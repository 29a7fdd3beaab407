"""How a policy is trained, whatever the stage: optimizer, ranks, DeepSpeed, freezing, LoRA, checkpoints.

The configuration classes need only pydantic; torch, transformers and peft are imported by the functions.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core.checkpoint import released_files
from core.files import atomic_dir, read_json, sha256_file, write_json
from core.strict import Strict, nearest
from core.training.group import form_group

log = logging.getLogger(__name__)

Module = Literal["tower", "adapter", "language_model"]


class Optim(Strict):
    """AdamW and its schedule. An SFT phase sets its length and global batch here; an RL stage elsewhere."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up: constant, or falling to 0 along a cosine or a line."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; give this or max_steps."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer updates; give this or epochs."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Rows per optimizer update, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows per forward-backward pass of one rank."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    @model_validator(mode="after")
    def _one_length(self) -> Optim:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs={self.epochs} and max_steps={self.max_steps}: give one of them, not both"
            )
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={self.betas}: each lies in [0, 1)")
        return self

    def gradient_accumulation(self, ranks: int, global_batch_size: int | None = None) -> int:
        """Micro-batches per update on each rank, so that ranks x micro x this = the global batch.

        Raises ValueError if no whole number does.
        """
        rows = global_batch_size or self.global_batch_size
        if rows is None:
            raise ValueError("optim.global_batch_size is missing: rows per update, e.g. 32")
        per_pass = ranks * self.micro_batch_size
        if rows % per_pass:
            raise ValueError(
                f"global_batch_size={rows} is not a multiple of processes={ranks} x "
                f"micro_batch_size={self.micro_batch_size} = {per_pass}; nearest multiples: "
                f"{max(per_pass, rows // per_pass * per_pass)} and {(rows // per_pass + 1) * per_pass}"
            )
        return rows // per_pass


class DeepSpeedConfig(Strict):
    """DeepSpeed ZeRO. The report trains on ZeRO-2, for MoE with CPU offload (section 5)."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is split over the ranks: 1 optimizer states, 2 also gradients, 3 also weights; 0 nothing."""
    offload: Literal["none", "cpu"] = "none"
    """Where optimizer states (and at stage 3 the weights) live."""
    bucket_elements: int = Field(default=500_000_000, ge=1)
    """Gradients that travel together; two buckets of them lie on every GPU. Fewer save memory and cost speed."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeedConfig:
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError(
                "offload=cpu with zero_stage=0: DeepSpeed offloads from stage 1 on; use zero_stage=2"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The DeepSpeed JSON; "auto" values are filled in by transformers from the training arguments."""
        buckets = {"reduce_bucket_size": self.bucket_elements, "allgather_bucket_size": self.bucket_elements}
        zero: dict[str, Any] = {"stage": self.zero_stage, **buckets}
        if self.zero_stage >= 2:
            zero |= {"overlap_comm": True, "contiguous_gradients": True}
        if self.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if self.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        if self.zero_stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        return {
            "zero_optimization": zero,
            # torch's AdamW on every device: with true, DeepSpeed insists on compiling its own for offload.
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "steps_per_print": 10**9,
        }


class LoRAConfig(Strict):
    """Low-rank adapters instead of full-parameter training (peft)."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["language_model", "all_linear"] = "language_model"
    """Linear layers that get an adapter: the language model's, or the tower's and the projector's as well."""


class LearnerConfig(Strict):
    """The machine side of training: ranks, precision, memory, and which weights move."""

    processes: int = Field(default=1, ge=1)
    """Ranks, of all hosts together; above 1 the stage runs under torchrun."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps float32 master weights in the optimizer under DeepSpeed."""
    deepspeed: DeepSpeedConfig | None = DeepSpeedConfig()
    """None: plain PyTorch (DDP when there are several ranks)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    freeze: tuple[Module, ...] = ()
    """Modules whose weights stay as they are: tower, adapter (the projector), language_model."""
    lora: LoRAConfig | None = None
    """Train adapters and merge them at the end; the checkpoint keeps them in adapter/. None trains the weights
    themselves."""

    @model_validator(mode="after")
    def _something_trains(self) -> LearnerConfig:
        self.check_freeze(self.freeze)
        return self

    def check_freeze(self, freeze: Sequence[Module]) -> None:
        """Raise ValueError if, with these modules frozen, nothing would train or LoRA were contradicted."""
        if len(set(freeze)) != len(freeze):
            raise ValueError(f"freeze={list(freeze)}: name each module once")
        if len(freeze) == 3:
            raise ValueError(
                f"freeze={list(freeze)} names all modules, so nothing would train; leave one out"
            )
        if self.lora and freeze:
            raise ValueError(
                f"freeze={list(freeze)} with lora: LoRA freezes every base weight already; "
                "choose the layers by lora.targets and leave freeze empty"
            )


MODULES: dict[str, tuple[str, ...]] = {
    "tower": ("model.vision_tower.",),
    "adapter": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""Prefixes of a native checkpoint's parameter names, by module."""
_LORA_TARGETS = {
    "language_model": r"model\.language_model\..*_proj",
    "all_linear": r"model\.(language_model|vision_tower|multi_modal_projector)\..*(_proj|linear_\d)",
}


def load_model(path: Path, cfg: LearnerConfig) -> Any:
    """The native core at `path`, ready to train on the CPU or a GPU of this process.

    Plain PyTorch keeps float32 weights whatever `dtype` says and computes in bfloat16 under autocast: updates
    of 1e-6 vanish in bfloat16 weights. DeepSpeed keeps float32 masters itself, and under LoRA these weights do not
    move (peft's adapters are float32), so there they take `dtype`.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    import core

    core.register()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(cfg.threads)
    half = cfg.dtype == "bfloat16" and (cfg.deepspeed is not None or cfg.lora is not None)
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16 if half else torch.float32)


def load_processor(path: Path) -> Any:
    """The processor saved with a native core."""
    from transformers import AutoProcessor

    import core

    core.register()
    return AutoProcessor.from_pretrained(path)


def apply_freeze(model: Any, freeze: Sequence[Module]) -> dict[str, int]:
    """Freeze modules of a native core; returns the trainable parameters of each module, which it also logs.

    Raises ValueError for an unknown module, and when nothing would train.
    """
    for name in freeze:
        if name not in MODULES:
            raise ValueError(f"freeze: unknown module {name!r}; {nearest(name, MODULES)}")
    counts = dict.fromkeys(MODULES, 0)
    for parameter_name, parameter in model.named_parameters():
        module = module_of(parameter_name)
        parameter.requires_grad_(module not in freeze)
        if parameter.requires_grad:
            counts[module] += getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a part here
    if not any(counts.values()):
        raise ValueError(f"freeze={list(freeze)}: no parameter would train; leave a module out")
    log.info("trainable parameters: %s", ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return counts


def module_of(parameter_name: str) -> str:
    """The module that a native parameter belongs to: tower, adapter or language_model."""
    for module, prefixes in MODULES.items():
        if parameter_name.startswith(prefixes):
            return module
    raise ValueError(f"parameter {parameter_name!r} is in none of {MODULES}: this is no native core")


def peft_config(cfg: LearnerConfig) -> Any:
    """peft's LoraConfig for the learner, or None for full-parameter training."""
    if cfg.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=cfg.lora.r,
        lora_alpha=cfg.lora.alpha,
        lora_dropout=cfg.lora.dropout,
        target_modules=_LORA_TARGETS[cfg.lora.targets],
        task_type="CAUSAL_LM",
    )


def training_arguments(optim: Optim, learner: LearnerConfig, *, seed: int) -> dict[str, Any]:
    """What SFT and RL tell transformers' TrainingArguments alike; batch size and length are the stage's own.

    Call `join_process_group` first: DeepSpeed looks for its peers while the arguments are built.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        "warmup_steps": optim.warmup_ratio,  # below 1 it is a share of all steps
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.epsilon,
        "max_grad_norm": optim.max_grad_norm,
        "per_device_train_batch_size": optim.micro_batch_size,
        "optim": "adamw_torch",
        "bf16": learner.dtype == "bfloat16",
        "gradient_checkpointing": learner.gradient_checkpointing,
        "deepspeed": learner.deepspeed.to_dict() if learner.deepspeed else None,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def join_process_group(cfg: LearnerConfig) -> None:
    """Make this process a rank: of the launcher's group, or under DeepSpeed of a group of its own.

    Plain PyTorch needs no group for one rank. Call it before building training arguments, as often as you like.
    Raises ValueError if another number of ranks was started than the configuration says.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != cfg.processes:
        raise ValueError(
            f"learner.processes={cfg.processes}, but {ranks} ranks were started; "
            f"launch with torchrun --nproc-per-node {cfg.processes}"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(cfg.threads))  # else accelerate takes every core
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by an earlier trainer; the configuration decides
    if ranks == 1 and cfg.deepspeed is None:
        return
    # Accelerate takes a process for a rank by these.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    form_group()
    if cfg.deepspeed is None:
        return
    import torch

    if not torch.cuda.is_available():  # on CPUs nothing of ours is compiled, and an optimizer that DeepSpeed
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # imports would load the compiler: two seconds
    import deepspeed

    # On CPU accelerate opens torch's group only; ZeRO-3, loading a model, would take itself for one rank.
    deepspeed.init_distributed(verbose=False)


def save_checkpoint(trainer: Any, processor: Any, out: Path) -> Path:
    """Write the trainer's policy as a complete native checkpoint, whole or not at all; returns `out`.

    Every rank calls it (ZeRO-3 gathers the weights), rank 0 writes. After LoRA training the checkpoint holds
    the merged weights, and `out/adapter` the adapter in PEFT's format, with the path and the weights' hash of
    the checkpoint it was trained on: peft and vLLM load it there, `core.checkpoint.merge` merges it again.

    The configuration is the one that the policy was loaded with: trainers edit theirs (no key/value cache,
    other end-of-text tokens), and a server of the checkpoint would obey.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model_wrapped)
    state = _gathered(accelerator, trainer.model_wrapped, model)
    if accelerator.is_main_process:
        with atomic_dir(Path(out)) as folder:
            if hasattr(model, "peft_config"):
                _save_adapter_and_merged(model, state, folder)
            else:
                model.save_pretrained(folder, state_dict=state)
            _restore_config(Path(model.config.name_or_path), folder, next(model.parameters()).dtype)
            processor.save_pretrained(folder)
            released_files.hand_on(Path(model.config.name_or_path), folder)
    accelerator.wait_for_everyone()
    return out


def _gathered(accelerator: Any, wrapped: Any, model: Any) -> dict[str, Any] | None:
    """ZeRO-3: every weight, put together on rank 0 from the ranks' parts; None where each has them whole."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        return None
    state = accelerator.get_state_dict(wrapped) or {}  # the other ranks get None
    # DeepSpeed gathers a tied output layer as a second copy; a native checkpoint holds the embedding alone.
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def _save_adapter_and_merged(model: Any, state: dict[str, Any] | None, folder: Path) -> None:
    """The trained adapter to `folder/adapter`, the core that it was trained on with it merged in to `folder`.

    Merged from the files of both: merging in place would need every shard of ZeRO-3 on every rank, and a second
    model in memory on any.
    """
    from core.checkpoint.adapters import check_fits, read_adapter, write_base
    from core.checkpoint.merge import merge_weights
    from core.checkpoint.shards import Tensors

    start = Path(model.peft_config[model.active_adapter].base_model_name_or_path)
    model.save_pretrained(folder / "adapter", state_dict=state)
    write_base(folder / "adapter", start, weights_hash(start))
    adapter, base = read_adapter(folder / "adapter"), Tensors(start)
    check_fits(adapter, base, start)
    merge_weights(adapter, base, folder, dtype=next(model.parameters()).dtype)


def _restore_config(start: Path, folder: Path, dtype: Any) -> None:
    """Put the configuration files of the checkpoint at `start` into `folder`, with the saved data type."""
    for name in ("config.json", "generation_config.json"):
        if not (start / name).exists():
            continue
        values = read_json(start / name)
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / name, values)


def weights_hash(path: Path) -> str:
    """One SHA-256 over the safetensors files of a checkpoint: two checkpoints with equal weights share it.

    Raises FileNotFoundError if there are none.
    """
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no safetensors file; a checkpoint of this project has one")
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
