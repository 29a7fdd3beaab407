r"""Exact numbers, the rule for rounded decimals, and the kinds `number` and `integer`.

The rule: a decimal is right for a gold that no finite decimal equals (irrational or periodic) if it has at least
ROUNDED_DIGITS significant digits and is the gold rounded to its last digit. The same holds with the sides exchanged.
Between two finite decimals nothing is rounded: they are equal or not.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.answers.kind import GoldError, Kind, Limits, decided, unparseable
from rewards.answers.notation import joined, named, speaks_of, split_noun
from rewards.answers.plain import MAX_DIGITS, plain_latex, too_many_digits
from rewards.example import Example
from rewards.verdict import Verdict

ROUNDED_DIGITS = 7
"""One more than the six digits to which math-verify rounds."""
CURRENCIES = "$€£¥"
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"([+-]?)({_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]([+-]?[0-9]{{1,2}}))?")
_POWER = re.compile(r"\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?(?:\{([+-]?[0-9]{1,2})\}|([0-9]))")
_REPEATING = re.compile(r"([+-]?)([0-9]+)\.([0-9]{0,20})\\(?:overline|bar|dot)\{([0-9]{1,20})\}")
_RATIO = re.compile(
    r"([+-]?)(?:([0-9]+)\s?/\s?([0-9]+)|\\frac\s?(?:\{([+-]?[0-9]+)\}|([0-9]))\s?(?:\{([0-9]+)\}|([0-9])))"
)
_MIXED = re.compile(
    r"([+-]?)([0-9]+)(?: ([0-9]+)/([0-9]+)|\\frac\s?(?:\{([0-9]+)\}|([0-9]))\s?(?:\{([0-9]+)\}|([0-9])))"
)
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "quadrillion": 10**15, "quintillion": 10**18, "percent": 1, "percentage": 1, "pct": 1,
}  # fmt: skip
_SCALE = re.compile(
    rf"(.*[0-9.}}])\s?(?:\\text\s?\{{)?\s?({'|'.join(_SCALES)})\.?\s?\}}?", re.IGNORECASE | re.DOTALL
)
_TEXT = re.compile(r"\\text\s?\{([^{}]*)\}")
_COMMA_DECIMAL = re.compile(r"[+-]?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
_PERCENT_ASKED = re.compile(r"%|\bpercent|\bpct\b", re.IGNORECASE)


class Number(NamedTuple):
    """An exact number as it is written: 50% is 50 with percent."""

    value: Fraction
    percent: bool = False
    step: Fraction | None = None
    """One unit of the last digit of a decimal; None for integers and fractions."""

    @property
    def share(self) -> Fraction:
        """The value; for a percentage, a hundredth of it."""
        return self.value / 100 if self.percent else self.value

    @property
    def significant(self) -> int:
        """Significant digits of a decimal; 0 for integers and fractions."""
        return len(str(abs(self.value) // self.step)) if self.step and self.value else 0

    def equals(self, other: "Number") -> bool:
        """Whether two numbers are equal. If only one has a percent sign, the sign is ignored."""
        if self.percent == other.percent:
            return same_number(self, other)
        return same_number(self, other._replace(percent=False)) or same_number(
            self._replace(percent=False), other
        )

    def rounds(self, exact: Fraction) -> bool:
        """Whether this decimal is an exact number rounded by the rule of this module."""
        if not self.step or self.significant < ROUNDED_DIGITS:
            return False
        return abs(self.value - (exact * 100 if self.percent else exact)) <= self.step / 2


def same_number(one: Number, other: Number) -> bool:
    """Whether two numbers are equal (percentages as shares), or one is the other rounded by the rule."""
    if one.share == other.share:
        return True
    return (one.rounds(other.share) and not _is_finite(other)) or (
        other.rounds(one.share) and not _is_finite(one)
    )


def _is_finite(number: Number) -> bool:
    """Whether some finite decimal equals the number."""
    rest = number.share.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def exact_number(text: str) -> Number | None:
    r"""The exact number that the whole text spells; None if it spells anything else.

    Reads integers and decimals with thousands separators, a/b, \frac, mixed numbers, scientific notation, repeating
    decimals, a percent sign, a degree sign, a currency sign, and words such as "million".

    >>> [exact_number(n).value for n in ("-1,234.50", r"1\frac{1}{2}", r"3 \times 10^{2}", "2 million")]
    [Fraction(-2469, 2), Fraction(3, 2), Fraction(300, 1), Fraction(2000000, 1)]
    >>> exact_number("4 or 5"), exact_number("100, 200")
    (None, None)
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    return plain_number(plain_latex(text))


def plain_number(text: str) -> Number | None:
    """As `exact_number`, for a text that is already plain LaTeX."""
    if len(text) > 2 * MAX_DIGITS or not any(map(str.isdigit, text)) or not text.isprintable():
        return None
    whole = _TEXT.fullmatch(text)
    text = whole[1].strip() if whole else text
    negative = text[:1] == "-" and text[1:2] in tuple(CURRENCIES)
    text = text[negative:]
    if text[:1] in tuple(CURRENCIES):
        text = text[1:].lstrip()
        if text[:1] in ("-", "+"):
            return None
    factor, percent = 1, text.endswith("%")
    scale = _SCALE.fullmatch(text) if text[-1:].isalpha() or text[-1:] in ("}", ".") else None
    if scale:
        text, factor = scale[1].removesuffix(r"\text{").rstrip(), _SCALES[scale[2].lower()]
        percent = factor == 1
    text = text.removesuffix("%").removesuffix("°").rstrip()
    number = _decimal(text)
    if number is None and ("/" in text or "frac" in text):
        number = _ratio(text)
    if number is None and "{" in text:
        number = _repeating(text)
    if number is None:
        return None
    factor = -factor if negative else factor
    step = number.step * abs(factor) if number.step else None
    return Number(number.value * factor, percent, step)


def comma_number(text: str) -> Number | None:
    """A number with a decimal comma, such as 0,5 or 3,14; None for anything else, such as 1,000 or the list 3, 14."""
    plain = plain_latex(text) if re.search(r"[0-9],[0-9]", text) else ""
    return plain_number(plain.replace(",", ".")) if _COMMA_DECIMAL.fullmatch(plain) else None


def _decimal(text: str) -> Number | None:
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
    step = Fraction(1, 10 ** len(part)) * Fraction(10) ** int(exponent or 0)
    value = int(whole + part or "0") * step
    return Number(-value if sign == "-" else value, step=step if part else None)


def _ratio(text: str) -> Number | None:
    found, whole = _RATIO.fullmatch(text), 0
    if too_many_digits(text):
        return None
    if found:
        sign, *parts = found.groups()
    else:
        found = _MIXED.fullmatch(text)
        if not found:
            return None
        sign, *parts = found.groups()
        whole = int(parts.pop(0))
    above, below = (int(part) for part in parts if part is not None)
    if not below or (_MIXED is found.re and not 0 < above < below):
        return None
    value = whole + Fraction(above, below)
    return Number(-value if sign == "-" else value)


def _repeating(text: str) -> Number | None:
    found = _REPEATING.fullmatch(text)
    if not found:
        return None
    sign, whole, first, again = found.groups()
    value = Fraction(int(whole + first), 10 ** len(first))
    value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(first))
    return Number(-value if sign == "-" else value)


def _number_of(text: str, example: Example) -> Number | None:
    """The number that a text spells, after a leading name and a noun from the question are dropped."""
    name, values = named(joined(text))
    bare = values[0] if len(values) == 1 else joined(text)
    number = plain_number(bare) or comma_number(text)
    if number or name:
        return number
    counted, noun = split_noun(bare)
    allowed = noun and (speaks_of(example.question, noun) or speaks_of(example.answer, noun))
    return plain_number(counted) if allowed else None


def _gold(example: Example) -> Number:
    number = _number_of(example.answer, example)
    if number is None:
        raise _no_gold(example, "a number")
    return number


def _integer_gold(example: Example) -> Number:
    number = _number_of(example.answer, example)
    if number is None or number.value.denominator != 1 or number.percent:
        raise _no_gold(example, "an integer")
    return number


def _no_gold(example: Example, what: str) -> GoldError:
    remedy = 'correct it, or use verifier "math" or "exact"'
    return GoldError(f"gold answer {example.answer!r} is not {what}; {remedy}")


def _integer(answer: str, gold: Number, example: Example, limits: Limits) -> Verdict:
    given = _number_of(answer, example)
    if not given or given.percent:
        return unparseable(answer, "integer")
    return decided(gold.value == given.value, answer)


def _number(answer: str, gold: Number, example: Example, limits: Limits) -> Verdict:
    given = _number_of(answer, example)
    if not given:
        return unparseable(answer, "number")
    right = within(gold, given, example, limits)
    if gold.percent != given.percent and (gold.percent or _PERCENT_ASKED.search(example.question)):
        # The question asks for percent, so a number means the same with and without the sign.
        right = right or within(gold._replace(percent=True), given._replace(percent=True), example, limits)
    return decided(right, answer)


def within(gold: Number, given: Number, example: Example, limits: Limits) -> bool:
    """Whether two numbers are the same, or differ by no more than the row's tolerances allow."""
    if same_number(gold, given):
        return True
    # A tolerance is in the unit of the gold: percentage points for a percentage.
    wanted, found = gold.value, given.share * (100 if gold.percent else 1)
    share = limits.limit("relative_tolerance", example) * abs(wanted)
    return abs(wanted - found) <= max(limits.limit("tolerance", example), share)


NUMBER = Kind(_gold, _number)
INTEGER = Kind(_integer_gold, _integer)
