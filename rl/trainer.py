"""TRL's GRPO trainer with two collaborators: a feed brings its rows, and passes compute its log-probabilities.

How a training row becomes a gradient: `rl.feed` collects and broadcasts graded completions, TRL turns their rewards
into advantages, `rl.shared_prefix.passes` computes log-probabilities, and TRL's `_compute_loss` the loss.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from trl import GRPOTrainer

from rl.distill import token_advantages


class Feed(Protocol):
    """Brings this rank's share of a generation batch (rl.feed.RolloutFeed)."""

    def rows(self, trainer: RolloutTrainer, count: int) -> list[dict[str, Any]]:
        """`count` rows: TRL's columns, and `prompt_ids`, `completion_ids`, `logprobs` of finished completions."""
        ...


class Passes(Protocol):
    """Computes log-probabilities and losses (rl.shared_prefix.passes.SharedPasses). `stock` is TRL's own method."""

    def build(self, stock: Callable[[Any], dict[str, Any]], rows: Any) -> dict[str, Any]:
        """TRL's generation batch of these rows."""
        ...

    def split(self, batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        """The shuffled batch in mini-batches."""
        ...

    def replaying(self, experts: Sequence[Any]) -> AbstractContextManager[None]:
        """Inside, `score` lets a mixture of experts visit the servers' experts."""
        ...

    def score(self, stock: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Log-probabilities, entropies and the router's loss of completions."""
        ...

    def loss(self, stock: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch."""
        ...


class RolloutTrainer(GRPOTrainer):
    """GRPO on completions that were sampled, graded and selected before TRL sees them.

    Overrides these private methods of TRL 1.16 and no others; tests/rl/test_trl_contract.py fails if one changes:

    - `_generate_and_score_completions`: TRL's own prompts are placeholders. The feed puts rows in their place, so that
      dynamic sampling and grading happen once for all ranks; TRL's public `rollout_func` hands over the completions.
    - `_prepare_inputs`: TRL shuffles rows. Shared prefixes need the rows of a group in one mini-batch.
    - `_get_per_token_logps_and_entropies`: a packed pass in place of one row per completion.
    - `_compute_loss`: a micro-batch is cut by tokens, with a backward pass for each part.

    Args:
        feed: brings the rows.
        passes: a function from this trainer to the `Passes` object; None keeps TRL's passes.
        banned_ids: tokens with probability 0 in sampling, and so for policy and reference.
        **trl: arguments of GRPOTrainer.
    """

    def __init__(
        self,
        *,
        feed: Feed,
        passes: Callable[[RolloutTrainer], Passes] | None = None,
        banned_ids: Sequence[int] = (),
        **trl: Any,
    ) -> None:
        # TRL warns that rollout_func may change; the contract test watches it.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        super().__init__(rollout_func=self._hand_over, **trl)
        for model in (self.model, self.ref_model):
            if model is not None and banned_ids:
                ban_tokens(self.accelerator.unwrap_model(model), banned_ids)
        # Selects TRL's branches for completions from vLLM: the learner's log-probabilities before the update, and the
        # importance-sampling correction. TRL's vLLM client is not built, because it cannot reach CPU servers.
        self.use_vllm = True
        # Keeps TRL from pushing the weights, which the feed does.
        self._last_loaded_step = 0
        # TRL's image logging gathers only on ranks with pictures; with a text-only rank the others would wait forever.
        self.log_multimodal = False
        self._buffered_inputs: Any = None
        self._rows: list[dict[str, Any]] = []
        self.feed, self.passes = feed, passes(self) if passes else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:  # type: ignore[union-attr]
            raise RuntimeError("evaluation runs through rl.evaluate, not through the trainer")
        self._last_loaded_step = self.state.global_step
        self._rows = self.feed.rows(self, len(inputs))
        stock = super()._generate_and_score_completions
        batch = self.passes.build(stock, self._rows) if self.passes else stock(self._rows)
        if self._rows and "teacher_logprobs" in self._rows[0]:
            batch["advantages"] = token_advantages(self._rows, batch["completion_mask"])
        return batch

    def _hand_over(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's rollout_func: returns this rank's completions from the feed."""
        return {
            name: [row[name] for row in self._rows] for name in ("prompt_ids", "completion_ids", "logprobs")
        }

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.passes is None or not self.model.training:  # type: ignore[union-attr]
            return super()._prepare_inputs(generation_batch)
        parts = self.args.steps_per_generation  # type: ignore[attr-defined]
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = self.passes.split(batch, parts)
        return self._buffered_inputs[self._step % parts]

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        stock = super()._get_per_token_logps_and_entropies
        return self.passes.score(stock, *args, **options) if self.passes else stock(*args, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        stock = super()._compute_loss
        return self.passes.loss(stock, model, inputs) if self.passes else stock(model, inputs)


def ban_tokens(model: Any, token_ids: Sequence[int]) -> None:
    """Give the learner's distribution no probability for `token_ids`, as sampling does.

    If only one side bans them, every importance ratio is off by the banned tokens' share (measured: 0.0056 per token).
    The ban is a bias of the output head, which both the plain forward and TRL's fused head add. The bias is a buffer,
    so checkpoints do not contain it and the optimizer does not train it.
    """
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    bias[list(token_ids)] = -1e4  # finite: 0 x -inf would make the entropy NaN
    if hasattr(head.weight, "ds_status"):  # ZeRO-3: TRL asks weight and bias whether they are gathered
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        bias.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    del head.bias
    head.register_buffer("bias", bias, persistent=False)


def reward_function(name: str) -> Callable[..., list[float | None]]:
    """A TRL reward function that returns one term's scores of the graded rows; None for rows it does not grade."""

    def score(scores: list[dict[str, float]], **_: Any) -> list[float | None]:
        return [row.get(name) for row in scores]

    score.__name__ = name
    return score
