"""Conditions on a comparison that a CI job checks: `mathvista >= base - 1`."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from chain.compare.paired import Comparison
from core.strict import ConfigError, nearest

_GATE = re.compile(r"\s*(\S+)\s*(>=|>)\s*(base|\d+(?:\.\d+)?)\s*(?:([+-])\s*(\d+(?:\.\d+)?))?\s*")
_MARGIN = 1e-9
"""Points by which a comparison may miss its bound through rounding."""


class GateFailed(RuntimeError):
    """A gate does not hold; the message has a line per failure."""


@dataclass(frozen=True)
class Gate:
    """A lower bound of an accuracy. Accuracies and bounds are in points, 0 to 100."""

    name: str
    """Set or benchmark."""
    strict: bool
    relative: bool
    """Whether `bound` is added to the base evaluation's accuracy."""
    bound: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read `NAME >= base - POINTS`, `NAME > base` or `NAME >= POINTS`. Raises ConfigError."""
        found = _GATE.fullmatch(text)
        if not found:
            raise ConfigError(f'--gate {text!r}: write "SET >= base - POINTS" or "SET >= POINTS"')
        name, sign, start, plus, points = found.groups()
        relative = start == "base"
        bound = (0.0 if relative else float(start)) + (float(points or 0) if plus != "-" else -float(points))
        return cls(name, sign == ">", relative, bound, text.strip())

    def failure(self, comparison: Comparison) -> str:
        """Why the gate does not hold; "" if it holds. Raises ConfigError for an unknown set."""
        sets = {one.name: one for one in comparison.sets}
        if self.name not in sets:
            raise ConfigError(
                f"--gate {self.text!r}: {self.name!r} is not compared; {nearest(self.name, sets)}"
            )
        one = sets[self.name]
        bound = self.bound + (100 * one.base if self.relative else 0.0)
        holds = (
            operator.gt(100 * one.other, bound + _MARGIN)
            if self.strict
            else 100 * one.other >= bound - _MARGIN
        )
        base = f", base has {100 * one.base:.2f}" if self.relative else ""
        return "" if holds else f"{self.text}: {comparison.other} has {100 * one.other:.2f}{base}"


def check(gates: Sequence[Gate], comparisons: Sequence[Comparison]) -> None:
    """Raise GateFailed with every gate that a comparison fails."""
    failures = [text for one in comparisons for gate in gates if (text := gate.failure(one))]
    if failures:
        raise GateFailed("\n".join(["gate failed", *failures]))
