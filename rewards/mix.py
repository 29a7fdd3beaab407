"""The mixed reward: weighted terms per kind of row, R = sum of weight x score, weights summing to 1.

A kind of row, a cell, is its mode (think, direct) and whether a rule can check its answer (verifiable) or
only a judge can (judged). Source: SAIL-VL2 (arXiv:2509.14033), mixed reward system: R = w_a answer +
w_t thinking + w_f format.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rewards.calls import THREADS, Caller, Reward, RewardError
from rewards.example import MODES, Example
from rewards.names import nearest
from rewards.verdict import Verdict

__all__ = ["GRADED", "Graded", "Mixture", "Reward", "RewardError", "Term", "cell_of", "check_terms"]

GRADED = ("verifiable", "judged")
"""Whether a rule can check a row's answer."""
JUDGED = ("judge", "none")
"""Verifiers of judged rows; every other one is a rule."""
ON_ERROR = ("stop", "unscorable")
SUM_TOLERANCE = 1e-6

Cell = tuple[str, str]


@dataclass(frozen=True)
class Term:
    """One reward of a mixture. A term of weight 0 only watches: its verdict is kept, and the total ignores it."""

    name: str
    reward: Reward
    weight: float
    modes: frozenset[str] = field(default=frozenset(MODES))
    """Modes of the rows that it grades."""
    graded: frozenset[str] = field(default=frozenset(GRADED))
    """The rows that it grades: verifiable, judged, or both."""
    gate: str | None = None
    """Name of another term. This term is asked only where that one scores 1; elsewhere it scores 0."""
    on_error: str = "stop"
    """When the reward fails: stop with a RewardError, or count it and leave the row unscorable. An exception whose
    class has a true `always_stops` stops either way: a judge failed its start-up check."""

    def __post_init__(self) -> None:
        for name, known in (("modes", MODES), ("graded", GRADED)):
            given = getattr(self, name)
            if not given or not set(given) <= set(known):
                raise ValueError(
                    f"reward {self.name!r}: {name}={sorted(given)}: some of {', '.join(known)}, at least one"
                )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"reward {self.name!r}: weight={self.weight}: a weight is in [0, 1]")
        if self.on_error not in ON_ERROR:
            hint = nearest(self.on_error, ON_ERROR)
            raise ValueError(f"reward {self.name!r}: on_error={self.on_error!r}: {hint}")


@dataclass(frozen=True)
class Graded:
    """A completion's reward and its parts."""

    total: float | None
    """In [0, 1]; None if a weighted term could not judge the completion: never 0 in its place."""
    verdicts: dict[str, Verdict]
    """By term name, the terms of the row's cell."""


class Mixture:
    """Grades completions with the terms of their row's cell.

    >>> half = Term("half", lambda completion, example: 0.5, 0.5)
    >>> full = Term("full", lambda completion, example: True, 0.5)
    >>> mixture, row = Mixture([half, full]), Example("row-1", "2 + 2?", "4", "direct")
    >>> mixture.grade("4", row).total
    0.75
    >>> [graded.total for graded in mixture.grade_batch(["4", "5"], [row, row])]
    [0.75, 0.75]

    Raises ValueError if two terms share a name, a cell's weights do not sum to 1, or a gate is invalid.
    """

    def __init__(self, terms: Iterable[Term], threads: int = THREADS) -> None:
        self.terms = tuple(terms)
        check_terms(self.terms)
        self._of_cell = _by_cell(self.terms)
        self._levels = _levels(self.terms)
        self._caller = Caller(threads)
        self._counting = threading.Lock()
        self.errors: Counter[str] = Counter()
        """By term: how often it failed under the policy "unscorable"."""

    def grade(self, completion: str, example: Example) -> Graded:
        """The completion's total and every term's verdict; raises as `grade_batch`."""
        return self.grade_batch([completion], [example])[0]

    def grade_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Graded]:
        """For each completion, against the example at its place, the total and every term's verdict.

        Safe from any thread. Terms are asked side by side, each in its form (rewards.calls). A term behind a gate
        waits for the gate.

        Raises ValueError if no term grades a row, or the lengths differ; RewardError if a reward fails and its policy
        is to stop.
        """
        if len(completions) != len(examples):
            raise ValueError(
                f"{len(completions)} completions and {len(examples)} examples: give one for each"
            )
        used = [self.terms_of(example) for example in examples]
        verdicts: list[dict[str, Verdict]] = [{} for _ in examples]
        for level in self._levels:
            self._grade_level(level, completions, examples, used, verdicts)
        return [_graded(terms, found) for terms, found in zip(used, verdicts, strict=True)]

    def terms_of(self, example: Example) -> tuple[Term, ...]:
        """The terms that grade a row. Raises ValueError if there is none; a stage asks before it trains."""
        mode, graded = cell_of(example)
        terms = self._of_cell[mode, graded]
        if not terms:
            raise ValueError(
                f"row {example.id!r}: no reward grades mode {mode!r}, {graded} rows; "
                "add one, or leave such rows out"
            )
        return terms

    def _grade_level(
        self,
        level: Sequence[Term],
        completions: Sequence[str],
        examples: Sequence[Example],
        used: Sequence[tuple[Term, ...]],
        verdicts: list[dict[str, Verdict]],
    ) -> None:
        asked = []
        try:
            for term in level:
                rows = []
                for row, terms in enumerate(used):
                    if term not in terms:
                        continue
                    closed = _closed(term, verdicts[row])
                    if closed:
                        verdicts[row][term.name] = closed
                    else:
                        rows.append(row)
                if rows:
                    pending = self._caller.start(
                        term.reward,
                        term.name,
                        [completions[row] for row in rows],
                        [examples[row] for row in rows],
                    )
                    asked.append((term, rows, pending))
            for term, rows, pending in asked:
                for row, result in zip(rows, pending.results(), strict=True):
                    verdicts[row][term.name] = self._settled(term, result)
        except BaseException:  # an interrupt must not wait for calls that are no longer needed
            for _, _, pending in asked:
                pending.cancel()
            raise

    def _settled(self, term: Term, result: Verdict | RewardError) -> Verdict:
        if isinstance(result, Verdict):
            return result
        if term.on_error == "stop" or result.always_stops:
            raise result
        with self._counting:
            self.errors[term.name] += 1
        return Verdict.unscored(result.problem)


def cell_of(example: Example) -> Cell:
    """A row's mode, and whether its answer is verifiable or judged.

    >>> cell_of(Example("row-1", "Describe it.", "", "direct", "judge"))
    ('direct', 'judged')
    """
    return example.mode, "judged" if example.verifier in JUDGED else "verifiable"


def check_terms(terms: Iterable[Any]) -> None:
    """Refuse terms that do not fit together. Each has a name, weight, modes, graded and gate, as Term has.

    Raises ValueError if two share a name, if a cell's weights do not sum to 1, or if a gate is unknown, grades fewer
    cells than the term behind it, or leads back to itself.
    """
    terms = tuple(terms)
    names = [term.name for term in terms]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"rewards named twice: {', '.join(double)}; every term needs its own name")
    cells = _by_cell(terms)
    for mode in MODES:
        sums = {graded: _listed_sum(cells[mode, graded]) for graded in GRADED}
        same = len(set(sums.values())) == 1
        for graded in GRADED[:1] if same else GRADED:
            total, listed = sums[graded]
            if listed and abs(total - 1) > SUM_TOLERANCE:
                which = "" if same else f", {graded} rows,"
                raise ValueError(f"weights for mode {mode!r}{which} sum to {total:g}, not 1: {listed}")
    _levels(terms)
    for cell, used in cells.items():
        for term in used:
            if term.gate is not None and term.gate not in {other.name for other in used}:
                raise ValueError(
                    f"reward {term.name!r}: gate={term.gate!r} does not grade mode {cell[0]!r}, {cell[1]} rows, "
                    f"which {term.name!r} does; give both the same modes and graded, or split {term.name!r} in two"
                )


def _by_cell(terms: Sequence[Any]) -> dict[Cell, tuple[Any, ...]]:
    return {
        (mode, graded): tuple(term for term in terms if mode in term.modes and graded in term.graded)
        for mode, graded in product(MODES, GRADED)
    }


def _listed_sum(terms: Sequence[Any]) -> tuple[float, str]:
    total = math.fsum(term.weight for term in terms)
    return total, ", ".join(f"{term.name} {term.weight:g}" for term in terms)


def _levels(terms: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Terms in the order of asking: those without a gate, those behind one of them, and so on."""
    names = {term.name for term in terms}
    for term in terms:
        if term.gate is not None and term.gate not in names:
            raise ValueError(
                f"reward {term.name!r}: gate={term.gate!r} is not a term; {nearest(term.gate, names)}"
            )
    levels, done = [], {None}
    left = list(terms)
    while left:
        level = tuple(term for term in left if term.gate in done)
        if not level:
            circle = ", ".join(f"{term.name} behind {term.gate}" for term in left)
            raise ValueError(f"gates form a circle: {circle}; at least one term must have no gate")
        levels.append(level)
        done |= {term.name for term in level}
        left = [term for term in left if term.name not in done]
    return levels


def _closed(term: Term, verdicts: Mapping[str, Verdict]) -> Verdict | None:
    """The verdict of a term whose gate is closed; None if the gate is open, or there is none."""
    if term.gate is None:
        return None
    gate = verdicts[term.gate]
    if gate.score is None:
        return Verdict.unscored(f"its gate {term.gate!r} is unscored: {gate.reason}", gate.status)
    return (
        None
        if gate.score == 1
        else Verdict.wrong(reason=f"gated: {term.gate!r} scored {gate.score:g}, not 1")
    )


def _graded(terms: Sequence[Term], found: Mapping[str, Verdict]) -> Graded:
    verdicts = {term.name: found[term.name] for term in terms}
    parts = [(term.weight, verdicts[term.name].score) for term in terms if term.weight > 0]
    scores = [weight * score for weight, score in parts if score is not None]
    return Graded(math.fsum(scores) if len(scores) == len(parts) else None, verdicts)
