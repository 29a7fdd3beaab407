"""Small encoded videos whose frame n is a grey of its own, and files that only look like one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np

STEP = 5
"""Difference in grey between two frames."""


def film(
    frames: int = 40,
    *,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    container: str = "mp4",
    to: Path | None = None,
    noise: bool = False,
    **options: str,
) -> bytes:
    """The bytes of a file of 25 frames a second, with a key frame every 12 frames."""
    target: Any = str(to) if to else io.BytesIO()
    with av.open(target, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 12
        for number in range(frames):
            shape = (size[1], size[0], 3)
            pixels = np.full(shape, STEP * number % 256, np.uint8)
            if noise:
                pixels = np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(stream.encode())
    return to.read_bytes() if to else target.getvalue()


def sound() -> bytes:
    """An MP4 file with sound alone."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16_000
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    return target.getvalue()


def shown_numbers(images: Any) -> list[int]:
    """The numbers of the film's frames that these pictures are."""
    return [round(image.getpixel((2, 2))[0] / STEP) for image in images]
