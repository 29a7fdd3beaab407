"""From an image to tiles, by InternVL's rule, which the released SAIL-VL2 models use."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorKwargs,
    GotOcr2ImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)
from transformers.utils import TensorType

from core.model.pictures import as_bytes, decoded


class SailVL2ImageKwargs(GotOcr2ImageProcessorKwargs, total=False):
    """GotOcr2's and two more.

    `use_thumbnail`: whether a thumbnail of the image follows if it has several tiles. `use_msac`: whether the tiles of
    a second grid follow the first grid's (two-scale tiling).
    """

    use_thumbnail: bool
    use_msac: bool


class SailVL2ImageProcessor(GotOcr2ImageProcessorPil):
    """Tiles of one image, row by row, then its thumbnail; bicubic on eight bits, then mean and deviation.

    The grid is the one of `min_patches` to `max_patches` tiles whose aspect ratio is closest to the image's. With
    `use_msac` the tiles of a second grid come before the thumbnail (`second_grid`). If the first grid is one tile, the
    thumbnail is that tile. Source: MSAC in the authors' VLMEvalKit wrapper (vlmeval/vlm/sail_vl.py, load_image_msac).
    Differs from the wrapper, which uses MSAC only for prompts with one image: here the option holds for every image,
    because a server expands each image by itself. With `max_patches` 1 there is no second grid.
    Differs from GotOcr2ImageProcessorPil in three points. The thumbnail can be switched off. Images that eight bits of
    RGB cannot represent are refused (core.model.pictures.as_bytes). The name has no torchvision backend, whose resize
    gives different pixels.
    """

    valid_kwargs = SailVL2ImageKwargs
    size = {"height": 448, "width": 448}  # noqa: RUF012  # a class attribute by transformers' convention
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_to_patches = True
    use_thumbnail = True
    use_msac = False

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
        use_msac: bool,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> Any:
        tiles = super()._preprocess(images, return_tensors=None, **kwargs)
        if use_msac:
            self._insert_second_grids(tiles, images, kwargs)
        if not use_thumbnail:
            _drop_thumbnails(tiles)
        return tiles.convert_to_tensors(return_tensors)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Number of tiles of an image of this size, including its thumbnail."""
        given = images_kwargs or {}
        count = super().get_number_of_image_patches(height, width, images_kwargs)
        if given.get("use_msac", self.use_msac):
            columns, rows = self._second_grid(height, width, given)
            count += columns * rows
        thumbnail = given.get("use_thumbnail", self.use_thumbnail)
        return count if thumbnail or count == 1 else count - 1

    def _second_grid(self, height: int, width: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """(columns, rows) of an image's second grid under `given`, else under the processor's own settings."""

        def setting(name: str) -> Any:
            value = given.get(name)
            return getattr(self, name) if value is None else value

        if not setting("crop_to_patches"):
            return 0, 0
        size = setting("size")
        side = size["height"] if isinstance(size, Mapping) else size.height
        return second_grid((height, width), side, setting("min_patches"), setting("max_patches"))

    def _insert_second_grids(self, tiles: Any, images: list[np.ndarray], kwargs: dict[str, Any]) -> None:
        """Put the tiles of each image's second grid before its thumbnail, in place. An image is (3, height, width)."""
        side = kwargs["size"].height
        whole = {**kwargs, "crop_to_patches": False, "do_resize": False}
        found: list[np.ndarray] = []
        start = 0
        for place, (image, count) in enumerate(zip(images, tiles["num_patches"], strict=True)):
            columns, rows = self._second_grid(image.shape[1], image.shape[2], kwargs)
            own, start = tiles["pixel_values"][start : start + count], start + count
            if not columns:
                found += own
                continue
            resized = self.resize(
                image, SizeDict(height=rows * side, width=columns * side), kwargs["resample"]
            )
            cut = [
                resized[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
                for row in range(rows)
                for column in range(columns)
            ]
            second = super()._preprocess(cut, return_tensors=None, **whole)["pixel_values"]
            found += [*own[:-1], *second, own[-1]]
            tiles["num_patches"][place] = count + columns * rows
        tiles["pixel_values"] = found


def second_grid(size: tuple[int, int], side: int, least: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the second grid of an image of (height, width) with tiles of `side` pixels; (0, 0) for none.

    The same rule chooses it as the first grid, among the grids of `least` to `most` tiles. Grids whose columns divide
    the first grid's columns and whose rows divide its rows are excluded.
    """
    if most <= 1:
        return 0, 0
    first = get_optimal_tiled_canvas(size, (side, side), least, most)
    height, width = size
    best, best_difference = (0, 0), math.inf
    for columns, rows in get_all_supported_aspect_ratios(least, most):
        if first[0] % columns == 0 and first[1] % rows == 0:
            continue
        difference = abs(width / height - columns / rows)
        more = difference == best_difference and width * height > 0.5 * side * side * columns * rows
        if difference < best_difference or more:
            best, best_difference = (columns, rows), difference
    return best


def decisive_sizes(side: int, least: int, most: int) -> list[tuple[int, int]]:
    """(height, width) of images that show every pair of first and second grid with the most tiles.

    The grids depend on the aspect ratio, and change only where two grids' ratios are equally near. So one size at each
    such ratio and one between neighbouring ratios suffice. They are so large that ties go to the grid with more tiles.
    """
    ratios = {columns / rows for columns, rows in get_all_supported_aspect_ratios(least, most)}
    turns = sorted({(one + other) / 2 for one, other in itertools.combinations_with_replacement(ratios, 2)})
    looks = [*turns, *((one + other) / 2 for one, other in itertools.pairwise(turns))]
    heights = [math.ceil(side * math.sqrt(most / ratio)) for ratio in looks]
    return [(height, max(1, round(height * ratio))) for height, ratio in zip(heights, looks, strict=True)]


def _drop_thumbnails(tiles: Any) -> None:
    kept: list[np.ndarray] = []
    start = 0
    for place, count in enumerate(tiles["num_patches"]):
        own = tiles["pixel_values"][start : start + count]
        kept += own if count == 1 else own[:-1]
        tiles["num_patches"][place] = max(count - 1, 1)
        start += count
    tiles["pixel_values"] = kept
