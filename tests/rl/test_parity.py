"""The parity guard stops a run whose two sides disagree."""

import pytest

from rl.config import Parity
from rl.rollout.messages import Answer, Completion, Prompt
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


def test_probes_without_a_token_stop_the_run():
    with pytest.raises(ParityError, match="none of 2 probes has a token"):
        GUARD.check(answers([], []), lambda *_: [], servers=1)


class Returned:
    """A client of which the server that came back gives `logprobs` to tokens 0, 1, 2 of each probe."""

    def __init__(self, *logprobs):
        self.answers = answers(*logprobs)

    def ask(self, url, prompts, sampling):
        assert (len(prompts), sampling.max_tokens) == (2, 3)
        return self.answers


def test_a_server_that_comes_back_must_answer_as_the_checked_ones_did():
    checked = answers([-1.0, -2.0], [-1.0, -2.0], [-3.0], [-3.0])  # two servers, two probes
    GUARD.gate(Returned([-1.0, -2.0], [-3.0]), checked, servers=2)("url")
    with pytest.raises(ParityError, match=r"on 3 tokens .* differs by 0.5"):
        GUARD.gate(Returned([-1.0, -2.0], [-3.5]), checked, servers=2)("url")


def test_a_server_that_comes_back_is_compared_up_to_where_it_draws_another_token():
    checked, returned = answers([-1.0, -2.0], [-3.0]), Returned([-1.0, -9.0], [-3.0])
    returned.answers[0].completions[0].token_ids[1] = 7
    GUARD.gate(returned, checked, servers=1)("url")
    for answer in returned.answers:
        answer.completions[0].token_ids[0] = 7
    with pytest.raises(ParityError, match="on 0 tokens"):
        GUARD.gate(returned, checked, servers=1)("url")


def test_a_server_that_missed_the_update_is_named():
    given = answers([-1.0], [-1.0], [-1.0], [-4.0])  # probe 1 on server 1 is stale
    with pytest.raises(ParityError, match="probe 1, server 1"):
        GUARD.check(given, lambda *_: [-1.0], servers=2)
