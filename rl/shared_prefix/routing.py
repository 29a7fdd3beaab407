"""Routing replay: the learner's mixture of experts visits the experts that the rollout server chose.

Server and learner compute the router's scores with other kernels or in other precision. Where two experts score alike,
the two sides choose differently, and the token's log-probability jumps. With R3 (arXiv:2510.11370) the learner takes
the server's choice. The experts' weights still come from the learner's own scores, so the router keeps its gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from rl.rollout.routing import routers

UNKNOWN = -1
"""In place of an expert: the server has not read this token, and the learner chooses."""


def take_experts(core: Any) -> None:
    """Let the layers of `core` with experts accept `experts` (1, N, layers, experts per token).

    The argument reaches a layer with its other arguments, also when gradient checkpointing computes the layer again.
    Calls without it are unchanged.
    """
    layers = core.model.language_model.layers
    for number, router in routers(core).items():
        _replay(layers[number], router, number)


def _replay(layer: Any, router: Any, number: int) -> None:
    plain, choose = layer.forward, router.forward
    given: list[torch.Tensor] = []

    def forward(*args: Any, experts: torch.Tensor | None = None, **inputs: Any) -> Any:
        if experts is not None:
            given.append(experts[0, :, number].long())
        try:
            return plain(*args, **inputs)
        finally:
            given.clear()

    def chosen(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, own = choose(hidden)
        if not given:
            return logits, weights, own
        (theirs,) = given
        experts = torch.where(theirs == UNKNOWN, own, theirs)
        # As Qwen3MoeTopKRouter weighs its own choice; tests/rl/test_routing.py compares them.
        weights = logits.softmax(-1, dtype=torch.float).gather(-1, experts)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), experts

    layer.forward, router.forward = forward, chosen
