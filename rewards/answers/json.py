r"""The kind `json`: the same JSON value, with keys in any order, text as `exact` and numbers as `number`.

JSON is read strictly: no duplicate keys, no NaN or Infinity, no number of hundreds of digits, no deep nesting.
Numbers are exact fractions.
"""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rewards.answers.kind import GoldError, Kind, LimitError, Limits, decided
from rewards.answers.plain import MAX_DIGITS, plain_text
from rewards.example import Example
from rewards.verdict import Status, Verdict

MAX_DEPTH = 20
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}\[\]_%&#$])")
_EXPONENT = re.compile(r"[eE][-+]?0*([0-9]+)")


class JsonError(ValueError):
    """A text is not JSON of the accepted form."""


class JsonLimitError(JsonError, LimitError):
    """The JSON is nested too deeply, or a number in it is too long."""


def read_json(text: str) -> Any:
    r"""The JSON value of a text, which may be fenced as code or have LaTeX's escapes; numbers are fractions.

    >>> read_json(r'\{"a": [1, 2.50]\}')
    {'a': [Fraction(1, 1), Fraction(5, 2)]}
    >>> read_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    rewards.answers.json.JsonError: the key 'a' occurs twice

    Raises JsonError, and JsonLimitError if the text breaks a cap.
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
    """Whether two values of `read_json` are equal: keys in any order, lists in order, text up to case and spaces.

    >>> a, b = read_json('{"n": 1, "t": ["Red"]}'), read_json('{"t": ["red"], "n": 1.0}')
    >>> json_equal(a, b, lambda one, other: one == other)
    True

    A text never equals a number, and true never equals 1.
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


def texts(text: str) -> list[str] | None:
    """Elements of a JSON list with a string in it, whose own commas do not separate; None for anything else."""
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
            raise JsonError(f"the key {key!r:.40} occurs twice")
        found[key] = value
    return found


def _fraction(text: str) -> Fraction:
    exponent = _EXPONENT.search(text)
    if len(text) >= MAX_DIGITS or (exponent and (len(exponent[1]) > 3 or int(exponent[1]) >= MAX_DIGITS)):
        raise JsonLimitError(f"a number of {MAX_DIGITS} digits or more")
    return Fraction(text)


def _refused(text: str) -> Any:
    raise JsonError(f"{text} is not a JSON number")


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        if letter in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]}":
            depth -= 1
    return deepest


def _gold(example: Example) -> Any:
    try:
        return read_json(example.answer)
    except JsonError as error:
        raise GoldError(
            f'gold answer {example.answer[:80]!r}: {error}; correct it, or use verifier "exact"'
        ) from None


def _judge(answer: str, gold: Any, example: Example, limits: Limits) -> Verdict:
    tolerance = limits.limit("tolerance", example)
    share = limits.limit("relative_tolerance", example)
    try:
        given = read_json(answer)
    except JsonLimitError:
        raise
    except JsonError as error:
        return Verdict.wrong(answer, str(error), Status.UNPARSEABLE)

    def close(one: Fraction, other: Fraction) -> bool:
        return abs(one - other) <= max(tolerance, share * abs(one))

    return decided(json_equal(gold, given, close), answer)


JSON = Kind(_gold, _judge)
