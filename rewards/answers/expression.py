"""Expressions compared by math-verify over sympy. Only worker processes run this module.

Source: math-verify 0.9 (huggingface/Math-Verify). It may hang, exhaust the memory or crash on a hostile answer. No
expression is ever printed as text, because sympy's printer can hang too.
"""

import logging
import os
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.answers.latex import to_sympy
from rewards.answers.number import plain_number
from rewards.answers.outcome import Outcome, Result, settle

WARM_UP = (
    ("x+1", "1+x"),
    (r"\frac{x^2-1}{2x}", r"\frac{(x-1)(x+1)}{x\cdot 2}"),
    (r"2\sqrt{3}+\sqrt[3]{5}\pi", r"\sqrt{12}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&x\end{bmatrix}"),
    (r"[1,\infty)", r"(-\infty,1)\cup(2,3]"),
    (r"\{1,x\}", r"\{x,1\}"),
    (r"(1,\frac{1}{2})", "(x,y)"),
    (r"x\le 2", r"2\ge x"),
    (r"1<x<2", "(1,2)"),
    ("y=2x+1", "y=1+2x"),
    (r"\sin^2 x+\cos(2x)", r"e^{x}\ln x+\log_2 8"),
    (r"3\frac{1}{2}x", r"-0.5x!"),
    (r"|x|+a_1", r"\binom{5}{2}x"),
    (r"\int_0^1 x\,dx", r"\sum_{k=1}^{3}k"),
    (r"x=1\text{ or }x=2", r"\pm 2x"),
    (r"15\pi\text{ cm}^2", r"60^\circ"),
    (r"4x^{\frac{3}{2}}", "4x^{3/2}"),
    (r"3\ln(5)-2e^{-3x}", r"\ln(5) \cdot 3x"),
    (r"(-3,\frac{9}{2})", "(4.5,y/2)"),
    (r"\{3,-5,x\}", "-5,x,3"),
    (r"\frac{2+4\sqrt{7}}{2}x", r"\frac{4\sqrt{7}}{2}x+1"),
)
"""Pairs that are compared before the workers are forked: they inherit the grammar's tables and sympy's caches."""


def settled(result: Result) -> Outcome:
    """The outcome of an open comparison. Raises MemoryError if the worker's memory does not suffice."""
    try:
        return settle(result, compare)
    except MemoryError:
        raise
    except Exception:  # sympy fails; the gold was read at load time, so the answer is at fault
        return Outcome.UNPARSEABLE


def compare(gold: str, given: str | None) -> Outcome:
    """How two expressions compare; with None, whether the gold can be read. May hang or crash."""
    from math_verify import verify

    wanted = _parse(gold.replace("°", ""))
    if wanted is None:
        return Outcome.BAD_GOLD
    if given is None:
        return Outcome.EQUAL
    found = _parse(given.replace("°", ""))
    if found is None:
        return Outcome.UNPARSEABLE
    rounded = _rounded(gold, given, wanted, found)
    if rounded is not None:
        return Outcome.EQUAL if rounded else Outcome.DIFFERENT
    if not verify([wanted], [found], timeout_seconds=None):
        return Outcome.DIFFERENT
    # math-verify makes "50%" equal to both 50 and 0.5, so its value decides nothing here.
    close = "%" in gold + given or _same_value(wanted, found)
    return Outcome.EQUAL if close else Outcome.DIFFERENT


def _rounded(gold: str, given: str, wanted: Any, found: Any) -> bool | None:
    """Whether a decimal is the other side rounded (rewards.answers.number); None if neither side is a bare decimal."""
    from sympy import Expr, Float, Rational

    for decimal, exact in ((plain_number(given), wanted), (plain_number(gold), found)):
        if decimal and decimal.step and isinstance(exact, Expr) and exact.is_number and not exact.has(Float):
            size = exact.evalf(decimal.significant + 20)
            if not size.is_Float:
                return None
            if exact.is_Rational:
                return decimal.share == Fraction(int(exact.p), int(exact.q)) or None
            size = Rational(size)
            return decimal.rounds(Fraction(int(size.p), int(size.q)))
    return None


def _same_value(gold: Any, given: Any) -> bool:
    """Whether two expressions agree to 40 digits, to 12 where decimals are involved.

    math-verify rounds to 6 decimals, which makes 1e-7 equal to 2e-7, and chops at 15 digits, which lets a negligible
    term pass. Expressions with variables are compared at two points. True for anything but two expressions.
    """
    from sympy import Expr, Float, Rational

    if not all(isinstance(side, Expr) for side in (gold, given)):
        return True
    names = sorted(gold.free_symbols | given.free_symbols, key=lambda symbol: symbol.name)
    digits = 12 if gold.has(Float) or given.has(Float) else 40
    for numerator in (17, 29) if names else (0,):
        point = {name: Rational(numerator + 2 * place, 13) for place, name in enumerate(names)}
        if not _agree(gold.subs(point), given.subs(point), digits):
            return False
    return True


def _agree(gold: Any, given: Any, digits: int) -> bool:
    """Whether two constants agree, relative to their size.

    A zero that evalf cannot prove has one bit of precision.
    """
    from sympy import Integer

    if not (gold.is_number and given.is_number):
        return True
    wanted, found = (_evaluated(one, digits + 10) for one in (gold, given))
    if not (wanted.is_finite and found.is_finite):
        return True
    wanted, found = (Integer(0) if getattr(one, "_prec", 53) == 1 else one for one in (wanted, found))
    return bool(abs(wanted - found) <= max(abs(wanted), abs(found)) * Integer(10) ** -digits)


def _evaluated(one: Any, digits: int) -> Any:
    """A constant to `digits` digits; operations left by latex2sympy, such as Mod(17, 5), are evaluated."""
    from sympy import Float, Integer

    number = one.evalf(digits)
    return number if isinstance(number, Float | Integer) else one.doit().evalf(digits)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """sympy's expression of LaTeX, or None. Cached: the gold answer of a group is parsed once."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from sympy import Expr, I, Symbol

    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        latex = normalize_latex(text.replace(r"\bmod", r"\mod"), config=config)
        real = not should_treat_as_complex(latex)
        found = to_sympy(latex, real)
        return found if real or not isinstance(found, Expr) else found.subs(Symbol("i", real=False), I)
    except MemoryError:
        raise
    except Exception:  # antlr, sympy and mpmath raise many types; the text is not mathematics
        return None


def warm_up() -> None:
    """Import the algebra and compare some pairs, in the process from which the workers are forked."""
    logging.disable(logging.WARNING)  # math-verify warns that its timeouts are off; the pool has its own
    # Numbers of gmpy2 and flint abort the process where Python's raise, so sympy and mpmath must not use them.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
    for pair in WARM_UP:
        compare(*pair)
