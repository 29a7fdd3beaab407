r"""Pairs of gold answer and prediction as in training, each with the right verdict.

Each family draws random numbers and makes from them a gold answer, other spellings of that answer, and wrong answers.
"""

import random
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


class Pair(NamedTuple):
    """A gold answer, a prediction, and whether they are equal."""

    gold: str
    prediction: str
    equal: bool


class Answers(NamedTuple):
    """A gold answer, predictions that equal it, and predictions that do not."""

    gold: str
    equal: list[str]
    wrong: list[str]


HOSTILE = (
    "9^{9^{9^{9}}}",
    r"\left(10^{10^{10}}\right)!",
    r"\binom{10^{12}}{5\cdot 10^{11}}",
    "((((" * 400 + "x" + "))))" * 400,
    r"\boxed{" * 1000,
    "x^{500}+" + "+".join(f"{n}x^{{{n}}}" for n in range(1, 60)) + "=7",
    r"\det"
    + r"\begin{pmatrix}"
    + r"\\".join("&".join(f"a_{{{r}{c}}}" for c in range(9)) for r in range(9))
    + r"\end{pmatrix}",
    "2^{2^{2^{2^{2^{2}}}}}x",
)
"""Hostile predictions, which must not hang or crash a verifier."""


def distinct(seed: int, each: int) -> list[Pair]:
    """`each` rounds with one right and one wrong prediction per family, in random order. All pairs are distinct."""
    draw = random.Random(seed)
    pairs: dict[tuple[str, str], Pair] = {}
    for family in FAMILIES:
        found = 0
        while found < 2 * each:
            answers = family(draw)
            for prediction, equal in (
                (draw.choice(answers.equal), True),
                (draw.choice(answers.wrong), False),
            ):
                if (answers.gold, prediction) not in pairs:
                    pairs[answers.gold, prediction] = Pair(answers.gold, prediction, equal)
                    found += 1
    shuffled = list(pairs.values())
    draw.shuffle(shuffled)
    return shuffled


def groups(seed: int, each: int) -> list[Pair]:
    """`each` prompts per family, eight completions each in a row: five right in two spellings, three wrong."""
    draw = random.Random(seed)
    pairs = []
    for family in FAMILIES * each:
        gold, equal, wrong = family(draw)
        right, other = gold, draw.choice(equal)
        given = [right] * 3 + [other] * 2 + draw.choices(wrong, k=3)
        group = [Pair(gold, prediction, prediction in (right, other)) for prediction in given]
        draw.shuffle(group)
        pairs += group
    return pairs


def _fraction(draw: random.Random) -> Fraction:
    """A fraction that is neither an integer nor a finite decimal."""
    while True:
        value = Fraction(draw.randint(1, 99), draw.choice((3, 6, 7, 9, 11, 13, 14, 21)))
        if value.denominator not in (1, 2):
            return value


def _frac(value: Fraction, command: str = "frac") -> str:
    return rf"\{command}{{{value.numerator}}}{{{value.denominator}}}"


def _signed(value: int) -> str:
    return f"{value:+d}"


def _integer(draw: random.Random) -> Answers:
    n = draw.randint(1000, 99999)
    return Answers(
        str(n), [f"{n:,}", f"{n}.0", f"x = {n}", rf"\text{{{n}}}"], [str(n + 1), str(-n), str(n * 10)]
    )


def _decimal(draw: random.Random) -> Answers:
    n = draw.randint(1, 999) * 4 + 1
    value = Fraction(n, 4)
    return Answers(
        f"{n / 4}", [_frac(value), f"{n}/4", f"{n / 4}0"], [f"{n / 4 + 0.01:.2f}", _frac(value + 1)]
    )


def _ratio(draw: random.Random) -> Answers:
    value = _fraction(draw)
    up, down = value.numerator, value.denominator
    return Answers(
        _frac(value),
        [f"{up}/{down}", _frac(value, "dfrac"), rf"\frac{{{2 * up}}}{{{2 * down}}}"],
        [_frac(value + 1), f"{down}/{up}" if up != down else "0", f"-{_frac(value)}"],
    )


def _mixed(draw: random.Random) -> Answers:
    whole, part = draw.randint(1, 40), Fraction(1, draw.randint(3, 9))
    value = whole + part
    return Answers(_frac(value), [f"{whole}{_frac(part)}"], [f"{whole + 1}{_frac(part)}", _frac(value + 2)])


def _surd(draw: random.Random) -> Answers:
    factor, root = draw.randint(2, 19), draw.choice((2, 3, 5, 6, 7, 10, 11))
    gold = rf"{factor}\sqrt{{{root}}}"
    square = rf"\sqrt{{{factor * factor * root}}}"
    spaced = rf"{factor} \cdot \sqrt{{{root}}}"
    return Answers(gold, [square, spaced], [rf"{factor + 1}\sqrt{{{root}}}", rf"{factor}\sqrt{{{root + 1}}}"])


def _surd_sum(draw: random.Random) -> Answers:
    a, b, root = draw.randint(1, 30), draw.randint(2, 9), draw.choice((2, 3, 5, 7))
    gold = rf"\frac{{{a}+{b}\sqrt{{{root}}}}}{{2}}"
    halves = rf"\frac{{{b}\sqrt{{{root}}}}}{{2}}+\frac{{{a}}}{{2}}"
    return Answers(gold, [halves, rf"({b}\sqrt{root}+{a})/2"], [gold.replace("+", "-"), halves + "+1"])


def _pi(draw: random.Random) -> Answers:
    value = _fraction(draw)
    up, down = value.numerator, value.denominator
    gold = rf"\frac{{{up}\pi}}{{{down}}}"
    return Answers(
        gold,
        [rf"{_frac(value)}\pi", rf"{up}\pi/{down}"],
        [rf"\frac{{{up + down}\pi}}{{{down}}}", _frac(value)],
    )


def _product(draw: random.Random) -> Answers:
    a, b = draw.sample(range(1, 40), 2)
    gold = f"x^2{_signed(b - a)}x{_signed(-a * b)}"
    wrong = [f"(x+{a})(x-{b})", f"x^2{_signed(b - a)}x{_signed(a * b)}"]
    return Answers(gold, [f"(x-{a})(x+{b})", rf"\left(x+{b}\right)\left(x-{a}\right)"], wrong)


def _cubic(draw: random.Random) -> Answers:
    a, b, c = draw.sample(range(2, 20), 3)
    gold = f"{a}x^3-{b}x+{c}"
    return Answers(
        gold, [f"{c}-{b}x+{a}x^{{3}}", f"x({a}x^2-{b})+{c}"], [f"{a}x^3+{b}x+{c}", f"{a}x^2-{b}x+{c}"]
    )


def _line(draw: random.Random) -> Answers:
    a, b = draw.randint(2, 99), draw.randint(1, 99)
    return Answers(f"y={a}x+{b}", [f"y = {b} + {a}x", f"{a}x+{b}"], [f"y={a}x-{b}", f"y={a + 1}x+{b}"])


def _quotient(draw: random.Random) -> Answers:
    a, b, c = draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 9)
    gold = rf"{c}+\frac{{{a}}}{{x+{b}}}"
    return Answers(gold, [rf"\frac{{{c}x+{a + b * c}}}{{x+{b}}}"], [rf"{c}-\frac{{{a}}}{{x+{b}}}"])


def _power(draw: random.Random) -> Answers:
    a, n = draw.randint(2, 60), draw.randint(2, 9)
    gold = rf"{a}x^{{\frac{{{n}}}{{2}}}}"
    return Answers(gold, [rf"{a}x^{{{n}/2}}"], [rf"{a}x^{{{n + 1}/2}}", rf"{a + 1}x^{{{n}/2}}"])


def _exponential(draw: random.Random) -> Answers:
    a, b = draw.randint(2, 30), draw.randint(2, 30)
    return Answers(
        f"{a}e^{{{b}x}}", [rf"{a}\cdot e^{{{b} x}}"], [f"{b}e^{{{a}x}}" if a != b else "0", f"{a}e^{{-{b}x}}"]
    )


def _logarithm(draw: random.Random) -> Answers:
    a, b = draw.randint(2, 50), draw.randint(2, 50)
    return Answers(rf"{a}\ln({b})", [rf"\ln({b}) \cdot {a}"], [rf"{a}\ln({b + 1})", rf"{a + 1}\ln({b})"])


def _trigonometry(draw: random.Random) -> Answers:
    a, b = draw.sample(range(2, 40), 2)
    gold = rf"{a}\sin x+{b}\cos x"
    return Answers(gold, [rf"{b}\cos(x)+{a}\sin(x)"], [rf"{b}\sin x+{a}\cos x", rf"{a}\sin x-{b}\cos x"])


def _interval(draw: random.Random) -> Answers:
    a, b = sorted(draw.sample(range(-60, 60), 2))
    return Answers(
        f"[{a},{b})", [rf"\left[{a}, {b}\right)", f"[{a}.0,{b})"], [f"({a},{b})", f"[{a},{b + 1})"]
    )


def _union(draw: random.Random) -> Answers:
    a, b = sorted(draw.sample(range(-60, 60), 2))
    gold = rf"(-\infty,{a})\cup({b},\infty)"
    return Answers(gold, [rf"({b},\infty)\cup(-\infty,{a})"], [rf"(-\infty,{a}]\cup({b},\infty)"])


def _set(draw: random.Random) -> Answers:
    a, b, c = draw.sample(range(-40, 40), 3)
    gold = rf"\{{{a},{b},{c}\}}"
    return Answers(
        gold, [rf"\{{{c}, {a}, {b}\}}", f"{b}, {c}, {a}"], [rf"\{{{a},{b}\}}", rf"\{{{a},{b},{c + 99}\}}"]
    )


def _solutions(draw: random.Random) -> Answers:
    a, b = draw.sample(range(1, 80), 2)
    gold = rf"x={a}\text{{ or }}x=-{b}"
    return Answers(gold, [f"{a}, -{b}", f"x=-{b}, x={a}"], [f"{a}, {b}", f"x={a}"])


def _point(draw: random.Random) -> Answers:
    a, n = draw.randint(-50, 50), draw.randint(0, 50) * 2 + 1
    gold = rf"({a},\frac{{{n}}}{{2}})"
    return Answers(
        gold, [f"({a}, {n / 2})", rf"\left({a}, {n}/2\right)"], [f"({n / 2}, {a})", f"({a}, {n / 2 + 1})"]
    )


def _quantity(draw: random.Random) -> Answers:
    n = draw.randint(2, 5000)
    gold = rf"{n}\text{{ cm}}^2"
    return Answers(
        gold,
        [rf"{n}\ \mathrm{{cm}}^2", str(n), rf"{n} cm^2"],
        [rf"{n}\text{{ cm}}", rf"{n + 1}\text{{ cm}}^2"],
    )


def _percent(draw: random.Random) -> Answers:
    n = draw.randint(1, 99)
    return Answers(rf"{n}\%", [f"{n}%", f"{n / 100}"], [f"{n + 1}%", f"{n / 1000}"])


def _angle(draw: random.Random) -> Answers:
    n = draw.randint(1, 359)
    return Answers(rf"{n}^\circ", [str(n), f"{n}°"], [rf"{n + 1}^\circ", str(-n)])


def _matrix(draw: random.Random) -> Answers:
    a, b, c, d = draw.sample(range(-20, 20), 4)

    def matrix(kind: str, *rows: str) -> str:
        return rf"\begin{{{kind}}}" + r"\\".join(rows) + rf"\end{{{kind}}}"

    gold = matrix("pmatrix", f"{a}&{b}", f"{c}&{d}")
    equal = matrix("bmatrix", f"{a} & {b}", f" {c} & {d}")
    return Answers(gold, [equal], [matrix("pmatrix", f"{a}&{c}", f"{b}&{d}"), matrix("pmatrix", f"{a}&{b}")])


def _inequality(draw: random.Random) -> Answers:
    n = draw.randint(-99, 99)
    return Answers(f"x>{n}", [f"{n}<x", rf"x \gt {n}"], [rf"x\ge {n}", f"x<{n}", f"x>{n + 1}"])


def _complex(draw: random.Random) -> Answers:
    a, b = draw.randint(1, 60), draw.randint(2, 60)
    return Answers(f"{a}+{b}i", [f"{b}i+{a}", rf"{a} + {b}i"], [f"{a}-{b}i", f"{b + 1}i+{a}"])


FAMILIES: tuple[Callable[[random.Random], Answers], ...] = (
    *(_integer, _decimal, _ratio, _mixed, _surd, _surd_sum, _pi, _product, _cubic, _line, _quotient, _power),
    *(_exponential, _logarithm, _trigonometry, _interval, _union, _set, _solutions, _point, _quantity),
    *(_percent, _angle, _matrix, _inequality, _complex),
)
