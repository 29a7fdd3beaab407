"""Hours of a stage: FLOPs of its rows at a stated MFU, and completion tokens at a stated speed of the servers.

Every assumption is a key of the recipe's `hardware` and is named in the line. Data preparation, evaluation, start-up,
weight updates and further rounds of dynamic sampling are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chain.inputs import phase_rows
from chain.recipe import HardwareConfig, Recipe, SFTStage
from core.model.shape import CoreShape
from core.training.flops import forward_flops, training_flops
from rl.config import RLConfig
from sft.config import Phase

BILLION = 1e9
HOUR_S = 3600.0


@dataclass(frozen=True)
class Hours:
    """Time of one stage."""

    learner: float
    """Hours of the learner."""
    rollout: float
    """Hours of the servers; 0 for SFT."""
    gpus: int
    """GPUs that the stage holds: learners and the servers beside them."""
    flops: float
    """FLOPs of the learner on all ranks."""
    overlap: bool
    of: str
    """The work that is counted, in words."""
    assumed: str
    """The assumptions, in words."""

    @property
    def hours(self) -> float:
        """Hours of the stage: the parts one after the other, or the longer one if they overlap."""
        return max(self.learner, self.rollout) if self.overlap else self.learner + self.rollout

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    def line(self) -> str:
        """The time with its parts and assumptions."""
        parts = f"learner {_short(self.learner)} h ({self.flops:.2g} FLOP)"
        parts += f", rollouts {_short(self.rollout)} h" if self.rollout else ""
        return (
            f"time: about {_short(self.hours)} h on {self.gpus} GPU{'s' if self.gpus > 1 else ''} = "
            f"{_short(self.gpu_hours)} GPU-hours for {self.of}: {parts}; assumed: {self.assumed}"
        )


def hours_of(
    config: SFTStage | RLConfig, recipe: Recipe, shape: CoreShape, rows: Callable[[str], int | None]
) -> Hours:
    """The time of a stage; `rows` maps a set's name to its number of rows, None if the set does not exist."""
    return _rl(config, recipe, shape) if isinstance(config, RLConfig) else _sft(config, recipe, shape, rows)


def _sft(config: SFTStage, recipe: Recipe, shape: CoreShape, rows: Callable[[str], int | None]) -> Hours:
    hardware, learner = recipe.hardware, config.learner
    tokens = [_tokens(config, phase, hardware, rows) for phase in config.phases]
    known = [count for count in tokens if count is not None]
    complete = len(known) == len(tokens)
    total = sum(known) if complete else BILLION
    per_row = hardware.row_tokens
    forward = forward_flops(
        shape,
        tokens=per_row,
        tiles=_tiles(hardware, shape),
        scored=per_row * (1 - hardware.image_share),
        pairs=per_row**2 / 2,
    )
    flops = (
        total
        / per_row
        * training_flops(
            forward, checkpointing=learner.gradient_checkpointing, adapters=learner.lora is not None
        )
    )
    return Hours(
        learner=_learner(flops, learner.processes, hardware),
        rollout=0.0,
        gpus=learner.processes,
        flops=flops,
        overlap=False,
        of=f"{total / BILLION:.3g}B tokens" if complete else "each 1B tokens (a set does not exist yet)",
        assumed=_assumed(hardware, "row_tokens", "image_share", "tflops", "mfu"),
    )


def _tokens(
    config: SFTStage, phase: Phase, hardware: HardwareConfig, rows: Callable[[str], int | None]
) -> float | None:
    """Tokens of a phase's rows; None if a set does not exist."""
    optim = phase.optim
    if optim.max_steps:
        if config.packing and config.packing.update_tokens:
            return float(optim.max_steps * config.packing.update_tokens)
        return float(optim.max_steps * (optim.global_batch_size or 1) * hardware.row_tokens)
    count = phase_rows(phase, rows)
    return None if count is None else count * (optim.epochs or 1) * hardware.row_tokens


def _rl(config: RLConfig, recipe: Recipe, shape: CoreShape) -> Hours:
    hardware, learner, pool = recipe.hardware, config.learner, recipe.servers
    assert pool
    prompt, group = hardware.row_tokens, config.rollout.group_size
    completion = config.rollout.max_completion_tokens * hardware.completion_share
    completions = config.batches * config.completions_per_batch
    shared = group if learner.shares_prefix else 1
    rows = completions / group * (group // shared)  # prompts that the learner computes
    tokens = rows * (prompt + shared * completion)
    pairs = rows * (prompt**2 / 2 + shared * completion * (prompt + completion / 2))
    forward = forward_flops(
        shape,
        tokens=tokens,
        tiles=rows * _tiles(hardware, shape),
        scored=completions * completion,
        pairs=pairs,
    )
    update = training_flops(
        forward, checkpointing=learner.gradient_checkpointing, adapters=learner.lora is not None
    )
    old = forward if config.updates_per_batch > 1 or not learner.shares_prefix else 0.0
    flops = config.passes * update + old
    servers = pool.count * pool.gpus_per_server
    beside = 0 if pool.share_gpus or not (pool.starts_on_gpus or pool.urls) else servers
    return Hours(
        learner=_learner(flops, learner.processes, hardware),
        rollout=completions * completion / hardware.rollout_tokens_per_s / servers / HOUR_S,
        gpus=learner.processes + beside,
        flops=flops,
        overlap=config.rollout.overlap,
        of=f"{completions:,} completions",
        assumed=_assumed(
            hardware,
            *("row_tokens", "image_share", "completion_share", "tflops", "mfu", "rollout_tokens_per_s"),
        ),
    )


def _tiles(hardware: HardwareConfig, shape: CoreShape) -> float:
    """Tiles of a row of mean length."""
    return hardware.row_tokens * hardware.image_share / shape.tile_tokens


def _learner(flops: float, ranks: int, hardware: HardwareConfig) -> float:
    return flops / ranks / (hardware.tflops * 1e12 * hardware.mfu) / HOUR_S


def _assumed(hardware: HardwareConfig, *names: str) -> str:
    return "hardware " + ", ".join(f"{name}={getattr(hardware, name):g}" for name in names)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
