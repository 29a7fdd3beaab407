"""The configuration of a SAIL-VL2 core: an AIMv2 tower, a two-layer adapter and a Qwen3 language model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.internvl.configuration_internvl import InternVLConfig

from core.model.released_sizes import DEFAULT_VISION

BLOCK = 2
"""Patches per side of the block that becomes one image token of an any-resolution core."""


@strict
class SailVL2Config(InternVLConfig):
    """Tower, adapter and language model of one core.

    `vision_config` is an Aimv2VisionConfig without pooling head, `text_config` a Qwen3Config or a
    Qwen3MoeConfig, as objects or as dictionaries with a `model_type`. Differs from InternVLConfig, which
    rebuilds any vision dictionary as an InternViT.

    `image_seq_length`, the language-model tokens of one tile, and `tie_word_embeddings` are derived from the parts and
    may be omitted. A value that contradicts the parts raises ValueError: a wrong token count causes a shape error far
    away, and contradicting values of tie_word_embeddings load the wrong output layer without an error (vLLM ties if
    either is true).

    With `any_resolution` an image is one grid of patches of its own size, not a set of tiles. The tower's positions
    are interpolated to that grid (core/model/any_resolution.py). `image_seq_length` then belongs to an image of the
    size for which the positions were learned.
    """

    model_type = "sailvl2"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 151671
    image_seq_length: int | None = None  # type: ignore[assignment]  # None until __post_init__ derives it
    any_resolution: bool = False
    vision_feature_select_strategy: str = "full"
    tie_word_embeddings: bool | None = None  # type: ignore[assignment]
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build both parts, derive the values that depend on them, and refuse contradictions."""
        self.vision_config = _part(self.vision_config, DEFAULT_VISION)
        self.text_config = _part(self.text_config, {"model_type": "qwen3"})
        if getattr(self.vision_config, "use_head", False):
            raise ValueError(
                "vision_config.use_head=True: a core reads the patch features and never uses an AIMv2 pooling "
                "head; set use_head=False"
            )
        if self.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}: AIMv2 has no CLS "
                'token to drop; use "full"'
            )
        if self.any_resolution and self.downsample_ratio * BLOCK != 1:
            raise ValueError(
                f"downsample_ratio={self.downsample_ratio}: an any-resolution core reads {BLOCK} by {BLOCK} patches "
                f"as one image token; use {1 / BLOCK}"
            )
        self.image_seq_length = _agreed(
            "image_seq_length",
            self.image_seq_length,
            tokens_per_tile(self.vision_config, self.downsample_ratio),
        )
        self.tie_word_embeddings = _agreed(
            "tie_word_embeddings", self.tie_word_embeddings, self.text_config.tie_word_embeddings
        )
        # Trainers compare these ids with the tokenizer's; if they are missing, trainers rewrite the generation config.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved; `any_resolution` is saved only if true."""
        fields = super().to_dict()
        if not self.any_resolution:
            del fields["any_resolution"]
        return fields


def tokens_per_tile(vision_config: PreTrainedConfig, downsample_ratio: float) -> int:
    """Language-model tokens of one tile: patches per side times the ratio, squared.

    Raises ValueError if the pixel shuffle cannot divide the patches into whole groups.
    """
    patches_per_side = vision_config.image_size // vision_config.patch_size
    side = patches_per_side * downsample_ratio
    if side < 1 or side != int(side):
        raise ValueError(
            f"{patches_per_side} patches per side cannot be downsampled by {downsample_ratio}: choose "
            "image_size and patch_size so that patches per side times the ratio is a whole number"
        )
    return int(side) ** 2


def _part(value: Any, default: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = {**(default if value is None else {"model_type": default["model_type"], **value})}
    if fields["model_type"] == DEFAULT_VISION["model_type"]:
        fields.setdefault("use_head", False)
    return AutoConfig.for_model(**fields)


def _agreed(name: str, given: Any, derived: Any) -> Any:
    if given is not None and given != derived:
        raise ValueError(
            f"{name}={given}: the parts of the model say {derived}; remove the key, or correct the parts"
        )
    return derived
