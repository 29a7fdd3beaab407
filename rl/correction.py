"""TRL's importance-sampling correction, from the log-probabilities that the loss computes anyway.

The rollout engine's probabilities differ from the learner's, so TRL weighs every token (or sequence) by
learner / engine. TRL computes the learner's probabilities in an extra pass before the update. If one update follows
each batch, the pass of the loss gives the same numbers, and the extra pass is skipped. The formulas are those of TRL
1.16's `GRPOTrainer._generate_and_score_completions`; tests/rl/test_shared_prefix.py compares them in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.utils import nanmax, nanmin


@dataclass(frozen=True)
class Correction:
    """The weights of a batch, and TRL's statistics of them."""

    mode: str
    """TRL's `vllm_importance_sampling_mode`: token or sequence, then _truncate or _mask."""
    least: float | None
    """Smaller ratios are raised to it (truncate) or become 0 (mask); None: no lower bound."""
    most: float | None
    """Larger ratios are lowered to it, or become 0."""

    @property
    def by_sequence(self) -> bool:
        return self.mode.startswith("sequence")

    def ratio(self, own: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ratios (rows, tokens), or (rows, 1) by sequence, of log-probabilities (rows, tokens).

        A token without the engine's log-probability (NaN) has the ratio 1. NaN of the learner stays NaN.
        """
        difference = torch.where(engine.isnan(), 0.0, own.detach() - engine) * mask
        ratio = torch.exp(difference.sum(-1, keepdim=True) if self.by_sequence else difference)
        if self.mode.endswith("truncate"):
            return ratio.clamp(self.least, self.most)
        low = -torch.inf if self.least is None else self.least
        high = torch.inf if self.most is None else self.most
        return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)

    def statistics(
        self,
        own: torch.Tensor,
        engine: torch.Tensor,
        mask: torch.Tensor,
        ratio: torch.Tensor,
        gather: Callable[[Any], Any],
    ) -> dict[str, float]:
        """TRL's statistics under TRL's names; `ratio` is the result of `ratio()`, `gather` collects from all ranks."""
        scored = mask.bool()
        differences = (own.detach() - engine)[scored & ~engine.isnan()].abs()
        ratios = ratio.flatten() if self.by_sequence else ratio[scored]

        def of(values: torch.Tensor, figure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return gather(figure(values) if len(values) else values.new_zeros(()))

        apart, weight = "sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/"
        return {
            apart + "mean": of(differences, torch.mean).mean().item(),
            apart + "max": of(differences, torch.max).max().item(),
            weight + "min": nanmin(of(ratios, torch.min)).item(),
            weight + "mean": of(ratios, torch.mean).nanmean().item(),
            weight + "max": nanmax(of(ratios, torch.max)).item(),
        }
