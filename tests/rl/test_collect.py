"""Dynamic sampling, by hand: which groups are kept, replaced, counted, and what an unscorable row does."""

import pytest

from core.strict import parse
from rewards.mix import Mixture, Term
from rewards.verdict import Verdict
from rl.collect import Collector
from rl.config import RLConfig
from rl.data import PromptStream
from rl.rollout.client import Answer, Completion

from .conftest import record


def config(max_rounds=2, group_size=2, prompts=2) -> RLConfig:
    stage = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {"prompts_per_batch": prompts, "group_size": group_size, "max_completion_tokens": 8},
        "dynamic_sampling": {"max_rounds": max_rounds},
        "batches": 1,
        "mini_batch": prompts * group_size,
        "optim": {"learning_rate": 1e-4},
        "parity": {"bound": 1e-3},
    }
    return parse(RLConfig, stage, "test")


class Script:
    """A pool that answers the prompts it is asked, in order, with scripted scores ("1" right, "0" wrong, "?")."""

    def __init__(self, *groups: str):
        self.groups, self.seeds = list(groups), []

    def generate(self, prompts, sampling):
        answers = []
        for prompt in prompts:
            self.seeds.append(prompt.seed)
            texts = self.groups.pop(0)
            answers.append(Answer([1], [Completion([2, 3], [-0.1, -0.1], text, True) for text in texts]))
        return answers


def grade(completion, example):
    if completion == "?":
        return Verdict.unscored("the judge is down")
    return Verdict.correct(completion) if completion == "1" else Verdict.wrong(completion)


def collector(pool, *, overlong=None, **cfg):
    mixture = Mixture([Term("answer", grade, 1.0, frozenset({"think", "direct"}))])
    stream = PromptStream([record(n, image=False) for n in range(20)], seed=0)
    return Collector(config(**cfg), pool, stream, mixture, grade, overlong, seed=3)


def test_groups_without_spread_are_replaced_by_new_prompts():
    # round 1: one of two groups has spread; round 2 asks for one more prompt and gets it
    work = collector(Script("10", "11", "01"))
    batch, sampled = work.collect()
    assert [[s.completion.text for s in group.samples] for group in batch] == [["1", "0"], ["0", "1"]]
    assert len(sampled) == 3
    assert len({group.row["id"] for group in sampled}) == 3
    counts = {key: work.metrics[f"rollout/groups_{key}"] for key in ("sampled", "spread", "solved", "failed")}
    assert counts == {"sampled": 3, "spread": 2, "solved": 1, "failed": 0}
    assert work.metrics["rollout/rounds"] == 2


def test_when_the_rounds_are_over_the_batch_is_filled_and_the_filling_counted():
    work = collector(Script("11", "00", "11", "00", "11", "00"), max_rounds=2)
    batch, sampled = work.collect()
    assert len(batch) == 2
    assert len(sampled) == 6
    assert work.metrics["rollout/groups_without_spread_kept"] == 2


def test_no_rounds_turn_dynamic_sampling_off():
    work = collector(Script("11", "10"), max_rounds=0)
    batch, sampled = work.collect()
    assert len(batch) == len(sampled) == 2
    assert work.metrics["rollout/groups_without_spread_kept"] == 1


def test_an_unscorable_completion_has_no_reward_and_leaves_its_group_spread():
    work = collector(Script("?10", "???", "100"), group_size=3)
    batch, sampled = work.collect()
    assert [sample.reward for sample in batch[0].samples] == [None, 1.0, 0.0]
    assert sampled[1].kind == "unscorable"
    assert work.metrics["rollout/unscorable"] == 4


def test_the_overlong_punishment_makes_spread_and_is_kept_apart():
    lengths = iter([0.0, -0.5, 0.0, 0.0, 0.0, -1.0])
    work = collector(Script("11", "11", "11"), overlong=lambda tokens: next(lengths))
    batch, _ = work.collect()
    assert [sample.reward for sample in batch[0].samples] == [1.0, 0.5]
    assert [sample.graded.total for sample in batch[0].samples] == [1.0, 1.0]
    assert [sample.reward for sample in batch[1].samples] == [1.0, 0.0]


def test_every_completion_has_a_seed_of_its_own():
    pool = Script("10", "10", "10", "10")
    work = collector(pool)
    work.collect()
    work.collect()
    # completion i of a request takes seed + i: the prompts lie group_size apart
    assert [seed - pool.seeds[0] for seed in pool.seeds] == [0, 2, 4, 6]


def test_the_stream_repeats_no_prompt_before_all_were_drawn():
    stream = PromptStream([{"id": n} for n in range(5)], seed=0)
    first, second = [r["id"] for r in stream.take(5)], [r["id"] for r in stream.take(5)]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    again = PromptStream([{"id": n} for n in range(5)], seed=0)
    assert [r["id"] for r in again.take(5)] == first


def test_no_prompt_at_all_is_an_error():
    with pytest.raises(ValueError, match="no row to draw prompts from"):
        PromptStream([], seed=0)
