r"""Are two mathematical answers equal? Exact rules first, guards next, math-verify last.

Source: math-verify 0.9 (huggingface/Math-Verify) over sympy; the guards answer what it credits too kindly
(shared/reward-notes.md): chained relations, anagrams of letters, other units, other bases, an ordered list
against an unordered one, the question restated, a negligible term.

`quick` takes microseconds and may run anywhere. `compare` and `readable` may hang, exhaust the memory or
crash on a hostile answer: rewards.mathworker runs them in a process that can be killed. No expression is ever
turned into text: sympy's printer can hang too.
"""

import re
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Any

from rewards.latex import to_sympy
from rewards.normal import exact_number, plain_latex, plain_text, unwrapped


class Outcome(StrEnum):
    """What comparing a prediction with a gold answer ended in."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSEABLE = "unparseable"
    """The prediction is no mathematics."""
    BAD_GOLD = "bad_gold"
    """The gold answer is no mathematics."""
    OVER_TIME = "over_time"
    """The prediction used up the deadline: it is hostile, no honest one does."""
    OVER_MEMORY = "over_memory"
    """The prediction used up the worker's memory: hostile too."""
    TIMEOUT = "timeout"
    """Not found out in time, for a reason that is not the prediction's."""
    CRASHED = "crashed"
    """Not found out: the worker died."""


_FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc"),
    *("infinity", "infty", "inf", "log", "exp", "ln", "lg", "sqrt", "pi"),
    *("gcd", "lcm", "max", "min", "mod", "det"),
)
_FUNCTION = re.compile("|".join(_FUNCTIONS))
_UNITS = frozenset(
    (
        *("mm", "cm", "dm", "km", "mg", "kg", "ml", "mL", "dL", "Hz", "kHz", "MHz", "kJ", "kW", "kV", "ms"),
        *("ft", "in", "lb", "oz", "mi", "hr", "mph", "kmh", "pt"),
    )
)
_SI = frozenset("mgslLNJKCFVWAh")
"""Units of one letter: taken for one only in \\text or \\mathrm, for they are variables' names too."""
_NO_UNITS = frozenset(("and", "or", "not", "e", "i", "d", "alpha", "beta", "gamma", "theta", *_FUNCTIONS))
_NO_UNITS -= {"sec", "min"}
_TEXT = r"\\(?:text|textrm|mathrm|mbox)\{([^{}]*)\}"
_UNIT = re.compile(
    rf"(.*[0-9A-Za-z}})])(?:{_TEXT}|(?<=[0-9}})])( ?[A-Za-z][A-Za-z /.]*))((?:\^[0-9]|\^\{{-?[0-9]\}})?)"
)
_WORD = re.compile(rf"{_TEXT}|\\(?:begin|end|operatorname)\{{[A-Za-z]*\}}|\\[A-Za-z]+|([A-Za-z]+)")
_JOINT = re.compile(
    rf" ?,? ?(?:{_TEXT.replace('[^{}]*', ' ?(?:and|or) ?')}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?"
)
_NAME = re.compile(r"((?:\\[A-Za-z]+|[A-Za-z]+)(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?)(?:=|\\in(?![A-Za-z]) ?)")
_RELATION = re.compile(r"\\(?:leq?|geq?|neq?|lt|gt|approx|equiv|sim|ll|gg|iff)(?![A-Za-z])|[<>!]=|[=<>]")
_OTHER_BASE = re.compile(r"[0-9)] ?_")
_UNDONE = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim)(?![A-Za-z])|\\frac\{(?:d|\\partial|\\mathrm\{d\})\}\{(?:d|\\partial|\\mathrm)"
)
_ARITHMETIC = re.compile(r"(?<=[0-9)}\]!%])[-+*]|\\(?:times|cdot|div)(?![A-Za-z])")


def quick(gold: str, prediction: str) -> Outcome | None:
    r"""Equal, different or unparseable as far as that shows without algebra; None if it does not.

    >>> [quick(r"\frac{1}{2}", p) for p in ("0.5", "1/3", r"\sqrt{1}/2")]
    [<Outcome.EQUAL: 'equal'>, <Outcome.DIFFERENT: 'different'>, None]
    """
    gold, prediction = _joined(gold), _joined(prediction)
    gold, prediction = _without_names(gold, prediction)
    gold, gold_unit = _split_unit(gold)
    prediction, unit = _split_unit(prediction)
    if gold_unit and unit and gold_unit != unit:
        return Outcome.DIFFERENT
    number, other = exact_number(gold), exact_number(prediction)
    if number and other:
        return Outcome.EQUAL if number.equals(other) else Outcome.DIFFERENT
    if unwrapped(gold) == unwrapped(prediction):
        return Outcome.EQUAL
    if _is_text(gold) or _is_text(prediction):
        if plain_text(gold) == plain_text(prediction):
            return Outcome.EQUAL
        return Outcome.DIFFERENT if _is_text(gold) else Outcome.UNPARSEABLE
    undone = _UNDONE.search(prediction) and not _UNDONE.search(gold)
    relations = len(_RELATION.findall(prediction))
    if undone or (number and _ARITHMETIC.search(prediction)):
        return Outcome.DIFFERENT  # the question restated
    if relations and relations != len(_RELATION.findall(gold)):
        return Outcome.DIFFERENT
    return None


def is_plain(gold: str) -> bool:
    """Whether a gold answer is a number or words, which need no parser to make sense.

    >>> is_plain("1,024"), is_plain("Tuesday"), is_plain("x^2")
    (True, True, False)
    """
    gold, _ = _split_unit(_joined(gold))
    return bool(gold) and (exact_number(gold) is not None or _is_text(gold))


def compare(gold: str, prediction: str) -> Outcome:
    """Whether two answers are equal. May hang or crash on a hostile prediction: call it in the worker."""
    outcome = quick(gold, prediction)
    if outcome:
        return outcome
    gold, prediction = _without_names(_joined(gold), _joined(prediction))
    gold, prediction = _split_unit(gold)[0], _split_unit(prediction)[0]
    lists = _elements(gold), _elements(prediction)
    if all(len(elements) > 1 for _, elements in lists):
        return _compare_lists(*lists)
    return _compare_expressions(gold, prediction)


def readable(gold: str) -> bool:
    """Whether math-verify can parse a gold answer. May hang: call it in the worker."""
    if is_plain(gold):
        return True
    gold, _ = _split_unit(_joined(gold))
    _, elements = _elements(gold)
    return _parse(gold) is not None or (len(elements) > 1 and all(map(readable, elements)))


def _joined(text: str) -> str:
    """Plain LaTeX with "and" and "or" between answers as commas."""
    return _JOINT.sub(", ", plain_latex(text))


def _without_names(gold: str, prediction: str) -> tuple[str, str]:
    r"""Without `x=` or `x \in` in front of what is named, unless the two name different things."""
    (name, bare_gold), (other, bare) = _named(gold), _named(prediction)
    if name and other and name != other:
        return gold, prediction
    return bare_gold, bare


def _named(text: str) -> tuple[str, str]:
    """The one name of all answers in a text, and they: `x=1,x=2` is ("x", "1, 2"). Else "" and the text."""
    brackets, parts = _elements(text)
    found = [_NAME.match(part) for part in parts]
    names = {name[1] if name else "" for name in found}
    bare = ", ".join(part[name.end() :] for part, name in zip(parts, found, strict=True) if name)
    if brackets or "" in names or len(names) > 1 or _RELATION.search(bare):
        return "", text
    return names.pop(), bare


def _split_unit(text: str) -> tuple[str, str]:
    r"""A quantity and its unit: `5\text{ cm}^2` is ("5", "cm^2"). The unit is "" if there is none."""
    found = _UNIT.fullmatch(text)
    if not found:
        return text, ""
    base, in_text, bare, power = found.groups()
    unit = (bare if in_text is None else in_text).strip(" .")
    words = unit.replace("/", " ").replace(".", " ").split()
    shortest = 2 if bare is None else 3 if bare.startswith(" ") else 99  # "3xy" is algebra, "3cm" is not
    si = _SI if bare is None else ()
    known = all(word.isalpha() and (word in _UNITS or word in si or len(word) >= shortest) for word in words)
    if not known or not 1 <= len(words) <= 3 or _NO_UNITS.intersection(words):
        return text, ""
    singular = unit.removesuffix("s") if len(unit) > 3 else unit
    return base, singular.replace(" ", "") + power.replace("{", "").replace("}", "")


def _is_text(text: str) -> bool:
    """Whether only the letters as they stand can be compared: words, numbers in another base, ratios, times.

    math-verify reads words as products of letters, where "elbow" is "below", and 101_2 as 101.
    """
    if ":" in text or _OTHER_BASE.search(text):
        return True
    for in_text, bare in _WORD.findall(text):
        word = _FUNCTION.sub("", bare)
        if len(in_text.strip()) > 1 or len(word) > 2 or (len(word) == 2 and word.isupper()):
            return True
    return False


def _elements(text: str) -> tuple[str, list[str]]:
    r"""Brackets around a list and what its commas separate: `\{1,2\}` is ("{}", ["1", "2"]).

    >>> _elements("(1,f(2,3)]"), _elements("1,2")
    (('(]', ['1', 'f(2,3)']), ('', ['1', '2']))
    """
    text = text.replace(r"\{", "\0").replace(r"\}", "\1")
    brackets, inner = "", text
    if text[:1] in "([\0" and text[-1:] in ")]\1" and _encloses(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    depth, start, parts = 0, 0, []
    for at, letter in enumerate(inner):
        depth += (letter in "([{\0") - (letter in ")]}\1")
        if letter == "," and not depth:
            parts.append(inner[start:at])
            start = at + 1
    parts.append(inner[start:])
    restored = [part.strip().replace("\0", r"\{").replace("\1", r"\}") for part in parts]
    return brackets.replace("\0", "{").replace("\1", "}"), restored


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character and no earlier."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{\0") - (letter in ")]}\1")
        if depth == 0:
            return at == len(text) - 1
    return False


def _compare_lists(gold: tuple[str, list[str]], prediction: tuple[str, list[str]]) -> Outcome:
    """In order within parentheses and brackets, in any order within braces or none."""
    (brackets, wanted), (others, given) = gold, prediction
    if len(wanted) != len(given) or (brackets and others and brackets != others):
        return Outcome.DIFFERENT
    ordered = any(kind not in ("", "{}") for kind in (brackets, others))
    if ordered and "{}" in (brackets, others):
        return Outcome.DIFFERENT
    if ordered:
        return _all(compare(*pair) for pair in zip(wanted, given, strict=True))
    return _match(wanted, given)


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    return next((outcome for outcome in outcomes if outcome != Outcome.EQUAL), Outcome.EQUAL)


def _match(wanted: list[str], given: list[str]) -> Outcome:
    """Whether each wanted element equals a given one of its own."""
    left = list(given)
    for one in wanted:
        place = next((at for at, other in enumerate(left) if compare(one, other) == Outcome.EQUAL), None)
        if place is None:
            return Outcome.DIFFERENT
        del left[place]
    return Outcome.EQUAL


def _compare_expressions(gold: str, prediction: str) -> Outcome:
    from math_verify import verify

    wanted, given = _parse(gold), _parse(prediction)
    if wanted is None:
        return Outcome.BAD_GOLD
    if given is None:
        return Outcome.UNPARSEABLE
    if not verify([wanted], [given], timeout_seconds=None):
        return Outcome.DIFFERENT
    # "50%" is equal to 50 as well as to 0.5, so its value says nothing here.
    close = "%" in gold + prediction or _same_value(wanted, given)
    return Outcome.EQUAL if close else Outcome.DIFFERENT


def _same_value(gold: Any, prediction: Any) -> bool:
    """Whether two numbers agree to 6 digits where decimals are involved, and to 40 where none are.

    math-verify rounds to 6 decimals, which makes 1e-7 equal to 2e-7, and chops at 15 digits, which lets a
    negligible term pass. True for anything but two numbers.
    """
    from sympy import Expr, Float, Integer

    if not all(isinstance(side, Expr) and side.is_number for side in (gold, prediction)):
        return True
    digits = 6 if gold.has(Float) or prediction.has(Float) else 40
    wanted, given = gold.evalf(digits + 10), prediction.evalf(digits + 10)
    if not (wanted.is_finite and given.is_finite):
        return True
    scale = max(abs(wanted), Integer(10) ** -20)  # a zero that evalf cannot prove is some 1e-60
    return bool(abs(wanted - given) <= scale * Integer(10) ** -digits)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """sympy's expression of LaTeX, or None. Cached: the gold answer of a group is parsed once."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        latex = normalize_latex(text, config=config)
        real = not should_treat_as_complex(latex)
        return to_sympy(latex, real)
    except MemoryError:
        raise
    except Exception:  # antlr, sympy and mpmath raise whatever they stumble over: it is no mathematics
        return None
