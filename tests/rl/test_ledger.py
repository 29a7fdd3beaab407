"""The ledger's predictions of spread against a simulation."""

import doctest
import random

import pytest

from rl import ledger as module
from rl.ledger import LEAST, UNKNOWN, Ledger


def filled(*visits: tuple[int, bool], group_size: int = 8) -> Ledger:
    ledger = Ledger(group_size)
    for number, (correct, spread) in enumerate(visits):
        ledger.record(str(number), correct=correct, of=group_size, epoch=1, spread=spread)
    return ledger


def test_the_docstrings_examples_hold():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("correct", [float("nan"), -1, 9, float("inf")])
def test_an_impossible_count_is_refused(correct):
    with pytest.raises(ValueError, match="correct of 8"):
        Ledger(8).record("p", correct=correct, of=8, epoch=1, spread=False)


def test_the_chance_of_spread_is_that_of_drawing_from_the_posterior():
    ledger = filled((8, False), (4, True), (0, False), (1, True))
    rng = random.Random(0)
    mean = 13 / 32
    for prompt, correct in (("0", 8), ("1", 4), ("2", 0), ("3", 1)):
        draws = 20_000
        spread = 0
        for _ in range(draws):
            rate = rng.betavariate(correct + 2 * mean, 8 - correct + 2 * (1 - mean))
            right = sum(rng.random() < rate for _ in range(8))
            spread += 0 < right < 8
        assert ledger.chance(prompt) == pytest.approx(spread / draws, abs=0.015)


def test_an_unseen_prompt_is_expected_to_be_like_the_others():
    assert Ledger(8).chance("new") == UNKNOWN
    assert filled((4, True), (4, True), (0, False)).chance("new") == pytest.approx(2.5 / 4)
    assert filled(*[(0, False)] * 50).chance("new") == LEAST


def test_enough_prompts_are_taken_to_expect_what_is_wanted():
    ledger = filled((4, True), (8, False), (4, True))
    chances = [ledger.chance(prompt) for prompt in "012"]
    assert ledger.take(["0", "1", "2"], chances[0]) == 1
    assert ledger.take(["0", "1", "2"], chances[0] + chances[1]) == 2
    assert ledger.take(["0", "1", "2"], 10) == 3


def test_a_rest_doubles_with_every_useless_group_up_to_eight_times():
    ledger = Ledger(4)

    def rest(correct: int, epoch: int, spread: bool = False) -> int:
        ledger.record("prompt", correct=correct, of=4, epoch=epoch, spread=spread)
        rested = 0
        while ledger.settled("prompt", epoch=epoch + rested + 1, rest_epochs=3):
            rested += 1
        return rested

    assert [rest(4, epoch) for epoch in (1, 5, 12, 25, 50)] == [3, 6, 12, 24, 24]
    assert rest(0, 60) == 3  # failed, not solved: something changed
    assert rest(0, 70) == 6
    assert rest(2, 80, spread=True) == 0
    assert rest(4, 90) == 3


def test_unscored_groups_settle_nothing():
    ledger = Ledger(4)
    ledger.record("down", correct=0, of=0, epoch=1, spread=False)
    assert not ledger.settled("down", epoch=1, rest_epochs=5)
    ledger.record("flat", correct=2, of=4, epoch=1, spread=False)
    assert not ledger.settled("flat", epoch=1, rest_epochs=5)
