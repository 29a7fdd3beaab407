"""The mixture's arithmetic and its refusals."""

import pytest

from rewards.example import Example
from rewards.mix import Mixture, RewardError, Term
from rewards.verdict import Status, Verdict

THINK, DIRECT = Example("t", "q", "a", "think"), Example("d", "q", "a", "direct")


def term(name, weight, value, modes=("think", "direct")):
    return Term(name, lambda completion, example: value, weight, frozenset(modes))


def test_the_total_is_the_weighted_sum():
    mixture = Mixture([term("answer", 0.6, 1.0), term("thinking", 0.3, 0.5), term("format", 0.1, False)])
    graded = mixture.grade("text", THINK)
    assert graded.total == pytest.approx(0.6 * 1 + 0.3 * 0.5 + 0.1 * 0)
    assert {name: verdict.score for name, verdict in graded.verdicts.items()} == {
        "answer": 1,
        "thinking": 0.5,
        "format": 0,
    }


def test_each_mode_has_its_own_terms():
    mixture = Mixture([term("chain", 1.0, 0.0, ["think"]), term("text", 1.0, 1.0, ["direct"])])
    assert mixture.grade("", THINK).total == 0
    assert list(mixture.grade("", DIRECT).verdicts) == ["text"]


def test_an_unscorable_weighted_term_leaves_the_row_out():
    mixture = Mixture([term("answer", 0.9, 1.0), term("judge", 0.1, None)])
    graded = mixture.grade("", THINK)
    assert graded.total is None
    assert graded.verdicts["answer"].score == 1
    assert graded.verdicts["judge"].status == Status.UNSCORABLE


def test_a_term_without_weight_only_watches():
    mixture = Mixture([term("answer", 1.0, 1.0), term("judge", 0.0, None)])
    assert mixture.grade("", THINK).total == 1


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([("a", 0.5, ["think"]), ("b", 0.4, ["think"])], "mode 'think' sum to 0.9, not 1: a 0.5, b 0.4"),
        ([("a", 1.0, ["think"]), ("b", 0.2, ["direct"])], "mode 'direct' sum to 0.2"),
        ([("a", 0.5, ["think"]), ("a", 0.5, ["think"])], "named twice: a"),
        ([("a", 1.5, ["think"])], "weight=1.5"),
        ([("a", 1.0, ["thinking"])], "modes=\\['thinking'\\]"),
        ([("a", 1.0, [])], "modes=\\[\\]"),
    ],
)
def test_weights_and_names_that_make_no_sense_are_refused(terms, says):
    with pytest.raises(ValueError, match=says):
        Mixture([term(name, weight, 1.0, modes) for name, weight, modes in terms])


def test_weights_that_miss_one_by_rounding_are_fine():
    Mixture([term("a", 0.1, 1.0), term("b", 0.2, 1.0), term("c", 0.7, 1.0)])


def test_a_row_whose_mode_nobody_grades_is_an_error():
    with pytest.raises(ValueError, match="row 'd': no reward grades mode 'direct'"):
        Mixture([term("a", 1.0, 1.0, ["think"])]).grade("", DIRECT)


def test_a_failing_reward_names_itself_the_row_and_the_completion():
    def fails(completion, example):
        raise KeyError("scene")

    with pytest.raises(
        RewardError, match=r"reward 'mine' failed on row 't': KeyError: 'scene'.*'yyy"
    ) as caught:
        Mixture([Term("mine", fails, 1.0)]).grade("y" * 300, THINK)
    assert isinstance(caught.value.__cause__, KeyError)
    assert "y" * 200 in str(caught.value)
    assert "y" * 201 not in str(caught.value)


@pytest.mark.parametrize("value", ["good", 1.5, float("nan"), [1.0]])
def test_what_is_no_verdict_is_refused_by_name(value):
    with pytest.raises(RewardError, match="reward 'mine'"):
        Mixture([term("mine", 1.0, value)]).grade("", THINK)


def test_numpy_scores_are_scores():
    import numpy as np

    assert Mixture([term("mine", 1.0, np.float32(0.5))]).grade("", THINK).total == 0.5


def test_a_verdict_is_taken_as_it_is():
    verdict = Verdict.wrong("3", "too small")
    assert Mixture([term("mine", 1.0, verdict)]).grade("", THINK).verdicts["mine"] is verdict
