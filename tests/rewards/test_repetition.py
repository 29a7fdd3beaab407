"""The repetition reward, by counting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.example import Example
from rewards.style.repetition import Repetition

ROW = Example("r", "q", "4", "think")
HONEST = (
    "The picture shows a triangle whose base is six and whose height is four, so half of their product, twelve, "
    "is the area; the circle beside it has radius one."
)
CHINESE = "图中的三角形底边长为六，高为四，所以面积等于底乘高的一半，也就是十二；旁边的圆半径是一。"


@pytest.mark.parametrize("text", [HONEST, CHINESE, "4", "yes yes"])
def test_a_text_that_does_not_repeat_itself_keeps_full_marks(text):
    assert Repetition()(text, ROW).score == 1


@pytest.mark.parametrize(
    "text",
    [
        HONEST * 20,
        CHINESE * 20,
        "wait " * 200,
        "等等" * 200,
        "ha" * 2000,
        "!" * 300,
        "1, " * 300,
        "ab\n" * 300,
    ],
)
def test_a_text_that_goes_in_circles_earns_nothing(text):
    assert Repetition()(text, ROW).score == 0


def test_the_score_falls_between_the_shares():
    # a b c a b c: five bigrams ab bc ca ab bc, three different: 40% occurred before; (0.6 - 0.4) / (0.6 - 0.2)
    verdict = Repetition(ngram=2)("a b c A b c", ROW)
    assert verdict.score == pytest.approx(0.5)
    assert verdict.reason == "40% of the 2-grams occurred before"
    assert Repetition(ngram=2, allowed=0.4, worst=0.5)("a b c a b c", ROW).score == pytest.approx(1)
    assert Repetition(ngram=2, allowed=0.0, worst=0.4)("a b c a b c", ROW).score == pytest.approx(0)


def test_an_empty_completion_earns_nothing():
    assert Repetition()(" \n", ROW).reason == "empty"
    assert Repetition()("", ROW).score == 0


@pytest.mark.parametrize("params", [{"ngram": 0}, {"allowed": 0.6}, {"worst": 1.1}, {"allowed": -0.1}])
def test_invalid_shares_are_refused(params):
    with pytest.raises(ValueError, match=r"ngram|shares"):
        Repetition(**params)


@given(st.text(alphabet=st.characters(), max_size=200))
def test_any_text_gets_a_score(text):
    assert 0 <= Repetition()(text, ROW).score <= 1


def test_a_text_of_megabytes_is_read():
    assert Repetition()("the same words again and again " * 100_000, ROW).score == 0
