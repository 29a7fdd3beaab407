"""Translates a stage's policy loss into TRL's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.training.ranks import training_arguments
from rl.config import Algorithm, RLConfig

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    # One ratio per sequence, mean over sequences: TRL's "grpo" aggregation.
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    # Advantages come per token from the teacher (rl.distill).
    "distill": {"loss_type": "dapo"},
    "gdpo": {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
}
"""`algorithm.name` -> TRL's settings. docs/algorithms.md has the papers."""


def trl_config(cfg: RLConfig, folder: Path, seed: int) -> Any:
    """The stage as TRL's GRPOConfig; `folder` is for the trainer's checkpoints."""
    from trl import GRPOConfig

    algorithm, rollout, correction = cfg.algorithm, cfg.rollout, cfg.algorithm.importance_sampling
    # Packed passes receive all rows of an update at once and cut them by tokens.
    per_pass = (
        cfg.mini_batch if cfg.learner.shares_prefix else cfg.optim.micro_batch_size * cfg.learner.processes
    )
    arguments = training_arguments(cfg.optim, cfg.learner, seed=seed)
    if cfg.save_every:  # between two batches
        arguments |= {"save_strategy": "steps", "save_steps": cfg.save_every * cfg.updates_per_batch}
    return GRPOConfig(
        **arguments | {"per_device_train_batch_size": per_pass // cfg.learner.processes},
        output_dir=str(folder),
        max_steps=cfg.max_steps,
        num_generations=rollout.group_size,
        gradient_accumulation_steps=cfg.mini_batch // per_pass,
        steps_per_generation=cfg.completions_per_batch // per_pass,
        num_iterations=cfg.passes,
        max_completion_length=rollout.max_completion_tokens,
        temperature=rollout.temperature,
        **LOSSES[algorithm.name],
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        delta=algorithm.delta,
        sapo_temperature_pos=algorithm.sapo_temperature_positive,
        sapo_temperature_neg=algorithm.sapo_temperature_negative,
        beta=algorithm.kl_beta,
        entropy_coef=algorithm.entropy_bonus,
        top_entropy_quantile=algorithm.top_entropy,
        scale_rewards="group" if algorithm.divides_by_std else "none",
        mask_truncated_completions=algorithm.mask_truncated,
        vllm_importance_sampling_correction=correction.mode != "off",
        vllm_importance_sampling_mode="token_truncate" if correction.mode == "off" else correction.mode,
        vllm_importance_sampling_clip_max=correction.cap,
        reward_weights=list(reward_columns(cfg).values()),
        logging_steps=1,
        remove_unused_columns=False,
    )


def reward_columns(cfg: RLConfig) -> dict[str, float]:
    """Reward columns and their weights, as TRL sums them."""
    columns = {term.name: term.weight for term in cfg.rewards}
    return columns | ({"overlong": 1.0} if cfg.overlong else {})


def move_clip(trainer: Any, algorithm: Algorithm) -> None:
    """Let the trainer's upper clip follow `algorithm.clip_schedule`, and log it as `clip_high`.

    It depends only on the update's number, so a resumed stage has the same clips as an uninterrupted one.
    """
    from transformers import TrainerCallback

    if algorithm.clip_schedule is None:
        return
    first, last = algorithm.clip_high, algorithm.clip_schedule.end

    class MoveClip(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done = state.global_step / max(1, state.max_steps - 1)
            trainer.epsilon_high = first + (last - first) * done

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                logs["clip_high"] = trainer.epsilon_high

    trainer.callback_handler.callbacks.insert(0, MoveClip())  # before the callback that writes the logs
