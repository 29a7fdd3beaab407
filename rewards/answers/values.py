r"""The types of value that an answer may have, and the parser from text to value.

| value | written as | is equal to |
|---|---|---|
| Term | an expression, perhaps with a unit or a counted noun | the same value in any notation |
| Words | text, a number in another base, a ratio, a time | the same text |
| Named | `x = 4`, `f(x) = x^2`, `|AB| = 1` | the same value, named so or not named |
| Chain | `\sqrt{4} = 2` | its last value, if each step is true |
| Relation | `2x = 4y`, `x \ne 2` | an equivalent equation; the same relation |
| Region | inequalities, unions, all numbers | the same set of numbers |
| Collection | a set, list, tuple or matrix row | the same elements; in order within ( ) and [ ] |
| Matrix | `\begin{pmatrix} ... \end{pmatrix}` | the same elements at the same places |
"""

import re
from functools import lru_cache
from typing import NamedTuple

from rewards.answers import notation
from rewards.answers.notation import elements, has_relation, is_words, named, relation, symbols_of
from rewards.answers.number import plain_number
from rewards.answers.quantity import split
from rewards.answers.region import Region, region

MAX_DEPTH = 12
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z]) ?")


class Term(NamedTuple):
    """An expression, perhaps with a unit."""

    text: str


class Words(NamedTuple):
    """Text whose letters are compared as they stand."""

    text: str


class Named(NamedTuple):
    """A value with its name, as in x = 4."""

    text: str
    name: str
    value: "Answer"


class Chain(NamedTuple):
    """Values that the text states to be equal, from left to right."""

    text: str
    members: tuple["Answer", ...]


class Relation(NamedTuple):
    """Members of a relation and the signs between them."""

    text: str
    members: tuple[str, ...]
    signs: tuple[str, ...]


class Collection(NamedTuple):
    """A list of values."""

    text: str
    brackets: str
    parts: tuple["Answer", ...]
    connectives: frozenset[str]


class Matrix(NamedTuple):
    """Rows of values."""

    text: str
    rows: tuple[tuple["Answer", ...], ...]


Answer = Term | Words | Named | Chain | Relation | Collection | Matrix | Region


@lru_cache(maxsize=8192)
def parse(text: str, depth: int = 0) -> Answer:
    r"""The value of a text in `notation.joined` form. It never fails: a text of no other type is a Term.

    >>> [type(parse(text)).__name__ for text in ("x = 4", "(1,2)", "1<x<2", "dark blue", "x^2")]
    ['Named', 'Collection', 'Region', 'Words', 'Term']
    """
    found = region(text)
    if found:
        return found
    matrix = _matrix(text) if text.startswith(r"\begin") else None
    if matrix:
        return matrix
    if depth >= MAX_DEPTH:
        return Term(text)
    # Numbers come first, because the comma of 1,000 is not a separator.
    if plain_number(text) or (text.count("=") == 1 and plain_number(text.partition("=")[2])):
        return _related(text, depth)
    listed = elements(text)
    if listed.brackets == "()" and len(listed.parts) == 1:
        return parse(listed.parts[0], depth + 1)
    if listed.brackets == "{}" and len(listed.parts) == 1:  # a set of one
        only = parse(listed.parts[0], depth + 1)
        return Collection(text, "{}", (only,), listed.connectives) if isinstance(only, Collection) else only
    if len(listed.parts) > 1 or r"\pm" in text or r"\mp" in text:
        collection = _collection(text, listed, depth)
        if collection:
            return collection
    if has_relation(text):
        return _related(text, depth)
    return Words(text) if is_words(text) and not plain_number(text) and split(text)[1] is None else Term(text)


def _related(text: str, depth: int) -> Answer:
    """A named value, or a relation."""
    name, values = named(text)
    if name:
        parts = tuple(parse(one, depth + 1) for one in values)
        return Named(text, name, parts[0] if len(parts) == 1 else Chain(" = ".join(values), parts))
    members, signs = relation(text)
    return Relation(text, tuple(members), tuple(signs)) if signs else Term(text)


def _collection(text: str, listed: notation.Elements, depth: int) -> Answer | None:
    """A list with its signs written out; under one name if all its elements have that name."""
    parts: list[str] = [one for part in listed.parts for one in _signs_written_out(part)]
    if len(parts) < 2:
        return None
    if is_words(", ".join(listed.parts)) and not has_relation(text):
        return Words(text)
    pairs = [named(part) if has_relation(part) else ("", [part]) for part in parts]
    names = {name for name, _ in pairs}
    rest_is_bare = not any(symbols_of(values[0]) for name, values in pairs[1:] if not name)
    one_name = pairs[0][0] and names <= {pairs[0][0], ""} and ("" not in names or rest_is_bare)
    if one_name and not listed.brackets and all(len(values) == 1 for _, values in pairs):
        bare = tuple(parse(values[0], depth + 1) for _, values in pairs)
        value_text = ", ".join(values[0] for _, values in pairs)
        return Named(text, pairs[0][0], Collection(value_text, "", bare, listed.connectives))
    return Collection(
        text, listed.brackets, tuple(parse(part, depth + 1) for part in parts), listed.connectives
    )


def _signs_written_out(part: str) -> list[str]:
    r"""Both values of a part with \pm."""
    name, values = named(part) if has_relation(part) else ("", [part])
    signs = _PLUS_MINUS.findall(values[-1])
    if not 1 <= len(signs) <= 2 or len(values) > 1:
        return [part]
    both = []
    for plus, minus in (("+", "-"), ("-", "+")):
        one = _PLUS_MINUS.sub(lambda found, p=plus, m=minus: p if found[1] == "pm" else m, values[0])  # type: ignore[misc]
        both.append((f"{name}=" if name else "") + one.removeprefix("+"))
    return both


def _matrix(text: str) -> Matrix | None:
    found = _MATRIX.fullmatch(text)
    if not found or r"\begin" in found[2]:
        return None
    rows = found[2].strip().removesuffix(r"\\").split(r"\\")
    return Matrix(text, tuple(tuple(parse(cell.strip()) for cell in row.split("&")) for row in rows))
