"""Charts, questions about them, and the chains that answer: text only, no pixels.

A chart shows three values of a topic with a unit. Every value is 1 to 9 steps of its axis, whose top is 10 or 100.
Questions follow ChartQA's kinds (arXiv:2203.10244):

    What is the sum of Mar and Apr?    <think>Mar=40;Apr=70;40+70=110</think>\\boxed{110mm}
    How much higher is Apr than Mar?   <think>Apr=70;Mar=40;70-40=30</think>\\boxed{30mm}
    Which is higher, Mar or Apr?       <think>Mar=40;Apr=70;70>40</think>\\boxed{Apr}

The hasty form of a chain keeps the readings and jumps to the answer. Triples of levels are split permanently, by hash:
no stage uses a held-out triple, neither as a picture nor as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

TRAIN, VALIDATION, HELDOUT = "train", "validation", "heldout"
SHOWN = 3
"""Number of values in a chart."""
STEPS = (1, 10)
"""What one level is worth. An axis ends at level 10."""
LEVELS = range(1, 10)
MONTHS = (("Jan", "Feb", "Mar"), ("Apr", "May", "Jun"), ("Jul", "Aug", "Sep"), ("Oct", "Nov", "Dec"))
DAYS = (("Mon", "Tue", "Wed"), ("Thu", "Fri", "Sat"))
FRUIT = (("Apple", "Pear", "Plum"), ("Grape", "Lemon", "Mango"))
CROPS = (("Wheat", "Rice", "Oats"), ("Maize", "Rye", "Beans"))
NAMES = (("Ann", "Ben", "Eva"), ("Leo", "Mia", "Tom"))
REASONING = ("sum", "difference", "total", "range", "compare")
"""Kinds of reasoning questions, asked in equal shares."""


@dataclass(frozen=True)
class Topic:
    """What a chart can be about."""

    kind: str
    """bar or line."""
    titles: tuple[str, ...]
    unit: str
    groups: tuple[tuple[str, ...], ...]
    """Labels that appear together, in this order."""


TOPICS = (
    Topic("bar", ("Fruit sold", "Fruit stock", "Exports"), "kg", FRUIT),
    Topic("bar", ("Harvest", "Yield", "Imports"), "t", CROPS),
    Topic("bar", ("Training", "Cycling", "Running"), "km", NAMES),
    Topic("line", ("Rainfall", "Snowfall"), "mm", MONTHS),
    Topic("line", ("Power use", "Solar power"), "kWh", DAYS),
)
WORDS = (
    *(label for topic in TOPICS for group in topic.groups for label in group),
    *(topic.unit for topic in TOPICS),
    ">",
    *"What is the value of sum How much higher than Which or total all difference highest lowest and".split(),
    *"List values Read".split(),
)
"""Every word in the questions and answers, for the tiny tokenizer, which has digits and most symbols already."""


@dataclass(frozen=True)
class Chart:
    """One chart, without its looks."""

    kind: str
    title: str
    unit: str
    labels: tuple[str, ...]
    levels: tuple[int, ...]
    step: int

    @property
    def values(self) -> dict[str, int]:
        """The value of each label, left to right."""
        return {label: level * self.step for label, level in zip(self.labels, self.levels, strict=True)}

    def meta(self) -> dict[str, Any]:
        """The chart as a record's `meta` holds it."""
        return {
            "kind": self.kind,
            "title": self.title,
            "unit": self.unit,
            "labels": list(self.labels),
            "values": self.values,
        }


@dataclass(frozen=True)
class Question:
    """A question with its gold answer, and the readings and steps that lead to it."""

    kind: str
    text: str
    answer: str
    readings: tuple[str, ...] = ()
    steps: tuple[str, ...] = field(default=())

    @property
    def chain(self) -> str:
        """The careful thought: readings, then every step."""
        return ";".join((*self.readings, *self.steps))

    @property
    def hasty(self) -> str:
        """The thought that jumps from the readings to the answer."""
        return ";".join(self.readings)


def split_of(levels: Sequence[int]) -> str:
    """The split of a triple of levels: HELDOUT (20% of the 729, by hash), VALIDATION (5%) or TRAIN."""
    return _split("".join(map(str, levels)))


def draw_chart(rng: Random, split: str) -> Chart:
    """A chart whose levels belong to the split; its values differ from each other."""
    topic = rng.choice(TOPICS)
    while True:
        levels = tuple(rng.sample(LEVELS, SHOWN))
        if split_of(levels) == split:
            break
    return Chart(
        topic.kind,
        rng.choice(topic.titles),
        topic.unit,
        rng.choice(topic.groups),
        levels,
        rng.choice(STEPS),
    )


def ask(rng: Random, kind: str, chart: Chart) -> Question:
    """A question of this kind: one of REASONING, or for direct answers value, list."""
    values = chart.values
    first, second = rng.sample(chart.labels, 2)
    high, low = sorted((first, second), key=values.__getitem__, reverse=True)
    top, *_, bottom = sorted(values, key=values.__getitem__, reverse=True)
    if kind == "value":
        return Question(kind, f"What is the value of {first}?", _with_unit(values[first], chart))
    if kind == "list":
        return Question(
            kind, "List all values.", ";".join(_read(values, chart.labels)), _read(values, chart.labels)
        )
    if kind == "sum":
        text = f"What is the sum of {first} and {second}?"
        return _sum(kind, text, (first, second), chart)
    if kind == "total":
        return _sum(kind, "What is the total of all?", chart.labels, chart)
    if kind == "difference":
        return _difference(kind, f"How much higher is {high} than {low}?", (high, low), high, low, chart)
    if kind == "range":
        text = "What is the difference of the highest and the lowest?"
        return _difference(kind, text, chart.labels, top, bottom, chart)
    if kind == "compare":
        text = f"Which is higher, {first} or {second}?"
        return Question(kind, text, high, _read(values, (first, second)), (f"{values[high]}>{values[low]}",))
    raise ValueError(f"kind={kind!r}: ask for one of {', '.join(REASONING)}, value, list")


def _sum(kind: str, text: str, labels: Sequence[str], chart: Chart) -> Question:
    total, steps = chart.values[labels[0]], []
    for label in labels[1:]:
        value = chart.values[label]
        steps.append(f"{total}+{value}={total + value}")
        total += value
    return Question(kind, text, _with_unit(total, chart), _read(chart.values, labels), tuple(steps))


def _difference(kind: str, text: str, labels: Sequence[str], high: str, low: str, chart: Chart) -> Question:
    larger, smaller = chart.values[high], chart.values[low]
    step = f"{larger}-{smaller}={larger - smaller}"
    return Question(kind, text, _with_unit(larger - smaller, chart), _read(chart.values, labels), (step,))


def _read(values: dict[str, int], labels: Sequence[str]) -> tuple[str, ...]:
    """One reading per label, `Mar=40`."""
    return tuple(f"{label}={values[label]}" for label in labels)


def _with_unit(value: int, chart: Chart) -> str:
    return f"{value} {chart.unit}"


@cache
def _split(levels: str) -> str:
    share = hash_of(f"levels {levels}") % 100
    return HELDOUT if share < 20 else VALIDATION if share < 25 else TRAIN


def hash_of(name: str) -> int:
    """A number that depends only on the name: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
