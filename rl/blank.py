"""Rows with blanked images, to measure how much of an answer needs the image."""

from __future__ import annotations

from typing import Any

from core.model.pictures import Picture
from rl.data import Record

GREY = (128, 128, 128)


def blanked(row: Record) -> dict[str, Any]:
    """The row with each image replaced by a grey one of its size."""
    from PIL import Image

    grey = [Picture.of(Image.new("RGB", image.size, GREY)) for image in row["images"]]
    return {**row, "images": grey}
