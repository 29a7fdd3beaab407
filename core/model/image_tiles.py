"""From an image to tiles, by InternVL's rule, which the released SAIL-VL2 models use."""

from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorKwargs,
    GotOcr2ImageProcessorPil,
)
from transformers.utils import TensorType

from core.model.pictures import as_bytes, decoded


class SailVL2ImageKwargs(GotOcr2ImageProcessorKwargs, total=False):
    """GotOcr2's, and `use_thumbnail`: whether a thumbnail of the image follows if it has several tiles."""

    use_thumbnail: bool


class SailVL2ImageProcessor(GotOcr2ImageProcessorPil):
    """Tiles of one image, row by row, then its thumbnail; bicubic on eight bits, then mean and deviation.

    The grid is the one of `min_patches` to `max_patches` tiles whose aspect ratio is closest to the image's.
    Differs from GotOcr2ImageProcessorPil in three points: the thumbnail can be switched off; images that eight bits of
    RGB cannot represent are refused (core.model.pictures.as_bytes); and the name has no torchvision backend, whose
    resize gives different pixels.
    """

    valid_kwargs = SailVL2ImageKwargs
    size = {"height": 448, "width": 448}  # noqa: RUF012  # a class attribute by transformers' convention
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_to_patches = True
    use_thumbnail = True

    def fetch_images(self, images: Any) -> Any:
        """The images as they are: `preprocess` opens them, by this project's one rule."""
        return images

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As transformers'; it also accepts `core.model.pictures.Picture`."""
        return super().preprocess(decoded(images), *args, **kwargs)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """One image as an array (3, height, width) of bytes."""
        return super().process_image(as_bytes(image), *args, **kwargs)

    def _preprocess(  # type: ignore[override]  # the base class names each argument
        self,
        images: list[np.ndarray],
        *,
        use_thumbnail: bool,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> Any:
        tiles = super()._preprocess(images, return_tensors=None, **kwargs)
        if not use_thumbnail:
            _drop_thumbnails(tiles)
        return tiles.convert_to_tensors(return_tensors)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Number of tiles of an image of this size, including its thumbnail."""
        count = super().get_number_of_image_patches(height, width, images_kwargs)
        thumbnail = (images_kwargs or {}).get("use_thumbnail", self.use_thumbnail)
        return count if thumbnail or count == 1 else count - 1


def _drop_thumbnails(tiles: Any) -> None:
    kept: list[np.ndarray] = []
    start = 0
    for place, count in enumerate(tiles["num_patches"]):
        own = tiles["pixel_values"][start : start + count]
        kept += own if count == 1 else own[:-1]
        tiles["num_patches"][place] = max(count - 1, 1)
        start += count
    tiles["pixel_values"] = kept
