"""Lets a native core take packed rows: its backbone's forward gets two arguments beyond the Hugging Face signature.

`packed` (rl.shared_prefix.rows.Packed) defines which tokens attend to which and which hidden states are returned;
`features` are the tower's outputs instead of pixels. They reach the backbone as core.training.kept describes.
"""

from __future__ import annotations

from typing import Any

import torch

from core.training.kept import take_keep
from rl.shared_prefix.attention import SHARED_PREFIX, SHARED_PREFIX_FLEX
from rl.shared_prefix.routing import take_experts
from rl.shared_prefix.rows import Packed


def core_of(model: Any) -> Any:
    """The native core inside a LoRA model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def take_packed_rows(core: Any, *, flex: bool = False) -> None:
    """Let `core.model` take `packed` and `features`; calls without them are unchanged.

    `flex` chooses torch's flex attention for packed rows, which has a backward pass on GPUs only.
    """
    take_keep(core)
    take_experts(core)
    backbone = core.model
    plain = backbone.forward
    core.config.text_config._attn_implementation = SHARED_PREFIX_FLEX if flex else SHARED_PREFIX

    def forward(
        *args: Any, packed: Packed | None = None, features: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        if packed is None:
            return plain(*args, **inputs)
        if features is not None:
            inputs["inputs_embeds"] = _embedded(backbone, inputs.pop("input_ids"), features)
        # The layout defines attention. transformers uses a mask with four axes unchanged.
        inputs["attention_mask"] = torch.ones((1, 1, 1, 1), device=packed.keep.device)
        if packed.experts is not None:
            inputs["experts"] = packed.experts
        return plain(*args, prefix=packed.layout, keep=packed.keep, **inputs)

    backbone.forward = forward


def _embedded(backbone: Any, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Embeddings (1, tokens, hidden) in which the adapter's output for `features` replaces the image tokens."""
    embeds = backbone.get_input_embeddings()(input_ids)
    if not len(
        features
    ):  # the adapter runs even without images: DDP and DeepSpeed reduce its gradients on all ranks
        blank = features.new_zeros((1, *features.shape[1:]))
        return embeds + backbone.multi_modal_projector(blank).sum() * 0
    images = backbone.multi_modal_projector(features).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(backbone.get_placeholder_mask(input_ids, embeds, images), images)
