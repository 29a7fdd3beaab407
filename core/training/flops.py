"""Floating-point operations of a pass: arithmetic over shapes, without torch.

Norms, rotations and softmax are left out; attention counts the pairs that a token may see.
tests/test_realsize.py compares these counts with the operations of the real passes.
"""

from __future__ import annotations

from core.model.shape import CoreShape


def forward_flops(
    shape: CoreShape, *, tokens: float, tiles: float, scored: float, pairs: float, seen: bool = True
) -> float:
    """FLOPs of one forward pass.

    Args:
        shape: the core.
        tokens: tokens that pass through the language model, image tokens included.
        tiles: tiles that pass through the tower.
        scored: positions at which the output layer computes a distribution.
        pairs: pairs of a query token and a key token of attention.
        seen: whether the tower and the adapter run.
    """
    h = shape.hidden
    feed_forward = (
        shape.experts_per_token * 3 * h * shape.expert_mlp + h * shape.experts
        if shape.experts
        else 3 * h * shape.mlp
    )
    per_token = 2 * h * (shape.query + shape.key) + feed_forward
    text = shape.layers * (tokens * per_token + 2 * pairs * shape.query) + scored * h * shape.vocabulary
    v, patches = shape.vision_hidden, shape.patches
    tile = shape.vision_layers * (patches * (4 * v * v + 3 * v * shape.vision_mlp) + 2 * patches**2 * v)
    tile += patches * 3 * shape.patch_px**2 * v + shape.tile_tokens * (4 * v * h + h * h)
    return 2 * (text + (tiles * tile if seen else 0))


def training_flops(forward: float, *, checkpointing: bool, adapters: bool) -> float:
    """FLOPs of a forward and a backward pass.

    The backward pass costs as much as two forward passes, or as one if only adapters are trained, since frozen weights
    need no gradient. Checkpointing adds a forward pass.
    """
    return forward * (1 + (1 if adapters else 2) + (1 if checkpointing else 0))
