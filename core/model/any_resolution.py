"""The AIMv2 tower at any resolution: learned positions are interpolated to each image; attention stays within an image.

Axis N holds the patches of all images, one image after the other. An image's patches come block by block, row-major;
a block is the 2x2 patches that become one image token. This is the order of Qwen2-VL's image processor, and TRL and
vLLM split it by `image_grid_thw`. A block's features lie side by side, as InternVL's pixel shuffle would order them.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig
from transformers.models.aimv2.modeling_aimv2 import (
    Aimv2Attention,
    Aimv2Encoder,
    Aimv2RMSNorm,
    Aimv2VisionEmbeddings,
    Aimv2VisionModel,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from core.model.configuration import BLOCK


def interpolated_positions(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The positions (side * side, hidden) of a square grid, resized to (rows * columns, hidden), block by block.

    Bicubic in float32, corners not aligned, no antialiasing. At the learned size the learned values are unchanged.

    Source: the report says that SAIL-ViT-AnyRes interpolates; the method is ours (as DINOv2 and transformers'
    `interpolate_pos_encoding`).
    """
    side = isqrt(len(table))
    if (rows, columns) != (side, side):
        square = table.float().T.reshape(1, -1, side, side)
        stretched = interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        table = stretched[0].flatten(1).T.to(table.dtype)
    blocks = table.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK, -1)
    return blocks.transpose(1, 2).reshape(rows * columns, -1)


class AnyResolutionAttention(Aimv2Attention):
    """Attention within each image of a row: one projection for all patches, one attention per image."""

    def forward(  # type: ignore[override]  # one argument more
        self, hidden_states: torch.Tensor, attention_mask: None = None, *, lengths: Sequence[int], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """(1, N, hidden) in and out; `lengths` are the patches of each image."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        states = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(lengths, dim=2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        images = [
            attend(self, q, k, v, None, is_causal=False, scaling=self.scale, dropout=dropout)[0]
            for q, k, v in zip(*states, strict=True)
        ]
        return self.out_proj(torch.cat(images, dim=1).flatten(2)), None


class AnyResolutionTower(Aimv2VisionModel):
    """AIMv2 with the weights, and the weights' names, of the fixed-size tower.

    All images run as one row, so every module is called exactly once per forward pass: under ZeRO-3 the ranks must
    gather weights in step.
    """

    def __init__(self, config: Aimv2VisionConfig) -> None:
        # Skip AIMv2's __init__, which would build attention layers that are discarded.
        super(Aimv2VisionModel, self).__init__(config)
        self.embeddings = Aimv2VisionEmbeddings(config)
        self.encoder = Aimv2Encoder(config)  # type: ignore[arg-type]  # annotated with the two towers' config
        for layer in self.encoder.layers:
            layer.attention = AnyResolutionAttention(config)
        self.rms_norm = Aimv2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Features (1, N, hidden) of patches (N, 3 * patch_size**2) of images of (1, rows, columns) patches each."""
        grids = checked_grids(pixel_values, image_grid_thw)
        embeddings: Any = self.embeddings
        # A convolution over exactly one patch is a linear map; the module is called so that its hooks run.
        patches = pixel_values.unflatten(1, (-1, embeddings.patch_size, embeddings.patch_size))
        hidden = embeddings.rms_norm(embeddings.patch_embed(patches).flatten(1))
        table = embeddings.position_embedding(embeddings.position_ids)[0]
        positions = {grid: interpolated_positions(table, *grid) for grid in set(grids)}
        hidden = hidden + torch.cat([positions[grid] for grid in grids])
        lengths = [rows * columns for rows, columns in grids]
        outputs = self.encoder(inputs_embeds=hidden[None], lengths=lengths, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=self.rms_norm(outputs.last_hidden_state))


def checked_grids(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of patches of each image. Raises ValueError if they and the patches disagree."""
    grids = [(rows, columns) for _, rows, columns in image_grid_thw.tolist()]
    expected = sum(rows * columns for rows, columns in grids)
    if expected != len(pixel_values):
        raise ValueError(
            f"{len(pixel_values)} patches for images of {grids} patches, {expected} in all: give pixel_values and "
            "image_grid_thw of the same images"
        )
    odd = [grid for grid in grids if grid[0] % BLOCK or grid[1] % BLOCK]
    if odd:
        raise ValueError(f"an image of {odd[0]} patches is not made of blocks of {BLOCK} by {BLOCK} patches")
    return grids
