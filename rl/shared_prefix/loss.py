"""TRL's loss of a micro-batch, pack by pack.

A micro-batch that exceeds the token budget is cut into packs with a backward pass each:

- Most objectives are weighted sums over rows. Each pack runs TRL's loss and its backward pass; TRL's loss then runs
  once more on all log-probabilities together, without gradients, for its value and its statistics.
- The others (an entropy bonus, a quantile of entropies) need every log-probability before any gradient. A first pass
  without gradients computes them, TRL's loss gives one slope per token, and each pack's backward pass starts from
  those slopes (gradient caching, arXiv:2101.06983).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing

from rl.correction import Correction
from rl.shared_prefix.scores import Scores, joined_scores, taken


class PackedLoss:
    """The loss of one micro-batch.

    Args:
        passes: rl.shared_prefix.passes.SharedPasses.
        stock: TRL's `_compute_loss`.
        model: the policy, wrapped as TRL passes it.
        inputs: TRL's micro-batch.
    """

    def __init__(
        self, passes: Any, stock: Callable[..., torch.Tensor], model: Any, inputs: dict[str, Any]
    ) -> None:
        self.passes, self.stock, self.model, self.inputs = passes, stock, model, inputs
        self.trainer = passes.trainer
        self.rows = passes.rows(inputs)
        width = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
        self.parts: list[range] = passes.parts(self.rows, width)

    def value(self) -> torch.Tensor:
        """The loss of the whole micro-batch. The backward passes of all packs but the last are done."""
        if len(self.parts) == 1:
            return self._loss_of(self.inputs, self._pass_over(0), statistics=True)
        weights = self._weights()
        return self._by_slopes() if weights is None else self._by_parts(weights)

    def _by_parts(self, weights: Sequence[Any]) -> torch.Tensor:
        """The loss of an objective that is a weighted sum over packs."""
        done: list[Scores] = []

        def loss_of(number: int) -> torch.Tensor:
            scores = self._pass_over(number)
            done.append(scores.detached())
            return self._loss_of(taken(self.inputs, self.parts[number]), scores) * weights[number]

        metrics = self.trainer._metrics
        kept, metrics["train"] = metrics["train"], defaultdict(list)  # discard the metrics of single packs
        last = self._accumulated(loss_of)
        metrics["train"] = kept
        with torch.no_grad():
            whole = self._loss_of(self.inputs, joined_scores(done), statistics=True)
        return last + (whole - last).detach()

    def _by_slopes(self) -> torch.Tensor:
        """The loss of an objective that depends on the whole micro-batch, by one slope per token."""
        trainer, packs = self.trainer, range(len(self.parts))
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        ):
            scores = joined_scores([self._pass_over(number) for number in packs])
        leaves = [values.requires_grad_() for values in scores if values is not None]
        whole = self._loss_of(self.inputs, scores, statistics=True)
        slopes = torch.autograd.grad(whole, leaves, allow_unused=True, materialize_grads=True)

        def loss_of(number: int) -> torch.Tensor:
            part = self.parts[number]
            values = [value for value in self._pass_over(number) if value is not None]
            terms = [
                (value * slope[part.start : part.stop]).sum()
                if slope.ndim
                else value * slope * len(part) / len(self.rows)  # the router's
                for value, slope in zip(values, slopes, strict=True)
            ]
            return torch.stack(terms).sum()

        last = self._accumulated(loss_of)
        return last + (whole - last).detach()

    def _pass_over(self, number: int) -> Scores:
        part = self.parts[number]
        return self.passes.over(self.model, self.inputs, self.rows[part.start : part.stop])

    def _accumulated(self, loss_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The last pack's loss; the backward passes of the others are done."""
        deepspeed = {"scale_wrt_gas": False} if self.trainer.is_deepspeed_enabled else {}
        for number in range(len(self.parts) - 1):
            with self._gradients_held_back():  # DDP needs the forward pass inside as well
                loss = loss_of(number)
                with torch.autocast(loss.device.type, enabled=False):
                    self.trainer.accelerator.backward(loss, **deepspeed)
        return loss_of(len(self.parts) - 1)

    @contextmanager
    def _gradients_held_back(self) -> Iterator[None]:
        """Inside, a backward pass takes no step (DeepSpeed) and reduces nothing (DDP)."""
        accelerator = self.trainer.accelerator
        synchronised = accelerator.gradient_state.sync_gradients
        accelerator.gradient_state._set_sync_gradients(False)
        try:
            with accelerator.no_sync(self.model):
                yield
        finally:
            accelerator.gradient_state._set_sync_gradients(synchronised)

    def _weights(self) -> list[Any] | None:
        """Weights with which the packs' losses sum to the micro-batch's loss; None if the loss is not such a sum."""
        trainer, parts = self.trainer, self.parts
        if trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1.0:
            return None
        if trainer.loss_type in ("grpo", "sapo", "dr_grpo"):  # means over rows; so is our balancing loss
            return [len(part) / len(self.rows) for part in parts]
        if trainer.aux_loss_enabled:
            return None
        if trainer.loss_type in ("dapo", "cispo"):  # a sum over the whole batch's number of tokens
            return [1.0] * len(parts)
        if trainer.loss_type == "bnpo":  # a mean over tokens
            mask = self.inputs["completion_mask"]
            tokens = torch.stack([mask[part.start : part.stop].sum() for part in parts])
            return list(tokens / tokens.sum().clamp(min=1))
        return None

    def _loss_of(self, inputs: dict[str, Any], scores: Scores, *, statistics: bool = False) -> torch.Tensor:
        """TRL's loss from given scores: TRL's call for the policy's pass returns them.

        TRL reads `importance_sampling_ratio` from its inputs. If a batch has none, it is computed here from the scores.
        """
        trainer = self.trainer
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        if corrects and "importance_sampling_ratio" not in inputs:
            correction = Correction(
                trainer.vllm_importance_sampling_mode,
                trainer.vllm_importance_sampling_clip_min,
                trainer.vllm_importance_sampling_clip_max,
            )
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            both = scores.logps, inputs["sampling_per_token_logps"], mask
            ratio = correction.ratio(*both)
            inputs = {**inputs, "importance_sampling_ratio": ratio}
            if statistics:
                figures = correction.statistics(*both, ratio, trainer.accelerator.gather)
                for name, figure in figures.items():
                    trainer._metrics["train"][name].append(figure)
        self.passes.given = scores
        try:
            return self.stock(self.model, inputs)
        finally:
            self.passes.given = None
