r"""Scenes, questions about them, and the chains that answer: text only, no pixels.

A scene is four digits in the cells A B C D of a 2x2 panel, each on its own background. Reasoning questions need
several readings and arithmetic on them:

    compute C+A-B                     C=9;A=0;B=4;9+0=9;9-4=5
    compute largest minus smallest    A=0;B=4;C=9;D=3;9-0=9

A chain is statements joined by ";": readings `C=9` first, then steps `9+0=9`. (No full stops: "0.9" would be
a number.) The hasty form of a chain keeps the readings and jumps to the answer.

Digit 4-tuples are split permanently, by hash. Stages never use held-out tuples, neither in pictures nor in text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

CELLS = ("A", "B", "C", "D")
"""Names of the cells, left to right, top to bottom."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (176, 44, 44),
    "orange": (196, 112, 32),
    "green": (44, 128, 60),
    "teal": (24, 124, 132),
    "blue": (44, 72, 180),
    "purple": (124, 52, 152),
}
"""Backgrounds, dark enough for a near-white digit. RGB, 0 to 255."""
TRAIN, VALIDATION, HELDOUT = "train", "validation", "heldout"
REASONING = ("xyz", "xy", "spread")
"""Kinds of reasoning questions, asked in equal shares."""
WORDS = (
    *CELLS,
    *COLOURS,
    *("compute", "largest", "minus", "smallest"),
    *("Which", "digit", "is", "in", "cell"),
    *("Read", "cells", "and", "Describe", "the", "panel"),
)
"""Every word in the demo's questions and answers, for the tiny tokenizer, which has symbols and digits already."""


@dataclass(frozen=True)
class Scene:
    """One panel: digit, background and scan (index in scikit-learn's `load_digits`) per cell, in CELLS' order."""

    digits: tuple[int, ...]
    colours: tuple[str, ...]
    scans: tuple[int, ...]

    def digit(self, cell: str) -> int:
        """The digit in a cell."""
        return self.digits[CELLS.index(cell)]

    def meta(self) -> dict[str, Any]:
        """The scene as a record's `meta` holds it."""
        return {
            "scene": dict(zip(CELLS, self.digits, strict=True)),
            "colours": dict(zip(CELLS, self.colours, strict=True)),
            "scans": dict(zip(CELLS, self.scans, strict=True)),
        }


@dataclass(frozen=True)
class Question:
    """A question with its gold answer and the readings and steps that lead to it."""

    kind: str
    """Kind of question: xyz, xy, spread; digit, cells, panel."""
    text: str
    expr: tuple[str, ...]
    """The requested expression: cells and operators in order, ("max", "-", "min"), or only cells."""
    answer: str
    readings: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()

    @property
    def chain(self) -> str:
        """The careful thought: readings, then every step."""
        return ";".join((*self.readings, *self.steps))

    @property
    def hasty(self) -> str:
        """The thought that jumps from the readings to the answer."""
        return ";".join(self.readings)


def split_of(digits: Sequence[int]) -> str:
    """The split of a digit 4-tuple: HELDOUT (20% of the 10,000, by hash), VALIDATION (5%) or TRAIN."""
    a, b, c, d = digits
    return _splits()[((a * 10 + b) * 10 + c) * 10 + d]


def is_heldout(digits: Sequence[int]) -> bool:
    """Whether no stage may see this 4-tuple of digits, as a picture or as text."""
    return split_of(digits) == HELDOUT


def draw_digits(rng: Random, split: str) -> tuple[int, ...]:
    """A digit 4-tuple of the split."""
    while True:
        digits = tuple(rng.randrange(10) for _ in CELLS)
        if split_of(digits) == split:
            return digits


def draw_scene(rng: Random, split: str, scans: Mapping[int, Sequence[int]]) -> Scene:
    """A scene of the split; `scans` are the indices to choose from, by digit."""
    digits = draw_digits(rng, split)
    colours = tuple(rng.sample(list(COLOURS), len(CELLS)))
    return Scene(digits, colours, tuple(rng.choice(scans[digit]) for digit in digits))


def ask(rng: Random, kind: str, digits: Sequence[int]) -> Question:
    """A question of this kind about a scene with these digits.

    xyz, xy: three or two different cells, with signs such that partial results are not negative; spread: largest minus
    smallest; digit: one cell; cells: two cells; panel: all cells. Raises ValueError for another kind.
    """
    if kind in ("xyz", "xy"):
        return _sum(rng, kind, digits)
    if kind == "spread":
        high, low = max(digits), min(digits)
        step = f"{high}-{low}={high - low}"
        text, expr = "compute largest minus smallest", ("max", "-", "min")
        return Question(kind, text, expr, str(high - low), read(digits, CELLS), (step,))
    if kind == "digit":
        cell = rng.choice(CELLS)
        answer = str(digits[CELLS.index(cell)])
        return Question(kind, f"Which digit is in cell {cell}?", (cell,), answer, read(digits, cell))
    if kind == "cells":
        pair = tuple(rng.sample(CELLS, 2))
        text = f"Read cells {pair[0]} and {pair[1]}."
        return Question(kind, text, pair, ";".join(read(digits, pair)), read(digits, pair))
    if kind == "panel":
        readings = read(digits, CELLS)
        return Question(kind, "Describe the panel.", CELLS, ";".join(readings), readings)
    raise ValueError(f"kind={kind!r}: ask for one of xyz, xy, spread, digit, cells, panel")


def read(digits: Sequence[int], cells: Sequence[str]) -> tuple[str, ...]:
    """One reading per cell, `C=9`."""
    return tuple(f"{cell}={digits[CELLS.index(cell)]}" for cell in cells)


def _sum(rng: Random, kind: str, digits: Sequence[int]) -> Question:
    cells = rng.sample(CELLS, len(kind))
    total = digits[CELLS.index(cells[0])]
    expr, steps = [cells[0]], []
    for cell in cells[1:]:
        digit = digits[CELLS.index(cell)]
        sign = rng.choice("+-") if digit <= total else "+"
        result = total + digit if sign == "+" else total - digit
        steps.append(f"{total}{sign}{digit}={result}")
        expr += [sign, cell]
        total = result
    return Question(
        kind, f"compute {''.join(expr)}", tuple(expr), str(total), read(digits, cells), tuple(steps)
    )


@lru_cache(maxsize=1)
def _splits() -> tuple[str, ...]:
    return tuple(_by_hash(f"tuple {index:04d}") for index in range(10_000))


def _by_hash(name: str) -> str:
    share = hash_of(name) % 100
    return HELDOUT if share < 20 else VALIDATION if share < 25 else TRAIN


def hash_of(name: str) -> int:
    """A number that depends only on the name: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
