"""The table of grading cases: equivalent, different, hack, hostile and format rows of every kind."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rewards.answer import KINDS, UNGRADED, AnswerReward, gold_problem
from rewards.answers import checker as checker_module
from rewards.answers.checker import MathChecker
from rewards.example import Example
from rewards.style.format import DirectFormat, ThinkFormat

CASES = [
    case
    for name in ("cases.json", "cases_kinds.json")
    for case in json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))["cases"]
]
FAST = [case for case in CASES if not case.get("slow")]
FORMATS = {"think": ThinkFormat(), "direct": DirectFormat()}
SCORES = {"correct": 1.0, "unscorable": None}


@pytest.fixture(autouse=True, scope="module")
def patient_checker():
    """On a shared machine, an honest comparison may have to wait."""
    checker, shared = MathChecker(deadline_s=30), checker_module.SHARED
    checker_module.SHARED = checker
    yield
    checker_module.SHARED = shared
    checker.close()


def text(packed):
    """An expanded text: [text, times] stands for a repetition."""
    if isinstance(packed, str):
        return packed
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in packed)


def taken(case):
    """The reward, the completion and the row of a case."""
    mode, gold = case.get("mode", "think"), text(case["gold"])
    completion = text(case["completion"]) if "completion" in case else boxed(text(case["answer"]))
    row = Example("row", case.get("question", "What?"), gold, mode, case["kind"], meta=case.get("meta", {}))
    return AnswerReward(**case.get("params", {})), completion, row


def boxed(given):
    return f"<think>So.</think>\\boxed{{{given}}}"


def name_of(case):
    given = case["answer"] if "answer" in case else case["why"]
    return f"{case['family']}-{case['kind']}-{str(case['gold'])[:30]}-{str(given)[:40]}"


@pytest.mark.parametrize("case", FAST, ids=name_of)
def test_a_case_gets_its_verdict(case):
    reward, completion, row = taken(case)
    verdict = reward(completion, row)
    assert verdict.status == case["expect"], verdict
    assert verdict.score == SCORES.get(case["expect"], 0)
    assert verdict.score == 1 or verdict.reason
    if "format" in case:
        form = FORMATS[row.mode](completion, row)
        assert form.score == case["format"], form
        assert form.score == 1 or form.reason


GOLDS = {
    json.dumps([case["kind"], case["gold"], case.get("meta")]): case
    for case in FAST
    if case["expect"] != "unscorable" and "mode" not in case
}


@pytest.mark.parametrize("case", GOLDS.values(), ids=name_of)
def test_every_gold_answer_earns_full_marks_for_itself(case):
    reward, _, row = taken(case)
    assert gold_problem(row) == ""
    assert row.verifier == "point" or reward(boxed(row.answer), row).status == "correct"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.get("slow")], ids=name_of)
def test_what_burns_the_deadline_is_never_credited(case, monkeypatch):
    checker = MathChecker()
    monkeypatch.setattr(checker_module, "SHARED", checker)
    reward, completion, row = taken(case)
    assert reward(completion, row).score != 1
    checker.close()


def test_the_table_covers_every_kind_from_both_sides():
    credited = Counter(case["kind"] for case in FAST if case["expect"] == "correct")
    refused = Counter(case["kind"] for case in FAST if case["expect"] not in ("correct", "unscorable"))
    graded = set(KINDS) - set(UNGRADED)
    assert graded <= {kind for kind, count in credited.items() if count >= 10}
    assert graded <= {kind for kind, count in refused.items() if count >= 10}
    assert len(CASES) >= 500


def test_each_kind_of_the_new_cases_has_ten_and_both_directions():
    kinds = json.loads(Path(__file__).with_name("cases_kinds.json").read_text(encoding="utf-8"))["cases"]
    counted = Counter(case["family"].partition(": ")[2] for case in kinds)
    assert len(counted) == 13
    assert min(counted.values()) >= 10
    for kind in counted:
        assert {case["expect"] == "correct" for case in kinds if case["family"].endswith(kind)} == {
            True,
            False,
        }
