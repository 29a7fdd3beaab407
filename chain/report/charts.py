"""The geometry of line and interval charts; page.html.jinja draws it as SVG, without script, font or request.

Each series has a colour. From the eleventh series on, a dash pattern is added, so that all series of a chart differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, WIDE = 360, 190, 760
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
MAX_POINTS = 300
"""Longer curves are averaged in buckets, which keeps the page small without a visible difference."""
COLOURS = 10
"""Number of colours in report.css: classes s0, s1, ... Dash patterns d1, d2, ... distinguish series of equal colour."""


@dataclass(frozen=True)
class Mark:
    """A dot, with an error bar if `bar` is a path."""

    x: str
    y: str
    hint: str
    """Tooltip text."""
    bar: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    look: str
    """CSS classes."""
    value: str
    """The last value, for the legend; "": no value."""
    line: str
    """Points of an SVG polyline."""
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Figure:
    """A chart, ready to draw."""

    title: str
    label: str
    """Text for screen readers."""
    width: int
    x_ticks: tuple[tuple[str, str], ...]
    """Position and text of each tick."""
    y_ticks: tuple[tuple[str, str], ...]
    series: tuple[Series, ...]
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT


def look(index: int) -> str:
    """CSS classes of series number `index`. They are unique per number."""
    dash = index // COLOURS
    return f"s{index % COLOURS}" + (f" d{dash}" if dash else "")


def lines(title: str, series: Mapping[str, Points], *, x_label: str = "step", zero: bool = False) -> Figure:
    """A line per series, (x, y) points each; `zero` puts 0 on the y axis."""
    thinned = {name: _thinned(points) for name, points in series.items()}
    xs = [x for points in thinned.values() for x, _ in points]
    ys = [y for points in thinned.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min([*ys, 0.0] if zero else ys), max(ys), 4)
    x_of = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    drawn = []
    for index, (name, points) in enumerate(thinned.items()):
        x, y = points[-1]
        hint = f"{name}: {number(y)} at {x_label} {number(x)}"
        line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        mark = Mark(f"{x_of(x):.1f}", f"{y_of(y):.1f}", hint)
        drawn.append(Series(name, look(index), number(y), line, (mark,)))
    return Figure(
        title=title,
        label=f"{title} by {x_label}",
        width=WIDTH,
        x_ticks=tuple((f"{x_of(tick):.1f}", number(tick)) for tick in x_ticks if min(xs) <= tick <= max(xs)),
        y_ticks=tuple((f"{y_of(tick):.1f}", number(tick)) for tick in y_ticks),
        series=tuple(drawn),
    )


def intervals(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[Sequence[float] | None]]
) -> Figure:
    """A wide chart of shares in [0, 1] with intervals: per label and series (share, low, high), or None."""
    step = (WIDE - LEFT - RIGHT) / max(1, len(labels))
    y_of = _scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    middles = [LEFT + step * (place + 0.5) for place in range(len(labels))]
    drawn = []
    for index, (name, values) in enumerate(series.items()):
        shift = 9 * (index - (len(series) - 1) / 2)
        marks = []
        for middle, label, value in zip(middles, labels, values, strict=True):
            if value is None:
                continue
            share, low, high = value
            x = f"{middle + shift:.1f}"
            hint = f"{label}, {name}: {share:.3f} [{low:.3f}, {high:.3f}]"
            marks.append(Mark(x, f"{y_of(share):.1f}", hint, f"M{x} {y_of(low):.1f}V{y_of(high):.1f}"))
        line = " ".join(f"{mark.x},{mark.y}" for mark in marks)
        drawn.append(Series(name, look(index), "", line, tuple(marks)))
    return Figure(
        title=title,
        label=title,
        width=WIDE,
        x_ticks=tuple((f"{x:.1f}", label) for x, label in zip(middles, labels, strict=True)),
        y_ticks=tuple((f"{y_of(share):.1f}", number(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        series=tuple(drawn),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """Three significant digits, without noise: 0.874, 1.2e-05, 2,000."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _thinned(points: Points) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], math.fsum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


def _scale(low: float, high: float, to_low: float, to_high: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: to_low + (value - low) / span * (to_high - to_low)
