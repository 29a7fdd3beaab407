r"""Numbers with units: 1.5 km is 1500 m; 5 cm is neither 5 km nor 5 cm^2. The kind `quantity`.

pint knows the exact size and the dimension of a unit. This module lists the accepted spellings, because pint alone
takes 219 of 3,364 words of technical English for units ("chain", "link", "has", "exact", "fifths"). A word that is not
listed is never a unit.
"""

import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, NamedTuple

from rewards.answers.algebra import Value, approximate, constant, power_of_pi, same, value
from rewards.answers.kind import GoldError, Kind, Limits, decided, unparseable
from rewards.answers.notation import joined, named, speaks_of, split_noun
from rewards.answers.number import CURRENCIES, plain_number
from rewards.answers.plain import plain_latex
from rewards.example import Example
from rewards.verdict import Verdict

MAX_UNIT_CHARS = 60


class Unit(NamedTuple):
    """A unit of measurement."""

    dimension: tuple[tuple[str, int], ...]
    """Base units with their exponents, sorted."""
    factor: Fraction = Fraction(1)
    """Size in base units, to be multiplied by π to the power `pi`."""
    offset: Fraction = Fraction(0)
    """Zero of the scale in base units: 273.15 for degrees Celsius."""
    pi: int = 0


class Quantity(NamedTuple):
    """A number and its unit, or the noun that it counts; None and "" if it has neither."""

    number: Value
    unit: Unit | None
    noun: str = ""


_PREFIXES = {
    "p": "pico", "n": "nano", "u": "micro", "μ": "micro", "m": "milli", "c": "centi", "d": "deci", "h": "hecto",
    "k": "kilo", "M": "mega", "G": "giga", "T": "tera",
}  # fmt: skip
_SYMBOLS = {  # these accept the prefixes above; names are pint's
    "m": "meter", "g": "gram", "s": "second", "A": "ampere", "K": "kelvin", "mol": "mole", "cd": "candela",
    "Hz": "hertz", "N": "newton", "Pa": "pascal", "J": "joule", "W": "watt", "C": "coulomb", "V": "volt", "F": "farad",
    "Ω": "ohm", "S": "siemens", "Wb": "weber", "T": "tesla", "H": "henry", "L": "liter", "l": "liter",
    "eV": "electron_volt", "bar": "bar", "cal": "calorie", "Wh": "watt_hour", "B": "byte", "bit": "bit",
    "t": "metric_ton",
}  # fmt: skip
_NAMES = {  # these accept the prefixes' names
    **{name: name for name in (
        "meter gram second ampere kelvin mole candela hertz newton pascal joule watt coulomb volt farad ohm siemens "
        "weber tesla henry liter calorie byte bit bar"
    ).split()},
    "metre": "meter", "gramme": "gram", "sec": "second", "amp": "ampere", "litre": "liter", "siemen": "siemens",
    "electronvolt": "electron_volt", "tonne": "metric_ton",
}  # fmt: skip
_PLAIN = {  # these accept no prefix
    **{name: name for name in (
        "minute hour day week foot yard mile micron angstrom acre hectare gallon quart pint cup tablespoon teaspoon "
        "pound ounce stone ton knot atmosphere psi lbf hp cc mph kph floz mmHg atm light_year dyne erg gauss"
    ).split()},
    "min": "minute", "h": "hour", "hr": "hour", "d": "day", "wk": "week", "in": "inch", "inch": "inch", "inche": "inch",
    "ft": "foot", "feet": "foot", "feets": "foot", "yd": "yard", "mi": "mile", "nauticalmile": "nautical_mile",
    "Å": "angstrom", "ha": "hectare", "gal": "gallon", "qt": "quart", "pt": "pint", "fluidounce": "floz",
    "tbsp": "tablespoon",
    "tsp": "teaspoon", "lb": "pound", "lbs": "pound", "oz": "ounce", "kmh": "kph", "kn": "knot", "ly": "light_year",
    "lightyear": "light_year", "dyn": "dyne", "G": "gauss",
}  # fmt: skip
_OWN: dict[str, Unit] = {}
for _base, _words in {  # units for which pint has no dimension, or a different size
    "deg": {"° degree deg": "1", "arcmin": "1/60", "arcsec": "1/3600", "revolution rev": "360"},
    "usd": {"$ usd dollar": "1", "cent ¢": "1/100"}, "eur": {"€ eur euro": "1"}, "gbp": {"£ gbp": "1"},
    "jpy": {"¥ jpy yen": "1"}, "month": {"month": "1", "year yr": "12", "decade": "120", "century": "1200"},
    "unit": {"unit": "1"},
}.items():  # fmt: skip
    for _spelled, _factor in _words.items():
        _OWN |= {_word: Unit(((_base, 1),), Fraction(_factor)) for _word in _spelled.split()}
_OWN["rad"] = _OWN["radian"] = Unit((("deg", 1),), Fraction(180), pi=-1)
_OWN["rpm"] = Unit((("deg", 1), ("second", -1)), Fraction(6))
_SCALES: dict[str, tuple[Fraction, Fraction]] = {  # kelvin = number * factor + offset
    "°C": (Fraction(1), Fraction("273.15")), "celsius": (Fraction(1), Fraction("273.15")),
    "°F": (Fraction(5, 9), Fraction(45967, 180)), "fahrenheit": (Fraction(5, 9), Fraction(45967, 180)),
}  # fmt: skip
_NO_PLURALS = frozenset(("has", "ins"))
"""Words that would otherwise be read as plurals of symbols."""
_CLOCK = frozenset(("am", "pm", "a.m", "p.m"))
_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER = {"squared": 2, "cubed": 3}
_SEVERAL_WORDS = (
    (re.compile(r"(?:°|deg(?:ree)?s?) ?(?:C|Celsius|celsius)(?![a-z])"), "°C"),
    (re.compile(r"(?:°|deg(?:ree)?s?) ?(?:F|Fahrenheit|fahrenheit)(?![a-z])"), "°F"),
    (re.compile(r"\bnautical miles?"), "nauticalmile"),
    (re.compile(r"\blight[- ]years?"), "lightyear"),
    (re.compile(r"\b(?:fl\.? ?oz|fluid ounces?)"), "floz"),
    (re.compile(r"\b(?:US|U\.S\.) dollars?"), "dollar"),
    (re.compile(r"\bkm/hr?\b"), "kmh"),
)
_WRAPPER = re.compile(r"\\(?:text|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*+)\}")
_QUOTIENT = re.compile(r"\\frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_START = re.compile(
    r"\\(?:text|operatorname)\s?\{|°|\\mu(?![A-Za-z])|\\Omega(?![A-Za-z])"
    r"|(?<=[0-9}).μ]) ?(?![eE][-+]?[0-9])[A-Za-zμΩÅ¢]|(?<=\\pi) [A-Za-zμΩÅ¢]"
    r"|(?:(?<=illion)|(?<=ousand)|(?<=hundred)|(?<=dozen)) [A-Za-zμΩÅ¢]"
)
_PART = re.compile(
    r"(?P<word>°[CF]?|[A-Za-zμΩÅ]+|[$€£¥¢])|(?P<power>\^(?:[0-9]|\{-?[0-9]\})|[23](?![0-9]))|(?P<mark>[/*()])|[ .]+"
)
_ANOTHER_NUMBER = re.compile(r"(?<=[A-Za-z}]) ?(?=[0-9])")


def read(text: str) -> Quantity | None:
    r"""A number with its unit, or a sum of such parts (5 ft 6 in); None if the text is not a quantity.

    >>> [format(read(text).unit.factor) for text in (r"1.5\text{ km}", "5 miles", "3 m/s^2", r"2\,\mathrm{cm}^{2}")]
    ['1000', '201168/125', '1', '1/10000']
    >>> read("5 ft 6 in").number.rational
    Fraction(11, 2)
    """
    text = plain_latex(text)
    return _of(text) or _sum_of(text)


def equal(gold: Quantity, other: Quantity, tolerance: Fraction, relative: Fraction) -> bool:
    """Whether two quantities are equal, within a tolerance in the gold's unit or a share of the gold.

    If the gold has a unit or a noun, the other quantity must have one too. If it has none, any unit is accepted.
    """
    if gold.noun or other.noun:
        return gold.noun == other.noun and close(gold.number, other.number, tolerance, relative)
    if gold.unit is None or other.unit is None:
        return gold.unit is None and close(gold.number, other.number, tolerance, relative)
    if gold.unit.dimension != other.unit.dimension:
        return False
    given = converted(other.number, other.unit, gold.unit)
    return given is not None and close(gold.number, given, tolerance, relative)


def close(gold: Value, other: Value, tolerance: Fraction, relative: Fraction) -> bool:
    """Whether two numbers are equal, or differ by no more than an absolute or a relative tolerance."""
    if same(gold, other):
        return True
    wanted, given = approximate(gold), approximate(other)
    if wanted is None or given is None:
        return False
    return 0 < max(tolerance, relative * abs(wanted)) >= abs(wanted - given)


def same_unit_value(gold: str, gold_unit: Unit, other: str, unit: Unit) -> bool:
    """Whether the texts of two numbers with units are equal; False if algebra cannot decide."""
    wanted, given = _constant(gold), _constant(other)
    if wanted is None or given is None:
        return False
    return equal(Quantity(wanted, gold_unit), Quantity(given, unit), Fraction(0), Fraction(0))


def split(text: str, loose: bool = False) -> tuple[str, Unit | None]:
    r"""The number's text and the unit after it, of plain LaTeX; the text itself and None if there is no unit.

    Unless `loose`, a bare letter is a variable and not a unit: "3x", "5m", but "5 cm" and "5\text{ m}".

    >>> split("3xy"), split("5 apples"), split(r"5\text{ m/s}")[1].dimension
    (('3xy', None), ('5 apples', None), (('meter', 1), ('second', -1)))
    """
    sign = "-" if text[:1] == "-" and text[1:2] in tuple(CURRENCIES) else ""
    bare = text[len(sign) :]
    if bare[:1] in tuple(CURRENCIES):
        return sign + bare[1:].lstrip(), unit_of(bare[0])
    for tried, found in enumerate(_START.finditer(text)):
        start = found.start()
        number = text[:start].rstrip()
        if number.endswith((r"\frac{", r"\frac {")):
            start = number.rindex(r"\frac")
            number = text[:start].rstrip()
        if tried == 4 or not number:
            return text, None
        rest = text[start:]
        unit = unit_of(rest)
        if unit and (loose or rest[0] in "\\°" or _surely(rest)):
            return number, unit
        if unit:
            return text, None
    return text, None


def _surely(rest: str) -> bool:
    """Whether bare letters after a number can only be a unit, and not variables."""
    word = re.match(r"[A-Za-zμΩÅ¢]+", rest.lstrip())
    return word is not None and (len(word[0]) > 1 or (rest.startswith(" ") and "/" in rest))


@lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit | None:
    r"""The unit that a text names; None if it names none.

    >>> unit_of("km/h") == unit_of("kilometers per hour") == unit_of(r"\frac{\text{km}}{\text{h}}")
    True
    >>> unit_of("m/s") == unit_of("s/m"), unit_of("and 5"), unit_of("apples")
    (False, None, None)
    """
    if len(text) > 4 * MAX_UNIT_CHARS:
        return None
    text = _WRAPPER.sub(r" \1 ", text).replace(r"\mu", "μ").replace(r"\Omega", "Ω").replace(r"\$", "$")
    text = _QUOTIENT.sub(r" (\1)/(\2) ", text).replace(r"\cdot", "*").replace(r"\times", "*")
    text = re.sub(r"\s+", " ", text.replace("μ ", "μ").replace("{}", "")).strip(" .")
    for pattern, usual in _SEVERAL_WORDS:
        text = pattern.sub(usual, text)
    if not text or len(text) > MAX_UNIT_CHARS or text.lower() in _CLOCK:
        return None
    scale = _SCALES.get(text, _SCALES.get(text.lower()))
    if scale:
        return Unit((("kelvin", 1),), *scale)
    return _Units(re.sub(r"\bper\b", "/", text)).whole()


def _of(text: str) -> Quantity | None:
    number, unit = split(text, loose=True)
    noun = ""
    if unit is None:
        number, noun = split_noun(number)
    known = _constant(number)
    return None if known is None else Quantity(known, unit, noun)


def _sum_of(text: str) -> Quantity | None:
    """5 ft 6 in: quantities of one dimension, each in a smaller unit than the one before."""
    cuts = [found.start() for found in _ANOTHER_NUMBER.finditer(text)]
    if not 1 <= len(cuts) <= 2:
        return None
    parts = [_of(text[start:end].strip()) for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    first, total = parts[0], Fraction(0)
    previous: Unit | None = None
    for part in parts:
        rational = part.number.rational if part else None
        if first is None or first.unit is None or part is None or part.unit is None or rational is None:
            return None
        alike = (
            part.unit.dimension == first.unit.dimension
            and not part.unit.offset
            and part.unit.pi == first.unit.pi
        )
        if not alike or (previous and (part.unit.factor >= previous.factor or rational < 0)):
            return None
        previous = part.unit
        total += rational * part.unit.factor / first.unit.factor
    assert first is not None
    return Quantity(constant(total), first.unit)


def exact_value(text: str) -> Value | None:
    """The value of plain LaTeX: of a number (a percentage as its share) or of an expression; None if it is neither."""
    number = plain_number(text)
    return constant(number.share) if number else value(text)


def _constant(text: str) -> Value | None:
    found = exact_value(text)
    return found if found and found.is_constant else None


def converted(number: Value, unit: Unit, to: Unit) -> Value | None:
    """A number in one unit, converted to another unit of the same dimension."""
    if unit.offset or to.offset:
        rational = number.rational
        return (
            None
            if rational is None
            else constant((rational * unit.factor + unit.offset - to.offset) / to.factor)
        )
    return power_of_pi(number, unit.pi - to.pi, unit.factor / to.factor)


class _Units:
    """Reads a product of units: a term is a word with an optional power; a slash divides by the next term only.

    After a slash, a dot multiplies in the denominator, as in J/mol·K. A bare space there is ambiguous and is refused.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[tuple[str, str]] = []
        self._at = 0
        place = 0
        while place < len(text):
            found = _PART.match(text, place)
            if not found:
                self._parts = []
                return
            if found.lastgroup:
                self._parts.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()

    def whole(self) -> Unit | None:
        unit = self._product()
        return unit if self._at == len(self._parts) else None

    def _peek(self) -> tuple[str, str]:
        return self._parts[self._at] if self._at < len(self._parts) else ("", "")

    def _product(self) -> Unit | None:
        total, divided = self._term(), False
        while total:
            kind, text = self._peek()
            if text == "/":
                self._at += 1
                term = self._term()
                total, divided = term and _times(total, term, -1), True
            elif text == "*" or kind == "word" or text == "(":
                if divided and text != "*":
                    return None
                self._at += text == "*"
                term = self._term()
                total = term and _times(total, term, -1 if divided else 1)
            else:
                return total
        return None

    def _term(self) -> Unit | None:
        kind, text = self._peek()
        self._at += 1
        if text == "(":
            unit = self._product()
            closed = self._peek()[1] == ")"
            self._at += 1
            return self._raised(unit) if unit and closed else None
        if kind != "word":
            return None
        power = _BEFORE.get(text.lower())
        if power and self._peek()[0] == "word":
            unit = _word(self._parts[self._at][1])
            self._at += 1
            return unit and _times(Unit(()), unit, power)
        unit = _word(text)
        return unit and self._raised(unit)

    def _raised(self, unit: Unit) -> Unit:
        kind, text = self._peek()
        power = 1
        if kind == "power":
            power = int(text.strip("^{}"))
        elif kind == "word" and text.lower() in _AFTER:
            power = _AFTER[text.lower()]
        self._at += power != 1 or kind == "power"
        return _times(Unit(()), unit, power)


def _times(one: Unit, other: Unit, power: int) -> Unit:
    powers = dict(one.dimension)
    for name, exponent in other.dimension:
        powers[name] = powers.get(name, 0) + exponent * power
    dimension = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
    return Unit(dimension, one.factor * other.factor**power, pi=one.pi + other.pi * power)


@lru_cache(maxsize=4096)
def _word(word: str) -> Unit | None:
    """The unit that a word or symbol spells; None if it is not listed."""
    lower = word.lower()
    singular = lower.removesuffix("s") if len(lower) > 2 and lower not in _NO_PLURALS else lower
    if word in _SCALES:
        return Unit((("kelvin", 1),), _SCALES[word][0])
    if word in _SYMBOLS:
        return _measured(_SYMBOLS[word])
    for name in (word, lower, singular):
        if name in _OWN:
            return _OWN[name]
        if name in _PLAIN:
            return _measured(_PLAIN[name])
    for name in (lower, singular):
        if name in _NAMES:
            return _measured(_NAMES[name])
    for symbol, prefix in _PREFIXES.items():
        for rest in (word.removeprefix(symbol), word.removesuffix("s").removeprefix(symbol)):
            if word.startswith(symbol) and rest in _SYMBOLS and (rest != "s" or word == symbol + "s"):
                return _measured(prefix + _SYMBOLS[rest])
        if singular.startswith(prefix) and singular.removeprefix(prefix) in _NAMES:
            return _measured(prefix + _NAMES[singular.removeprefix(prefix)])
    return None


@cache
def _registry() -> Any:
    """pint's registry with exact fractions; created at first use, because that takes 0.4 s."""
    import pint

    return pint.UnitRegistry(non_int_type=Fraction, cache_folder=None)


def _measured(name: str) -> Unit:
    factor, base = _registry().get_root_units(name)
    powers = {str(unit): int(exponent) for unit, exponent in base._units.items()}
    factor = Fraction(factor) / 1000 ** powers.get("gram", 0)  # a kilogram is the base unit
    return Unit(tuple(sorted(powers.items())), factor)


def _bare(text: str) -> str:
    _, values = named(joined(text))
    return values[0] if len(values) == 1 else joined(text)


def _gold(example: Example) -> Quantity:
    quantity = read(_bare(example.answer))
    if quantity is None:
        raise GoldError(
            f'gold answer {example.answer!r} is not a number with a unit; correct it, or use verifier "math"'
        )
    return quantity


def _judge(answer: str, gold: Quantity, example: Example, limits: Limits) -> Verdict:
    given = read(_bare(answer))
    if not given:
        return unparseable(answer, "number with a unit")
    if not gold.unit and not gold.noun and given.noun and speaks_of(example.question, given.noun):
        given = given._replace(noun="")
    tolerances = limits.limit("tolerance", example), limits.limit("relative_tolerance", example)
    return decided(equal(gold, given, *tolerances), answer)


QUANTITY = Kind(_gold, _judge)
