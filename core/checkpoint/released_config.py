"""Converts a released config.json and preprocessor_config.json to a native configuration, and back.

If configuration and weights contradict each other, the weights decide. Every guess is noted for the user.
Sources of the released keys: public ports of SAIL-VL2 and InternVL2, whose configuration it extends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from core.checkpoint.released_names import RELEASED_HEAD
from core.checkpoint.shards import Entry, LayoutError
from core.model import configuration
from core.model.configuration import SailVL2Config
from core.strict import ConfigError, parse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from core.model.image_patches import SailVL2AnyResImageProcessor
    from core.model.image_tiles import SailVL2ImageProcessor

Read = TypeVar("Read", bound=BaseModel)

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
AUTO_MAP = {
    "AutoConfig": "configuration_sailvl.SAILVLConfig",
    "AutoModel": "modeling_sailvl.SAILVLModel",
    "AutoModelForCausalLM": "modeling_sailvl.SAILVLModel",
}
"""The file in which transformers looks for the released code; an export without `--like` does not have it."""
_VISION: dict[str, Any] = configuration.DEFAULT_VISION
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
_WITHOUT_MEANING = {
    *("_attn_implementation", "_attn_implementation_autoset", "add_cross_attention", "attn_implementation"),
    *("auto_map", "cross_attention_hidden_size", "finetuning_task", "is_decoder", "max_window_layers"),
    *("model_type", "prefix", "pruned_heads", "task_specific_params", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "use_bfloat16"),
}
"""Keys that transformers wrote into every configuration at the time of the release, beside generation parameters."""
_UNDERSTOOD_PREPROCESSOR = {
    *("any_resolution", "auto_map", "crop_size", "do_center_crop", "do_convert_rgb", "do_resize"),
    *(
        "feature_extractor_type",
        "image_processor_type",
        "image_size",
        "patch_size",
        "processor_class",
        "size",
    ),
}


class _Released(BaseModel):
    """A part of a released configuration: the keys that are read, all others ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Top(_Released):
    vision_config: dict[str, Any]
    llm_config: dict[str, Any]
    downsample_ratio: PositiveFloat = 0.5
    force_image_size: PositiveInt | None = None
    select_layer: int = -4
    """The default is that of the released configuration class."""
    any_resolution: bool = False
    """Our key, written by an export without a release and set by `--any-resolution`. No released key is known."""
    ps_version: Literal["v2"]
    """The order of InternVL's pixel shuffle. The released code's default, v1, has no native counterpart."""
    pad2square: Literal[False] = False
    tie_word_embeddings: bool | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: None = None


class _Vision(_Released):
    hidden_size: PositiveInt = _VISION["hidden_size"]
    intermediate_size: PositiveInt = _VISION["intermediate_size"]
    num_hidden_layers: PositiveInt = _VISION["num_hidden_layers"]
    num_attention_heads: PositiveInt = _VISION["num_attention_heads"]
    num_channels: Literal[3] = 3
    image_size: PositiveInt = _VISION["image_size"]
    patch_size: PositiveInt = _VISION["patch_size"]
    rms_norm_eps: PositiveFloat = _VISION["rms_norm_eps"]
    attention_dropout: float = 0.0
    initializer_range: PositiveFloat = 0.02
    qkv_bias: bool = False
    use_bias: bool = False


class _Llm(_Released):
    architectures: list[str] | None = None
    model_type: str | None = None
    num_hidden_layers: PositiveInt
    num_experts: NonNegativeInt | None = None
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool | None = None
    quantization_config: None = None


class _Images(_Released):
    """Keys that both files may have; preprocessor_config.json takes precedence."""

    min_dynamic_patch: PositiveInt = 1
    max_dynamic_patch: PositiveInt = 12
    use_thumbnail: bool = True
    dynamic_image_size: bool = True
    image_mean: list[float] = Field(default=list(_MEAN), min_length=3, max_length=3)
    image_std: list[PositiveFloat] = Field(default=list(_STD), min_length=3, max_length=3)
    resample: Literal[3] = 3
    """Pillow's number of the resampling filter; 3 is bicubic."""
    rescale_factor: PositiveFloat = 1 / 255
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    longest_edge: PositiveInt = 1792
    """Longest side of an any-resolution image, in pixels; our key, as no released key is known. Source: the report's
    1792x1792."""
    use_msac: bool = False
    """Whether images are tiled at two scales."""


_TILING = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail", "dynamic_image_size")
_OPTIONAL_TILING = ("use_msac",)
"""Keys that a release may leave out without a note."""


def native_config(
    released: Mapping[str, Any],
    entries: Mapping[str, Entry],
    *,
    head_is_embedding: bool,
    image_token_id: int,
    notes: list[str],
) -> SailVL2Config:
    """The native configuration of a released checkpoint; assumptions go to `notes`.

    `entries` are its tensors by their released names. `head_is_embedding`: an output layer is stored and equals the
    embedding. Raises LayoutError for values that contradict the weights or have no native counterpart.
    """
    top = _read(_Top, released, CONFIG)
    vision = _read(_Vision, top.vision_config, f"{CONFIG}: vision_config")
    llm = _read(_Llm, top.llm_config, f"{CONFIG}: llm_config")
    _agree_on_depth(vision, llm, entries)
    if top.force_image_size not in (None, vision.image_size):
        raise LayoutError(
            f"{CONFIG}: force_image_size={top.force_image_size}, vision_config.image_size={vision.image_size}: a tile "
            "has one size; set both to the size that fits pos_embed"
        )
    if vision.qkv_bias != vision.use_bias:
        raise LayoutError(
            f"{CONFIG}: vision_config.qkv_bias={vision.qkv_bias}, use_bias={vision.use_bias}: a native tower has "
            "biases in all attention layers or in none"
        )
    dtype = top.torch_dtype or top.dtype
    if dtype is None:
        dtype = _DTYPES[next(iter(entries.values())).dtype]
        notes.append(f"config.json does not give the data type; the first tensor's is used: {dtype}")
    text = _text_config(top, llm, entries, head_is_embedding, notes)
    return SailVL2Config(
        vision_config={
            "model_type": "aimv2_vision_model",
            **vision.model_dump(exclude={"use_bias"}),
            "mlp_bias": vision.use_bias,
            "use_head": False,
            "dtype": dtype,
        },
        text_config={**text, "dtype": dtype},
        image_token_id=image_token_id,
        downsample_ratio=top.downsample_ratio,
        any_resolution=top.any_resolution,
        vision_feature_layer=_feature_layer(top.select_layer, vision.num_hidden_layers),
        architectures=["SailVL2ForConditionalGeneration"],
        dtype=dtype,
    )


def image_processor(
    released: Mapping[str, Any], preprocessor: Mapping[str, Any], config: SailVL2Config, notes: list[str]
) -> SailVL2ImageProcessor | SailVL2AnyResImageProcessor:
    """The native image processor of a released checkpoint; `preprocessor` is {} if the release ships none."""
    from core.model.image_patches import SailVL2AnyResImageProcessor
    from core.model.image_tiles import SailVL2ImageProcessor

    notes += [
        f"{key}: {preprocessor[key]} from {PREPROCESSOR} is used; {CONFIG} has {released[key]}"
        for key in _TILING
        if key in preprocessor and key in released and preprocessor[key] != released[key]
    ]
    given = {key: released[key] for key in (*_TILING, *_OPTIONAL_TILING) if key in released} | {
        key: value for key, value in preprocessor.items() if value is not None
    }
    images = _read(_Images, given, PREPROCESSOR if preprocessor else CONFIG)
    needed = ("image_mean", "image_std") if config.any_resolution else (*_TILING, "image_mean", "image_std")
    missing = [key for key in needed if key not in given]
    if missing:
        assumed = ", ".join(f"{key}={getattr(images, key)}" for key in missing)
        notes.append(f"not set by the checkpoint: {assumed} is assumed")
    if images.min_dynamic_patch > images.max_dynamic_patch:
        raise LayoutError(
            f"min_dynamic_patch={images.min_dynamic_patch} is above max_dynamic_patch={images.max_dynamic_patch}"
        )
    side = config.vision_config.image_size
    notes += [
        f"{PREPROCESSOR} has {key}={preprocessor[key]}; tiles are {side} px, the size of the tower"
        for key in ("image_size", "size", "crop_size")
        if isinstance(preprocessor.get(key), int) and preprocessor[key] != side
    ]
    unused = sorted(set(preprocessor) - set(_Images.model_fields) - _UNDERSTOOD_PREPROCESSOR)
    if unused:
        notes.append(f"{PREPROCESSOR} keys that are not used: {', '.join(unused)}")
    pixels: dict[str, Any] = {
        "image_mean": images.image_mean,
        "image_std": images.image_std,
        "rescale_factor": images.rescale_factor,
    }
    if config.any_resolution:
        return SailVL2AnyResImageProcessor(
            size={"longest_edge": images.longest_edge}, patch_size=config.vision_config.patch_size, **pixels
        )
    return SailVL2ImageProcessor(
        size={"height": side, "width": side},
        crop_to_patches=images.dynamic_image_size,
        min_patches=images.min_dynamic_patch,
        max_patches=images.max_dynamic_patch,
        use_thumbnail=images.use_thumbnail,
        use_msac=images.use_msac,
        **pixels,
    )


def released_config(
    config: SailVL2Config, images: SailVL2ImageProcessor | SailVL2AnyResImageProcessor
) -> dict[str, Any]:
    """The released config.json of a native core; `images` is its image processor.

    Raises LayoutError for values that the released layout cannot express.
    """
    vision, text = config.vision_config, config.text_config
    mixture = text.model_type == "qwen3_moe"
    if config.projector_hidden_act != "gelu":
        raise LayoutError(
            f"config.json: projector_hidden_act={config.projector_hidden_act!r}: the released adapter has a GELU"
        )
    return {
        "architectures": ["SAILVLModel"],
        "auto_map": dict(AUTO_MAP),
        "downsample_ratio": config.downsample_ratio,
        "force_image_size": vision.image_size,
        "llm_config": {
            "architectures": ["Qwen3MoeForCausalLM" if mixture else "Qwen3ForCausalLM"],
            "model_type": text.model_type,
            **_released_text(text),
            "torch_dtype": _dtype_name(text, config),
        },
        "model_type": "sailvl",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": _select_layer(
            int(config.vision_feature_layer),  # type: ignore[arg-type]
            vision.num_hidden_layers,
        ),
        "torch_dtype": _dtype_name(config, config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": {
            "model_type": "aimv2",
            **{key: getattr(vision, key) for key in _Vision.model_fields if key != "use_bias"},
            "use_bias": vision.mlp_bias,
            "torch_dtype": _dtype_name(vision, config),
        },
        **_released_tiling(images),
    }


def released_preprocessor(
    config: SailVL2Config, images: SailVL2ImageProcessor | SailVL2AnyResImageProcessor
) -> dict[str, Any]:
    """The released preprocessor_config.json of a native image processor."""
    return {
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "rescale_factor": images.rescale_factor,
        **_released_tiling(images),
        **({"use_msac": images.use_msac} if hasattr(images, "use_msac") else {}),
    }


def different_keys(one: Any, other: Any, path: str = "") -> list[str]:
    """The keys, `llm_config.vocab_size`, at which two configurations differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted({*one, *other})
        return [
            found
            for key in keys
            for found in different_keys(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if one == other else [path]


def _read(model: type[Read], values: Mapping[str, Any], where: str) -> Read:
    try:
        return parse(model, dict(values), where)
    except ConfigError as error:
        raise LayoutError(str(error)) from None


def _agree_on_depth(vision: _Vision, llm: _Llm, entries: Mapping[str, Entry]) -> None:
    """Refuse a number of layers that differs from the weights', before a model of that size is built."""
    counts = (
        (
            "vision_config.num_hidden_layers",
            vision.num_hidden_layers,
            r"vision_model\.trunk\.blocks\.(\d+)\.",
        ),
        ("llm_config.num_hidden_layers", llm.num_hidden_layers, r"language_model\.model\.layers\.(\d+)\."),
        (
            "llm_config.num_experts",
            llm.num_experts or 0,
            r"language_model\.model\.layers\.\d+\.mlp\.experts\.(\d+)\.",
        ),
    )
    for key, said, pattern in counts:
        found = len({match[1] for match in map(re.compile(pattern).match, entries) if match})
        if said != found:
            raise LayoutError(
                f"{CONFIG} says {key}={said}, the weights have {found}; they belong to different checkpoints or are "
                "incomplete: download both again"
            )


def _text_config(
    top: _Top, llm: _Llm, entries: Mapping[str, Entry], head_is_embedding: bool, notes: list[str]
) -> dict[str, Any]:
    """The fields of a Qwen3Config or Qwen3MoeConfig with its model_type."""
    from dataclasses import fields

    from transformers import GenerationConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

    label = (llm.architectures or [llm.model_type or "nothing"])[0]
    if not any(name.endswith(".self_attn.q_norm.weight") for name in entries):
        raise LayoutError(
            f"the language model ({label} by {CONFIG}) has no q_norm, so it is not a Qwen3: SAIL-VL2 is "
            "built on Qwen3; older SAIL-VL is built on Qwen2.5, which is not supported"
        )
    kind: Any = Qwen3MoeConfig if llm.num_experts else Qwen3Config
    expected = "Qwen3MoeForCausalLM" if llm.num_experts else "Qwen3ForCausalLM"
    if label not in (expected, kind.model_type):
        notes.append(f"{CONFIG} says {label}, the weights are those of a {expected} and are read as such")
    common = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(kind)} - common | {"head_dim", "rope_theta", "rope_scaling"}
    given = {key: value for key, value in top.llm_config.items() if key in own}
    if "rope_parameters" not in given:
        given.setdefault("rope_theta", 10000.0)  # Qwen3Config's in the release's transformers
    known = own | common | _WITHOUT_MEANING | vars(GenerationConfig()).keys()
    unused = sorted(top.llm_config.keys() - known)
    if unused:
        notes.append(f"llm_config keys without a meaning in {kind.__name__}: {', '.join(unused)}")
    return {
        "model_type": kind.model_type,
        **given,
        "tie_word_embeddings": _tied(top, llm, entries, head_is_embedding, notes),
    }


def _tied(
    top: _Top, llm: _Llm, entries: Mapping[str, Entry], head_is_embedding: bool, notes: list[str]
) -> bool:
    """Whether the output layer is tied to the embedding: as configured, if the weights allow it."""
    said = llm.tie_word_embeddings if llm.tie_word_embeddings is not None else top.tie_word_embeddings
    if None not in (llm.tie_word_embeddings, top.tie_word_embeddings) and said != top.tie_word_embeddings:
        notes.append(
            f"tie_word_embeddings: {said} from llm_config is used; the top level of {CONFIG} has "
            f"{top.tie_word_embeddings}"
        )
    if RELEASED_HEAD not in entries:
        if said is None:
            notes.append(
                f"{CONFIG} does not say whether embeddings are tied; no lm_head is stored, so they are"
            )
        # Untied by configuration: the check of the tensors reports lm_head as missing.
        return said is not False
    if not said:
        return False
    if not head_is_embedding:
        raise LayoutError(
            f"{CONFIG} ties the output layer to the embedding, but {RELEASED_HEAD} in "
            f"{entries[RELEASED_HEAD].file} differs from it; correct llm_config.tie_word_embeddings"
        )
    return True


def _feature_layer(select_layer: int, blocks: int) -> int:
    """The native index of the tower's output that the adapter reads.

    The released tower collects the outputs of its blocks; transformers collects the inputs of the blocks and the last
    output. So indices from the end agree, and indices from the start differ by one. -1 is the normed output in both.
    """
    if -blocks <= select_layer < 0:
        return select_layer
    if 0 <= select_layer < blocks - 1:
        return select_layer + 1
    raise LayoutError(
        f"{CONFIG}: select_layer={select_layer} of {blocks} blocks: must be from {-blocks} to -1, or from 0 to "
        f"{blocks - 2} (the last block's output without the norm after it has no native index)"
    )


def _select_layer(feature_layer: int, blocks: int) -> int:
    if -blocks <= feature_layer < 0:
        return feature_layer
    if 0 < feature_layer < blocks:
        return feature_layer - 1
    raise LayoutError(
        f"config.json: vision_feature_layer={feature_layer} of {blocks} blocks: the released layout reads the output "
        f"of a block, from {-blocks} to -1 or from 1 to {blocks - 1}"
    )


def _released_text(text: PreTrainedConfig) -> dict[str, Any]:
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    dropped = (
        *("architectures", "dtype", "model_type", "rope_parameters", "layer_types"),
        *("transformers_version", "_name_or_path"),
    )
    given = {key: value for key, value in text.to_dict().items() if key not in dropped}
    if "num_local_experts" in given:
        given["num_experts"] = given.pop("num_local_experts")
    scaling = None if kind == "default" else {"rope_type": kind, **rope}
    return {**given, "rope_theta": theta, "rope_scaling": scaling}


def _released_tiling(images: SailVL2ImageProcessor | SailVL2AnyResImageProcessor) -> dict[str, Any]:
    from core.model.image_tiles import SailVL2ImageProcessor

    if not isinstance(images, SailVL2ImageProcessor):
        return {"any_resolution": True, "longest_edge": dict(images.size)["longest_edge"]}
    return {
        "min_dynamic_patch": images.min_patches,
        "max_dynamic_patch": images.max_patches,
        "use_thumbnail": images.use_thumbnail,
        "dynamic_image_size": images.crop_to_patches,
    }


def _dtype_name(part: PreTrainedConfig, whole: PreTrainedConfig) -> str:
    return str(part.dtype or whole.dtype or "float32").removeprefix("torch.")
