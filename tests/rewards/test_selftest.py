"""The self-test finds rewards that score corrupted completions, and accepts honest rewards."""

import pytest

from rewards.answer import AnswerReward
from rewards.example import Example
from rewards.mix import Mixture, Term
from rewards.selftest import cases, self_test
from rewards.style.format import DirectFormat, Format, ThinkFormat
from rewards.style.language import Language
from rewards.style.repetition import Repetition
from rewards.verdict import Verdict

ROWS = [
    Example("number", "2 + 2?", "4", "think", "number"),
    Example("math", "Factor it.", r"\frac{1}{2}", "think", "math", chain="half of one"),
    Example("choice", "Which?", "B", "think", "choice", meta={"choices": ["red", "blue"]}),
    Example("letter", "Which?", "C", "direct", "choice"),
    Example("exact", r"Put it in \boxed{}.", "Paris", "think", "exact", meta={"answers": ["Lutetia"]}),
    Example("chinese", "图中有几个苹果？", "三个", "direct", "exact"),
    Example("percent", "How much?", "50%", "direct", "math"),
    Example("broken chain", "2 + 2?", "4", "think", "number", chain=r"so \boxed{4}"),
    Example("judged", "Describe it.", "a cat", "direct", "judge"),
]
THINK = [row for row in ROWS if row.mode == "think"]


@pytest.mark.parametrize(
    "reward",
    [
        AnswerReward(),
        AnswerReward(tolerance=0.5),
        Format(),
        ThinkFormat(),
        DirectFormat(),
        Language(),
        Repetition(),
    ],
)
def test_our_own_rewards_pass(reward):
    assert self_test(reward, ROWS) == []


@pytest.mark.parametrize("reward", [AnswerReward(thought_open=True), ThinkFormat(thought_open=True)])
def test_a_template_that_opens_the_thought_is_followed(reward):
    assert self_test(reward, ROWS) == []


def failed(reward, rows=ROWS):
    return {(failure.id, failure.case) for failure in self_test(reward, rows)}


def test_a_reward_that_always_pays_fails_on_all_but_the_gold():
    found = failed(lambda completion, example: 1.0, ROWS[:1])
    assert found == {("number", case) for case, _ in cases(ROWS[0]) if case != "gold"}


def test_a_reward_that_never_pays_fails_on_the_gold():
    found = failed(lambda completion, example: 0.0)
    assert found == {(row.id, "gold") for row in ROWS if row.verifier != "judge"}


def test_a_reward_that_looks_for_the_gold_anywhere_is_caught():
    found = failed(lambda completion, example: example.answer in completion, THINK[:1])
    cases_found = {case for _, case in found}
    assert cases_found == {"no box", "two boxes", "box inside the thought", "unclosed thought"}


def test_a_gold_answer_that_earns_nothing_is_found_with_its_row():
    rows = [*ROWS, Example("typo", "Which?", "E", "think", "choice", meta={"choices": ["red", "blue"]})]
    failures = self_test(AnswerReward(), rows)
    assert {failure.row for failure in failures} == {len(ROWS)}
    assert "row 9 ('typo'): reward: gold: expected 1, got no score (unscorable: gold answer 'E'" in str(
        failures[0]
    )


def test_a_reward_that_raises_fails_where_it_does():
    def reward(completion, example):
        if not completion:
            raise IndexError("nothing there")
        return AnswerReward()(completion, example)

    failures = self_test(reward, ROWS[:2])
    assert [(failure.id, failure.case, failure.found) for failure in failures] == [
        ("number", "empty", "IndexError: nothing there"),
        ("math", "empty", "IndexError: nothing there"),
    ]


def test_a_sample_is_drawn_by_its_seed():
    def rows_of(seed):
        return {failure.row for failure in self_test(lambda c, e: 0.0, ROWS[:6], rows=2, seed=seed)}

    assert len(rows_of(0)) == 2
    assert rows_of(0) == rows_of(0)
    assert len({frozenset(rows_of(seed)) for seed in range(8)}) > 1


class Terse:
    """A reward that does not check the answer and has no attribute `self_test`."""

    def __call__(self, completion, example):
        return float(len(completion) < 5)


class Judge:
    self_test = "skip"

    def __call__(self, completion, example):
        raise AssertionError("a judge was asked")


def test_a_mixture_asks_no_judge_and_holds_no_taste_to_the_gold():
    terms = [
        Term("answer", AnswerReward(), 0.5),
        Term("format", Format(), 0.2),
        Term("terse", Terse(), 0.2),
        Term("judge", Judge(), 0.1, gate="answer"),
    ]
    assert self_test(Mixture(terms), ROWS) == []


def test_a_mixture_that_pays_more_for_nothing_than_for_the_gold_is_found():
    terms = [Term("answer", AnswerReward(), 0.3), Term("terse", Terse(), 0.7)]
    found = failed(Mixture(terms), THINK[:1])
    assert found == {("number", "empty")}  # 0.7 for an empty completion, 0.3 for the right one


def test_a_format_term_of_the_other_mode_is_found_in_a_mixture():
    terms = [Term("answer", AnswerReward(), 0.8), Term("format", ThinkFormat(), 0.2)]
    assert failed(Mixture(terms)) == {(row.id, "gold") for row in ROWS if row.mode == "direct"}


def test_a_term_that_does_not_know_of_the_opened_thought_is_found():
    terms = [Term("answer", AnswerReward(thought_open=True), 0.8), Term("format", ThinkFormat(), 0.2)]
    assert self_test(Mixture(terms), THINK) != []


def test_a_term_of_level_runs_may_not_fail():
    def tasteless(completion, example):
        return len(completion)

    terms = [Term("answer", AnswerReward(), 0.5), Term("mine", tasteless, 0.5)]
    failures = self_test(Mixture(terms), THINK[:1])
    assert {failure.reward for failure in failures} == {"mine"}
    assert "a score must be in [0, 1]" in failures[0].found


def test_a_test_without_rows_is_refused():
    with pytest.raises(ValueError, match="no row of mode 'think'"):
        self_test(ThinkFormat(), [row for row in ROWS if row.mode == "direct"])
    with pytest.raises(ValueError, match="no row to test"):
        self_test(AnswerReward(), [])


def test_an_unknown_level_is_refused():
    reward = Judge()
    reward.self_test = "answers"
    with pytest.raises(ValueError, match=r"Judge\.self_test = 'answers'"):
        self_test(reward, ROWS)


def test_a_single_judge_is_asked_when_it_is_named():
    asked = []

    class Kind(Judge):
        def __call__(self, completion, example):
            asked.append(completion)
            return Verdict.correct() if completion else Verdict.wrong()

    assert self_test(Kind(), ROWS[:1]) == []
    assert asked


def test_a_wrong_number_is_wrong_under_any_tolerance():
    for gold in ("0", "-3", "1,234.5", "1e9", r"\frac{3}{7}"):
        row = Example("r", "q", gold, "direct", "number")
        assert self_test(AnswerReward(tolerance=500), [row]) == [], gold
