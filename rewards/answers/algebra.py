r"""Exact values of everyday expressions, without computer algebra: microseconds instead of milliseconds.

The fragment: rational numbers, variables, π, e, i, square roots of rationals, + - * / \frac, whole powers,
parentheses. Its members are quotients of polynomials over the rationals whose unknowns are the variables and the
square roots of primes (of -1 for i). Square roots of different primes are independent over the rationals, and π and
e are treated as variables. So two members are equal exactly if their canonical forms are, and both answers of `same`
are proofs. A function or another power of members, such as \sin(2x) or e^{x}, is treated as one variable. `same` can
prove that values with such variables are equal, but not that they differ. An expression that may lie outside the
fragment has no value here; rewards.answers.compare then asks sympy.
"""

import decimal
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_PRODUCTS = 2000
"""Most products of two terms per value; they take some milliseconds."""
MAX_BITS = 1400
MAX_EXPONENT = 64
MAX_DEPTH = 30
MAX_RADICAND = 10**6
"""Square roots of larger numbers would take too long to factor."""

Monomial = tuple[tuple[str, int], ...]
Polynomial = dict[Monomial, Fraction]

_ONE: Polynomial = {(): Fraction(1)}
_ROOT = "√"
_WHOLE = "ƒ"
"""First character of a variable that stands for a whole function."""
_I = "√-1"
_CONSTANTS = frozenset(("pi", "e"))
_DIGITS_OF = {
    "pi": decimal.Decimal(
        "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"
    ),
    "e": decimal.Decimal(
        "2.71828182845904523536028747135266249775724709369995957496696762772407663035354759"
    ),
}
GREEK = frozenset(
    (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi "
        "varphi chi psi omega pi Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
    ).split()
)
FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split())
_TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|\\(?P<command>[A-Za-z]+)"
    r"|(?P<letter>[A-Za-z](?:_(?:[A-Za-z0-9](?![0-9])|\{[A-Za-z0-9]{1,8}\}))?)|(?P<mark>[-+*/^(){}])|(?P<space> +)"
)
_FACTORS = frozenset(("(", "{", "/", "cdot", "times", "frac", "sqrt"))
"""Tokens that may continue a product."""
_APPLIED = frozenset("fghFGHPE")
"""Letters that name a function when a parenthesis follows."""


class Value(NamedTuple):
    """A quotient of two polynomials; the denominator is not zero."""

    top: Polynomial
    bottom: Polynomial

    @property
    def rational(self) -> Fraction | None:
        """The value as a rational number; None if it is not rational."""
        if any(self.top.keys() - {()}) or any(self.bottom.keys() - {()}):
            return None
        return self.top.get((), Fraction(0)) / self.bottom[()]

    @property
    def is_constant(self) -> bool:
        """Whether the value has no variables; e and π do not count as variables here."""
        return not any(
            name not in _CONSTANTS and not name.startswith(_ROOT)
            for side in self
            for term in side
            for name, _ in term
        )

    @property
    def has_functions(self) -> bool:
        """Whether a variable of the value stands for a function or power; another form may then be equal to it."""
        return any(name.startswith(_WHOLE) for side in self for term in side for name, _ in term)


class _OutsideError(Exception):
    """The text is not in the fragment, or too expensive."""


class _Token(NamedTuple):
    kind: str
    text: str


@lru_cache(maxsize=4096)
def value(text: str) -> Value | None:
    r"""The value of an expression in plain LaTeX (plain.plain_latex); None if it is not in the fragment.

    >>> value(r"\frac{3}{6}").rational
    Fraction(1, 2)
    >>> value(r"\sin 2x"), value("1/0"), value("x^{1000}")
    (None, None, None)
    """
    try:
        return _Parser(text).whole()
    except _OutsideError:
        return None


def same(one: Value, other: Value) -> bool | None:
    r"""Whether two values are equal; None if this module cannot decide it within its budget.

    >>> same(value(r"2\sqrt{3}"), value(r"\sqrt{12}")), same(value("(x-1)(x+1)"), value("x^2+1"))
    (True, False)
    """
    work = _Work()
    try:
        equal = (
            one.top == other.top
            if one.bottom == other.bottom
            else work.times(one.top, other.bottom) == work.times(other.top, one.bottom)
        )
    except _OutsideError:
        return None
    return equal or (None if one.has_functions or other.has_functions else False)


def approximate(one: Value) -> Fraction | None:
    r"""A real constant to 50 digits; None if the value is not a real constant, or holds a function.

    >>> float(approximate(value(r"\sqrt{2}")))
    1.4142135623730951
    """
    with decimal.localcontext(prec=70):
        sides = []
        for side in one:
            total = decimal.Decimal(0)
            for term, factor in side.items():
                number = decimal.Decimal(factor.numerator) / factor.denominator
                for name, exponent in term:
                    known = _DIGITS_OF.get(name)
                    if name.startswith(_ROOT) and name != _I:
                        known = decimal.Decimal(name[len(_ROOT) :]).sqrt()
                    if known is None:
                        return None
                    number *= known**exponent
                total += number
            sides.append(total)
        return Fraction(sides[0]) / Fraction(sides[1]) if sides[1] else None


def power_of_pi(one: Value, exponent: int, factor: Fraction) -> Value:
    """A value times a rational factor and a whole power of π."""
    pi: Polynomial = {(("pi", abs(exponent)),) if exponent else (): Fraction(1)}
    top = {term: amount * factor for term, amount in one.top.items()}
    work = _Work()
    if exponent < 0:
        return Value(top, work.times(one.bottom, pi))
    return Value(work.times(top, pi), one.bottom)


def same_equation(one: Value, other: Value) -> bool:
    """Whether one = 0 and other = 0 are the same equation: the numerators are nonzero multiples of each other.

    >>> same_equation(value("2x-2y"), value("y-x")), same_equation(value("x-x"), value("y-y"))
    (True, False)
    """
    if not one.top or one.top.keys() != other.top.keys():
        return False
    return len({factor / other.top[term] for term, factor in one.top.items()}) == 1


def difference(one: Value, other: Value) -> Value | None:
    """One minus the other; None if that is too expensive."""
    try:
        return _Work().plus(one, _negative(other))
    except _OutsideError:
        return None


class _Work:
    """Arithmetic with a budget."""

    def __init__(self) -> None:
        self.products = 0

    def times(self, one: Polynomial, other: Polynomial) -> Polynomial:
        if one == _ONE:
            return other
        if other == _ONE:
            return one
        self.products += len(one) * len(other)
        if self.products > MAX_PRODUCTS:
            raise _OutsideError
        result: Polynomial = {}
        for term, factor in one.items():
            for another, times in other.items():
                whole, product = _joined(term, another)
                _add_term(result, product, factor * times * whole)
        return result

    def multiplied(self, one: Value, other: Value) -> Value:
        return Value(self.times(one.top, other.top), self.times(one.bottom, other.bottom))

    def divided(self, one: Value, other: Value) -> Value:
        if not other.top:
            raise _OutsideError
        rational = other.rational
        if rational:  # the usual case: keep the denominator 1
            return self.multiplied(one, constant(1 / rational))
        return self.multiplied(one, Value(other.bottom, other.top))

    def plus(self, one: Value, other: Value) -> Value:
        if one.bottom == other.bottom:
            top = dict(one.top)
            for term, factor in other.top.items():
                _add_term(top, term, factor)
            return Value(top, one.bottom)
        top = self.times(one.top, other.bottom)
        return self.plus(
            Value(top, self.times(one.bottom, other.bottom)),
            Value(self.times(other.top, one.bottom), self.times(one.bottom, other.bottom)),
        )

    def power(self, base: Value, exponent: int) -> Value:
        if abs(exponent) > MAX_EXPONENT or (exponent <= 0 and not base.top):
            raise _OutsideError
        result = Value(_ONE, _ONE)
        for _ in range(abs(exponent)):
            result = self.multiplied(result, base)
        return result if exponent >= 0 else self.divided(Value(_ONE, _ONE), result)


def _add_term(polynomial: Polynomial, term: Monomial, factor: Fraction) -> None:
    total = polynomial.get(term, 0) + factor
    if max(total.numerator.bit_length(), total.denominator.bit_length()) > MAX_BITS:
        raise _OutsideError
    if total:
        polynomial[term] = total
    else:
        polynomial.pop(term, None)


def _joined(one: Monomial, other: Monomial) -> tuple[int, Monomial]:
    """The product of two monomials: the integer factor from squared roots, and the remaining monomial."""
    if not one or not other:
        return 1, one or other
    powers, whole = dict(one), 1
    for name, exponent in other:
        exponent += powers.get(name, 0)
        if exponent == 2 and name.startswith(_ROOT):
            whole *= int(name[len(_ROOT) :])
            del powers[name]
        else:
            powers[name] = exponent
    return whole, tuple(sorted(powers.items()))


def constant(number: Fraction) -> Value:
    """A rational number as a value."""
    return Value({(): number} if number else {}, _ONE)


def _negative(one: Value) -> Value:
    return Value({term: -factor for term, factor in one.top.items()}, one.bottom)


def _unknown(name: str) -> Value:
    return Value({((name, 1),): Fraction(1)}, _ONE)


def _whole(name: str, *arguments: Value) -> Value:
    """The variable that stands for a function of values; equal polynomials give the same variable."""
    if any(argument.bottom != _ONE or len(argument.top) > 20 for argument in arguments):
        raise _OutsideError
    spelled = ";".join(repr(sorted(argument.top.items())) for argument in arguments)
    return _unknown(f"{_WHOLE}{name}({spelled})")


def _root(square: Fraction) -> Value:
    """The square root of a rational number; for a negative number, i times the root of its absolute value."""
    radicand = abs(square.numerator) * square.denominator
    if radicand > MAX_RADICAND:
        raise _OutsideError
    factor, names = Fraction(1, square.denominator), [_I] if square < 0 else []
    for prime, exponent in _primes(radicand):
        factor *= prime ** (exponent // 2)
        if exponent % 2:
            names.append(f"{_ROOT}{prime}")
    return Value({tuple(sorted((name, 1) for name in names)): factor} if square else {}, _ONE)


def _primes(number: int) -> Iterator[tuple[int, int]]:
    """Prime factors with their exponents; nothing for 0 and 1."""
    candidate = 2
    while candidate * candidate <= number:
        exponent = 0
        while number % candidate == 0:
            number, exponent = number // candidate, exponent + 1
        if exponent:
            yield candidate, exponent
        candidate += 1
    if number > 1:
        yield number, 1


class _Parser:
    """Recursive descent; raises _OutsideError wherever two readings are possible."""

    def __init__(self, text: str) -> None:
        self._tokens: list[_Token] = []
        self._work, self._at, self._depth = _Work(), 0, 0
        place = 0
        while place < len(text):
            found = _TOKEN.match(text, place)
            if not found or not found.lastgroup:
                raise _OutsideError
            if found.lastgroup != "space":
                self._tokens.append(_Token(found.lastgroup, found[found.lastgroup]))
            elif self._tokens and self._tokens[-1].kind == "number" and text[found.end() :][:1].isdigit():
                raise _OutsideError  # "2 3"
            place = found.end()
        self._tokens.append(_Token("end", ""))

    def whole(self) -> Value:
        result = self._sum()
        if self._peek().kind != "end":
            raise _OutsideError
        return result

    def _peek(self, ahead: int = 0) -> _Token:
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)]

    def _next(self) -> _Token:
        token = self._peek()
        self._at += 1
        return token

    def _take(self, mark: str) -> bool:
        taken = self._peek() == _Token("mark", mark)
        self._at += taken
        return taken

    def _sum(self) -> Value:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _OutsideError
        negative = self._take("-")
        if not negative:
            self._take("+")
        total = self._product()
        total = _negative(total) if negative else total
        while self._peek() in (_Token("mark", "+"), _Token("mark", "-")):
            minus = self._next().text == "-"
            term = self._product()
            total = self._work.plus(total, _negative(term) if minus else term)
        self._depth -= 1
        return total

    def _product(self) -> Value:
        result, over = self._power(), False
        while True:
            token = self._peek()
            if token == _Token("mark", "/") or token == _Token("command", "div"):
                if over:
                    raise _OutsideError  # "1/2/3"
                self._at += 1
                result, over = self._work.divided(result, self._power()), True
            elif token == _Token("mark", "*") or (
                token.kind == "command" and token.text in ("times", "cdot")
            ):
                self._at += 1
                result, over = self._work.multiplied(result, self._power()), False
            elif token.kind in ("letter", "command") or token.text in ("(", "{"):
                if over:
                    raise _OutsideError  # "1/2x"
                result = self._work.multiplied(result, self._power())
            elif token.kind == "number":
                raise _OutsideError  # "x2"
            else:
                return result

    def _power(self) -> Value:
        base = self._base()
        if not self._take("^"):
            return base
        exponent = self._argument()
        if self._peek() == _Token("mark", "^"):
            raise _OutsideError
        rational = exponent.rational
        if rational == Fraction(1, 2) and base.rational is not None:
            return _root(base.rational)
        if rational is not None and rational.denominator == 1:
            return self._work.power(base, int(rational))
        return _whole("pow", base, exponent)

    def _base(self) -> Value:
        token = self._next()
        if token.kind == "number":
            return self._mixed(_fraction(token.text))
        if token.kind == "letter":
            return self._variable(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.text in ("(", "{"):
            result = self._sum()
            if not self._take(")" if token.text == "(" else "}"):
                raise _OutsideError
            return result
        raise _OutsideError

    def _variable(self, name: str) -> Value:
        if name in _APPLIED and self._peek() == _Token("mark", "("):
            raise _OutsideError
        return _unknown(_I if name == "i" else name.replace("{", "").replace("}", ""))

    def _command(self, name: str) -> Value:
        if name == "frac":
            top = self._argument()
            return self._work.divided(top, self._argument())
        if name == "sqrt":
            if self._peek().kind == "number" and len(self._peek().text) > 1:
                raise _OutsideError  # LaTeX reads \sqrt12 as the root of 1, times 2
            square = self._argument().rational
            if square is None:
                raise _OutsideError
            return _root(square)
        if name in FUNCTIONS:
            return self._function(name)
        if name in GREEK:
            return _unknown(name)
        raise _OutsideError

    def _function(self, name: str) -> Value:
        power = self._argument().rational if self._take("^") else Fraction(1)
        # \sin^{-1} may be the inverse; log_2 has its base between.
        if power is None or power.denominator != 1 or not 1 <= power <= MAX_EXPONENT:
            raise _OutsideError
        token = self._peek()
        if token.text in ("(", "{"):
            argument = self._base()
        else:
            self._at += 1
            if token.kind == "number":
                argument = constant(_fraction(token.text))
            elif token.kind == "letter":
                argument = self._variable(token.text)
            elif token.kind == "command" and token.text in GREEK:
                argument = self._command(token.text)
            else:
                raise _OutsideError
            after = self._peek()
            if after.kind in ("number", "letter") or after.text in _FACTORS | GREEK:
                raise _OutsideError  # "\sin 2x"
        if self._peek() == _Token("mark", "^"):
            raise _OutsideError  # "\sin x^2"
        return self._work.power(_whole(name, argument), int(power))

    def _argument(self) -> Value:
        """The expression in the braces, or the next digit or letter if there are no braces."""
        if self._peek() == _Token("mark", "{"):
            return self._base()
        token = self._next()
        if token.kind == "letter" and len(token.text) == 1:
            return self._variable(token.text)
        if token.kind != "number" or not token.text[0].isdigit():
            raise _OutsideError
        if len(token.text) > 1:
            before = self._tokens[self._at - 2]
            if before.text == "^":
                raise _OutsideError  # LaTeX reads 2^10 as 2^1 0
            self._at -= 1
            self._tokens[self._at] = _Token("number", token.text[1:])
        return constant(Fraction(int(token.text[0])))

    def _mixed(self, whole: Fraction) -> Value:
        r"""A number, plus the fraction that follows it, as in 3\frac{1}{2}."""
        if self._peek() != _Token("command", "frac"):
            return constant(whole)
        start = self._at
        self._at += 1
        top, bottom = self._argument().rational, self._argument().rational
        plain = top is not None and bottom is not None and top.denominator == bottom.denominator == 1
        if not plain:  # 2\frac{x}{3} is a product
            self._at = start
            return constant(whole)
        assert top is not None
        assert bottom is not None
        if whole.denominator != 1 or not 0 < top < bottom:
            raise _OutsideError
        return constant(whole + top / bottom)


def _fraction(text: str) -> Fraction:
    if len(text) > MAX_BITS // 4:
        raise _OutsideError
    return Fraction(text.removesuffix("."))
