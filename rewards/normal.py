r"""Answers in normal form: text, LaTeX without its typography, exact numbers, option letters.

What these decide takes microseconds and no computer algebra; half of all answers are decided here.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 400

_LOOKALIKES = {
    **dict.fromkeys("−–‒﹣－", "-"),
    **{
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "°": r"^\circ ",
    },
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "²": "^2", "³": "^3", "％": "%"},
}
_TRANSLATE = str.maketrans(_LOOKALIKES)
_TYPOGRAPHY = re.compile(
    r"(?P<row>\\\\)|\\(?:left|right|displaystyle|limits|quad|qquad)(?![A-Za-z])|\\[ ,;:]|~|\\?\$"
    r"|\^ ?\{? ?\\circ ?\}?|\\degree(?![A-Za-z])"
)
_SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\cfrac", r"\frac"),
    (r"\%", "%"),
    ("{,}", ","),
    (r"\!", ""),
    (r"\varnothing", r"\emptyset"),
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\s+")
# Spaces but for those between two letters or digits, and the one that tells "100, 200" from 100,200.
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])(?<![0-9],) | (?![A-Za-z0-9])|(?<=[0-9],) (?![0-9]{3}(?![0-9]))")

_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"([+-]?)({_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{{1,2}}))?")
_POWER = re.compile(r"\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?(?:\{([+-]?[0-9]{1,2})\}|([0-9]))")
_RATIO = re.compile(
    r"([+-]?)(?:([0-9]+)\s?/\s?([0-9]+)|\\frac\s?(?:\{([+-]?[0-9]+)\}|([0-9]))\s?(?:\{([0-9]+)\}|([0-9])))"
)
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])[).:]\s*(\S.*)", re.DOTALL)


class Number(NamedTuple):
    """An exact number as written: 50% is 50 with percent."""

    value: Fraction
    percent: bool = False

    def equals(self, other: "Number", tolerance: Fraction = Fraction(0)) -> bool:
        """Equal within an absolute tolerance. 50% equals 0.5, and also 50: the question may hold the %."""
        if self.percent == other.percent:
            return abs(self.value - other.value) <= tolerance
        share, plain = (self, other) if self.percent else (other, self)
        return min(abs(share.value - plain.value), abs(share.value / 100 - plain.value)) <= tolerance


def plain_text(text: str) -> str:
    r"""Text for comparison: one case, single spaces, no \text{}, no quotes or full stop around it.

    >>> plain_text(r" \text{Dark  Blue}. ")
    'dark blue'
    """
    text = unicodedata.normalize("NFKC", unwrapped(text)).replace(r"\%", "%")
    text = _SPACE.sub(" ", text.casefold()).strip(" $\"'“”‘’`*")
    return text.removesuffix(".").strip(" $\"'“”‘’`*")


def unwrapped(text: str) -> str:
    r"""The text without \text{}, \mathrm{} and their like around its parts."""
    return _WRAPPED.sub(r"\1", text)


def plain_latex(text: str) -> str:
    r"""LaTeX without what only changes its looks; two answers equal in this form are equal.

    >>> plain_latex(r"$\left( \dfrac{1}{2} ,\, 3 \right)$.")
    '(\\frac{1}{2},3)'
    """
    text = _SPACE.sub(" ", text.translate(_TRANSLATE))  # single spaces first: no regex below may backtrack
    for spelling, usual in _SPELLINGS:
        text = text.replace(spelling, usual)
    text = _TYPOGRAPHY.sub(lambda found: found["row"] or " ", text)
    text = _SPACE.sub(" ", text).strip()
    for opened, closed in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opened) and text.endswith(closed):
            text = text[2:-2]
    return _LOOSE_SPACE.sub("", text.strip().removesuffix("."))


def too_many_digits(text: str) -> bool:
    """Whether a number in the text has MAX_DIGITS digits or more: no honest answer has."""
    return re.search(rf"[0-9]{{{MAX_DIGITS}}}", text) is not None


def exact_number(text: str) -> Number | None:
    r"""The number that the whole text is, exactly; None if it is anything else.

    Takes integers and decimals with thousands separators, a/b, \frac, scientific notation, a percent sign, a
    currency sign.

    >>> [exact_number(n).value for n in ("-1,234.50", r"\frac{1}{2}", r"3 \times 10^{2}")]
    [Fraction(-2469, 2), Fraction(1, 2), Fraction(300, 1)]
    >>> exact_number("4 or 5"), exact_number("100, 200")
    (None, None)
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    text = plain_latex(text)
    if text[:1] in "€£¥":
        text = text[1:].lstrip()
    percent = text.endswith("%")
    text = text.removesuffix("%").rstrip()
    value = _ratio(text) if "/" in text or "frac" in text else _decimal(text)
    return None if value is None else Number(value, percent)


def _decimal(text: str) -> Fraction | None:
    found = _DECIMAL.match(text)
    if not found or too_many_digits(text):
        return None
    sign, digits, exponent = found.groups()
    rest = text[found.end() :]
    if rest:
        power = None if exponent else _POWER.fullmatch(rest)
        if not power:
            return None
        exponent = power[1] or power[2]
    whole, _, part = digits.replace(",", "").replace(" ", "").partition(".")
    value = Fraction(int(whole + part or "0"), 10 ** len(part)) * Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value


def _ratio(text: str) -> Fraction | None:
    found = _RATIO.fullmatch(text)
    if not found or too_many_digits(text):
        return None
    sign, *parts = found.groups()
    above, below = (int(part) for part in parts if part is not None)
    if not below:
        return None
    return Fraction(-above if sign == "-" else above, below)


def options_of(choices: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Options by capital letter: a list's first option is A.

    >>> options_of(["red", "blue"])
    {'A': 'red', 'B': 'blue'}
    """
    if isinstance(choices, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in choices.items()}
    return {chr(ord("A") + place): str(text) for place, text in enumerate(choices)}


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    r"""The one option that the text names, by letter, by the option's text or by both; else None.

    >>> options = {"A": "red", "B": "blue"}
    >>> [option_letter(t, options) for t in ("b", "(B)", "Blue", "B. blue", "B. red", "A, B")]
    ['B', 'B', 'B', 'B', None, None]

    Without options any single letter will do.
    """
    words = plain_text(text)
    named = [letter for letter, option in options.items() if plain_text(option) == words]
    if len(named) == 1:
        return named[0]
    letter = _LETTER.fullmatch(words)
    if letter:
        found = letter[1].upper()
        return found if not options or found in options else None
    both = _LETTER_AND_TEXT.fullmatch(words)
    if both and plain_text(options.get(both[1].upper(), "")) == both[2]:
        return both[1].upper()
    return None
