"""The mixed reward: R = sum of weight x score over the terms of a row's cell; the weights of a cell sum to 1.

A cell is a mode (think, direct) together with a kind of grading: verifiable if a rule can check the answer, judged if
only a judge can. Source: SAIL-VL2 (arXiv:2509.14033), mixed reward system: R = w_a answer + w_t thinking + w_f format.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rewards.calls import THREADS, Caller, Reward, RewardError
from rewards.example import MODES, UNGRADED, Example
from rewards.names import nearest
from rewards.verdict import Verdict

__all__ = ["GRADED", "Graded", "Mixture", "Reward", "RewardError", "Term", "cell_of", "check_terms"]

GRADED = ("verifiable", "judged")
"""Kinds of grading: a rule can check the row's answer, or only a judge can."""
ON_ERROR = ("stop", "unscorable")
SUM_TOLERANCE = 1e-6

Cell = tuple[str, str]


@dataclass(frozen=True)
class Term:
    """One reward of a mixture. The verdict of a term of weight 0 is recorded and does not affect the total."""

    name: str
    reward: Reward
    weight: float
    modes: frozenset[str] = field(default=frozenset(MODES))
    """Modes of the rows that the term grades."""
    graded: frozenset[str] = field(default=frozenset(GRADED))
    """Kinds of the rows that the term grades: verifiable, judged, or both."""
    gate: str | None = None
    """Name of another term. This term is called only for completions that the other term scores 1; elsewhere it scores
    0."""
    on_error: str = "stop"
    """Policy when the reward fails. stop: raise a RewardError; unscorable: count the failure and leave the row
    unscored. An exception whose class sets `always_stops` stops the run in both cases, such as a judge that failed its
    start-up check."""

    def __post_init__(self) -> None:
        for name, known in (("modes", MODES), ("graded", GRADED)):
            given = getattr(self, name)
            if not given or not set(given) <= set(known):
                raise ValueError(
                    f"reward {self.name!r}: {name}={sorted(given)}: give at least one of {', '.join(known)}"
                )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"reward {self.name!r}: weight={self.weight}: a weight must be in [0, 1]")
        if self.on_error not in ON_ERROR:
            hint = nearest(self.on_error, ON_ERROR)
            raise ValueError(f"reward {self.name!r}: on_error={self.on_error!r}: {hint}")


@dataclass(frozen=True)
class Graded:
    """A completion's reward and its parts."""

    total: float | None
    """In [0, 1]; None, and never 0, if a term with a weight could not score the completion."""
    verdicts: dict[str, Verdict]
    """Term name -> verdict, for the terms of the row's cell."""


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
        """Term name -> number of failures under the policy "unscorable"."""

    def grade(self, completion: str, example: Example) -> Graded:
        """The completion's total and every term's verdict. Raises the exceptions of `grade_batch`."""
        return self.grade_batch([completion], [example])[0]

    def grade_batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Graded]:
        """Grade each completion against the example at the same index: total and every term's verdict.

        Any thread may call this. Terms are called concurrently, each according to its form (rewards.calls). A term with
        a gate waits for the gate.

        Raises ValueError if the lengths differ or a row has no term, and RewardError if a reward with the policy "stop"
        fails.
        """
        if len(completions) != len(examples):
            raise ValueError(
                f"{len(completions)} completions and {len(examples)} examples: give one example per completion"
            )
        used = [self.terms_of(example) for example in examples]
        verdicts: list[dict[str, Verdict]] = [{} for _ in examples]
        for level in self._levels:
            self._grade_level(level, completions, examples, used, verdicts)
        return [_graded(terms, found) for terms, found in zip(used, verdicts, strict=True)]

    def terms_of(self, example: Example) -> tuple[Term, ...]:
        """The terms that grade a row. Raises ValueError if there are none. A stage checks this before it trains."""
        mode, graded = cell_of(example)
        terms = self._of_cell[mode, graded]
        if not terms:
            raise ValueError(
                f"row {example.id!r}: no reward grades mode {mode!r}, {graded} rows; "
                "add a reward for them, or leave such rows out"
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
        except BaseException:  # after an interrupt, do not wait for calls whose results are no longer needed
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
    return example.mode, "judged" if example.verifier in UNGRADED else "verifiable"


def check_terms(terms: Iterable[Any]) -> None:
    """Refuse inconsistent terms. Each object has the attributes name, weight, modes, graded and gate of Term.

    Raises ValueError if two terms share a name, if a cell's weights do not sum to 1, or if a gate is unknown, grades
    fewer cells than the term behind it, or is part of a circle.
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
                    f"but {term.name!r} does; give both the same modes and graded, or split {term.name!r} in two"
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
    """Terms by level, in the order of the calls: first terms without a gate, then terms behind those, and so on."""
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
            raise ValueError(f"gates form a circle: {circle}; remove the gate of one of these terms")
        levels.append(level)
        done |= {term.name for term in level}
        left = [term for term in left if term.name not in done]
    return levels


def _closed(term: Term, verdicts: Mapping[str, Verdict]) -> Verdict | None:
    """The verdict of a term whose gate is closed; None if the gate is open or the term has no gate."""
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
