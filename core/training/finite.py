"""Ends a training that diverges: losses and gradients that are not finite are logged, counted and not applied.

transformers logs a NaN loss as 0.0, and plain PyTorch then writes NaN into every weight. DeepSpeed skips such updates
silently. With `watch_finite` both skip the update, the log shows the true loss, and after a few such updates in a row
the training raises `Diverged`.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

log = logging.getLogger(__name__)

IN_A_ROW = 3
"""Number of updates in a row with non-finite loss or gradients that end a training; one bad batch may pass."""
COUNT = "nonfinite_updates"
"""Log key of the number of such updates so far; it is logged from the first one on."""


class Diverged(RuntimeError):
    """Several updates in a row had a loss or gradients that are not finite."""


def watch_finite(trainer: Any, in_a_row: int = IN_A_ROW) -> None:
    """Let `trainer` (a transformers.Trainer) skip and count updates that are not finite, and finally end the training.

    Call it once, before `trainer.train()`. Works on plain PyTorch, DDP and DeepSpeed; all ranks decide alike, because
    gradients and the logged loss are reduced over the ranks.
    """
    trainer.args.logging_nan_inf_filter = False
    # Insert it first, so that callbacks that write the logs see the count.
    trainer.callback_handler.callbacks.insert(0, _FiniteGuard(trainer, in_a_row))


class _FiniteGuard(TrainerCallback):
    """Raises at the start of the next update, so that the logs of the bad updates are written first."""

    def __init__(self, trainer: Any, in_a_row: int) -> None:
        self.trainer, self.in_a_row = trainer, in_a_row
        self.total = self.run = self.run_before = 0
        self.bad = False
        self.last_finite: tuple[int, float] | None = None
        self.last_bad = ""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Plain PyTorch: an optimizer without gradients changes nothing. (DeepSpeed has stepped already.)"""
        self.bad = False
        if self.trainer.is_deepspeed_enabled:
            return
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        if gradients and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self.bad = True
            self.trainer.model.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the update. DeepSpeed sets `optimizer_step_was_skipped` after an overflow."""
        self.bad = self.bad or bool(self.trainer.accelerator.optimizer_step_was_skipped)
        self.run_before = self.run
        self.run = self.run + 1 if self.bad else 0
        self.total += self.bad
        if self.bad:  # however rarely the stage logs
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the count to the logs and remember the loss and the gradient norm."""
        if logs is None or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        finite = math.isfinite(loss)
        if not finite:
            # transformers resets the sum of losses by subtracting it from itself, and NaN - NaN stays NaN.
            self.trainer._tr_loss.zero_()
        if not (finite and math.isfinite(norm)) and not self.bad:
            # An overflowing norm scales finite gradients to 0: the update changed almost nothing, but it is bad.
            self.run, self.total = self.run_before + 1, self.total + 1
        if self.run:
            rate = logs.get("learning_rate", math.nan)
            self.last_bad = f"step {state.global_step}: loss {loss:g}, gradient norm {norm:g}, rate {rate:g}"
            if state.is_world_process_zero:
                log.warning("%s: this update is not applied; %d in a row", self.last_bad, self.run)
        elif finite:
            self.last_finite = state.global_step, loss
        if self.total:
            logs[COUNT] = self.total

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_if_diverged(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_if_diverged(state)

    def _end_if_diverged(self, state: Any) -> None:
        if self.run < min(self.in_a_row, max(1, state.max_steps)):
            return
        before = (
            "no earlier loss was finite"
            if self.last_finite is None
            else f"the last finite loss was {self.last_finite[1]:g} at step {self.last_finite[0]}"
        )
        raise Diverged(
            f"the last {self.run} updates had a loss or gradients that are not finite ({self.last_bad}); {before}. "
            "No checkpoint is written. Lower optim.learning_rate, raise optim.warmup_ratio, or look at the rows of "
            "these updates"
        )
