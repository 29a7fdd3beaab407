r"""Answers in normal form: text, LaTeX without its typography, exact numbers, option letters.

What these decide takes microseconds and no computer algebra; half of all answers are decided here.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DIGITS = 400

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅐": "1/7", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8", "⅑": "1/9", "⅒": "1/10",
}  # fmt: skip
_LOOKALIKES = {
    **dict.fromkeys("−–‒‐‑﹣", "-"),
    **{"×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "∗": "*"},
    **{"∞": r"\infty ", "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm ", "∓": r"\mp "},
    **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
    **{"→": r"\to ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "√": r"\sqrt ", "′": "'", "，": ",", "、": ","},
    **{"㎡": "m^2", "㎠": "cm^2", "㎢": "km^2", "㎟": "mm^2", "㎥": "m^3", "㎤": "cm^3", "㎜": "mm", "㎝": "cm"},
    **{"㎞": "km", "㎏": "kg", "℃": r"^\circ C", "℉": r"^\circ F", "Ω": "Ω", "µ": "μ"},
    **{sign: rf"\frac{{{ratio.replace('/', '}{')}}}" for sign, ratio in _VULGAR.items()},
    **{letter: rf"\{name} " for letter, name in zip(
        "αβγδεζηθκλνξπρστφχψω",
        ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda", "nu", "xi",
         "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),
        strict=True,
    )},
}  # fmt: skip
_TRANSLATE = str.maketrans(_LOOKALIKES)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT_OF_NUMBER = re.compile(r"√\s?([0-9]+)")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff\ufe0e\ufe0f]")
"""Soft hyphen, zero-width spaces and joiners, direction marks, variation selectors: a reader sees nothing."""
_READ_AS = ("<wide>", "<narrow>", "<font>", "<compat>", "<noBreak>")
"""Unicode's kinds of letters that are other letters in another font; not superscripts, circles or fractions."""
_TYPOGRAPHY = re.compile(
    r"(?P<keep>\\\\)|\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![A-Za-z])|\\[ ,;:>]|~|\$"
    r"|(?P<dollar>\\\$)|(?P<degree>\^ ?\{? ?\\circ ?\}?|\\degree(?![A-Za-z])|\{\^ ?\\circ ?\})"
)
_LONE_DOLLAR = re.compile(r"\s*\$[^$]*")
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal)\s*\{([^{}]*)\}")
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
_MIXED = re.compile(
    r"([+-]?)([0-9]+)(?: ([0-9]+)/([0-9]+)|\\frac\s?(?:\{([0-9]+)\}|([0-9]))\s?(?:\{([0-9]+)\}|([0-9])))"
)
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
_SCALE = re.compile(
    rf"(.*[0-9.}}])\s?(?:\\text\s?\{{)?\s?({'|'.join(_SCALES)}|percent)\s?\}}?", re.IGNORECASE | re.DOTALL
)
CURRENCIES = "$€£¥"
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_SAID = re.compile(r"^(?:option|choice|answer) ?:? ?(?=\(?[a-z]\)?(?:[).:]|$))")
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


def cleaned(text: str) -> str:
    r"""The text as a reader sees it: no invisible characters, letters and digits of other fonts and widths as usual.

    >>> cleaned("４\u200b２ = 𝟒𝟐 = ٤٢"), cleaned("x²")
    ('42 = 42 = 42', 'x²')

    Direction overrides, control characters and invisible operators stay: see `strange`.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    return "".join(map(_usual, text))


@lru_cache(maxsize=4096)
def _usual(letter: str) -> str:
    if letter.isascii() or letter in _LOOKALIKES:
        return letter
    if unicodedata.category(letter) == "Nd":
        return str(unicodedata.decimal(letter))
    if unicodedata.decomposition(letter).startswith(_READ_AS):
        return unicodedata.normalize("NFKC", letter)
    return letter


def strange(text: str) -> bool:
    r"""Whether a text holds what no mathematical answer does: control and override characters, marks, symbols.

    >>> strange("\u202e24"), strange("4\u03382"), strange("42 ☺"), strange("42€ é 度")
    (True, True, True, False)
    """
    if text.isascii():
        return not text.isprintable()
    return any(
        not (letter.isprintable() and (letter.isalpha() or letter.isascii() or letter in "€£¥°"))
        for letter in text
    )


def plain_text(text: str) -> str:
    r"""Text for comparison: one case, single spaces, no \text{}, no quotes or full stop around it.

    >>> plain_text(r" \text{Dark  Blue}. ")
    'dark blue'
    """
    text = unwrapped(cleaned(text)).replace(r"\%", "%")
    text = _SPACE.sub(" ", text.casefold()).strip(" $\"'“”‘’`*")
    return text.removesuffix(".").strip(" $\"'“”‘’`*")


def unwrapped(text: str) -> str:
    r"""The text without \text{}, \mathrm{} and their like around its parts."""
    return _WRAPPED.sub(r"\1", text)


def plain_latex(text: str) -> str:
    r"""LaTeX without what only changes its looks; two answers equal in this form are equal.

    >>> plain_latex(r"$\left( \dfrac{1}{2} ,\, 3 \right)$."), plain_latex(r"x² = 90^{\circ}")
    ('(\\frac{1}{2},3)', 'x^2=90°')

    A dollar sign that is money stays.
    """
    text = cleaned(text)
    if not text.isascii():
        text = _RAISED.sub(lambda found: _script("^", found[0].translate(_SUPERSCRIPTS)), text)
        text = _LOWERED.sub(lambda found: _script("_", found[0].translate(_SUBSCRIPTS)), text)
        text = _ROOT_OF_NUMBER.sub(r"\\sqrt{\1}", text).translate(_TRANSLATE)
    text = _SPACE.sub(" ", text)  # single spaces first: no regex below may backtrack
    for spelling, usual in _SPELLINGS:
        text = text.replace(spelling, usual)
    money = _LONE_DOLLAR.fullmatch(text) is not None
    text = _TYPOGRAPHY.sub(_typography, text.replace("$", r"\$", 1) if money and r"\$" not in text else text)
    text = _SPACE.sub(" ", _FONT.sub(r"\1", text)).strip()
    for opened, closed in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opened) and text.endswith(closed) and len(text) >= 4:
            text = text[2:-2]
    text = _LOOSE_SPACE.sub("", text.strip())
    return text if text.endswith("..") else text.removesuffix(".")


def _script(mark: str, digits: str) -> str:
    return f"{mark}{digits}" if len(digits) == 1 else f"{mark}{{{digits}}}"


def _typography(found: re.Match[str]) -> str:
    if found["keep"]:
        return found["keep"]
    if found["dollar"]:
        return "$"
    return "°" if found["degree"] else " "


def too_many_digits(text: str) -> bool:
    """Whether a number in the text has MAX_DIGITS digits or more: no honest answer has."""
    return re.search(rf"[0-9]{{{MAX_DIGITS}}}", text) is not None


def exact_number(text: str) -> Number | None:
    r"""The number that the whole text is, exactly; None if it is anything else.

    Takes integers and decimals with thousands separators, a/b, \frac, mixed numbers, scientific notation, a percent
    sign, a degree sign, a currency sign, "million" and its like.

    >>> [exact_number(n).value for n in ("-1,234.50", r"1\frac{1}{2}", r"3 \times 10^{2}", "2 million")]
    [Fraction(-2469, 2), Fraction(3, 2), Fraction(300, 1), Fraction(2000000, 1)]
    >>> exact_number("4 or 5"), exact_number("100, 200")
    (None, None)
    """
    if len(text) > 2 * MAX_DIGITS:
        return None
    return plain_number(plain_latex(text))


def plain_number(text: str) -> Number | None:
    """As `exact_number`, of a text that is plain LaTeX already."""
    if len(text) > 2 * MAX_DIGITS or not any(map(str.isdigit, text)) or not text.isprintable():
        return None
    whole = _WRAPPED.fullmatch(text)
    text = whole[1].strip() if whole else text
    negative = text[:1] == "-" and text[1:2] in tuple(CURRENCIES)
    text = text[negative:]
    if text[:1] in tuple(CURRENCIES):
        text = text[1:].lstrip()
        if text[:1] in ("-", "+"):
            return None
    factor, percent = 1, text.endswith("%")
    scale = _SCALE.fullmatch(text) if text[-1:].isalpha() or text[-1:] == "}" else None
    if scale:
        text, factor = scale[1].removesuffix(r"\text{").rstrip(), _SCALES.get(scale[2].lower(), 1)
        percent = factor == 1
    text = text.removesuffix("%").removesuffix("°").rstrip()
    value = _decimal(text)
    if value is None and ("/" in text or "frac" in text):
        value = _ratio(text)
    return None if value is None else Number((-value if negative else value) * factor, percent)


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
    return -value if sign == "-" else value


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
    words = _SAID.sub("", plain_text(text))
    letter = _LETTER.fullmatch(words)
    if letter and (not options or letter[1].upper() in options):
        return letter[1].upper()
    named = [letter for letter, option in options.items() if plain_text(option) == words]
    if not named:
        named = [letter for letter, option in options.items() if plain_latex(option) == plain_latex(text)]
    if len(named) == 1:
        return named[0]
    both = _LETTER_AND_TEXT.fullmatch(words)
    if both and plain_text(options.get(both[1].upper(), "")) == both[2]:
        return both[1].upper()
    return None
