"""Panels as pixels: real handwritten digits (scikit-learn's bundled scans) on coloured 2x2 panels.

Axes: N panels, S scans; pixel arrays are (N, height, width, RGB).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from recipes.demo.scenes import CELLS, COLOURS, HELDOUT, TRAIN, VALIDATION, Scene, hash_of

if TYPE_CHECKING:
    import numpy as np

SCANS = 1797
"""Scans in `sklearn.datasets.load_digits`: 8x8 pixels, the test part of UCI's "optical recognition of
handwritten digits"."""
HELDOUT_COUNT, VALIDATION_COUNT = 360, 180
_ORDER = sorted(range(SCANS), key=lambda scan: hash_of(f"scan {scan}"))
HELDOUT_SCANS = frozenset(_ORDER[:HELDOUT_COUNT])
"""Number of scans that only the held-out sets show."""
VALIDATION_SCANS = frozenset(_ORDER[HELDOUT_COUNT : HELDOUT_COUNT + VALIDATION_COUNT])
"""Number of scans that only the validation sets show."""
TRAIN_SCANS = frozenset(_ORDER[HELDOUT_COUNT + VALIDATION_COUNT :])

CELL_PX = 28
PANEL_PX = 2 * CELL_PX
DIGIT_PX = 22
"""Side of an enlarged scan in pixels."""
SHIFT_PX = 1
"""Largest offset of a digit from the middle of its cell in pixels, per direction."""
COLOUR_JITTER = 12.0
"""Standard deviation of a background's offset from its colour, per channel, on a scale of 0 to 255."""
INK = (232, 256)
"""Range of a digit's grey value."""
NOISE = 10.0
"""Standard deviation of the noise of every pixel and channel, on a scale of 0 to 255."""


@lru_cache(maxsize=1)
def scans() -> tuple[np.ndarray, np.ndarray]:
    """The enlarged scans (S, DIGIT_PX, DIGIT_PX), float32, 0 (paper) to 1 (ink), and their digits (S,)."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    if len(digits.images) != SCANS:
        raise ValueError(
            f"scikit-learn ships {len(digits.images)} scans, but the splits are made for {SCANS}"
        )
    side = (DIGIT_PX, DIGIT_PX)
    large = [
        Image.fromarray(scan.astype("float32") / 16).resize(side, Image.Resampling.BICUBIC)
        for scan in digits.images
    ]
    return np.clip(np.stack([np.asarray(scan) for scan in large]), 0, 1), digits.target


@lru_cache(maxsize=3)
def scans_of(split: str) -> dict[int, tuple[int, ...]]:
    """The indices of a split's scans, by digit."""
    members = {TRAIN: TRAIN_SCANS, VALIDATION: VALIDATION_SCANS, HELDOUT: HELDOUT_SCANS}[split]
    labels = scans()[1]
    return {digit: tuple(scan for scan in sorted(members) if labels[scan] == digit) for digit in range(10)}


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """The panels (N, PANEL_PX, PANEL_PX, 3) as bytes: jittered colours, shifted digits, noisy pixels."""
    import numpy as np

    count, cells = len(scenes), len(CELLS)
    ink = _ink([scan for scene in scenes for scan in scene.scans], rng)
    base = np.array([COLOURS[colour] for scene in scenes for colour in scene.colours], np.float32)
    base += rng.normal(0, COLOUR_JITTER, base.shape).astype(np.float32)
    white = rng.uniform(*INK, (count * cells, 1)).astype(np.float32)
    pixels = base[:, None, None] + ink[..., None] * (white - base)[:, None, None]
    pixels += NOISE * rng.standard_normal(pixels.shape, np.float32)
    grid = pixels.reshape(count, 2, 2, CELL_PX, CELL_PX, 3).swapaxes(2, 3)
    return np.clip(np.rint(grid), 0, 255).astype(np.uint8).reshape(count, PANEL_PX, PANEL_PX, 3)


def png(panel: np.ndarray) -> bytes:
    """One panel (PANEL_PX, PANEL_PX, 3) as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    # Noise does not compress, so higher levels only take longer.
    Image.fromarray(panel).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _ink(chosen: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """The scans, each in a cell (CELL_PX, CELL_PX), shifted from the middle by up to SHIFT_PX."""
    import numpy as np

    margin = (CELL_PX - DIGIT_PX) // 2
    shift = rng.integers(-SHIFT_PX, SHIFT_PX + 1, (len(chosen), 2)) + margin
    cells = np.zeros((len(chosen), CELL_PX, CELL_PX), np.float32)
    glyphs = scans()[0][np.asarray(chosen)]
    for top, left in sorted(set(map(tuple, shift.tolist()))):
        here = (shift[:, 0] == top) & (shift[:, 1] == left)
        cells[here, top : top + DIGIT_PX, left : left + DIGIT_PX] = glyphs[here]
    return cells
