"""The language reward: counted words, and attempts to hide words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.example import Example
from rewards.style.language import Language, words_by_script

CHINESE, ENGLISH = "图中有几个苹果？", "How many apples are in the picture?"


def score(question, thought, mode="think", **fields):
    text = rf"<think>{thought}</think> \boxed{{4}}" if mode == "think" else thought
    return Language(**fields)(text, Example("r", question, "4", mode)).score


@pytest.mark.parametrize(
    ("question", "thought", "expected"),
    [
        (ENGLISH, "There are two on the left and two on the right.", 1),
        (CHINESE, "左边有两个，右边有两个，一共四个。", 1),
        (ENGLISH, "左边有两个，右边有两个，一共四个。", 0),
        (CHINESE, "There are two on the left and two on the right.", 0),
        ("Сколько яблок на картинке?", "Слева два яблока, справа тоже два.", 1),
        ("リンゴはいくつですか？", "左に二個、右に二個、合計四個です。", 1),
        ("リンゴはいくつですか？", "There are four apples.", 0),
        ("사과가 몇 개 있나요?", "왼쪽에 두 개, 오른쪽에 두 개 있습니다.", 1),
        (CHINESE, r"设 $x=2$，$AB=3$ cm，则 \frac{1}{2}\cdot x\sin\theta 等于四。", 1),
        (CHINESE, "用代码 `len(apples) + total` 数一数左边和右边一共有几个苹果。", 1),
        (CHINESE, "<b>左边</b>两个<br/>右边两个", 1),
        ("3 + 4 = ?", "Three and four are seven.", 1),
        (CHINESE, "3 + 4 = 7", 1),
    ],
)
def test_a_thought_in_the_questions_script_earns_full_marks(question, thought, expected):
    assert score(question, thought) == expected


def test_the_score_is_the_share_of_words_over_what_is_enough():
    # two Chinese characters, two English words: half of the words, over 0.9 or over 0.5
    assert score(CHINESE, "左边 two apples") == pytest.approx(0.5 / 0.9)
    assert score(CHINESE, "左边 two apples", enough=0.5) == 1


def test_code_that_is_most_of_a_thought_hides_nothing():
    assert score(CHINESE, "好 `There are two on the left and two on the right`") < 0.2
    assert score(CHINESE, "```There are two on the left and two on the right") == 0


def test_a_script_may_be_prescribed():
    assert score("3 + 4 = ?", "三加四等于七", script="latin") == 0
    assert score(CHINESE, "Three and four", script="latin") == 1


def test_a_direct_completion_is_read_whole_and_nothing_earns_nothing():
    assert score(CHINESE, "四个", mode="direct") == 1
    assert score(CHINESE, "four apples", mode="direct") == 0
    assert score(CHINESE, " ", mode="direct") == 0
    assert Language()("no tags at all", Example("r", ENGLISH, "4", "think")).reason == "no thought"


def test_a_thought_that_the_template_opened_is_found():
    row = Example("r", ENGLISH, "4", "think")
    assert Language(thought_open=True)(r"Two and two are four</think> \boxed{4}", row).score == 1


@pytest.mark.parametrize("params", [{"script": "english"}, {"enough": 0}, {"enough": 1.5}])
def test_invalid_parameters_are_refused(params):
    with pytest.raises(ValueError, match=r"one of latin|a share"):
        Language(**params)


@given(st.text(max_size=200), st.text(max_size=50))
def test_any_text_gets_a_score(text, question):
    assert 0 <= score(question, text) <= 1
    assert words_by_script(text).total() <= len(text)


@pytest.mark.parametrize("piece", ["`", "```", "\\", "<", "<a", "</", "$", r"\(", "a", "字"])
def test_a_long_run_of_marks_is_read(piece):
    assert 0 <= score(ENGLISH, piece * 200_000) <= 1
