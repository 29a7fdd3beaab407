"""A picture as every part of the suite sees it: eight bits of red, green and blue, as they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from PIL.Image import Image


def as_rgb(image: Image) -> Image:
    """The image in mode RGB, by Pillow's conversion: transparency is dropped, not composited.

    An EXIF orientation is not applied: who opens a file decides on that. What InternVL's code does with a
    file; SAIL-VL2's own, given another mode than RGB, resizes before it converts. Raises ValueError where the
    conversion loses the picture: more than eight bits per channel are clipped at 255, not scaled.
    """
    if not (image.width and image.height):
        raise ValueError(f"the image has {image.width}x{image.height} pixels: it shows nothing; remove it")
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())
        if image.mode == "F" or low < 0 or high > 255:
            raise ValueError(
                f"the image has mode {image.mode} with values from {low} to {high}: the conversion to eight "
                "bits clips at 255; scale the values to 0..255 and save it with eight bits per channel"
            )
    if image.mode == "P":
        image = image.convert("RGBA")  # the same pixels; straight to RGB, Pillow warns of the transparency
    return image.convert("RGB")


def as_bytes(image: Any) -> Any:
    """A PIL image in mode RGB, an array as it is. Raises ValueError for what `as_rgb` refuses, and other arrays than
    of bytes."""
    if hasattr(image, "getextrema"):
        return as_rgb(image)
    if str(getattr(image, "dtype", "")).removeprefix("torch.") != "uint8":
        raise ValueError(
            f"an image of type {type(image).__name__} and dtype {getattr(image, 'dtype', None)}: give a PIL "
            "image, or an array of bytes (uint8) with three channels"
        )
    return image
