"""The answer reward beyond the table of cases: parameters, load-time checks, internal failures."""

import math

import pytest

from rewards import pool
from rewards.answer import AnswerReward, GoldError, validate_gold
from rewards.answers import checker as checker_module
from rewards.answers.checker import MathChecker
from rewards.answers.outcome import All, Matching, Outcome
from rewards.example import Example
from rewards.style.format import ThinkFormat
from rewards.verdict import Status


def example(gold, *, kind="math", mode="think", **meta):
    return Example("row-1", "What?", gold, mode, kind, meta=meta)


def boxed(answer, gold, **row):
    return AnswerReward()(f"<think>So.</think>\\boxed{{{answer}}}", example(gold, **row))


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
        (example("four", kind="number"), "is not a number"),
        (example('" "', kind="exact"), "is empty after normalisation"),
        (example("a", kind="exact", answers="b"), "write a list"),
        (example("AB", kind="choice"), "is not an option"),
        (example("C", kind="choice", choices={"A": "x", "B": "y"}), "A: x, B: y"),
        (example("4", kind="maths"), "did you mean math. Known: auto, box"),
        (example("4.5", kind="integer"), "is not an integer"),
        (example("(1,2)", kind="set"), "is not a set"),
        (example("1,,2", kind="list"), "list: an element is empty"),
        (example("1,\\frac{", kind="list"), "list: .*not readable as mathematics"),
        (example('{"a": NaN}', kind="json"), "NaN is not a JSON number"),
        (example("[9,9,1,1]", kind="box"), "write .x1, y1, x2, y2. with x1 < x2"),
        (example("[1]", kind="point"), "neither a point nor a box"),
        (example("cm", kind="quantity"), "not a number with a unit"),
        (example("[0,0,1,1]", kind="box", iou_threshold=2), "meta: iou_threshold=2: .* in .0, 1."),
        (example("4", kind="number", tolerance=True), "meta: tolerance=True"),
    ],
)
def test_an_unusable_gold_answer_is_refused_at_load(row, says):
    with pytest.raises(GoldError, match=r"row 'row-1'.*" + says):
        validate_gold(row)


@pytest.mark.parametrize("kind", ["judge", "none"])
def test_rows_that_no_rule_grades_load(kind):
    validate_gold(example("a fine day", kind=kind))


def test_a_completion_that_burns_the_deadline_is_wrong(monkeypatch):
    monkeypatch.setattr(pool, "CPU_SHARE", 0.1)  # independent of the machine's load
    checker = MathChecker(deadline_s=5, workers=1)
    monkeypatch.setattr(checker_module, "SHARED", checker)
    verdict = boxed("9^{9^{9^{9}}}", "3x")
    checker.close()
    assert (verdict.score, verdict.status) == (0, Status.TIMEOUT)
    assert "too much computing time" in verdict.reason


@pytest.mark.parametrize(
    ("outcome", "score", "status"),
    [
        (Outcome.OVER_TIME, 0, Status.TIMEOUT),
        (Outcome.OVER_MEMORY, 0, Status.OVER_LIMIT),
        (Outcome.UNPARSEABLE, 0, Status.UNPARSEABLE),
        (Outcome.TIMEOUT, None, Status.TIMEOUT),
        (Outcome.CRASHED, None, Status.CRASHED),
        (Outcome.BAD_GOLD, None, Status.UNSCORABLE),
    ],
)
def test_only_what_the_completion_did_becomes_a_number(monkeypatch, outcome, score, status):
    class Checker:
        def settle(self, result):
            return result if isinstance(result, Outcome) or asks_for_gold(result) else outcome

    def asks_for_gold(result):
        return isinstance(result, All) and all(part.given is None for part in result.parts)

    monkeypatch.setattr(checker_module, "SHARED", Checker())
    for kind in ("math", "set", "list"):
        verdict = boxed(
            r"\sin x, 2" if kind != "math" else r"\sin x", "x, 2" if kind != "math" else "x", kind=kind
        )
        assert (verdict.score, verdict.status) == (score, status)
        assert verdict.reason


def test_a_graded_box_earns_its_mean_overlap():
    row = example("[[0,0,10,10],[20,20,30,30]]", kind="box")
    graded = AnswerReward(graded=True)
    think = "<think>x</think>"
    # the first box half covered, the second exactly: (1/2 + 1) / 2; a third box: (1/2 + 1) / 3
    two, third = "[0,0,10,5],[20,20,30,30]", "[50,50,60,60]"
    assert graded(f"{think}\\boxed{{[{two}]}}", row).score == 0.75
    assert graded(f"{think}\\boxed{{[{two},{third}]}}", row).score == 0.5
    assert graded(f"{think}\\boxed{{{row.answer}}}", row).status == Status.CORRECT


def test_auto_names_the_kind_of_the_gold():
    assert (
        boxed("(1, 2, 4)", "[1, 2, 3]", kind="auto").reason
        == "auto read the gold as list: not the gold answer"
    )
    assert boxed("red", "Red", kind="auto").reason == "auto read the gold as exact"


def test_the_rows_own_limit_takes_the_place_of_the_parameter():
    strict, loose = AnswerReward(tolerance=0.1), AnswerReward(tolerance=5)
    row = example("10", kind="number", mode="direct", tolerance=1)
    assert [reward("11", row).score for reward in (strict, loose)] == [1, 1]
    assert [reward("12", row).score for reward in (strict, loose)] == [0, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tolerance", math.nan),
        ("relative_tolerance", math.inf),
        ("iou_threshold", 0),
        ("iou_threshold", 1.1),
        ("max_distance", -1),
    ],
)
def test_an_invalid_limit_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        AnswerReward(**{field: value})


def test_a_list_of_many_elements_is_one_comparison(monkeypatch):
    asked = []

    class Checker:
        def settle(self, result):
            if not isinstance(result, Outcome):
                asked.append(result)
            return Outcome.DIFFERENT if isinstance(result, Matching) else Outcome.EQUAL

    monkeypatch.setattr(checker_module, "SHARED", Checker())
    gold = ", ".join(rf"\sin({n}x)" for n in range(9))
    assert boxed(gold.replace("sin", "cos"), gold, kind="set").score == 0
    assert len(asked) == 1
