r"""Answers with parts: JSON values, and lists written in LaTeX, in JSON or plainly.

JSON is read strictly: no duplicate keys, no NaN or Infinity, no number of hundreds of digits, no deep nesting.
Numbers are exact fractions.
"""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rewards.equality import elements_of
from rewards.normal import MAX_DIGITS, plain_text

MAX_DEPTH = 20
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}\[\]_%&#$])")
_EXPONENT = re.compile(r"[eE][-+]?0*([0-9]+)")
_ORDERED, _UNORDERED = ("()", "[]"), ("{}",)


class JsonError(ValueError):
    """A text is no JSON that we take."""


class JsonLimitError(JsonError):
    """It is too deep, or a number in it too long."""


def read_json(text: str) -> Any:
    r"""The JSON value that a text is, perhaps fenced as code or with LaTeX's escapes; numbers are fractions.

    >>> read_json(r'\{"a": [1, 2.50]\}')
    {'a': [Fraction(1, 1), Fraction(5, 2)]}
    >>> read_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    rewards.structured.JsonError: the key 'a' is there twice

    Raises JsonError, for what breaks a cap JsonLimitError.
    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    text = (fenced[1] if fenced else text).strip("$ \n\t")
    if _depth(text) > MAX_DEPTH:
        raise JsonLimitError(f"nested more than {MAX_DEPTH} deep")
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        plain = _ESCAPED.sub(r"\1", text)
        if plain == text:
            raise JsonError(f"no JSON: {error}") from None
    try:
        return _loads(plain)
    except json.JSONDecodeError as error:
        raise JsonError(f"no JSON: {error}") from None


def json_equal(gold: Any, other: Any, close: Callable[[Fraction, Fraction], bool]) -> bool:
    """Whether two values of `read_json` are equal: keys in any order, lists in theirs, text but for case and spaces.

    >>> a, b = read_json('{"n": 1, "t": ["Red"]}'), read_json('{"t": ["red"], "n": 1.0}')
    >>> json_equal(a, b, lambda one, other: one == other)
    True

    Text is never a number, nor true 1.
    """
    if type(gold) is not type(other):
        return False
    if isinstance(gold, dict):
        return gold.keys() == other.keys() and all(json_equal(gold[key], other[key], close) for key in gold)
    if isinstance(gold, list):
        return len(gold) == len(other) and all(
            json_equal(one, two, close) for one, two in zip(gold, other, strict=True)
        )
    if isinstance(gold, Fraction):
        return close(gold, other)
    return plain_text(gold) == plain_text(other) if isinstance(gold, str) else bool(gold == other)


def elements(text: str, ordered: bool) -> list[str] | None:
    r"""The elements of a list; None if its brackets say that their order is of the other kind.

    >>> elements(r"\{1, \frac{1}{2}\}", ordered=False), elements('["a, b", 2]', ordered=True)
    (['1', '\\frac{1}{2}'], ['a, b', '2'])
    >>> elements("(1, 2)", ordered=False), elements(r"\{1, 2\}", ordered=True)
    (None, None)
    """
    listed = _json_elements(text)
    if listed is not None:
        return listed
    brackets, parts = elements_of(text)
    if brackets and brackets not in (_ORDERED if ordered else (*_UNORDERED, "[]")):
        return None
    return parts


def _json_elements(text: str) -> list[str] | None:
    """Elements of a JSON list with a string in it: commas within strings separate nothing."""
    if '"' not in text:
        return None
    try:
        value = read_json(text)
    except JsonError:
        return None
    if not isinstance(value, list) or any(isinstance(one, dict | list | bool | None) for one in value):
        return None
    return [str(one) for one in value]


def _loads(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=_object,
        parse_int=_fraction,
        parse_float=_fraction,
        parse_constant=_refused,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonError(f"the key {key!r:.40} is there twice")
        found[key] = value
    return found


def _fraction(text: str) -> Fraction:
    exponent = _EXPONENT.search(text)
    if len(text) >= MAX_DIGITS or (exponent and (len(exponent[1]) > 3 or int(exponent[1]) >= MAX_DIGITS)):
        raise JsonLimitError(f"a number of {MAX_DIGITS} digits or more")
    return Fraction(text)


def _refused(text: str) -> Any:
    raise JsonError(f"{text} is no JSON number")


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        if letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest
