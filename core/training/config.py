"""The configuration of a learner of any stage: optimizer, ranks, DeepSpeed, freezing, LoRA. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from core.model.names import Module
from core.strict import Strict


class Optim(Strict):
    """AdamW and its schedule. An SFT phase sets its length and global batch here; an RL stage has other keys."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0 as a cosine or linearly."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data; give this or max_steps."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer updates; give this or epochs."""
    global_batch_size: int | None = Field(default=None, ge=1, le=100_000_000)
    """Rows per optimizer update, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(default=1, ge=1, le=1_000_000)
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
    """ZeRO stage: ranks share at 1 the optimizer states, at 2 also gradients, at 3 also weights; at 0 nothing."""
    offload: Literal["none", "cpu"] = "none"
    """Where optimizer states (and at stage 3 the weights) are stored."""
    bucket_elements: int = Field(default=500_000_000, ge=1)
    """Elements of a gradient bucket; two buckets lie on every GPU. Smaller buckets save memory and cost speed."""

    @property
    def offloads(self) -> bool:
        """Whether optimizer states live in host memory."""
        return self.offload == "cpu"

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeedConfig:
        if self.offloads and self.zero_stage == 0:
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
        if self.offloads:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if self.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        if self.zero_stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        return {
            "zero_optimization": zero,
            # torch's AdamW on every device: with true, DeepSpeed compiles its own optimizer for offload.
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

    @property
    def everywhere(self) -> bool:
        """Whether the tower and the projector get adapters too."""
        return self.targets == "all_linear"


class LearnerConfig(Strict):
    """Ranks, precision and memory of training, and which weights are trained."""

    processes: int = Field(default=1, ge=1, le=65536)
    """Number of ranks on all hosts together; `posttrain run` starts them."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; bfloat16 keeps float32 master weights in the optimizer under DeepSpeed."""
    deepspeed: DeepSpeedConfig | None = DeepSpeedConfig()
    """DeepSpeed's settings. None: plain PyTorch (DDP if there are several ranks)."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, a third more time."""
    freeze: tuple[Module, ...] = ()
    """Modules whose weights are not trained: tower, adapter (the projector), language_model."""
    lora: LoRAConfig | None = None
    """Train LoRA adapters and merge them at the end; the checkpoint keeps them in adapter/. None: train the weights."""

    @property
    def half(self) -> bool:
        """Whether the model's own weights are bfloat16, in memory and in the checkpoint: see `load_model`."""
        return self.dtype == "bfloat16" and (self.deepspeed is not None or self.lora is not None)

    @model_validator(mode="after")
    def _something_trains(self) -> LearnerConfig:
        self.check_freeze(self.freeze)
        return self

    def check_freeze(self, freeze: Sequence[Module]) -> None:
        """Raise ValueError if freezing these modules leaves nothing to train, or contradicts LoRA."""
        if len(set(freeze)) != len(freeze):
            raise ValueError(f"freeze={list(freeze)}: name each module once")
        if len(freeze) == 3:
            raise ValueError(
                f"freeze={list(freeze)} names all modules, so nothing would train; leave one out"
            )
        if self.lora and freeze:
            raise ValueError(
                f"freeze={list(freeze)} with lora: LoRA freezes every base weight already; "
                "choose the layers by lora.targets and remove freeze"
            )
