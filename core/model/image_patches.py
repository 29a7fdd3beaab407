"""Images of any size as patches: resized to whole blocks of patches, never cut into tiles."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from core.model.pictures import as_bytes, decoded


class SailVL2AnyResImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen2-VL's patches of a still image, resized by our rule, `fitted_size`.

    `size["longest_edge"]` is the longest side in pixels. Source of 1792: the report's figure for
    SAIL-VL2-AnyRes, "up to 1792x1792".

    A call returns `pixel_values` (patches of all images, 3 * patch_size**2), `image_grid_thw` (images, 3) with 1, rows
    and columns of patches, and `num_patches` (images,).
    """

    size = {"longest_edge": 1792}  # noqa: RUF012  # transformers' own form
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    temporal_patch_size = 1

    def fetch_images(self, images: Any) -> Any:
        """The images as they are: `preprocess` opens them, by this project's one rule."""
        return images

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As transformers'; it also accepts `core.model.pictures.Picture`."""
        return super().preprocess(decoded(images), *args, **kwargs)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """One image as an array (3, height, width) of bytes. Raises as `core.model.pictures.as_bytes`."""
        return super().process_image(as_bytes(image), *args, **kwargs)

    def resize(  # type: ignore[override]  # Qwen2-VL's argument, the size of a block
        self, image: np.ndarray, size: SizeDict, resample: Any, factor: int, **kwargs: Any
    ) -> np.ndarray:
        """The image (3, height, width) at its fitted size."""
        height, width = fitted_size(*image.shape[-2:], block=factor, longest=_longest(size))
        # Skip Qwen2-VL's resize, which would apply its own rule.
        return super(Qwen2VLImageProcessorPil, self).resize(
            image, SizeDict(height=height, width=width), resample
        )

    def _preprocess(  # type: ignore[override]  # the arguments go through as they are
        self, images: list[np.ndarray], **kwargs: Any
    ) -> BatchFeature:
        inputs = super()._preprocess(images, **kwargs)
        inputs["num_patches"] = inputs["image_grid_thw"].prod(-1)
        return inputs

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Number of patches of an image of this size, without its pixels; vLLM and TRL call it by this name."""
        given = images_kwargs or {}
        longest = _longest(given.get("size") or self.size)
        rows, columns = fitted_size(height, width, block=self.patch_size * self.merge_size, longest=longest)
        return rows * columns // self.patch_size**2


def fitted_size(height: int, width: int, *, block: int, longest: int) -> tuple[int, int]:
    """Height and width in pixels at which an image is seen: whole blocks, no side longer than `longest`.

    An image with a longer side is scaled down with its aspect ratio kept. Then each side is rounded to the nearest
    multiple of `block`, at least one block. So a strip longer than `longest` / `block` to 1 is stretched, not refused.
    Raises ValueError unless `longest` is a multiple of `block`.

    Source: ours; the report says "up to 1792x1792".

    >>> [fitted_size(*size, block=28, longest=1792) for size in ((448, 448), (300, 41), (4000, 3000), (1, 5000))]
    [(448, 448), (308, 28), (1792, 1344), (28, 1792)]
    """
    if longest < block or longest % block:
        raise ValueError(
            f"longest side {longest} px: images become whole blocks of {block} px (2 by 2 patches); give a "
            f"multiple of {block}"
        )
    scale = min(1.0, longest / max(height, width))
    rows, columns = (max(block, round(side * scale / block) * block) for side in (height, width))
    return rows, columns


def _longest(size: Any) -> int:
    longest = dict(size).get("longest_edge")
    if not longest:
        raise ValueError(
            f'size={dict(size)}: an any-resolution image processor needs {{"longest_edge": pixels}}'
        )
    return longest
