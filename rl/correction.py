"""TRL's importance-sampling correction, from the log-probabilities that the loss computes anyway.

Completions come from an engine whose probabilities differ from the learner's; TRL weighs every token (or sequence) by
learner / engine. It takes the learner's from a pass of their own before the update. Where one update follows each
batch, the loss's own pass gives the same numbers, and that pass is saved. The formulas are those of TRL 1.16's
`GRPOTrainer._generate_and_score_completions`; tests/rl/test_shared_prefix.py compares them in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import nanmax, nanmin


class Correction:
    """The correction of one batch, part by part, and its statistics.

    Args:
        mode: TRL's `vllm_importance_sampling_mode`: token or sequence, _truncate or _mask.
        least: ratios below are raised to it, or masked; None leaves them.
        most: ratios above are lowered to it, or masked; None leaves them.
    """

    def __init__(self, mode: str, least: float | None, most: float | None) -> None:
        self.mode, self.least, self.most = mode, least, most
        self._differences: list[torch.Tensor] = []
        self._ratios: list[torch.Tensor] = []

    def ratio(self, own: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Ratios (rows, tokens), or (rows, 1) for sequences, of log-probabilities (rows, tokens).

        A token whose engine gave none (NaN) has the ratio 1 and does not count in the statistics.
        """
        apart = own.detach() - engine
        difference = torch.nan_to_num(apart * mask, nan=0.0)
        whole = self.mode.startswith("sequence")
        ratio = torch.exp(difference.sum(-1, keepdim=True) if whole else difference)
        if self.mode.endswith("truncate"):
            ratio = ratio.clamp(self.least, self.most)
        else:
            low = -torch.inf if self.least is None else self.least
            high = torch.inf if self.most is None else self.most
            ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
        scored = mask.bool()
        self._differences.append(apart[scored & ~apart.isnan()].abs())
        self._ratios.append(ratio.flatten() if whole else ratio[scored])
        return ratio

    def statistics(self, gather: Callable[[Any], Any]) -> dict[str, float]:
        """TRL's figures of the batch so far, under its names; `gather` collects a scalar from all ranks."""
        differences, ratios = torch.cat(self._differences), torch.cat(self._ratios)

        def of(values: torch.Tensor, figure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return gather(figure(values) if len(values) else values.new_zeros(()))

        difference, ratio = "sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/"
        return {
            difference + "mean": of(differences, torch.mean).mean().item(),
            difference + "max": of(differences, torch.max).max().item(),
            ratio + "min": nanmin(of(ratios, torch.min)).item(),
            ratio + "mean": of(ratios, torch.mean).nanmean().item(),
            ratio + "max": nanmax(of(ratios, torch.max)).item(),
        }
