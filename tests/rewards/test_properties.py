"""Properties for any text: parsing never raises and has linear cost, and equality is an equivalence relation."""

import json
import math
import re
import re._constants as sre
import re._parser as sre_parser
import string
import sys
from fractions import Fraction

import math_verify
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rewards import extract
from rewards.answer import KINDS, AnswerReward, gold_problem, kind_of
from rewards.answers import algebra
from rewards.answers.boxes import Box, iou, overlap
from rewards.answers.compare import compare_parts, decide
from rewards.answers.notation import joined
from rewards.answers.number import exact_number
from rewards.answers.outcome import Outcome
from rewards.answers.plain import cleaned, plain_latex, plain_text
from rewards.answers.quantity import read, unit_of
from rewards.answers.values import parse
from rewards.example import Example
from rewards.extract import parse_direct, parse_thinking
from rewards.style.format import DirectFormat, ThinkFormat
from rewards.verdict import Status

settings.register_profile("rewards", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("rewards")

MARKUP = (
    *(
        "<think>",
        "</think>",
        "\\boxed{",
        "\\boxed",
        "{",
        "}",
        "\\",
        "\\{",
        "<|im_end|>",
        "<|",
        "4",
        " ",
        "x=",
        "\n",
    ),
    *(
        "\\text{",
        "\\frac",
        "^",
        "_",
        ",",
        "(",
        ")",
        "[",
        "]",
        '"',
        "\u200b",
        "\u202e",
        "４",
        "½",
        "\ud800",
        "\0",
        "é",
    ),
    *(
        "\\pm",
        "<",
        "\\cup",
        "1.5 km",
        "\\sqrt",
        "%",
        "$",
        "\\begin{pmatrix}",
        "&",
        "\\\\",
        "NaN",
        "1e999",
        "°C",
    ),
)


def quick(gold, answer):
    """The outcome where no worker is needed; None where one is."""
    result = decide(gold, answer)
    return result if isinstance(result, Outcome) else None


def quick_list(gold, given, ordered):
    return compare_parts(*(tuple(parse(joined(one)) for one in side) for side in (gold, given)), ordered)


texts = st.lists(st.sampled_from(MARKUP) | st.text(max_size=5), max_size=40).map("".join)
numbers = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=1000)


# ---- any text


@given(texts, st.booleans())
@example("\\boxed{" * 1000, False)
@example("<think>" * 1000, True)
def test_reading_and_format_never_raise_and_always_give_a_reason(text, opened):
    row = Example("row", "?", "4", "think")
    for parsed in (parse_thinking(text, opened), parse_direct(text)):
        assert (parsed.answer is None) == (parsed.status != Status.CORRECT)
        assert parsed.well_formed or parsed.problem
    for verdict in (ThinkFormat(opened)(text, row), DirectFormat()(text, row)):
        assert verdict.score in (0, 1)
        assert verdict.score == 1 or verdict.reason


FIXED = ("integer", "number", "exact", "choice", "json", "box", "point", "quantity")
GOLDS = {
    "exact": "red",
    "choice": "B",
    "json": '{"a": 1}',
    "box": "[0,0,9,9]",
    "point": "[1,2]",
    "quantity": "5 cm",
}


@given(texts, st.sampled_from(FIXED))
def test_no_kind_that_needs_no_algebra_raises_or_leaves_an_answer_unscored(text, kind):
    row = Example("row", "?", GOLDS.get(kind, "42"), "think", kind)
    assert AnswerReward()(f"<think>x</think>\\boxed{{{text}}}", row).score in (0, 1)
    assert AnswerReward()(text, Example("row", "?", row.answer, "direct", kind)).score in (0, 1)


@given(texts)
def test_the_fast_path_never_raises_whatever_gold_and_answer(text):
    for gold in ("42", "x^2-1", "(1,2)", "5 cm", "1<x<2", text):
        assert quick(gold, text) in (None, *Outcome)
        assert quick(text, gold) in (None, *Outcome)


@given(texts)
def test_any_gold_has_a_kind_and_is_usable_or_has_a_problem(text):
    assert kind_of(text) in KINDS
    for kind in FIXED:
        assert isinstance(gold_problem(Example("row", "?", text, "think", kind)), str)


# ---- linear


def steps(function, text):
    """Number of Python lines and C function calls to parse a text."""
    count = 0

    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return line

    def call(frame, event, argument):
        nonlocal count
        count += event == "c_call"

    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.settrace(line)
    sys.setprofile(call)
    try:
        function(text)
    finally:
        sys.settrace(tracing)
        sys.setprofile(profiling)
    return count


@settings(max_examples=60)
@given(st.lists(st.sampled_from(MARKUP), min_size=1, max_size=4).map("".join), st.booleans())
def test_twice_the_text_takes_at_most_twice_the_steps(unit, opened):
    for read_text in (lambda text: parse_thinking(text, opened), parse_direct):
        short, long = (steps(read_text, "<think>x</think>" + unit * times) for times in (200, 400))
        assert long <= 2 * short + 50


def unbounded(pattern):
    """Whether a step of a regex may look at more than a fixed number of characters."""

    def within(tree):
        for operation, argument in tree:
            if (
                operation in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
                and argument[1] == sre.MAXREPEAT
            ):
                return True
            parts = argument if isinstance(argument, tuple | list) else [argument]
            for part in parts:
                branches = part if isinstance(part, list) else [part]
                if any(isinstance(one, sre_parser.SubPattern) and within(one) for one in branches):
                    return True
        return False

    return within(sre_parser.parse(pattern.pattern, pattern.flags))


def test_the_regexes_of_reading_look_at_a_bounded_number_of_characters_a_match():
    found = [value for value in vars(extract).values() if isinstance(value, re.Pattern)]
    assert len(found) == 2
    assert not any(map(unbounded, found))
    assert unbounded(re.compile("a(?:b|c*d)"))


# ---- numbers


@given(numbers, st.sampled_from(("{0}/{1}", "\\frac{{{0}}}{{{1}}}", "\\dfrac{{{0}}}{{{1}}}", " {0} / {1} .")))
def test_a_fraction_reads_as_itself(number, spelling):
    number = exact_number(spelling.format(number.numerator, number.denominator))
    assert number is not None
    again = exact_number(f"{number.value.numerator}/{number.value.denominator}")
    assert again == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**9), max_value=10**9))
def test_a_decimal_reads_as_itself_in_every_spelling(decimal):
    for spelling in (
        f"{decimal:f}",
        f"{decimal:,f}",
        f"{decimal:f}000",
        f"${decimal:,f}$".replace(",", "{,}"),
    ):
        assert exact_number(spelling).value == Fraction(decimal)
    wide = f"{decimal:f}".translate({ord(digit): ord(digit) + 0xFEE0 for digit in string.digits})
    assert exact_number(wide).value == Fraction(decimal)


@given(st.text())
def test_what_is_normal_stays_so(text):
    assert plain_text(plain_text(text)) == plain_text(text)
    assert cleaned(cleaned(text)) == cleaned(text)


# ---- expressions, against plain evaluation at a rational point

names = ("x", "y", "a")
leaves = st.integers(0, 20).map(str) | st.sampled_from(names)


def _joined(children):
    pair = st.tuples(children, children)
    return (
        pair.map(lambda two: f"({two[0]}+{two[1]})")
        | pair.map(lambda two: f"({two[0]}-{two[1]})")
        | pair.map(lambda two: f"{two[0]} \\cdot {two[1]}")
        | pair.map(lambda two: f"\\frac{{{two[0]}}}{{{two[1]}}}")
        | st.tuples(children, st.integers(0, 3)).map(lambda two: f"{{({two[0]})}}^{{{two[1]}}}")
    )


expressions = st.recursive(leaves, _joined, max_leaves=8)


def evaluated(text, point):
    """The value at a point, by Python; None where it divides by zero."""
    code = text
    while "\\frac" in code:  # from the innermost
        start = code.rindex("\\frac")
        depth, cuts = 0, []
        for at, letter in enumerate(code[start:], start):
            depth += (letter == "{") - (letter == "}")
            if letter == "}" and depth == 0:
                cuts.append(at)
            if len(cuts) == 2:
                break
        top, bottom = code[start + 6 : cuts[0]], code[cuts[0] + 2 : cuts[1]]
        code = f"{code[:start]}(({top})/({bottom})){code[cuts[1] + 1 :]}"
    code = code.replace("\\cdot", "*").replace("^", "**").replace("{", "(").replace("}", ")")
    code = "".join(f"Q({token})" if token.isdigit() else token for token in _tokens(code))
    try:
        return eval(code, {"Q": Fraction, **point})
    except ZeroDivisionError:
        return None


def _tokens(code):
    return re.findall(r"[0-9]+|.", code)


POINTS = [
    {"x": Fraction(3, 7), "y": Fraction(-5, 11), "a": Fraction(13, 2)},
    {n: Fraction(k, 97) for k, n in enumerate(names, 5)},
]


def value_at(value, point):
    """A canonical value at a point; None where its denominator is zero."""

    def side(polynomial):
        return sum(
            factor * math.prod(point[name] ** exponent for name, exponent in term)
            for term, factor in polynomial.items()
        )

    bottom = side(value.bottom)
    return None if bottom == 0 else side(value.top) / bottom


@given(expressions)
def test_the_canonical_form_has_the_expressions_value(text):
    value = algebra.value(plain_latex(text))
    assume(value is not None)
    compared = [(evaluated(text, point), value_at(value, point)) for point in POINTS]
    assert all(left == right for left, right in compared if left is not None)
    assert algebra.same(value, value)


@given(
    st.fractions(min_value=0, max_value=500, max_denominator=20),
    st.fractions(min_value=0, max_value=500, max_denominator=20),
)
def test_square_roots_multiply_and_divide_as_numbers_do(one, other):
    spelled = [rf"\sqrt{{\frac{{{n.numerator}}}{{{n.denominator}}}}}" for n in (one, other)]
    product = algebra.value(rf"\sqrt{{\frac{{{(one * other).numerator}}}{{{(one * other).denominator}}}}}")
    assume(product is not None)
    assert algebra.same(algebra.value(" ".join(spelled)), product)
    assert algebra.value(rf"{{{spelled[0]}}}^{{2}}").rational == one
    assert algebra.same(*map(algebra.value, spelled)) == (one == other)


# ---- equality

answers = (
    expressions
    | numbers.map(str)
    | st.tuples(numbers, numbers).map(lambda two: f"({two[0]},{two[1]})")
    | st.sampled_from(
        (
            "red",
            "5 cm",
            "50\\%",
            "\\{1,2\\}",
            "x=4",
            "1<x<2",
            "\\sqrt{2}",
            "ABC",
            "101_2",
            "\\pm 2",
            "90^\\circ",
        )
    )
)


@given(answers)
def test_an_answer_equals_itself(text):
    assert quick(text, text) == Outcome.EQUAL
    assert quick(text, f" {text} ") == Outcome.EQUAL
    assert quick(text, f"${text}$") == Outcome.EQUAL


PLAIN = expressions | numbers.map(str)


@given(PLAIN, PLAIN)
def test_equality_of_expressions_has_no_direction(one, other):
    outcomes = {quick(one, other), quick(other, one)} - {None}
    # A restated question counts only on the answer's side: 9+7 does not answer 16.
    if exact_number(one) is None and exact_number(other) is None:
        assert len(outcomes) <= 1


different = st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True)


@given(different, st.randoms(use_true_random=False))
def test_order_never_matters_in_a_set_and_always_in_a_list(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    left, right = [str(value) for value in values], [f"{value}.0" for value in shuffled]
    moved = values != shuffled
    assert quick_list(left, right, ordered=False) == Outcome.EQUAL
    assert quick_list(left, right, ordered=True) == (Outcome.DIFFERENT if moved else Outcome.EQUAL)
    in_braces, in_parentheses = (
        [form.format(", ".join(side)) for side in (left, right)] for form in ("\\{{{}\\}}", "({})")
    )
    assert quick(*in_braces) == Outcome.EQUAL
    assert quick(*in_parentheses) == (Outcome.DIFFERENT if moved else Outcome.EQUAL)
    assert quick(in_braces[0], in_parentheses[1]) == Outcome.DIFFERENT


@given(
    numbers,
    st.sampled_from(("mm", "cm", "m", "km", "in", "ft", "mi")),
    st.sampled_from(("mm", "cm", "m", "km", "in", "ft", "mi")),
)
def test_a_length_converts_there_and_back(number, unit, other):
    here = read(f"{number} {unit}")
    factor = here.unit.factor / read(f"1 {other}").unit.factor
    there = number * factor
    assume(len(str(there)) < 300)
    gold, answer = f"{number} {unit}", f"{there} {other}"
    row = Example("row", "?", gold, "direct", "quantity")
    assert AnswerReward()(answer, row).score == 1
    assert AnswerReward()(f"{answer}^2", row).score == 0


boxes = (
    st.tuples(*[st.integers(0, 100)] * 4)
    .filter(lambda c: c[0] < c[2] and c[1] < c[3])
    .map(lambda c: Box(*map(Fraction, c)))
)


@given(boxes, boxes)
def test_iou_is_symmetric_bounded_and_1_only_for_itself(one, other):
    assert iou(one, other) == iou(other, one)
    assert 0 <= iou(one, other) <= 1
    assert (iou(one, other) == 1) == (one == other)
    assert overlap([one], [other]) == iou(one, other)


@pytest.mark.parametrize("kind", ["json", "list", "set"])
@given(st.lists(st.integers(-99, 99) | st.sampled_from(("red", "dark blue")), min_size=1, max_size=5))
def test_json_lists_are_their_own_gold(kind, values):
    row = Example("row", "?", json.dumps(values), "direct", kind)
    assert AnswerReward()(json.dumps(values), row).score == 1
    assert AnswerReward()(json.dumps([*values, 1]), row).score == 0


# ---- text after a gold, text without mathematics, and notations of one value

WORDS = st.text(string.ascii_lowercase, min_size=3, max_size=9) | st.sampled_from(
    "incorrect eighths quadrillion chain exact fifths points left wrong divided less thirds squared apples".split()
)
SIGNS_OF_PERCENT = {"percent", "percentage", "pct"}


@given(
    st.sampled_from(("5", "42", "1/3", "-2.5", "x^2", "\\sqrt{2}", "(1,2)", "5 cm")),
    st.lists(WORDS, min_size=1, max_size=3).map(" ".join),
    st.sampled_from(("{} {}", "{}\\text{{ {}}}", "{}\\ {}")),
    st.sampled_from(("math", "number", "integer", "quantity", "auto")),
)
def test_a_gold_followed_by_words_that_are_no_unit_never_earns(gold, words, form, kind):
    assume(unit_of(words) is None and not SIGNS_OF_PERCENT & {*words.split()})
    row = Example("row", "?", gold, "direct", kind)
    assert not AnswerReward()(form.format(gold, words), row).score


@given(
    st.lists(WORDS | st.sampled_from((".", ",", "!", "(", "the", "is", "no", "?")), max_size=5).map(" ".join)
)
def test_text_that_math_verify_parses_to_nothing_never_earns(text):
    assume(math_verify.parse(text) == [])
    for gold in ("5", "x^2", "\\frac{1}{2}", "(1,2)", "5 cm", "1<x<2"):
        assert not AnswerReward()(text, Example("row", "?", gold, "direct", "math")).score


def notations(value):
    """Ways to write a rational number."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    written = [
        f"{sign}{top}/{bottom}",
        f"{sign}\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac{{{sign}{top}}}{{{bottom}}}",
    ]
    if top > bottom > 1:
        written.append(f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    if 10**6 % bottom == 0:
        decimal = f"{float(value):.6f}"
        written += [
            decimal,
            decimal.rstrip("0").rstrip("."),
            f"{float(value):,.6f}",
            f"{float(value * 100):.4f}\\%",
        ]
        written.append(f"{float(value):.6f} \\times 10^{{0}}")
    if bottom == 1:
        written += [f"{value.numerator}", f"{value.numerator:,}", f"{value.numerator}.0"]
    return written


@given(
    st.integers(-(10**6), 10**6),
    st.sampled_from((1, 2, 4, 5, 8, 3, 7, 12, 1000)),
    st.sampled_from(
        ("{}", "${}$", "x={}", "\\text{{Answer}} = {}", " {}.", "\\left({}\\right)", "{}\\text{{ cm}}")
    ),
)
def test_a_value_earns_in_each_of_its_notations(top, bottom, form):
    value = Fraction(top, bottom)
    for gold in notations(value)[:2]:
        row = Example("row", "?", gold, "direct", "math")
        for written in notations(value):
            if (form.endswith(" cm}}") and "%" in written) or ("left(" in form and "," in written):
                continue  # (1,000.0) is a point
            assert AnswerReward()(form.format(written), row).score == 1, (gold, form.format(written))
