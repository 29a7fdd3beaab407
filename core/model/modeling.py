"""The SAIL-VL2 model, composed of transformers' parts: InternVL around an AIMv2 tower and a Qwen3.

It adds to InternVL: contiguous features before the pixel shuffle, the router's output of a mixture-of-experts text
model (for its balancing loss), several completions per row of several tiles, and images of any resolution.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import (
    InternVLCausalLMOutputWithPast,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLModelOutputWithPast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.generic import can_return_tuple

from core.model.any_resolution import AnyResolutionTower
from core.model.configuration import BLOCK, SailVL2Config, tokens_per_tile


@dataclass
class SailVL2ModelOutput(InternVLModelOutputWithPast):
    """InternVL's output and, for a mixture of experts on request, the router's logits per layer."""

    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class SailVL2CausalLMOutput(InternVLCausalLMOutputWithPast):
    """InternVL's output and, for a mixture of experts on request, the router's balancing loss."""

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class SailVL2Model(InternVLModel):
    """Tower, adapter and language model without the output layer."""

    config: SailVL2Config
    config_class = SailVL2Config
    input_modalities = ("image", "text")  # type: ignore[assignment]  # InternVL's has a third, video

    def __init__(self, config: SailVL2Config):
        super().__init__(config)
        if config.any_resolution:
            self.vision_tower = AnyResolutionTower._from_config(config.vision_config)

    def pixel_shuffle(self, vision_features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """Fold each 2x2 block of patches into one: (tiles, w, h, c) -> (tiles, w/2, h/2, 4c) at 0.5.

        AIMv2's features are a transposed view of the patch convolution's output; InternVL's shuffle calls
        `.view` on them, which needs contiguous memory.
        """
        return super().pixel_shuffle(vision_features.contiguous(), scale_factor)

    def tower_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        layer: int | None = None,
    ) -> torch.Tensor:
        """The adapter's input: the tower's features of tiles, folded by the pixel shuffle.

        Shape (tiles, image_seq_length, 4 x vision hidden); for images of any resolution (image tokens of all images,
        4 x vision hidden). `layer` defaults to the configuration's.
        """
        if layer is None:
            layer = self.config.vision_feature_layer  # type: ignore[assignment]  # InternVL's may be a list
        seen = self.vision_tower(
            pixel_values=pixel_values.to(self.dtype),
            **self._grids(image_grid_thw),
            return_dict=True,
            output_hidden_states=layer != -1,
        )
        features = seen.last_hidden_state if layer == -1 else seen.hidden_states[layer]
        if self.config.any_resolution:  # the patches of a block are adjacent already
            return features.reshape(-1, BLOCK**2 * features.shape[-1])
        tiles, patches, hidden = features.shape
        side = int(patches**0.5)
        folded = self.pixel_shuffle(features.reshape(tiles, side, side, hidden), self.config.downsample_ratio)
        return folded.reshape(tiles, -1, folded.shape[-1])

    def _features_of_nothing(self, nothing: torch.Tensor) -> torch.Tensor:
        """Zero, computed by the tower and the adapter on a blank tile; `nothing` is an empty `pixel_values`.

        DeepSpeed gathers weights and reduces gradients on all ranks in step. If a rank without images skipped the
        tower, the other ranks would wait for it.
        """
        any_resolution = self.config.any_resolution
        blank = nothing.new_zeros((BLOCK**2 if any_resolution else 1, *nothing.shape[1:]))
        seen = self.tower_features(blank, torch.tensor([[1, BLOCK, BLOCK]]) if any_resolution else None)
        return self.multi_modal_projector(seen).sum() * 0

    def _grids(self, image_grid_thw: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The second argument of the any-resolution tower; empty for the fixed-size tower."""
        if self.config.any_resolution != (image_grid_thw is not None):
            got = "without" if image_grid_thw is None else "with"
            raise ValueError(
                f"any_resolution={self.config.any_resolution}, but images came {got} image_grid_thw: the core and its "
                "image processor do not belong together; an any-resolution core reads the patches and grids of "
                "SailVL2AnyResImageProcessor, any other core reads tiles"
            )
        return {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw}

    @can_return_tuple
    def get_image_features(  # type: ignore[override]  # one argument more
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """InternVL's output with `pooler_output` (tiles, image_seq_length, hidden).

        At any resolution, `pooler_output` is a tuple with one (image tokens, hidden) per image, as vLLM expects it.
        """
        if not self.config.any_resolution and image_grid_thw is None:
            return super().get_image_features(
                pixel_values=pixel_values, vision_feature_layer=vision_feature_layer, **kwargs
            )
        folded: Any = self.tower_features(pixel_values, image_grid_thw, vision_feature_layer)
        assert image_grid_thw is not None
        tokens = (image_grid_thw.prod(-1) // BLOCK**2).tolist()
        return BaseModelOutputWithPooling(
            last_hidden_state=folded, pooler_output=self.multi_modal_projector(folded).split(tokens)
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SailVL2ModelOutput:
        """Hidden states (rows, tokens, hidden) of rows in which image tokens stand for `pixel_values`.

        Differs from InternVLModel: it returns `router_logits`, and it accepts `pixel_values` of zero tiles (a
        micro-batch of text-only rows cut from a mixed batch). Raises ValueError if the number of image tokens in
        `input_ids` does not match the tiles.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None and not len(pixel_values):
            nothing: Any = self._features_of_nothing(pixel_values)
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds.device)
        elif pixel_values is not None:
            image_features = self.get_image_features(
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
            if self.config.any_resolution:
                image_features = torch.cat(image_features)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            embeds: Any = inputs_embeds  # the annotations of transformers and torch disagree here
            mask = self.get_placeholder_mask(input_ids, embeds, image_features)  # type: ignore[arg-type]
            inputs_embeds = embeds.masked_scatter(mask, image_features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return SailVL2ModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            router_logits=getattr(outputs, "router_logits", None),
        )


class SailVL2ForConditionalGeneration(InternVLForConditionalGeneration):
    """A SAIL-VL2 core with its output layer: the policy of every stage.

    Shapes: `input_ids` (rows, tokens), in which each image takes `tiles * config.image_seq_length` copies of
    `config.image_token_id`; `pixel_values` (tiles of all rows in order, 3, image_size, image_size).

    With `config.any_resolution` an image takes a quarter as many image tokens as patches. The inputs are
    `pixel_values` (patches of all images in order, 3 * patch_size**2) and `image_grid_thw` (images, 3) with 1, rows
    and columns of patches.
    """

    config: SailVL2Config
    config_class = SailVL2Config
    input_modalities = ("image", "text")  # type: ignore[assignment]  # InternVL's has a third, video

    def __init__(self, config: SailVL2Config):
        # Skip InternVL's __init__, which would build an InternVLModel that is discarded.
        super(InternVLForConditionalGeneration, self).__init__(config)
        self.model = SailVL2Model(config)
        text = config.text_config
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def enable_input_require_grads(self) -> None:
        """As in transformers, which calls this for gradient checkpointing, but a frozen tower stays without gradients.

        transformers also makes the tower's patches require a gradient. A frozen tower would then keep its activations
        and compute a backward pass that no weight needs (benchmarks/RESULTS.md, "benchmarks.realsize").
        """
        super().enable_input_require_grads()
        tower: Any = self.model.vision_tower

        def leave_frozen(_: Any, __: Any, patches: torch.Tensor) -> torch.Tensor | None:
            frozen = not any(parameter.requires_grad for parameter in tower.parameters())
            return patches.detach() if frozen else None

        self._require_grads_hooks.append(tower.get_input_embeddings().register_forward_hook(leave_frozen))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SailVL2CausalLMOutput:
        """Logits (rows, tokens, vocabulary), and the mean next-token loss over labels other than -100.

        With `output_router_logits` (default: the text configuration's) a mixture of experts also returns its
        load-balancing loss, and adds it to the loss with weight `router_aux_loss_coef`.
        """
        text = self.config.text_config
        if output_router_logits is None:
            output_router_logits = getattr(text, "output_router_logits", False)
        if output_router_logits:
            kwargs["output_router_logits"] = True
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss: Any = None
        aux_loss: Any = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **kwargs)
        if output_router_logits and outputs.router_logits is not None:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, text.num_experts, text.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + text.router_aux_loss_coef * aux_loss.to(loss.device)
        return SailVL2CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits,
            aux_loss=aux_loss,
        )

    def _expand_inputs_for_generation(  # type: ignore[override]  # static in the base class
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # Differs from transformers, which repeats each tile: of a row with tiles a, b, one completion would see a, a
        # and the other b, b, without an error.
        pixels, grids = (model_kwargs.pop(name, None) for name in ("pixel_values", "image_grid_thw"))
        if pixels is not None and input_ids is not None and expand_size > 1:
            tokens = (input_ids == self.config.image_token_id).sum(dim=1)
            if grids is None:
                per_tile = tokens_per_tile(self.config.vision_config, self.config.downsample_ratio)
                lengths = tokens // per_tile
            else:
                lengths = tokens * BLOCK**2
                # An image belongs to the row in which the tokens of all images up to it have ended.
                ends = (grids.prod(-1) // BLOCK**2).cumsum(0)
                images = torch.searchsorted(ends, tokens.cumsum(0).to(ends), right=True)
                grids = _repeated(grids, images.diff(prepend=images.new_zeros(1)), expand_size)
            pixels = _repeated(pixels, lengths, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        given = {"pixel_values": pixels, "image_grid_thw": grids}
        return input_ids, model_kwargs | {name: value for name, value in given.items() if value is not None}


def _repeated(images: torch.Tensor, lengths: torch.Tensor, times: int) -> torch.Tensor:
    """The images of each row, repeated `times` times as a block; `lengths` (rows,) are the images of each row."""
    rows = images.split(lengths.tolist())
    return torch.cat([row.repeat(times, *[1] * (images.ndim - 1)) for row in rows])


def no_images(config: SailVL2Config) -> dict[str, torch.Tensor]:
    """Image inputs for a batch without images: the tower and the adapter run on a blank image, multiplied by zero."""
    vision = config.vision_config
    if config.any_resolution:
        return {
            "pixel_values": torch.zeros(0, vision.num_channels * vision.patch_size**2),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        }
    return {"pixel_values": torch.zeros(0, vision.num_channels, vision.image_size, vision.image_size)}
