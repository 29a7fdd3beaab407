"""Ends a training that diverges: losses and gradients that are not finite are logged, counted and not applied.

transformers logs a NaN loss as 0.0 and lets plain PyTorch write NaN into every weight; DeepSpeed skips such updates
without a word. With `watch_finite` both skip the update, the log shows the loss as it is, and after a few such updates
in a row the training raises `Diverged`.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

log = logging.getLogger(__name__)

IN_A_ROW = 3
"""Updates in a row without finite loss and gradients that end a training: one bad batch may pass."""
COUNT = "nonfinite_updates"
"""Key in the logs, from the first such update on: how many there were so far."""


class Diverged(RuntimeError):
    """Several updates in a row had a loss or gradients that are not finite."""


def watch_finite(trainer: Any, in_a_row: int = IN_A_ROW) -> None:
    """Let `trainer` (a transformers.Trainer) skip, count and finally refuse updates that are not finite.

    Call it once, before `trainer.train()`. Works on plain PyTorch, DDP and DeepSpeed; all ranks decide alike, as
    gradients and the logged loss are reduced over them.
    """
    trainer.args.logging_nan_inf_filter = False
    # First: callbacks that write the logs then see the count.
    trainer.callback_handler.callbacks.insert(0, _FiniteGuard(trainer, in_a_row))


class _FiniteGuard(TrainerCallback):
    """Raises where the next update would begin, so that the logs of the bad ones are written."""

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
        """Count the update. `optimizer_step_was_skipped` is DeepSpeed's word for an overflow."""
        self.bad = self.bad or bool(self.trainer.accelerator.optimizer_step_was_skipped)
        self.run_before = self.run
        self.run = self.run + 1 if self.bad else 0
        self.total += self.bad
        if self.bad:  # however rarely the stage logs
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the count to the logs and remember what they say."""
        if logs is None or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        finite = math.isfinite(loss)
        if not finite:
            # transformers subtracts the sum of losses from itself, and NaN - NaN is NaN for ever.
            self.trainer._tr_loss.zero_()
        if not (finite and math.isfinite(norm)) and not self.bad:
            # A norm that overflows scales finite gradients to 0: the update was next to nothing, but it counts.
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
            "no loss before was finite"
            if self.last_finite is None
            else f"the last finite loss was {self.last_finite[1]:g} at step {self.last_finite[0]}"
        )
        raise Diverged(
            f"the last {self.run} updates had a loss or gradients that are not finite ({self.last_bad}); {before}. "
            "No checkpoint is written. Lower optim.learning_rate, raise optim.warmup_ratio, or look at the rows of "
            "these updates"
        )
