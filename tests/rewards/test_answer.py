"""The answer reward against the table of cases, and what the table cannot say."""

import json
from pathlib import Path

import pytest

from rewards.answer import AnswerReward, GoldError, validate_gold
from rewards.example import Example
from rewards.format import DirectFormat, ThinkFormat
from rewards.verdict import Status

CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
FORMATS = {"think": ThinkFormat(), "direct": DirectFormat()}


def example(gold, *, kind="math", mode="think", **meta):
    return Example("row-1", "What?", gold, mode, kind, meta=meta)


def boxed(answer, gold, **row):
    return AnswerReward()(f"<think>So.</think>\\boxed{{{answer}}}", example(gold, **row))


@pytest.mark.parametrize("case", CASES["completions"], ids=lambda case: f"{case['family']}: {case['name']}")
def test_case_table(case):
    row = example(case["gold"], kind=case["kind"], mode=case["mode"], **case.get("meta", {}))
    verdict = AnswerReward()(case["completion"], row)
    assert verdict.status == case["answer"], verdict
    assert verdict.score == {"correct": 1, "unscorable": None}.get(case["answer"], 0)
    form = FORMATS[case["mode"]](case["completion"], row)
    assert form.score == case["format"], form
    assert verdict.score == 1 or verdict.reason
    assert form.score == 1 or form.reason


@pytest.mark.parametrize(("gold", "answer"), CASES["equal"])
def test_equal_answers_earn_full_marks(gold, answer):
    assert boxed(answer, gold).status == Status.CORRECT


@pytest.mark.parametrize(("gold", "answer"), CASES["different"])
def test_different_answers_earn_nothing(gold, answer):
    assert boxed(answer, gold).score == 0


@pytest.mark.parametrize(("gold", "_"), CASES["equal"] + CASES["different"])
def test_every_gold_answer_earns_full_marks_for_itself(gold, _):
    validate_gold(example(gold))
    assert boxed(gold, gold).status == Status.CORRECT


def test_a_verdict_keeps_the_answer_and_says_why():
    verdict = boxed("5", "4")
    assert (verdict.answer, verdict.reason) == ("5", "not the gold answer")


def test_a_tolerance_is_inclusive_and_for_numbers():
    near = AnswerReward(tolerance=0.25)
    row = example("10", kind="number", mode="direct")
    # 10 +- 0.25
    assert [near(text, row).score for text in ("10.25", "9.75", "10.26")] == [1, 1, 0]
    with pytest.raises(ValueError, match="tolerance=-1"):
        AnswerReward(tolerance=-1)


def test_a_template_that_opens_the_thought_is_known():
    row = example("4")
    completion = r"2 + 2 = 4</think>\boxed{4}"
    assert AnswerReward(thought_open=True)(completion, row).score == 1
    assert ThinkFormat(thought_open=True)(completion, row).score == 1
    assert AnswerReward()(completion, row).status == Status.NO_ANSWER
    # opened by the template and again by the model: two openings
    assert ThinkFormat(thought_open=True)(f"<think>{completion}", row).score == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (example("\\frac{"), "not readable as mathematics"),
        (example("9" * 400), "a number of 400 digits"),
        (example("four", kind="number"), "is no number"),
        (example('" "', kind="exact"), "nothing to compare"),
        (example("a", kind="exact", answers="b"), "write a list"),
        (example("AB", kind="choice"), "names no option"),
        (example("C", kind="choice", choices={"A": "x", "B": "y"}), "A: x, B: y"),
        (example("4", kind="maths"), "it is one of math"),
    ],
)
def test_a_gold_answer_that_makes_no_sense_is_refused_at_load(row, says):
    with pytest.raises(GoldError, match=r"row 'row-1'.*" + says):
        validate_gold(row)


@pytest.mark.parametrize("kind", ["judge", "none"])
def test_rows_that_no_rule_grades_load(kind):
    validate_gold(example("a fine day", kind=kind))


def test_a_completion_that_burns_the_deadline_is_wrong(monkeypatch):
    from rewards import answer, mathpool
    from rewards.mathcheck import MathChecker

    monkeypatch.setattr(mathpool, "CPU_SHARE", 0.01)  # however busy the machine is
    checker = MathChecker(deadline_s=0.5)
    monkeypatch.setattr(answer, "SHARED", checker)
    verdict = boxed("9^{9^{9^{9}}}", "3x")
    checker.close()
    assert (verdict.score, verdict.status) == (0, Status.TIMEOUT)
    assert "over 0.5 s" in verdict.reason
