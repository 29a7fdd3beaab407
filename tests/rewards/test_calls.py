"""A reward gives the same verdicts in every form and from any thread."""

import asyncio
import functools
import os
import threading

import pytest

from rewards.calls import Caller, RewardError, form_of
from rewards.example import Example
from rewards.mix import Mixture, Term
from rewards.verdict import Status, Verdict

ROWS = [Example(f"row-{n}", f"{n} + {n}?", str(2 * n), "direct") for n in range(40)]
COMPLETIONS = [str(2 * n) if n % 3 else "" if n else "?" for n in range(40)]


def judge(completion, example):
    if completion == "?":
        return None
    if not completion:
        return Verdict.wrong(reason=f"empty on {example.id}", status=Status.NO_ANSWER)
    return completion == example.answer


def plain(completion, example):
    return judge(completion, example)


async def plain_async(completion, example):
    await asyncio.sleep(0.001 * (len(example.id) % 3))
    return judge(completion, example)


def whole(completions, examples):
    return [judge(c, e) for c, e in zip(completions, examples, strict=True)]


async def whole_async(completions, examples):
    await asyncio.sleep(0)
    return tuple(judge(c, e) for c, e in zip(completions, examples, strict=True))


class Called:
    def __call__(self, completion, example):
        return judge(completion, example)


class CalledAsync:
    async def __call__(self, completion, example):
        return judge(completion, example)


class Batch:
    def batch(self, completions, examples):
        return whole(completions, examples)


class BatchAsync:
    async def batch(self, completions, examples):
        return await whole_async(completions, examples)


class BatchToo:
    """Has both forms; the batched form is used."""

    def __call__(self, completion, example):
        raise AssertionError("asked one by one")

    def batch(self, completions, examples):
        return whole(completions, examples)


def with_parameter(completion, example, *, strict):
    return judge(completion, example)


FORMS = {
    "function": plain,
    "async function": plain_async,
    "batched function": whole,
    "batched async function": whole_async,
    "object": Called(),
    "async object": CalledAsync(),
    "batch method": Batch(),
    "async batch method": BatchAsync(),
    "both": BatchToo(),
    "partial": functools.partial(with_parameter, strict=True),
    "function that hands on a coroutine": lambda completion, example: plain_async(completion, example),
    "batched function that hands on a coroutine": lambda completions, examples: whole_async(
        completions, examples
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_verdicts(form):
    mixture = Mixture([Term("mine", FORMS[form], 1.0)])
    expected = Mixture([Term("mine", plain, 1.0)]).grade_batch(COMPLETIONS, ROWS)
    assert expected[3].verdicts["mine"].reason == "empty on row-3"
    assert expected[0].total is None
    assert mixture.grade_batch(COMPLETIONS, ROWS) == expected
    assert [mixture.grade(c, e) for c, e in zip(COMPLETIONS[:5], ROWS, strict=False)] == expected[:5]


def test_plain_rewards_run_side_by_side_and_async_ones_all_at_once():
    meeting = threading.Barrier(4, timeout=30)  # passes only with four concurrent calls

    def together(completion, example):
        meeting.wait()
        return 1.0

    count = 0

    async def last_opens(completion, example):
        nonlocal count
        count += 1
        while count < len(ROWS):
            await asyncio.sleep(0)
        return 1.0

    mixture = Mixture([Term("a", together, 0.5), Term("b", last_opens, 0.5)], threads=4)
    assert {one.total for one in mixture.grade_batch(COMPLETIONS, ROWS)} == {1.0}


def test_rewards_can_be_called_in_a_thread_that_runs_an_event_loop():
    mixture = Mixture([Term("a", plain_async, 0.5), Term("b", plain, 0.5)])
    expected = mixture.grade_batch(COMPLETIONS, ROWS)

    async def within():
        return mixture.grade_batch(COMPLETIONS, ROWS)

    assert asyncio.run(within()) == expected


def test_async_rewards_meet_the_same_loop_every_time():
    loops = []

    async def reward(completion, example):
        loops.append(asyncio.get_running_loop())
        return 1.0

    for _ in range(3):
        Mixture([Term("a", reward, 1.0)]).grade("", ROWS[0])
    assert len(set(loops)) == 1  # an HTTP client is bound to the first loop that it uses


def test_many_threads_grade_with_one_mixture():
    mixture = Mixture([Term("a", plain_async, 0.5), Term("b", whole, 0.5)])
    expected = mixture.grade_batch(COMPLETIONS, ROWS)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(mixture.grade_batch(COMPLETIONS, ROWS)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8


def test_an_async_reward_that_would_wait_for_itself_is_refused():
    inner = Mixture([Term("inner", plain_async, 1.0)])

    async def outer(completion, example):
        return inner.grade(completion, example).total

    with pytest.raises(RewardError, match="on the same event loop, which never ends"):
        Mixture([Term("outer", outer, 1.0)]).grade("0", ROWS[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_grades_with_threads_of_its_own():
    mixture = Mixture([Term("a", plain_async, 0.5), Term("b", plain, 0.5)])
    expected = mixture.grade_batch(COMPLETIONS, ROWS)
    child = os.fork()
    if not child:
        os._exit(0 if mixture.grade_batch(COMPLETIONS, ROWS) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "reward", [lambda completions, examples: [1.0] * 3, whole_async], ids=["plain", "async"]
)
def test_a_batch_of_the_wrong_length_names_the_reward(reward):
    async def one_short(completions, examples):
        return (await whole_async(completions, examples))[:-1]

    wrong = one_short if reward is whole_async else reward
    with pytest.raises(
        RewardError, match=r"reward 'mine' returned \d+ verdicts for a batch of 40 completions"
    ):
        Mixture([Term("mine", wrong, 1.0)]).grade_batch(COMPLETIONS, ROWS)


@pytest.mark.parametrize("value", ["good", {"score": 1.0}, None, 1.0])
def test_a_result_that_is_not_a_batch_names_the_reward(value):
    def reward(completions, examples):
        return value

    with pytest.raises(RewardError, match=f"reward 'mine' returned {type(value).__name__} for a batch"):
        Mixture([Term("mine", reward, 1.0)]).grade_batch(COMPLETIONS, ROWS)


def test_a_bad_verdict_in_a_batch_names_its_row():
    def reward(completions, examples):
        return [1.5 if example.id == "row-7" else 1.0 for example in examples]

    results = Caller().start(reward, "mine", COMPLETIONS, ROWS).results()
    assert [row for row, result in enumerate(results) if not isinstance(result, Verdict)] == [7]
    assert "row 'row-7'" in str(results[7])


def test_arrays_are_batches():
    import numpy as np

    results = (
        Caller().start(lambda completions, examples: np.full(40, 0.5), "mine", COMPLETIONS, ROWS).results()
    )
    assert {result.score for result in results} == {0.5}


@pytest.mark.parametrize("error", [KeyError("scene"), SystemExit(3), RecursionError("deep")])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_whatever_a_reward_raises_is_named_and_ends_nothing_else(error, is_async, batched):
    def fails(first, second):
        raise error

    async def fails_async(first, second):
        raise error

    call = fails_async if is_async else fails
    reward = call
    if batched:
        reward = type("Failing", (), {"batch": staticmethod(call)})()
    mixture = Mixture([Term("mine", reward, 1.0)])
    with pytest.raises(
        RewardError, match=rf"reward 'mine' failed on .*row 'row-0': {type(error).__name__}"
    ) as caught:
        mixture.grade_batch(COMPLETIONS, ROWS)
    assert caught.value.__cause__ is error
    assert Mixture([Term("after", plain_async, 1.0)]).grade("2", ROWS[1]).total == 1.0  # the loop still runs


def test_a_batch_that_fails_under_the_lenient_policy_is_unscored_row_by_row():
    def fails(completions, examples):
        raise OSError("the server is down")

    mixture = Mixture([Term("mine", fails, 1.0, on_error="unscorable")])
    graded = mixture.grade_batch(COMPLETIONS, ROWS)
    assert {one.verdicts["mine"].reason for one in graded} == {"OSError: the server is down"}
    assert mixture.errors["mine"] == 40


def test_forms_are_told_apart_by_names():
    assert form_of(whole).batched
    assert not form_of(lambda completion, examples: 1.0).batched
    assert form_of(CalledAsync()).is_async
    assert not form_of(str.startswith).batched  # a callable without a signature is not batched
