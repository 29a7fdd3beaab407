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
def test_invalid_weights_and_names_are_refused(terms, says):
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
def test_an_invalid_return_value_names_the_reward(value):
    with pytest.raises(RewardError, match="reward 'mine'"):
        Mixture([term("mine", 1.0, value)]).grade("", THINK)


def test_numpy_scores_are_scores():
    import numpy as np

    assert Mixture([term("mine", 1.0, np.float32(0.5))]).grade("", THINK).total == 0.5


def test_a_verdict_is_taken_as_it_is():
    verdict = Verdict.wrong("3", "too small")
    assert Mixture([term("mine", 1.0, verdict)]).grade("", THINK).verdicts["mine"] is verdict


JUDGED = Example("j", "q", "", "think", "judge")


def test_each_cell_has_its_own_weights():
    rule = Term("rule", lambda c, e: 1.0, 0.8, graded=frozenset({"verifiable"}))
    judge = Term("judge", lambda c, e: 0.5, 0.8, graded=frozenset({"judged"}))
    mixture = Mixture([rule, judge, term("format", 0.2, 1.0)])
    assert mixture.grade("", THINK).total == pytest.approx(0.8 * 1 + 0.2)
    assert mixture.grade("", JUDGED).total == pytest.approx(0.8 * 0.5 + 0.2)
    assert list(mixture.grade("", JUDGED).verdicts) == ["judge", "format"]


def test_a_row_whose_cell_nobody_grades_is_an_error():
    mixture = Mixture([Term("rule", lambda c, e: 1.0, 1.0, graded=frozenset({"verifiable"}))])
    with pytest.raises(ValueError, match="row 'j': no reward grades mode 'think', judged rows"):
        mixture.grade("", JUDGED)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (
            [{"name": "a", "weight": 0.8, "graded": frozenset({"judged"})}, {"name": "b", "weight": 0.2}],
            "mode 'think', verifiable rows, sum to 0.2, not 1: b 0.2",
        ),
        (
            [{"name": "answer", "weight": 1.0}, {"name": "b", "weight": 0.0, "gate": "anser"}],
            "did you mean answer",
        ),
        ([{"name": "a", "weight": 1.0, "gate": "a"}], "form a circle: a behind a"),
        (
            [{"name": "a", "weight": 0.5, "gate": "b"}, {"name": "b", "weight": 0.5, "gate": "a"}],
            "form a circle: a behind b, b behind a",
        ),
        (
            [
                {"name": "a", "weight": 1.0, "graded": frozenset({"verifiable"})},
                {"name": "b", "weight": 1.0, "graded": frozenset({"judged"})},
                {"name": "c", "weight": 0.0, "gate": "a"},
            ],
            "'c': gate='a' does not grade mode 'think', judged rows",
        ),
        ([{"name": "a", "weight": 1.0, "on_error": "unscoreable"}], "did you mean unscorable"),
        ([{"name": "a", "weight": 1.0, "graded": frozenset({"rules"})}], "graded=\\['rules'\\]"),
    ],
)
def test_invalid_cells_and_gates_are_refused(terms, says):
    with pytest.raises(ValueError, match=says):
        Mixture([Term(reward=lambda c, e: 1.0, **one) for one in terms])


def gated(score):
    asked = []
    mixture = Mixture(
        [
            Term("thinking", lambda c, e: asked.append(c) or 1.0, 0.4, gate="answer"),
            Term("answer", lambda c, e: score, 0.6),
        ]
    )
    return mixture.grade("text", THINK), asked


def test_behind_an_open_gate_a_term_earns_its_own_score():
    graded, asked = gated(1.0)
    assert (graded.total, asked) == (1.0, ["text"])
    assert list(graded.verdicts) == ["thinking", "answer"]


@pytest.mark.parametrize("score", [0.0, 0.99])
def test_behind_a_closed_gate_a_term_earns_nothing_and_costs_nothing(score):
    graded, asked = gated(score)
    assert graded.total == pytest.approx(0.6 * score)
    assert asked == []
    assert graded.verdicts["thinking"].reason == f"gated: 'answer' scored {score:g}, not 1"


def test_behind_an_unscored_gate_a_term_is_unscored():
    graded, asked = gated(Verdict.unscored("ours was late", Status.TIMEOUT))
    assert (graded.total, asked) == (None, [])
    verdict = graded.verdicts["thinking"]
    assert (verdict.score, verdict.status) == (None, Status.TIMEOUT)
    assert verdict.reason == "its gate 'answer' is unscored: ours was late"


def test_gates_stand_behind_one_another_and_only_open_rows_are_asked():
    asked = []

    def batch(completions, examples):
        asked.append(list(completions))
        return [1.0] * len(completions)

    terms = [
        Term("c", batch, 0.5, gate="b"),
        Term("b", lambda c, e: c != "no b", 0.5, gate="a"),
        Term("a", lambda c, e: c != "no a", 0.0),
    ]
    graded = Mixture(terms).grade_batch(["yes", "no a", "no b", "oui"], [THINK] * 4)
    assert [one.total for one in graded] == [1.0, 0.0, 0.0, 1.0]
    assert asked == [["yes", "oui"]]


def test_by_policy_an_error_is_counted_and_its_reason_kept():
    def fails(completion, example):
        if completion == "bad":
            raise KeyError("scene")
        return 1.0

    mixture = Mixture([Term("mine", fails, 1.0, on_error="unscorable")])
    graded = mixture.grade_batch(["good", "bad", "bad"], [THINK] * 3)
    assert [one.total for one in graded] == [1.0, None, None]
    assert graded[1].verdicts["mine"].reason == "KeyError: 'scene'"
    assert mixture.errors == {"mine": 2}


def test_completions_and_examples_come_in_pairs():
    with pytest.raises(ValueError, match="2 completions and 1 examples"):
        Mixture([term("a", 1.0, 1.0)]).grade_batch(["", ""], [THINK])


def test_an_empty_batch_is_graded_to_nothing():
    assert Mixture([term("a", 1.0, 1.0)]).grade_batch([], []) == []
