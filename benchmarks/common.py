"""Helpers of the benchmarks: alternating repetitions, medians, tables, charts and the JSON line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def alternate(
    sides: Mapping[str, Callable[[int], float | None]], repetitions: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds per side over `repetitions`, after `warm_up` uncounted repetitions.

    The sides take turns, and their order alternates, so that a machine that slows down or warms up favours no side.
    Each side is called with the number of the repetition. It returns its seconds, or None for the call's wall time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(-warm_up, repetitions):
        order = list(sides.items())
        for name, run in order if repetition % 2 else reversed(order):
            started = time.perf_counter()
            own = run(repetition)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - started if own is None else own)
    return {name: statistics.median(found) for name, found in seconds.items()}


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    Console(width=120).print(table)


def bars(title: str, axis: str, values: Mapping[str, float]) -> str:
    """A bar chart as a Mermaid block, which Markdown viewers render."""
    names = ", ".join(json.dumps(name) for name in values)
    heights = ", ".join(f"{value:.2f}" for value in values.values())
    lines = [
        f"title {json.dumps(title)}",
        f"x-axis [{names}]",
        f"y-axis {json.dumps(axis)}",
        f"bar [{heights}]",
    ]
    return "\n    ".join(["```mermaid\nxychart-beta", *lines]) + "\n```"


def emit(bench: str, **results: Any) -> None:
    """Print the benchmark's single JSON line, with the machine and the commit."""
    from core.manifest import git_commit

    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"bench": bench, **results, "commit": git_commit(), **machine}), flush=True)
