"""Parsing of completions, and its linear cost."""

import pytest

from rewards.extract import MAX_BOX_CHARS, MAX_BOX_DEPTH, parse_direct, parse_thinking
from rewards.verdict import Status


def test_a_well_formed_completion_comes_apart():
    parsed = parse_thinking("  <think>\nC = 9.\n</think> So \\boxed{ \\frac{1}{2} }.")
    assert parsed.well_formed
    assert (parsed.thought, parsed.boxes, parsed.answer) == ("C = 9.", (r"\frac{1}{2}",), r"\frac{1}{2}")
    assert parsed.answer_part == " So \\boxed{ \\frac{1}{2} }."


@pytest.mark.parametrize(
    ("completion", "problem"),
    [
        ("\\boxed{4}", "no thought"),
        ("Well. <think>x</think>\\boxed{4}", "text before the thought"),
        ("<think>x", "the thought is never closed"),
        ("<think>x</think><think>\\boxed{4}", "the thought is opened again"),
        ("<think>x</think></think>\\boxed{4}", "the thought is closed twice"),
        ("<think> </think>\\boxed{4}", "the thought is empty"),
        ("<think>\\boxed{4}</think>\\boxed{4}", "a box inside the thought"),
        ("<think>x</think>4", "no box"),
        ("<think>x</think>\\boxed{1}\\boxed{2}\\boxed{3}", "3 boxes, not one"),
        ("<think>x</think>\\boxed{1 \\boxed{2}}", "a box inside a box"),
        ("<think>x</think>\\boxed{1", "the box has no pair of braces"),
        ("<think>x</think>\\boxed{}", "the box is empty"),
        (
            "<think>x</think>\\boxed{1}<|im_start|>user",
            "a chat token, as of an invented next turn: <|im_start|>",
        ),
    ],
)
def test_a_breach_of_the_contract_is_named(completion, problem):
    parsed = parse_thinking(completion)
    assert not parsed.well_formed
    assert parsed.problem == problem


def test_the_caps_are_inclusive():
    def box(content):
        return parse_thinking(f"<think>x</think>\\boxed{{{content}}}")

    assert box("1" * MAX_BOX_CHARS).well_formed
    assert box("1" * (MAX_BOX_CHARS + 1)).status == Status.OVER_LIMIT
    assert box("{" * MAX_BOX_DEPTH + "1" + "}" * MAX_BOX_DEPTH).well_formed
    assert box("{" * (MAX_BOX_DEPTH + 1) + "1" + "}" * (MAX_BOX_DEPTH + 1)).status == Status.OVER_LIMIT


def test_a_box_is_a_command_and_not_a_prefix_of_one():
    assert parse_direct(r"\boxedit{3} \boxed {4}").answer == "4"
    assert parse_direct(r"\\boxed{4}").answer == r"\\boxed{4}"  # a line break, then a word


class CountedText(str):
    """Text that counts how many characters its slices copy."""

    copied = 0

    def __getitem__(self, key):
        part = super().__getitem__(key)
        CountedText.copied += len(part)
        return part


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "\\boxed", "\\boxed{1}", "{", "}", "<think>", "</think>", "<|im_", "\\", "\\boxed{{"]
)
def test_hostile_text_is_read_in_one_pass(unit):
    from rewards import extract

    text = CountedText(unit * 4000)
    CountedText.copied = 0
    extract._read_boxes(text)
    assert CountedText.copied <= 2 * len(text)
    for completion in (str(text), f"<think>x</think>{text}", f"<think>{text}</think>"):
        assert not parse_thinking(completion).well_formed


@pytest.mark.parametrize("text", ["", " ", "\0", "\ud800", "\\boxed{\ud800}", "}{", "<think></think>", "\\"])
def test_nothing_makes_reading_fail(text):
    for parsed in (parse_thinking(text), parse_thinking(text, thought_open=True), parse_direct(text)):
        assert (parsed.answer is None) == (parsed.status != Status.CORRECT)
        assert parsed.well_formed or parsed.problem


@pytest.mark.parametrize(
    "completion", [r"</think>\boxed{42}", r"Let me reconsider. \boxed{99}</think>Final: \boxed{42}"]
)
def test_a_thought_that_the_template_opened_may_be_empty_or_hold_a_box(completion):
    opened, not_opened = parse_thinking(completion, thought_open=True), parse_thinking(completion)
    assert (opened.well_formed, opened.answer) == (True, "42")
    assert (not_opened.well_formed, not_opened.answer) == (False, None)
