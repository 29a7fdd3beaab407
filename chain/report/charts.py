"""Line and interval charts as SVG text: no script, no font, no request; colours are the page's variables.

Series take the classes s0, s1, ... in order; every mark has a <title> that browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
MAX_POINTS = 300
"""Longer curves are averaged in buckets: the page stays small and the eye sees no more."""


def lines(title: str, series: Mapping[str, Points], *, x_label: str = "step", zero: bool = False) -> str:
    """A figure with a line per series, a legend with last values, and axes; `zero` puts 0 on the y axis."""
    thinned = {name: _thinned(points) for name, points in series.items()}
    xs = [x for points in thinned.values() for x, _ in points]
    ys = [y for points in thinned.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min([*ys, 0.0] if zero else ys), max(ys), 4)
    x_of = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes([t for t in x_ticks if min(xs) <= t <= max(xs)], y_ticks, x_of, y_of)]
    for index, (name, points) in enumerate(thinned.items()):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        hint = f"<title>{escape(name)}: {number(points[-1][1])} at {x_label} {number(points[-1][0])}</title>"
        x, y = points[-1]
        parts.append(f'<polyline class="line s{index}" points="{path}">{hint}</polyline>')
        parts.append(
            f'<circle class="dot s{index}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3">{hint}</circle>'
        )
    legend = "".join(
        f'<span class="key s{index}">{escape(name)} <b>{number(points[-1][1])}</b></span>'
        for index, (name, points) in enumerate(thinned.items())
    )
    return _figure(title, legend, parts, f"{title} by {x_label}")


def intervals(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[Sequence[float] | None]]
) -> str:
    """A wide figure of shares in [0, 1] with intervals: per label and series (share, low, high), or None."""
    width, step = 760, (760 - LEFT - RIGHT) / max(1, len(labels))
    y_of = _scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_axes([], [0.0, 0.25, 0.5, 0.75, 1.0], lambda x: x, y_of, width)]
    for place, label in enumerate(labels):
        x = LEFT + step * (place + 0.5)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - 6}">{escape(label)}</text>')
    for index, (name, values) in enumerate(series.items()):
        shift = 9 * (index - (len(series) - 1) / 2)
        xs = [LEFT + step * (place + 0.5) + shift for place in range(len(labels))]
        dots = [(x, label, value) for x, label, value in zip(xs, labels, values, strict=True) if value]
        path = " ".join(f"{x:.1f},{y_of(share):.1f}" for x, _, (share, _, _) in dots)
        parts.append(f'<polyline class="line faint s{index}" points="{path}"/>')
        for x, label, (share, low, high) in dots:
            hint = f"<title>{escape(f'{label}, {name}: {share:.3f} [{low:.3f}, {high:.3f}]')}</title>"
            bar = f"M{x:.1f} {y_of(low):.1f}V{y_of(high):.1f}"
            parts.append(f'<path class="line s{index}" d="{bar}">{hint}</path>')
            parts.append(
                f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y_of(share):.1f}" r="4">{hint}</circle>'
            )
    legend = "".join(f'<span class="key s{index}">{escape(name)}</span>' for index, name in enumerate(series))
    return _figure(title, legend, parts, title, width)


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


def _scale(low: float, high: float, to_low: float, to_high: float):
    span = (high - low) or 1.0
    return lambda value: to_low + (value - low) / span * (to_high - to_low)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_of, y_of, width: int = WIDTH) -> str:
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{number(tick)}</text>')
    parts += [
        f'<text class="tick mid" x="{x_of(tick):.1f}" y="{HEIGHT - 6}">{number(tick)}</text>'
        for tick in x_ticks
    ]
    return "".join(parts)


def _figure(title: str, legend: str, parts: Sequence[str], label: str, width: int = WIDTH) -> str:
    wide = ' class="wide"' if width > WIDTH else ""
    return (
        f"<figure{wide}><figcaption><strong>{escape(title)}</strong>"
        f'<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )
