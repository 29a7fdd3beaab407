r"""Sets of real numbers: intervals, unions of them, and inequalities in one variable.

A region is stored as disjoint intervals in order if its ends can be ordered, so that `x>2 and x<5` is `2<x<5`. "and"
intersects and "or" unites. A comma between inequalities may mean either: it is read as "and" unless the intersection
is empty.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from rewards.answers.algebra import approximate
from rewards.answers.notation import (
    INEQUALITIES,
    SYMBOL,
    elements,
    has_relation,
    is_name,
    relation,
    symbols_of,
)
from rewards.answers.quantity import exact_value

MAX_PIECES = 64
_BRACKETS = {"(": ")", "[": "]"}
_REALS = re.compile(
    r"\\(?:mathbb|bf|Bbb) ?\{?R\}?|\\text\{ ?all real numbers ?\}|all real numbers", re.IGNORECASE
)
_WITHOUT = re.compile(r"(.+?)\\(?:setminus|backslash) ?\\\{(.+)\\\}")
_LOW, _HIGH = Fraction(-(10**400)), Fraction(10**400)


class Interval(NamedTuple):
    """All numbers between two ends."""

    low: str
    high: str
    closed: tuple[bool, bool]


class Region(NamedTuple):
    """A union of intervals, with the name of the variable if the text has one."""

    text: str
    name: str
    pieces: tuple[Interval, ...]
    connective: str = ""
    """Empty if the intervals are disjoint and in order; "and", "or" or "," if the order of the ends is unknown."""


@lru_cache(maxsize=4096)
def region(text: str) -> Region | None:
    r"""The region that plain LaTeX writes as inequalities, a union or the set of all numbers; None for other texts.

    >>> region("x>2 and x<5").pieces, region(r"(1,2]\cup(3,4)").pieces[1].low, region("(1,2)")
    ((Interval(low='2', high='5', closed=(False, False)),), '3', None)
    """
    name, rest = _membership(text)
    if r"\cup" not in rest and not _REALS.search(rest) and not _has_inequality(text):
        return None
    if not _has_inequality(text):
        pieces = _union(rest)
        return _ordered(text, name, pieces, "or") if pieces else None
    listed = elements(text.replace(r"\lor", " or ").replace(r"\land", " and ").replace(r"\cup", " or "))
    if listed.brackets or len(listed.parts) > MAX_PIECES or len(listed.connectives - {","}) > 1:
        return None
    found = [_inequality(part) for part in listed.parts]
    names = {one[0] for one in found if one}
    if None in found or len(names) != 1:
        return None
    connective = next(iter(sorted(listed.connectives, reverse=True)), "or")
    return _ordered(text, names.pop(), [one[1] for one in found if one], connective)


def as_region(text: str) -> Region | None:
    """As `region`, but a single interval counts as a region as well."""
    name, rest = _membership(text)
    piece = _interval(rest)
    return Region(text, name, (piece,)) if piece else region(text)


def _membership(text: str) -> tuple[str, str]:
    members, signs = relation(text)
    if signs == [r"\in"] and is_name(members[0], members[1:]):
        return members[0], members[1]
    return "", text


def _has_inequality(text: str) -> bool:
    return bool(INEQUALITIES.intersection(relation(text)[1]))


def _union(text: str) -> list[Interval]:
    if _REALS.fullmatch(text.strip()):
        return [Interval(r"-\infty", r"\infty", (False, False))]
    without = _WITHOUT.fullmatch(text)
    if without and _REALS.fullmatch(without[1].strip()):
        ends = sorted(elements(without[2]).parts, key=lambda end: _size(end) or Fraction(0))
        ends = [r"-\infty", *ends, r"\infty"]
        return [Interval(low, high, (False, False)) for low, high in pairwise(ends)]
    pieces = [_interval(part.strip()) for part in text.split(r"\cup")]
    return [] if None in pieces or len(pieces) > MAX_PIECES else [piece for piece in pieces if piece]


def _interval(text: str) -> Interval | None:
    brackets, parts, _ = elements(text)
    if (
        len(brackets) != 2
        or brackets[0] not in _BRACKETS
        or brackets[1] not in _BRACKETS.values()
        or len(parts) != 2
    ):
        return None
    return Interval(_infinite(parts[0]), _infinite(parts[1]), (brackets[0] == "[", brackets[1] == "]"))


def _inequality(text: str) -> tuple[str, Interval] | None:
    members, signs = relation(text)
    if not 1 <= len(signs) <= 2 or not INEQUALITIES.issuperset(signs) or any(map(has_relation, members)):
        return None
    more = [sign in (">", r"\ge") for sign in signs]
    closed = [sign in (r"\le", r"\ge") for sign in signs]
    if len(signs) == 2:
        if more[0] != more[1] or not SYMBOL.fullmatch(members[1]):
            return None
        low, high = (members[2], members[0]) if more[0] else (members[0], members[2])
        ends = (closed[1], closed[0]) if more[0] else (closed[0], closed[1])
        return members[1], Interval(_infinite(low), _infinite(high), ends)
    if members[0].startswith("-") and SYMBOL.fullmatch(members[0][1:]):  # -x < 1 is x > -1
        members, more = [members[0][1:], f"-({members[1]})"], [not more[0]]
    name, end, upwards = members[0], members[1], more[0]
    if not SYMBOL.fullmatch(name):
        name, end, upwards = members[1], members[0], not more[0]
    if not SYMBOL.fullmatch(name) or symbols_of(name) & symbols_of(end):
        return None
    if upwards:
        return name, Interval(end, r"\infty", (closed[0], False))
    return name, Interval(r"-\infty", end, (False, closed[0]))


def _infinite(text: str) -> str:
    text = re.sub(r"^\+?\\infty$|^\+?(?:infinity|inf|oo)$", r"\\infty", text)
    return re.sub(r"^-(?:infinity|inf|oo)$", r"-\\infty", text)


def _ordered(text: str, name: str, pieces: list[Interval], connective: str) -> Region:
    """The pieces joined, if the order of all ends is known."""
    sized = [(_size(piece.low), _size(piece.high)) for piece in pieces]
    if any(low is None or high is None for low, high in sized):
        return Region(text, name, tuple(pieces), connective if len(pieces) > 1 else "")
    if connective != "or":
        common = _intersection(pieces)
        if common or connective == "and":
            return Region(text, name, (common,) if common else ())
    return Region(text, name, tuple(_united(pieces)))


def _intersection(pieces: list[Interval]) -> Interval | None:
    """The intersection of all pieces; None if it is empty."""
    lowest = max(pieces, key=lambda piece: (_known(piece.low), not piece.closed[0]))
    highest = min(pieces, key=lambda piece: (_known(piece.high), piece.closed[1]))
    found = Interval(lowest.low, highest.high, (lowest.closed[0], highest.closed[1]))
    width = _known(found.high) - _known(found.low)
    return found if width > 0 or (width == 0 and all(found.closed)) else None


def _united(pieces: list[Interval]) -> list[Interval]:
    """Disjoint intervals in order; two that meet in a point that either contains become one."""
    united: list[Interval] = []
    for piece in sorted(pieces, key=lambda piece: (_known(piece.low), not piece.closed[0])):
        if not united:
            united.append(piece)
            continue
        last = united[-1]
        gap = _known(piece.low) - _known(last.high)
        if gap > 0 or (gap == 0 and not (piece.closed[0] or last.closed[1])):
            united.append(piece)
            continue
        longer = max(last, piece, key=lambda one: (_known(one.high), one.closed[1]))
        united[-1] = Interval(last.low, longer.high, (last.closed[0], longer.closed[1]))
    return united


def _size(end: str) -> Fraction | None:
    """An end as a number, to order it among others; None if its value is unknown."""
    if end in (r"\infty", r"-\infty"):
        return _HIGH if end == r"\infty" else _LOW
    exact = exact_value(end)
    return approximate(exact) if exact and exact.is_constant else None


def _known(end: str) -> Fraction:
    return _size(end) or Fraction(0)
