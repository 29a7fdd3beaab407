"""The format rewards, for templates with and without an opened thought."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.example import Example
from rewards.style.format import DirectFormat, Format, ThinkFormat, ThinkTags

THINK, DIRECT = Example("t", "q", "4", "think"), Example("d", "q", "4", "direct")
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", r"\boxed", "{", "}", "4", " ", "x", "<|im_end|>", "\ud800"]),
    max_size=12,
)


@pytest.mark.parametrize(
    ("completion", "closed", "opened"),
    [
        (r"<think>2 + 2</think> \boxed{4}", 1, 0),
        (r"2 + 2</think> \boxed{4}", 0, 1),
        (r" <think>2 + 2</think>\boxed{4} so four.", 1, 0),
        (r"<think>2 + 2</think> 4", 0, 0),
        (r"2 + 2</think> 4", 0, 0),
        (r"</think> \boxed{4}", 0, 1),
        (r"<think> </think> \boxed{4}", 0, 0),
        ("<think>\u200b</think> \\boxed{4}", 0, 0),
        (r"<think>...</think> \boxed{4}", 0, 0),
        (r"2 + 2</think> \boxed{4}</think>", 0, 0),
        (r"2 + 2</think> \boxed{4} \boxed{4}", 0, 0),
        (r"2 + 2 <think>again</think> \boxed{4}", 0, 0),
        (r"\boxed{4}</think> \boxed{4}", 0, 1),
        (r"<think>数一数：三加一</think> \boxed{4}", 1, 0),
    ],
)
def test_a_think_completion_with_the_thought_closed_or_already_opened(completion, closed, opened):
    assert ThinkFormat()(completion, THINK).score == closed
    assert ThinkFormat(thought_open=True)(completion, THINK).score == opened


@pytest.mark.parametrize(
    ("completion", "closed", "opened"),
    [
        (r"<think>2 + 2</think> \boxed{4}", 1, 0),
        (r"<think>2 + 2</think> 4", 1, 0),
        (r"<think>2 + 2 is \boxed{4}</think> \boxed{4} or \boxed{5}", 1, 0),
        ("<think>2 + 2</think>{\\", 1, 0),
        ("2 + 2</think> 4", 0, 1),
        ("2 + 2 = 4", 0, 0),
        ("<think>2 + 2 = 4", 0, 0),
        ("<think></think> 4", 0, 0),
        ("<think>...</think> 4", 0, 0),
        ("So: <think>2 + 2</think> 4", 0, 0),
        ("<think>2</think> 4 <think>2</think>", 0, 0),
        ("<think>2 + 2</think> 4</think>", 0, 0),
        ("<think>2 + 2</think> 4<|im_end|>", 0, 0),
    ],
)
def test_think_tags_ask_for_the_tags_alone(completion, closed, opened):
    assert ThinkTags()(completion, THINK).score == closed
    assert ThinkTags(thought_open=True)(completion, THINK).score == opened


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("4", 1),
        (r"\boxed{4}", 1),
        ("", 0),
        (" \n", 0),
        ("<think>4</think> 4", 0),
        ("</think>4", 0),
        ("4<|im_end|>", 0),
    ],
)
def test_a_direct_completion_has_no_think_tags(completion, score):
    assert DirectFormat()(completion, DIRECT).score == score


@given(PIECES, st.booleans())
def test_format_never_raises_and_follows_the_rows_mode(pieces, thought_open):
    completion = "".join(pieces)
    think, direct = ThinkFormat(thought_open)(completion, THINK), DirectFormat()(completion, DIRECT)
    assert think.score in (0, 1)
    assert bool(think.reason) == (think.score == 0)
    assert Format(thought_open)(completion, THINK) == think
    assert ThinkTags(thought_open)(completion, THINK).score >= think.score
    assert Format(thought_open)(completion, DIRECT) == direct
