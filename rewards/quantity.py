r"""Numbers with units: 1.5 km is 1500 m; 5 cm is neither 5 km nor 5 cm^2.

Units are products of powers of base units with an exact factor (the factors are the legal definitions: SI
Brochure, 9th edition; the international yard and pound of 1959). A word that is no unit, as in "12 apples", is a
base unit of its own: apples are not pears.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rewards.algebra import Value, same, value
from rewards.normal import CURRENCIES, plain_latex, plain_number

MAX_UNIT_CHARS = 60


class Unit(NamedTuple):
    """A unit of measurement."""

    dimension: tuple[tuple[str, int], ...]
    """Base units with their exponents, sorted."""
    factor: Fraction = Fraction(1)
    """So many of the base units."""
    offset: Fraction = Fraction(0)
    """Zero of the scale in base units: 273.15 for degrees Celsius."""
    known: bool = True
    """Whether all words in it are in the table."""


class Quantity(NamedTuple):
    """A number and its unit; None if it has none."""

    number: Value
    unit: Unit | None


_KILOGRAM = Fraction("0.45359237")
_FOOT = Fraction("0.3048")
_GALLON = Fraction("0.003785411784")
_SYMBOLS: dict[str, tuple[str, str | int | Fraction]] = {
    # symbol: (base units, factor); these take prefixes
    "m": ("m", 1), "g": ("kg", "1/1000"), "s": ("s", 1), "A": ("A", 1), "K": ("K", 1), "mol": ("mol", 1),
    "cd": ("cd", 1), "Hz": ("s-1", 1), "N": ("kg m s-2", 1), "Pa": ("kg m-1 s-2", 1), "J": ("kg m2 s-2", 1),
    "W": ("kg m2 s-3", 1), "C": ("A s", 1), "V": ("kg m2 s-3 A-1", 1), "F": ("kg-1 m-2 s4 A2", 1),
    "Ω": ("kg m2 s-3 A-2", 1), "S": ("kg-1 m-2 s3 A2", 1), "Wb": ("kg m2 s-2 A-1", 1), "T": ("kg s-2 A-1", 1),
    "H": ("kg m2 s-2 A-2", 1), "L": ("m3", "1/1000"), "l": ("m3", "1/1000"), "eV": ("kg m2 s-2", "1.602176634e-19"),
    "bar": ("kg m-1 s-2", 100000), "cal": ("kg m2 s-2", "4.184"), "Wh": ("kg m2 s-2", 3600), "B": ("bit", 8),
    "bit": ("bit", 1), "t": ("kg", 1000),
}  # fmt: skip
_NAMES: dict[str, str] = {
    "meter": "m", "metre": "m", "gram": "g", "gramme": "g", "second": "s", "sec": "s", "ampere": "A", "amp": "A",
    "kelvin": "K", "mole": "mol", "candela": "cd", "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J",
    "watt": "W", "coulomb": "C", "volt": "V", "farad": "F", "ohm": "Ω", "siemen": "S", "weber": "Wb",
    "tesla": "T", "henry": "H", "liter": "L", "litre": "L", "electronvolt": "eV", "calorie": "cal",
    "byte": "B", "tonne": "t",
}  # fmt: skip
_OTHERS: dict[str, tuple[str, str | int | Fraction]] = {
    # word: (base units, factor); these take no prefix
    "min": ("s", 60), "minute": ("s", 60), "h": ("s", 3600), "hr": ("s", 3600), "hour": ("s", 3600),
    "d": ("s", 86400), "day": ("s", 86400), "week": ("s", 604800), "wk": ("s", 604800), "month": ("month", 1),
    "year": ("month", 12), "yr": ("month", 12), "decade": ("month", 120), "century": ("month", 1200),
    "in": ("m", _FOOT / 12), "inch": ("m", _FOOT / 12), "inche": ("m", _FOOT / 12), "ft": ("m", _FOOT),
    "foot": ("m", _FOOT), "feet": ("m", _FOOT), "yd": ("m", _FOOT * 3), "yard": ("m", _FOOT * 3),
    "mi": ("m", _FOOT * 5280), "mile": ("m", _FOOT * 5280), "nauticalmile": ("m", 1852),
    "micron": ("m", "1/1000000"), "Å": ("m", "1/10000000000"), "angstrom": ("m", "1/10000000000"),
    "acre": ("m2", _FOOT**2 * 43560), "ha": ("m2", 10000), "hectare": ("m2", 10000),
    "gal": ("m3", _GALLON), "gallon": ("m3", _GALLON), "quart": ("m3", _GALLON / 4), "qt": ("m3", _GALLON / 4),
    "pint": ("m3", _GALLON / 8), "pt": ("m3", _GALLON / 8), "cup": ("m3", _GALLON / 16),
    "floz": ("m3", _GALLON / 128), "fluidounce": ("m3", _GALLON / 128), "cc": ("m3", "1/1000000"),
    "tbsp": ("m3", _GALLON / 256), "tablespoon": ("m3", _GALLON / 256), "tsp": ("m3", _GALLON / 768),
    "teaspoon": ("m3", _GALLON / 768),
    "lb": ("kg", _KILOGRAM), "lbs": ("kg", _KILOGRAM), "oz": ("kg", _KILOGRAM / 16),
    "ounce": ("kg", _KILOGRAM / 16), "stone": ("kg", _KILOGRAM * 14), "ton": ("kg", _KILOGRAM * 2000),
    "mph": ("m s-1", _FOOT * 5280 / 3600), "kmh": ("m s-1", "5/18"), "kph": ("m s-1", "5/18"),
    "knot": ("m s-1", "463/900"), "kn": ("m s-1", "463/900"), "atm": ("kg m-1 s-2", 101325),
    "atmosphere": ("kg m-1 s-2", 101325), "mmHg": ("kg m-1 s-2", "133.322387415"),
    "psi": ("kg m-1 s-2", _KILOGRAM * Fraction("9.80665") * 144 / _FOOT**2),
    "lbf": ("kg m s-2", _KILOGRAM * Fraction("9.80665")), "hp": ("kg m2 s-3", "745.69987158227022"),
    "°": ("deg", 1), "degree": ("deg", 1), "deg": ("deg", 1), "arcmin": ("deg", "1/60"), "arcsec": ("deg", "1/3600"),
    "revolution": ("deg", 360), "rev": ("deg", 360), "rad": ("rad", 1), "radian": ("rad", 1), "rpm": ("deg s-1", 6),
    "$": ("usd", 1), "usd": ("usd", 1), "dollar": ("usd", 1), "cent": ("usd", "1/100"), "¢": ("usd", "1/100"),
    "€": ("eur", 1), "eur": ("eur", 1), "euro": ("eur", 1), "£": ("gbp", 1), "gbp": ("gbp", 1), "¥": ("jpy", 1),
    "yen": ("jpy", 1), "people": ("person", 1), "person": ("person", 1), "children": ("child", 1),
    "men": ("man", 1), "women": ("woman", 1), "mice": ("mouse", 1), "feets": ("m", _FOOT),
    "square unit": ("unit2", 1), "unit": ("unit", 1),
}  # fmt: skip
_SCALES: dict[str, tuple[Fraction, Fraction]] = {  # K = number * factor + offset
    "°C": (Fraction(1), Fraction("273.15")), "celsius": (Fraction(1), Fraction("273.15")),
    "°F": (Fraction(5, 9), Fraction(45967, 180)), "fahrenheit": (Fraction(5, 9), Fraction(45967, 180)),
}  # fmt: skip
_PREFIXES = {
    "p": -12, "n": -9, "u": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "da": 1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12,
}  # fmt: skip
_PREFIX_NAMES = {
    "pico": -12, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "hecto": 2, "kilo": 3, "mega": 6,
    "giga": 9, "tera": 12,
}  # fmt: skip
_NO_UNIT = frozenset(
    (
        *(
            "and",
            "or",
            "not",
            "no",
            "nor",
            "to",
            "than",
            "minus",
            "plus",
            "times",
            "over",
            "half",
            "halves",
            "third",
        ),
        *(
            "thirds",
            "quarter",
            "quarters",
            "fourths",
            "fifths",
            "tenths",
            "factorial",
            "mod",
            "modulo",
            "base",
        ),
        *("choose", "power", "root", "sqrt", "pi", "hundred", "thousand", "million", "billion", "trillion"),
        *(
            "dozen",
            "percent",
            "negative",
            "positive",
            "infinity",
            "maybe",
            "perhaps",
            "possibly",
            "wrong",
            "false",
        ),
        *(
            "sin",
            "cos",
            "tan",
            "cot",
            "csc",
            "log",
            "ln",
            "exp",
            "gcd",
            "lcm",
            "max",
            "det",
            "arcsin",
            "arccos",
        ),
        *(
            "arctan",
            "sinh",
            "cosh",
            "tanh",
            "alpha",
            "beta",
            "gamma",
            "theta",
            "inf",
            "infty",
            "lg",
            "if",
            "else",
        ),
    )
)
_CLOCK = frozenset(("am", "pm", "a.m", "p.m"))
_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER = {"squared": 2, "cubed": 3}
_SEVERAL_WORDS = (
    (re.compile(r"(?:°|deg(?:ree)?s?) ?(?:C|Celsius|celsius)(?![a-z])"), "°C"),
    (re.compile(r"(?:°|deg(?:ree)?s?) ?(?:F|Fahrenheit|fahrenheit)(?![a-z])"), "°F"),
    (re.compile(r"\bnautical miles?"), "nauticalmile"),
    (re.compile(r"\b(?:fl\.? ?oz|fluid ounces?)"), "floz"),
    (re.compile(r"\b(?:US|U\.S\.) dollars?"), "dollar"),
    (re.compile(r"\bkm/hr?\b"), "kmh"),
)
_WRAPPER = re.compile(r"\\(?:text|textrm|mathrm|mbox|operatorname|rm)\s*\{([^{}]*)\}")
_QUOTIENT = re.compile(r"\\frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_START = re.compile(
    r"\\(?:text|textrm|mathrm|mbox|operatorname)\s?\{|°|\\mu(?![A-Za-z])|\\Omega(?![A-Za-z])"
    r"|(?<=[0-9}).μ]) ?(?![eE][-+]?[0-9])[A-Za-zμΩÅ¢]|(?<=\\pi) [A-Za-zμΩÅ¢]"
    r"|(?:(?<=illion)|(?<=ousand)|(?<=hundred)|(?<=dozen)) [A-Za-zμΩÅ¢]"
)
_PART = re.compile(
    r"(?P<word>°[CF]?|[A-Za-zμΩÅ]+|[$€£¥¢])|(?P<power>\^(?:[0-9]|\{-?[0-9]\})|[23](?![0-9]))|(?P<mark>[/*()])|[ .]+"
)
_ANOTHER_NUMBER = re.compile(r"(?<=[A-Za-z}]) ?(?=[0-9])")


def read(text: str) -> Quantity | None:
    r"""A number with its unit, or parts of it that add up; None if the text is no quantity.

    >>> [format(read(text).unit.factor) for text in (r"1.5\text{ km}", "5 miles", "3 m/s^2", r"2\,\mathrm{cm}^{2}")]
    ['1000', '201168/125', '1', '1/10000']
    >>> read("5 ft 6 in").number.rational
    Fraction(11, 2)
    """
    text = plain_latex(text)
    whole = _of(text)
    return whole if whole else _sum_of(text)


def equal(gold: Quantity, other: Quantity, tolerance: Fraction, relative: Fraction) -> bool:
    """Whether two quantities are equal, within a tolerance in the gold's unit or a share of the gold.

    A gold without unit leaves the unit open; a unit that the gold has is needed.
    """
    if gold.unit is None or other.unit is None:
        return gold.unit is None and close(gold.number, other.number, tolerance, relative)
    if gold.unit.dimension != other.unit.dimension:
        return False
    given = _converted(other.number, other.unit, gold.unit)
    return given is not None and close(gold.number, given, tolerance, relative)


def close(gold: Value, other: Value, tolerance: Fraction, relative: Fraction) -> bool:
    """Whether two numbers are equal; rational ones within an absolute or a relative tolerance."""
    wanted, given = gold.rational, other.rational
    if wanted is None or given is None:
        return bool(same(gold, other))
    return abs(wanted - given) <= max(tolerance, relative * abs(wanted))


def same_unit_value(gold: str, gold_unit: Unit, other: str, unit: Unit) -> bool | None:
    """Whether two numbers with units of one dimension are equal; None if algebra does not tell."""
    wanted, given = _constant(gold), _constant(other)
    if wanted is None or given is None:
        return None
    converted = _converted(given, unit, gold_unit)
    return None if converted is None else same(wanted, converted)


def split(text: str, loose: bool = False) -> tuple[str, Unit | None]:
    r"""The number's text and the unit after it, of plain LaTeX; the text itself and None if there is no unit.

    Unless `loose`, a bare letter is a variable and not a unit: "3x", "5m", but "5 cm" and "5\text{ m}".

    >>> split("3xy"), split("5 apples")[1].dimension, split(r"5\text{ m/s}")[1].dimension
    (('3xy', None), (('apple', 1),), (('m', 1), ('s', -1)))
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
        if unit and (loose or rest[0] in "\\°" or _surely(rest, unit)):
            return number, unit
        if unit:
            return text, None
    return text, None


@lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit | None:
    r"""The unit that a text names; None if it names none.

    >>> unit_of("km/h") == unit_of("kilometers per hour") == unit_of(r"\frac{\text{km}}{\text{h}}")
    True
    >>> unit_of("m/s") == unit_of("s/m"), unit_of("and 5")
    (False, None)
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
        return Unit((("K", 1),), *scale)
    return _Units(re.sub(r"\bper\b", "/", text)).whole()


def _of(text: str) -> Quantity | None:
    number, unit = split(text, loose=True)
    known = _constant(number)
    return None if known is None else Quantity(known, unit)


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
        alike = part.unit.dimension == first.unit.dimension and not part.unit.offset
        if not alike or (previous and (part.unit.factor >= previous.factor or rational < 0)):
            return None
        previous = part.unit
        total += rational * part.unit.factor / first.unit.factor
    assert first is not None
    return Quantity(Value({(): total} if total else {}, {(): Fraction(1)}), first.unit)


def exact_value(text: str) -> Value | None:
    """The value of plain LaTeX, a plain number (a percentage as its share) or an expression; None if neither."""
    number = plain_number(text)
    if not number:
        return value(text)
    amount = number.value / 100 if number.percent else number.value
    return Value({(): amount} if amount else {}, {(): Fraction(1)})


def _constant(text: str) -> Value | None:
    found = exact_value(text)
    return found if found and found.is_constant else None


def _converted(number: Value, unit: Unit, to: Unit) -> Value | None:
    """A number in one unit as a number in another of the same dimension."""
    if unit.offset or to.offset:
        rational = number.rational
        if rational is None:
            return None
        amount = (rational * unit.factor + unit.offset - to.offset) / to.factor
        return Value({(): amount} if amount else {}, number.bottom)
    factor = unit.factor / to.factor
    return Value({term: amount * factor for term, amount in number.top.items()}, number.bottom)


def _surely(rest: str, unit: Unit) -> bool:
    """Whether bare letters behind a number are a unit and not variables."""
    spaced, word = rest.startswith(" "), re.match(r"[A-Za-zμΩÅ¢]+", rest.lstrip())
    if not word:
        return False
    if unit.known:
        return len(word[0]) > 1 or (spaced and "/" in rest)
    return spaced and len(word[0]) > 3


class _Units:
    """Reads a product of units: a term is a word and perhaps its power; a slash divides by the one next term."""

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
                if divided:
                    return None  # "J/kg K" may mean either
                self._at += text == "*"
                term = self._term()
                total = term and _times(total, term, 1)
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
            text = self._parts[self._at][1]
            self._at += 1
            unit = _word(text)
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
    return Unit(dimension, one.factor * other.factor**power, known=one.known and other.known)


@lru_cache(maxsize=4096)
def _word(word: str) -> Unit | None:
    """One word or symbol as a unit."""
    lower = word.lower()
    singular = lower.removesuffix("s") if len(lower) > 3 else lower
    if word in _SCALES:
        return Unit((("K", 1),), _SCALES[word][0])
    for table, name in ((_SYMBOLS, word), (_OTHERS, word), (_OTHERS, lower), (_OTHERS, singular)):
        if name in table:
            return _unit(*table[name])
    for name in (lower, singular):
        if name in _NAMES:
            return _unit(*_SYMBOLS[_NAMES[name]])
    for prefixes, symbol_of in ((_PREFIXES, word), (_PREFIX_NAMES, singular)):
        found = _prefixed(symbol_of, prefixes.items(), prefixes is _PREFIXES)
        if found:
            return found
    if not word.isalpha() or lower in _NO_UNIT or lower in _AFTER or lower in _BEFORE or len(word) < 2:
        return None
    return Unit(((singular, 1),), known=False)


def _prefixed(word: str, prefixes: Iterable[tuple[str, int]], symbols: bool) -> Unit | None:
    for prefix, exponent in prefixes:
        rest = word.removeprefix(prefix)
        symbol = rest if symbols else _NAMES.get(rest)
        if rest != word and symbol in _SYMBOLS:
            unit = _unit(*_SYMBOLS[symbol])
            return unit._replace(factor=unit.factor * Fraction(10) ** exponent)
    return None


def _unit(base: str, factor: str | int | Fraction) -> Unit:
    powers = [re.fullmatch(r"([A-Za-z]+)(-?[0-9]*)", part) for part in base.split()]
    dimension = sorted((found[1], int(found[2] or 1)) for found in powers if found)
    return Unit(tuple(dimension), Fraction(factor))
