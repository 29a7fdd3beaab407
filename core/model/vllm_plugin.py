"""The `vllm.general_plugins` entry point that lets a stock vLLM server load a native core.

vLLM calls it in every process it starts (API server, engine core, workers), before it reads the model's
configuration. vLLM's transformers backend then finds the classes through the Auto classes and as attributes
of the `transformers` module. The plug-in also changes five things: the image that vLLM takes as the costliest, the
token that stands for an image of one token, the count of tiles if a request names its own cap, the decoding of pictures
in requests (by core/model/pictures.py, as in the learner), and the check of a checkpoint by core/checkpoint/check.py
before it is served.
"""

from functools import wraps
from pathlib import Path
from typing import Any


def register() -> None:
    """Register the core with transformers and vLLM; idempotent, as vLLM may call a plug-in more than once."""
    import core

    core.register()
    _measure_with_the_costliest_image()
    _find_the_token_of_an_image_of_one()
    _count_the_tiles_of_the_request()
    _decode_pictures_as_the_learner_does()
    _refuse_what_is_no_sound_checkpoint()


def _refuse_what_is_no_sound_checkpoint() -> None:
    """Let vLLM check a native core before it loads it, as stages do: no foreign code, only finite weights."""
    import vllm.config.model as models

    from core.checkpoint.check import check_checkpoint

    stock = models.get_config
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def checked(model: Any, *arguments: Any, **options: Any) -> Any:
        config = stock(model, *arguments, **options)
        if config.model_type == "sailvl2" and Path(model).is_dir():
            check_checkpoint(Path(model))
        return config

    models.get_config = checked


def _measure_with_the_costliest_image() -> None:
    """Let vLLM size its encoder cache and its memory by the image with the most tokens for this core.

    vLLM 0.31 assumes that this is a square with a side of 10,000 pixels. It refuses images with more tokens if a step
    takes few tokens (2,048, its default on A100s, GPUs below 70 GB and CPUs). With up to twelve tiles, a square gets
    nine and a thumbnail (2,562 tokens); a 4:3 image gets thirteen (3,330 tokens). Resizing the square also takes ten
    seconds of each start.
    """
    from vllm.model_executor.models.transformers.multimodal import MultiModalProcessingInfo
    from vllm.multimodal.parse import ImageSize

    from core.model.processing import SailVL2Processor

    stock = MultiModalProcessingInfo.get_image_size_with_most_features
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def costliest(self: Any) -> ImageSize:
        processor = self.get_hf_processor()
        if not isinstance(processor, SailVL2Processor):
            return stock(self)
        height, width = processor.costliest_image()
        return ImageSize(width=width, height=height)

    MultiModalProcessingInfo.get_image_size_with_most_features = costliest  # type: ignore[method-assign]


def _find_the_token_of_an_image_of_one() -> None:
    """Let vLLM put the features of an image of one token in that token's place.

    An image expands to `<img>`, the image tokens and `</img>`. vLLM 0.31 takes the most frequent of these tokens. If
    there is one image token (at any resolution, up to 41 pixels a side), all three occur once, and vLLM would take the
    lowest id.
    """
    from vllm.model_executor.models.transformers import multimodal

    stock = multimodal._get_embed_token_id
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def between_its_marks(replacement_ids: Any) -> int:
        ids = replacement_ids.tolist()
        return ids[1] if len(set(ids)) == len(ids) == 3 else stock(replacement_ids)

    multimodal._get_embed_token_id = between_its_marks


def _count_the_tiles_of_the_request() -> None:
    """Let vLLM attribute tiles to images by their tokens.

    vLLM 0.31 passes a request's `mm_processor_kwargs` to the processor, but counts an image's tiles by the server's own
    settings, and refuses the request if the counts differ.
    """
    from vllm.model_executor.models.transformers.multimodal import OffsetsMultiModalProcessor

    from core.model.processing import SailVL2Processor

    stock = OffsetsMultiModalProcessor._get_num_image_patches
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def counted(self: Any, hf_inputs: Any, mm_data: Any, num_images: int) -> Any:
        processor = self.info.get_hf_processor()
        if not isinstance(processor, SailVL2Processor) or processor.any_resolution:
            return stock(self, hf_inputs, mm_data, num_images)
        # Besides its tiles' tokens an image has <img> and </img>.
        return (hf_inputs["image_replacement_sizes"] - 2) // processor.image_seq_length

    OffsetsMultiModalProcessor._get_num_image_patches = counted  # type: ignore[method-assign]


def _decode_pictures_as_the_learner_does() -> None:
    """Let vLLM read the pictures of requests by our rule.

    vLLM 0.31 applies EXIF orientation and blends alpha over white as we do. But it reads every format of Pillow's (EPS
    through Ghostscript) and truncates 16 bits per channel to eight. If its command line asks for a mode other than RGB
    or a background other than white, vLLM's own decoding stays.
    """
    from vllm.multimodal.media.base import MediaWithBytes
    from vllm.multimodal.media.image import ImageMediaIO

    from core.model.pictures import Picture

    stock = ImageMediaIO.load_bytes
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def by_the_rule(self: Any, data: bytes) -> Any:
        if self.image_mode != "RGB" or self.rgba_background_color != (255, 255, 255):
            return stock(self, data)
        try:
            image = Picture(data).rgb()
        except (
            Exception
        ) as error:  # the types that Pillow raises for broken files; vLLM answers 400 to a ValueError
            raise ValueError(f"Failed to load image: {error}") from error
        return MediaWithBytes(image, data, {"image_mode": "RGB", "rule": "core.model.pictures"})

    ImageMediaIO.load_bytes = by_the_rule  # type: ignore[method-assign]
