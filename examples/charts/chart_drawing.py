"""Charts as pixels: bars or a line on a grid, with a title, a unit, tick labels and category labels in a real font.

The font is Aileron, a TrueType font that Pillow ships. Colours, sizes and places vary a little from chart to chart.
"""

from __future__ import annotations

import io
from functools import cache
from random import Random

from chart_scenes import Chart
from PIL import Image, ImageDraw, ImageFont

SIDE = 160
"""Side of a picture in pixels."""
LEFT, COLUMN = 40, 40
"""The axis and its labels take the first 40 pixels; each value has a column of 40."""
TOP, BOTTOM = 42, 136
"""Height of level 10 and of level 0, in pixels from the top."""
SHIFT = 1
"""Largest offset of the plot in pixels, per direction."""
PALETTE = ("#1f77b4", "#d6452f", "#2a8f3c", "#8e5bb5", "#c77700", "#0f8b8d")
PAPERS = ("#ffffff", "#fbf7ee", "#eef3f8")
INK, GRID = "#222222", "#c4c4c4"


def draw(chart: Chart, rng: Random) -> Image.Image:
    """The chart's picture (SIDE x SIDE, RGB)."""
    image = Image.new("RGB", (SIDE, SIDE), rng.choice(PAPERS))
    pen = ImageDraw.Draw(image)
    x, y = rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)
    colour = rng.choice(PALETTE)
    _axis(pen, chart, x, y)
    middles = [LEFT + COLUMN * index + COLUMN // 2 + x for index in range(len(chart.labels))]
    heights = [_height(level) + y for level in chart.levels]
    if chart.kind == "bar":
        half = rng.randint(11, 14)
        for middle, height in zip(middles, heights, strict=True):
            pen.rectangle((middle - half, height, middle + half, BOTTOM + y), fill=colour)
    else:
        pen.line(list(zip(middles, heights, strict=True)), fill=colour, width=2)
        for middle, height in zip(middles, heights, strict=True):
            pen.ellipse((middle - 4, height - 4, middle + 4, height + 4), fill=colour)
    for middle, label in zip(middles, chart.labels, strict=True):
        pen.text((middle, BOTTOM + y + 12), label, INK, _font(13), anchor="mm")
    return image


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _axis(pen: ImageDraw.ImageDraw, chart: Chart, x: int, y: int) -> None:
    """Title, unit, and grid lines, every second one with its value."""
    pen.text((LEFT + x, 12 + y), chart.title, INK, _font(15), anchor="lm")
    pen.text((20 + x, 28 + y), chart.unit, INK, _font(15), anchor="mm")
    for level in range(0, 11, 2):
        height = _height(level) + y
        pen.line((LEFT + x, height, SIDE, height), fill=INK if level == 0 else GRID)
        if level % 4 == 2:
            pen.text((LEFT - 4 + x, height), str(level * chart.step), INK, _font(13), anchor="rm")


def _height(level: int) -> int:
    return round(BOTTOM + (TOP - BOTTOM) * level / 10)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType, which draws the charts' text; install a wheel"
        )
    return font
