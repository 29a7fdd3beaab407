"""The available sizes of core, as configurations without weights: SAIL-VL2's three and two small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.model.released_sizes import DEFAULT_VISION, TEXT
from core.model.tiny import IMAGENET_MEAN, IMAGENET_STD, TinySize, tiny_config, tiny_processor
from core.model.tokenizer import (
    IMAGE_TOKEN,
    RELEASED_IDS,
    build_padded_tokenizer,
    build_word_tokenizer,
)
from core.strict import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from core.model.configuration import SailVL2Config
    from core.model.processing import SailVL2Processor

SMALL = {
    "tiny": TinySize(),
    "mid": TinySize(
        image_px=448,
        vision_hidden=256,
        vision_layers=6,
        vision_mlp=512,
        text_hidden=384,
        text_layers=8,
        text_heads=6,
        text_head_dim=64,
        text_mlp=1024,
    ),
}
"""`tiny` is the demo's architecture; `mid` has 18M parameters and real tiles: 448 px, 256 tokens each."""

MAX_TILES = 10
"""Most tiles that the released image processor cuts from an image, without the thumbnail."""
WORDS = ("compute", "A", "B", "plus", "minus", "digit", "cell", "question", "read", "image", "yes", "no")
"""Default words of the word-level tokenizer."""

SIZES = (*SMALL, *TEXT)


@dataclass(frozen=True)
class Blueprint:
    """A core without its weights."""

    config: SailVL2Config
    tokenizer: PreTrainedTokenizerBase
    processor: SailVL2Processor


def core_config(size: str) -> SailVL2Config:
    """The configuration of one of the real sizes: SAIL-ViT-Huge and a Qwen3. Raises ConfigError for another name."""
    from core.model.configuration import SailVL2Config

    if size not in TEXT:
        raise ConfigError(f"size {size!r}: {nearest(size, TEXT)}")
    return SailVL2Config(
        vision_config=dict(DEFAULT_VISION),
        text_config=dict(TEXT[size]),
        image_token_id=RELEASED_IDS[IMAGE_TOKEN],
    )


def blueprint(size: str, *, words: Sequence[str] = WORDS, dtype: str | None = None) -> Blueprint:
    """Configuration, tokenizer and processor of a size.

    The released vocabulary is not available, so every size gets a word-level tokenizer of `words`. For the real sizes
    it is padded to the size of the released vocabulary, with the chat tokens at their released ids. `dtype` is float32
    or bfloat16; default: float32 for tiny and mid, bfloat16 for the others. Raises ConfigError for an unknown size and
    for invalid words.
    """
    if size not in SIZES:
        raise ConfigError(f"size {size!r}: {nearest(size, SIZES)}")
    try:
        tokenizer = (build_word_tokenizer if size in SMALL else build_padded_tokenizer)(words)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if size in SMALL:
        config = tiny_config(tokenizer, SMALL[size])
        processor = tiny_processor(tokenizer, SMALL[size])
    else:
        config = core_config(size)
        processor = _tiling_processor(tokenizer, config)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype or ("float32" if size in SMALL else "bfloat16")
    return Blueprint(config, tokenizer, processor)


def _tiling_processor(tokenizer: PreTrainedTokenizerBase, config: SailVL2Config) -> SailVL2Processor:
    from core.model.image_tiles import SailVL2ImageProcessor
    from core.model.processing import SailVL2Processor

    side = config.vision_config.image_size
    image_processor = SailVL2ImageProcessor(
        size={"height": side, "width": side},
        min_patches=1,
        max_patches=MAX_TILES,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    assert config.image_seq_length is not None
    return SailVL2Processor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
