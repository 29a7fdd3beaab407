"""The parity guard stops a run whose two sides disagree."""

import pytest

from rl.config import Parity
from rl.rollout.client import Answer, Completion, Prompt
from rl.rollout.parity import ParityError, ParityGuard

GUARD = ParityGuard(Parity(sequences=2, tokens=3, bound=1e-3), [Prompt([]), Prompt([])], temperature=0.7)


def answers(*logprobs):
    return [Answer([1, 2], [Completion(list(range(len(row))), list(row), "", True)]) for row in logprobs]


def test_the_largest_difference_comes_back():
    learner = {0: [-1.0, -2.0], 1: [-3.0005, -1.0]}
    worst = GUARD.check(answers([-1.0, -2.0001], [-3.0, -1.0]), lambda index, _: learner[index], servers=1)
    assert worst == pytest.approx(5e-4)


def test_a_difference_above_the_bound_stops_the_run_and_names_causes():
    with pytest.raises(ParityError, match=r"differs by 0.5, above parity.bound=0.001") as caught:
        GUARD.check(answers([-1.5]), lambda *_: [-1.0], servers=1)
    assert "tied lm_head" in str(caught.value)
    assert "probe 0, server 0, token 0" in str(caught.value)


def test_nan_on_either_side_stops_the_run():
    with pytest.raises(ParityError, match="inf"):
        GUARD.check(answers([float("nan")], [-1.0]), lambda *_: [-1.0], servers=1)


def test_every_server_answers_every_probe():
    class Pool:
        urls = ("a", "b", "c")

        def generate(self, prompts, sampling):
            self.asked = len(prompts)

    pool = Pool()
    GUARD.sample(pool)
    assert pool.asked == 2 * 3


def test_a_server_that_missed_the_update_is_named():
    given = answers([-1.0], [-1.0], [-1.0], [-4.0])  # probe 1 on server 1 is stale
    with pytest.raises(ParityError, match="probe 1, server 1"):
        GUARD.check(given, lambda *_: [-1.0], servers=2)
