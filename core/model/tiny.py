"""Randomly initialised tiny cores: the architecture of SAIL-VL2 at a size two CPU cores can train."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt, model_validator

from core.model.tokenizer import IMAGE_TOKEN, build_word_tokenizer, generation_config, token_id
from core.strict import Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from core.model.configuration import SailVL2Config
    from core.model.processing import SailVL2Processor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TinySize(Strict):
    """The size of a tiny core; the defaults give the demo's 763,000 parameters (with its vocabulary)."""

    vision_hidden: PositiveInt = 96
    vision_layers: PositiveInt = 2
    vision_heads: PositiveInt = 4
    vision_mlp: PositiveInt = 192
    image_px: PositiveInt = 56
    """Side in pixels of the only tile, which is the whole image: tiny cores do not cut images into tiles."""
    patch_px: PositiveInt = 14
    any_resolution: bool = False
    """Images keep their size, as in SAIL-VL2-AnyRes; `image_px` is then the size of the learned positions."""
    max_image_px: PositiveInt = 224
    """Longest side in pixels of an any-resolution image."""
    text_hidden: PositiveInt = 128
    text_layers: PositiveInt = 3
    text_heads: PositiveInt = 4
    text_kv_heads: PositiveInt = 2
    text_head_dim: PositiveInt = 32
    text_mlp: PositiveInt = 256
    max_tokens: PositiveInt = 2048
    """Longest sequence, prompt and completion together."""
    initializer_range: float = Field(default=0.06, gt=0)
    """Standard deviation of the initial weights of tower and text model; at 0.02, reading digits stayed at chance."""
    tie_embeddings: bool = True
    experts: int = Field(default=0, ge=0)
    """Experts per layer of a mixture-of-experts text model (Qwen3-MoE); 0 is the dense Qwen3."""
    experts_per_token: PositiveInt = 2

    @model_validator(mode="after")
    def _fits(self) -> "TinySize":
        if self.image_px % (2 * self.patch_px):
            raise ValueError(
                f"image_px={self.image_px} is not a multiple of 2 x patch_px={self.patch_px}: "
                "two patches by two become one image token"
            )
        if self.any_resolution and self.max_image_px % (2 * self.patch_px):
            raise ValueError(
                f"max_image_px={self.max_image_px} is not a multiple of 2 x patch_px={self.patch_px}: images of any "
                "resolution are whole blocks of two patches by two"
            )
        if self.vision_hidden % self.vision_heads:
            raise ValueError(
                f"vision_hidden={self.vision_hidden} is not a multiple of vision_heads={self.vision_heads}"
            )
        if self.text_heads % self.text_kv_heads:
            raise ValueError(
                f"text_heads={self.text_heads} is not a multiple of text_kv_heads={self.text_kv_heads}"
            )
        if self.experts and self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds experts={self.experts}: use at most that many"
            )
        return self


def build_tiny(path: str | Path, *, words: Sequence[str], seed: int, size: TinySize | None = None) -> Path:
    """Write a randomly initialised core (float32), its processor and tokenizer to the folder `path`.

    `words` are the words of the task; the tokenizer adds chat tokens, digits, symbols and role names.
    The same words, seed and size give the same bytes, whatever torch's random state was before.
    """
    import torch

    from core.model.modeling import SailVL2ForConditionalGeneration

    size = size or TinySize()
    tokenizer = build_word_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SailVL2ForConditionalGeneration(tiny_config(tokenizer, size)).float()
    model.generation_config = generation_config(tokenizer)
    path = Path(path)
    model.save_pretrained(path)
    tiny_processor(tokenizer, size).save_pretrained(path)
    return path


def tiny_config(tokenizer: "PreTrainedTokenizerBase", size: TinySize) -> "SailVL2Config":
    """The configuration of a tiny core around this tokenizer."""
    from core.model.configuration import SailVL2Config

    vision = {
        "model_type": "aimv2_vision_model",
        "use_head": False,
        "rms_norm_eps": 1e-5,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "image_size": size.image_px,
        "patch_size": size.patch_px,
        "initializer_range": size.initializer_range,
        "dtype": "float32",
    }
    text = {
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_hidden,
        "intermediate_size": size.text_mlp,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_kv_heads,
        "head_dim": size.text_head_dim,
        "max_position_embeddings": size.max_tokens,
        "initializer_range": size.initializer_range,
        "tie_word_embeddings": size.tie_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    if size.experts:
        text |= {
            "model_type": "qwen3_moe",
            "num_experts": size.experts,
            "num_experts_per_tok": size.experts_per_token,
            "moe_intermediate_size": size.text_mlp,
            "norm_topk_prob": True,
        }
    return SailVL2Config(
        vision_config=vision,
        text_config=text,
        image_token_id=token_id(tokenizer, IMAGE_TOKEN),
        any_resolution=size.any_resolution,
        dtype="float32",
    )


def tiny_processor(tokenizer: "PreTrainedTokenizerBase", size: TinySize) -> "SailVL2Processor":
    """The processor of a tiny core: one tile per image or any size, ImageNet mean and standard deviation."""
    from core.model.image_patches import SailVL2AnyResImageProcessor
    from core.model.image_tiles import SailVL2ImageProcessor
    from core.model.processing import SailVL2Processor

    tokens = (size.image_px // size.patch_px // 2) ** 2
    if size.any_resolution:
        patches = SailVL2AnyResImageProcessor(
            size={"longest_edge": size.max_image_px}, patch_size=size.patch_px
        )
        return SailVL2Processor(patches, tokenizer, image_seq_length=tokens)
    image_processor = SailVL2ImageProcessor(
        size={"height": size.image_px, "width": size.image_px},
        min_patches=1,
        max_patches=1,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return SailVL2Processor(image_processor, tokenizer, image_seq_length=tokens)
