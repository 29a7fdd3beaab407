"""Outcomes of comparisons, and open comparisons that only computer algebra can settle.

A comparison by type returns an Outcome if the types decide. Otherwise it returns an open formula: pairs of expressions
under "all of them" and "one to one". A worker settles the formula without repeating decided parts.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """The outcome of comparing an answer with its gold."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSEABLE = "unparseable"
    """The answer is not of the gold's kind."""
    BAD_GOLD = "bad_gold"
    """The gold answer is not of the kind that the row declares."""
    OVER_TIME = "over_time"
    """The answer used up its computing time. Honest answers do not."""
    OVER_MEMORY = "over_memory"
    """The answer used up the memory of a worker. Honest answers do not."""
    TIMEOUT = "timeout"
    """Not settled in time, and not because of the answer."""
    CRASHED = "crashed"
    """Not settled: the worker died."""


class Pair(NamedTuple):
    """Two expressions in LaTeX that sympy must compare. `given` is None where only the gold must be readable."""

    gold: str
    given: str | None


class All(NamedTuple):
    """Equal if every part is."""

    parts: tuple["Open | Outcome", ...]


class Matching(NamedTuple):
    """Equal if each row can be assigned a different column with an equal cell. Axes: gold elements, given elements."""

    rows: tuple[tuple["Open | Outcome", ...], ...]


Open = Pair | All | Matching
Result = Outcome | Open
Decide = Callable[[str, str | None], Outcome]


def all_of(results: Iterable[Result]) -> Result:
    """The first outcome that is not EQUAL; else what is still open, or EQUAL."""
    still_open: list[Open | Outcome] = []
    for result in results:
        if not isinstance(result, Outcome):
            still_open.append(result)
        elif result != Outcome.EQUAL:
            return result
    return All(tuple(still_open)) if still_open else Outcome.EQUAL


def one_to_one(gold: Sequence, given: Sequence, compare: Callable[..., Result]) -> Result:
    """Whether gold and given elements pair one to one as equals. `compare` takes a gold and a given element.

    >>> one_to_one([1, 2], [2, 1], lambda one, two: Outcome.EQUAL if one == two else Outcome.DIFFERENT)
    <Outcome.EQUAL: 'equal'>
    """
    if len(gold) != len(given):
        return Outcome.DIFFERENT
    known: dict[tuple[int, int], Result] = {}

    def cell(want: int, give: int) -> Result:
        if (want, give) not in known:
            known[want, give] = compare(gold[want], given[give])
        return known[want, give]

    count = len(gold)
    if matches_all(count, count, lambda want, give: cell(want, give) == Outcome.EQUAL):
        return Outcome.EQUAL
    if not matches_all(
        count,
        count,
        lambda want, give: cell(want, give) == Outcome.EQUAL or not isinstance(cell(want, give), Outcome),
    ):
        return Outcome.DIFFERENT
    return Matching(tuple(tuple(cell(want, give) for give in range(count)) for want in range(count)))


def settle(result: Result, decide: Decide) -> Outcome:
    """The outcome of an open comparison, given a function that decides pairs."""
    if isinstance(result, Outcome):
        return result
    if isinstance(result, Pair):
        return decide(result.gold, result.given)
    if isinstance(result, All):
        outcomes = (settle(part, decide) for part in result.parts)
        return next((outcome for outcome in outcomes if outcome != Outcome.EQUAL), Outcome.EQUAL)
    rows = result.rows
    right = matches_all(
        len(rows), len(rows), lambda want, give: settle(rows[want][give], decide) == Outcome.EQUAL
    )
    return Outcome.EQUAL if right else Outcome.DIFFERENT


def matches_all(wanted: int, given: int, fits: Callable[[int, int], bool]) -> bool:
    """Whether each wanted index can be assigned a different given index that fits. Exact, by augmenting paths.

    >>> matches_all(2, 2, lambda want, give: (want, give) in {(0, 0), (0, 1), (1, 0)})
    True
    >>> matches_all(2, 2, lambda want, give: give == 0)
    False
    """
    taken: dict[int, int] = {}
    known: dict[tuple[int, int], bool] = {}

    def edge(want: int, give: int) -> bool:
        if (want, give) not in known:
            known[want, give] = fits(want, give)
        return known[want, give]

    def place(want: int, tried: set[int]) -> bool:
        # The same position first: an answer in the gold's order costs one comparison per element.
        for give in sorted(range(given), key=lambda other: other != want):
            if give not in tried and edge(want, give):
                tried.add(give)
                if give not in taken or place(taken[give], tried):
                    taken[give] = want
                    return True
        return False

    return wanted <= given and all(place(want, set()) for want in range(wanted))
