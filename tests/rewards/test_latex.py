"""The fast conversion from LaTeX to sympy has the same results as latex2sympy's own."""

import json
from pathlib import Path

import pytest

from rewards.answers.latex import to_sympy

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))["cases"]
MATHS = [case for case in CASES if case.get("kind") == "math" and not case.get("slow")]
TEXTS = [
    *dict.fromkeys(
        case[side] for case in MATHS for side in ("gold", "answer") if isinstance(case.get(side), str)
    ),
    *(
        "x^2",
        "3x^{7/2}-2x^3",
        "a_1^2b_2^3",
        r"\sqrt[3]{x^2_1}",
        "f(x)^2",
        "|x^2-1|",
        r"\sin^2(x)^3",
        "x^{2^{2}}",
    ),
    *("x^2+", r"\frac{1}{", "a b c^", "007", "0.50x", ".5", "3.", "1e5", "1,234x", "00.50", "²", "x!^2"),
    *("12345678901234567890.123456789012345678901", r"\{x^2,y\}", "x^2<y^2<z^2", r"\lim_{x\to 0}x^2"),
]


def form(parse, text: str) -> str:
    """The exact result of parsing a text, or that parsing fails."""
    from sympy import srepr

    try:
        return srepr(parse(text))
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("text", TEXTS)
def test_the_result_is_latex2sympys_at_first_and_from_memory(text):
    from latex2sympy2_extended import latex2sympy

    stock = form(lambda text: latex2sympy(text, is_real=True, normalization_config=None), text)
    assert [form(lambda text: to_sympy(text, real=True), text) for _ in range(2)] == [stock, stock]
