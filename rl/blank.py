"""Rows with blanked images, to measure how much of an answer needs the image."""

from __future__ import annotations

from typing import Any

from core.model.pictures import Picture
from core.model.videos import Clip
from rl.data import Record

GREY = (128, 128, 128)


def blanked(row: Record) -> dict[str, Any]:
    """The row with each image, and each frame of its videos, replaced by a grey one of its size."""
    from PIL import Image

    def grey(picture: Picture) -> Picture:
        return Picture.of(Image.new("RGB", picture.size, GREY))

    videos = [
        Clip.of_frames([grey(video.frames[0])] * len(video.frames), video.caps)
        for video in row.get("videos") or ()
    ]
    return {**row, "images": [grey(image) for image in row["images"]], "videos": videos}
