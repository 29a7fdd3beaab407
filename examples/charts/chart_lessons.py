"""Rows for the tiny core's pre-training: a question and pieces of an answer, each trained or only read.

Charts are new in every step, and all of the train split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from chart_scenes import LEVELS, REASONING, SHOWN, STEPS, TRAIN, Chart, ask, draw_chart

MIXTURES: dict[str, dict[str, int]] = {
    "ordered": {"in_order": 24, "sums": 8},
    "reading": {"in_order": 6, "looked_up": 20, "sums": 10},
    "mixed": {"looked_up": 4, "listed": 12, "question": 14, "sums": 10, "story": 12},
}
"""Number of rows of each kind per step, by phase."""


@dataclass(frozen=True)
class Lesson:
    """A user's turn, the pieces of the reply (text, whether it is trained), and the chart of the picture, if any."""

    asked: str
    reply: tuple[tuple[str, bool], ...]
    chart: Chart | None = None


def draw_lessons(phase: str, rng: Random) -> list[Lesson]:
    """The rows of one step of a phase."""
    return [MAKERS[kind](rng) for kind, count in MIXTURES[phase].items() for _ in range(count)]


def _in_order(rng: Random) -> Lesson:
    """Unit, labels and values from left to right: this teaches the labels."""
    chart = draw_chart(rng, TRAIN)
    text = chart.unit + "".join(f"{label}{value}" for label, value in chart.values.items())
    return Lesson("", ((text, True),), chart)


def _looked_up(rng: Random) -> Lesson:
    """The values in random order. The order cannot be known, so the labels are only read."""
    chart = draw_chart(rng, TRAIN)
    order = rng.sample(chart.labels, SHOWN)
    pieces = [((label, False), (str(chart.values[label]), True)) for label in order]
    return Lesson("", tuple(piece for pair in pieces for piece in pair), chart)


def _listed(rng: Random) -> Lesson:
    """As `_looked_up`, in the notation of chains: Mar=40;Jan=20;Feb=90."""
    chart = draw_chart(rng, TRAIN)
    order = rng.sample(chart.labels, SHOWN)
    pieces = [((f"{label}=", False), (f"{chart.values[label]};", True)) for label in order]
    return Lesson("", (*(piece for pair in pieces for piece in pair), (chart.unit, True)), chart)


def _question(rng: Random) -> Lesson:
    """A question that is answered directly."""
    chart = draw_chart(rng, TRAIN)
    question = ask(rng, "value", chart)
    return Lesson(question.text, ((question.answer, True),), chart)


def _sums(rng: Random) -> Lesson:
    """Four sums; only the results are trained."""
    pieces: list[tuple[str, bool]] = []
    for _ in range(4):
        step = rng.choice(STEPS)
        left, right = rng.randrange(1, rng.choice((10, 19))) * step, rng.choice(LEVELS) * step
        sign = rng.choice("+-") if right < left else "+"
        result = left + right if sign == "+" else left - right
        pieces += [(f"{left}{sign}{right}=", False), (str(result), True), (";", True)]
    return Lesson("", tuple(pieces))


def _story(rng: Random) -> Lesson:
    """A chart in words, a reasoning question about it, and the chain that answers."""
    chart = draw_chart(rng, TRAIN)
    question = ask(rng, rng.choice(REASONING), chart)
    told = chart.unit + "".join(f"{label}{value}" for label, value in chart.values.items())
    return Lesson(f"{told};{question.text}", ((f"{question.chain};{question.answer}", True),))


MAKERS: dict[str, Callable[[Random], Lesson]] = {
    "in_order": _in_order,
    "looked_up": _looked_up,
    "listed": _listed,
    "question": _question,
    "sums": _sums,
    "story": _story,
}
