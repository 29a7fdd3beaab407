"""Processes each image of a generation batch once, and then refers to it by the numbers of its tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature

TILES_AT_ONCE = 16
"""Tiles in one pass of a frozen tower. Any-resolution images, which have up to 16 tiles' patches, pass one by one."""


class TileStore:
    """An image processor that processes each image once and returns tile numbers in place of pixels.

    TRL requests the images of every row, and then moves, shuffles and splits the result. Here `pixel_values` are tile
    numbers (tiles, 1, 1, 1), so pixels are never duplicated, and equal numbers mean equal images. Images are
    distinguished by object identity, because the rows of a group hold the same objects. An any-resolution image counts
    as one tile; the store keeps its grid.

    Args:
        processor: the wrapped image processor, which also provides all other attributes.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._numbers: dict[int, list[int]] = {}
        self._images: list[Any] = []  # kept alive, as Python may reuse the id of an object that is gone
        self._patches: dict[int, int] = {}
        self._pixels: list[torch.Tensor] = []
        self._grids: list[torch.Tensor] = []
        self._features: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values` (tiles, 1, 1, 1) and the image processor's `num_patches` of nested lists of images."""
        flat = list(_flat(images))
        for image in flat:
            if id(image) not in self._numbers:
                self._add(image, {**kwargs, "return_tensors": "pt"})
        numbers = [self._numbers[id(image)] for image in flat]
        handles = torch.tensor([number for own in numbers for number in own])
        return BatchFeature(
            {
                "pixel_values": handles.view(-1, 1, 1, 1),
                "num_patches": torch.tensor([self._patches[id(image)] for image in flat]),
            }
        )

    def _add(self, image: Any, options: dict[str, Any]) -> None:
        inputs = self._processor([image], **options)
        grids = inputs.get("image_grid_thw")
        tiles = inputs["pixel_values"].split(1 if grids is None else len(inputs["pixel_values"]))
        self._numbers[id(image)] = list(range(len(self._pixels), len(self._pixels) + len(tiles)))
        self._patches[id(image)] = int(inputs["num_patches"][0])
        self._images.append(image)
        self._pixels += tiles
        self._grids += [] if grids is None else [grids]

    def images(self, tiles: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The model's inputs for these tiles; repeated numbers give repeated tiles."""
        held = {"pixel_values": self._pixels, "image_grid_thw": self._grids}
        return {name: joined(values, tiles).to(device) for name, values in held.items() if values}

    def features(self, tower: Any, tiles: Sequence[int], device: torch.device) -> torch.Tensor:
        """The output of a frozen `tower` for these tiles. The first call computes it for every tile of the store."""
        if not self._features:
            every, at_once = range(len(self._pixels)), 1 if self._grids else TILES_AT_ONCE
            with torch.no_grad():
                for start in range(0, len(every), at_once):
                    seen = tower(**self.images(every[start : start + at_once], device))
                    self._features += [seen] if self._grids else seen.split(1)
        return joined(self._features, tiles)


def joined(tensors: Sequence[torch.Tensor], places: Sequence[int]) -> torch.Tensor:
    """The tensors at `places`, concatenated along their first axis."""
    return torch.cat([tensors[place] for place in places] or [tensors[0][:0]])


def tile_numbers(pixel_values: torch.Tensor | None, counts: Sequence[int]) -> list[Sequence[int]]:
    """Tile numbers of each row, of which row i has `counts[i]`.

    `pixel_values` are numbers from a `TileStore`, or pixels, which count from 0 in their order.
    """
    numbers: Sequence[int] = range(sum(counts))
    if pixel_values is not None and not pixel_values.is_floating_point():
        numbers = pixel_values.flatten().tolist()
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [numbers[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for part in images:
            yield from _flat(part)
    elif images is not None:
        yield images
