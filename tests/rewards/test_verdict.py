"""Verdicts and examples enforce their rules."""

import pytest

from rewards.example import Example
from rewards.verdict import UNSCORED, Status, Verdict


@pytest.mark.parametrize("status", [status for status in Status if status != Status.TIMEOUT])
def test_the_score_is_none_for_the_unscored_statuses_alone(status):
    score, other = (None, 0.0) if status in UNSCORED else (0.0, None)
    assert Verdict(score, status).score == score
    with pytest.raises(ValueError, match=f"status '{status}'"):
        Verdict(other, status)


def test_a_timeout_is_unscored_or_the_completions_fault():
    assert Verdict.unscored("too slow", Status.TIMEOUT).score is None
    assert Verdict.wrong(reason="a power tower", status=Status.TIMEOUT).score == 0


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_score_outside_zero_to_one_is_refused(score):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Verdict(score, Status.WRONG)


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="right"):
        Verdict(1.0, "right")


def test_a_verdict_can_be_written_as_json():
    import json

    written = json.loads(json.dumps(Verdict.unscored("the judge is down").to_dict()))
    assert written == {"score": None, "status": "unscorable", "answer": None, "reason": "the judge is down"}


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="row 'r': mode='thinking'"):
        Example("r", "q", "a", "thinking")
