"""Counts of a `posttrain score` run, and their text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.offline.rows import printable

MOST_CAUSES = 1000
"""Most causes that are counted separately. Further causes are counted together."""
SHOWN_CAUSES = 5
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""The variable parts of a cause: numbers and quoted words."""


@dataclass
class Summary:
    """Counts of one run."""

    rows: int = 0
    """Number of input lines."""
    errors: int = 0
    """Number of input lines that are not rows."""
    seconds: float = 0.0
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By reward."""
    sums: Counter[str] = field(default_factory=Counter)
    """Reward -> sum of its scores."""
    scored: Counter[str] = field(default_factory=Counter)
    """Reward -> number of completions with a score."""
    raised: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reward -> number of errors that it raised, and the first error."""
    modes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(mode, source of the mode) -> number of rows (rewards.offline.rows.mode_of_row)."""
    causes: dict[str, Counter[str]] = field(default_factory=dict)
    """Reward -> causes of missing scores; "" -> causes of invalid lines. Numbers and quoted words are left out."""
    examples: dict[str, str] = field(default_factory=dict)
    """Cause -> the first text with this cause."""

    def count_cause(self, name: str, text: str) -> None:
        """Count the cause of a missing score."""
        cause = _VARIABLE.sub("…", text)[:200]
        causes = self.causes.setdefault(name, Counter())
        if cause not in causes and len(causes) >= MOST_CAUSES:
            cause = text = "other causes"
        self.examples.setdefault(cause, text[:200])
        causes[cause] += 1


def words(summary: Summary, target: Path) -> Iterator[str]:
    """The lines below the table: speed, contracts, causes."""
    rate = summary.rows / summary.seconds if summary.seconds else 0.0
    yield (
        f"{summary.rows} rows, {summary.errors} of them not rows, in {summary.seconds:.1f}s: "
        f"{rate:,.0f} pairs/s; written to {target}"
    )
    if summary.modes:
        counts = (f"{count} {mode} ({whose})" for (mode, whose), count in sorted(summary.modes.items()))
        yield f"contract, and its source: {', '.join(counts)}; --mode sets it for rows without one"
    for name, (count, first) in summary.raised.items():
        yield f"{name} raised {count} times; the first: {first}"
    for name, causes in summary.causes.items():
        shown = causes.most_common(SHOWN_CAUSES)
        rest = causes.total() - sum(count for _, count in shown)
        texts = [f"{count} x {summary.examples.get(cause, cause)}" for cause, count in shown] + (
            [f"{rest} for other causes"] if rest else []
        )
        yield f"{name or 'lines that are not rows'}, without a score: {printable('; '.join(texts), 2000)}"


def table(summary: Summary) -> Any:
    """Mean score and statuses of each reward, for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("reward", "mean score", "scored", "statuses")
    for name, statuses in summary.statuses.items():
        scored = summary.scored[name]
        mean = f"{summary.sums[name] / scored:.4f}" if scored else "-"
        counts = ", ".join(f"{status} {count}" for status, count in statuses.most_common())
        table.add_row(escape(name), mean, str(scored), counts)
    return table
