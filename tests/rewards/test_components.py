"""The arithmetic of the components' statistics, by hand."""

import pytest

from rewards.components import component_metrics
from rewards.mix import Graded
from rewards.verdict import Status, Verdict


def graded(**scores):
    verdicts = {
        name: Verdict.unscored("down")
        if score is None
        else Verdict(score, Status.CORRECT if score == 1 else "wrong")
        for name, score in scores.items()
    }
    return Graded(None, verdicts)


def test_means_spreads_groups_and_correlations():
    groups = [
        [graded(answer=1.0, format=1.0), graded(answer=0.0, format=1.0)],
        [graded(answer=1.0, format=1.0), graded(answer=1.0, format=0.0)],
    ]
    metrics = component_metrics(groups)
    # answer 1 0 1 1: mean 3/4, variance 3/16; format 1 1 1 0 the same; covariance = 2/4 - 9/16 = -1/16
    assert metrics["sampled/answer/mean"] == 0.75
    assert metrics["sampled/answer/std"] == pytest.approx((3 / 16) ** 0.5)
    assert metrics["sampled/answer/zero_variance_groups"] == 0.5
    assert metrics["sampled/answer/correlation/format"] == pytest.approx(-1 / 3)
    assert metrics["sampled/answer/status/correct"] == 3
    assert metrics["sampled/answer/status/wrong"] == 1
    assert metrics["sampled/answer/status/timeout"] == 0
    assert "sampled/format/correlation/answer" not in metrics


def test_what_is_not_defined_is_left_out():
    metrics = component_metrics([[graded(judge=None, answer=1.0), graded(answer=1.0)], [graded(answer=0.0)]])
    assert metrics["sampled/judge/status/unscorable"] == 1
    assert not {"sampled/judge/mean", "sampled/judge/std", "sampled/judge/zero_variance_groups"} & set(
        metrics
    )
    # The variance of a group of one completion is undefined.
    assert metrics["sampled/answer/zero_variance_groups"] == 1
    assert not [key for key in metrics if "correlation" in key]


def test_unscored_completions_count_in_no_mean():
    metrics = component_metrics([[graded(a=1.0, b=0.0), graded(a=None, b=1.0), graded(a=0.0, b=1.0)]])
    assert metrics["sampled/a/mean"] == 0.5
    assert metrics["sampled/a/correlation/b"] == pytest.approx(-1)


def test_a_constant_component_correlates_with_nothing():
    metrics = component_metrics([[graded(a=0.1, b=0.0), graded(a=0.1, b=1.0), graded(a=0.1, b=1.0)]])
    assert "sampled/a/correlation/b" not in metrics


def test_without_groups_there_are_no_metrics():
    assert component_metrics([]) == {}
