r"""Answers in plain form: text without formatting, and LaTeX without typography."""

import re
import unicodedata
from functools import lru_cache

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
"""Invisible characters: soft hyphen, zero-width spaces and joiners, direction marks, variation selectors."""
_READ_AS = ("<wide>", "<narrow>", "<font>", "<compat>", "<noBreak>")
"""Unicode's compatibility kinds for letters in another font; superscripts, circles and fractions are excluded."""
_TYPOGRAPHY = re.compile(
    r"(?P<keep>\\\\)|\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|limits|quad|qquad)(?![A-Za-z])|\\[ ,;:>]|~|\$"
    r"|(?P<dollar>\\\$)|(?P<degree>\^ ?\{? ?\\circ ?\}?|\\degree(?![A-Za-z])|\{\^ ?\\circ ?\})"
)
_LONE_DOLLAR = re.compile(r"\s*\$[^$]*")
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|mathcal|mathscr)\s*\{([^{}]*)\}")
_SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\cfrac", r"\frac"),
    (r"\%", "%"),
    ("{,}", ","),
    (r"\varnothing", r"\emptyset"),
)
_TEXT_FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|mathrm|mbox|rm)\s*(?=\{)")
_NEGATIVE_SPACE = re.compile(r"\\! ?")
_ROOT_OF_ONE = re.compile(r"\\sqrt ?(\[[0-9A-Za-z]{1,4}\]) ?([0-9A-Za-z])")
_GROUPED = re.compile(r"-?[0-9]{1,3}(?:,\\! ?[0-9]{2,3})*,\\! ?[0-9]{3}")
"""A number whose groups are set close together. In India all groups but the last have two digits."""
_PRIMED = re.compile(r"\$?([A-Za-z]'+)\$?")
_BINOMIAL = re.compile(r"\\[dt]?binom ?([0-9]) ?([0-9])")
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|mathrm|mathbf|mathit|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*+)\}"
)
_SPACE = re.compile(r"\s+")
# All spaces except those between two letters or digits, and the one that distinguishes "100, 200" from 100,200.
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])(?<![0-9],) | (?![A-Za-z0-9])|(?<=[0-9],) (?![0-9]{3}(?![0-9]))")


def cleaned(text: str) -> str:
    r"""The text as a reader sees it: no invisible characters; letters and digits in the usual font and width.

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
    r"""Whether a text holds characters that mathematical answers never contain: controls, overrides, marks, symbols.

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
    primed = _PRIMED.fullmatch(text.strip())
    if primed:  # a prime is not a quotation mark
        return primed[1].casefold()
    text = _SPACE.sub(" ", text.casefold()).strip(" $\"'“”‘’`*")
    return text.removesuffix(".").strip(" $\"'“”‘’`*")


def unwrapped(text: str) -> str:
    r"""The text without \text{}, \mathrm{} and their like around its parts."""
    return _WRAPPED.sub(r"\1", text)


def plain_latex(text: str) -> str:
    r"""LaTeX without commands that change only its appearance; two answers equal in this form are equal.

    >>> plain_latex(r"$\left( \dfrac{1}{2} ,\, 3 \right)$."), plain_latex(r"x² = 90^{\circ}")
    ('(\\frac{1}{2},3)', 'x^2=90°')

    A dollar sign that means money stays.
    """
    text = cleaned(text)
    if not text.isascii():
        text = _RAISED.sub(lambda found: _script("^", found[0].translate(_SUPERSCRIPTS)), text)
        text = _LOWERED.sub(lambda found: _script("_", found[0].translate(_SUBSCRIPTS)), text)
        text = _ROOT_OF_NUMBER.sub(r"\\sqrt{\1}", text).translate(_TRANSLATE)
    text = _SPACE.sub(" ", text)  # single spaces first: no regex below may backtrack
    if _GROUPED.fullmatch(text.strip(" $")):
        text = text.replace(",", "")
    text = _NEGATIVE_SPACE.sub("", text)
    for spelling, usual in _SPELLINGS:
        text = text.replace(spelling, usual)
    text = _ROOT_OF_ONE.sub(r"\\sqrt\1{\2}", _BINOMIAL.sub(r"\\binom{\1}{\2}", text))
    money = _LONE_DOLLAR.fullmatch(text) is not None
    text = _TYPOGRAPHY.sub(_typography, text.replace("$", r"\$", 1) if money and r"\$" not in text else text)
    text = _SPACE.sub(" ", _TEXT_FONT.sub(r"\\text", _FONT.sub(r"\1", text))).strip()
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
