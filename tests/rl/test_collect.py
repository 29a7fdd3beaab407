"""Dynamic sampling, by hand: which groups are kept, replaced, counted, and what an unscorable row does."""

import pytest

from core.strict import parse
from rewards.mix import Mixture, Term
from rewards.verdict import Verdict
from rl.collect import Collector, Pipeline
from rl.config import RLConfig
from rl.data import PromptStream
from rl.rollout.messages import Answer, Completion

from .conftest import record


def config(max_rounds=2, group_size=2, prompts=2, max_staleness=1, overlap=False, **sampling) -> RLConfig:
    """Plain DAPO's dynamic sampling unless told otherwise."""
    sampling = {"oversample": 1.0, "carry": False, "rest_epochs": 0} | sampling
    stage = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {
            "prompts_per_batch": prompts,
            "group_size": group_size,
            "max_completion_tokens": 8,
            "max_staleness": max_staleness,
            "overlap": overlap,
        },
        "dynamic_sampling": {"max_rounds": max_rounds, **sampling},
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
    rows = [record(n, image=False) for n in range(20)]
    return Collector(config(**cfg), pool, rows, mixture, grade, overlong, seed=3)


def test_groups_without_spread_are_replaced_by_new_prompts():
    # round 1: one of two groups has spread; round 2 asks for one more prompt and gets it
    work = collector(Script("10", "11", "01"))
    batch = work.collect()
    sampled, groups = batch.sampled, batch.groups
    assert [[s.completion.text for s in group.samples] for group in groups] == [["1", "0"], ["0", "1"]]
    assert len(sampled) == 3
    assert len({group.row["id"] for group in sampled}) == 3
    counts = {
        key: batch.metrics[f"rollout/groups_{key}"] for key in ("sampled", "spread", "solved", "failed")
    }
    assert counts == {"sampled": 3, "spread": 2, "solved": 1, "failed": 0}
    assert batch.metrics["rollout/rounds"] == 2


def test_when_the_rounds_are_over_the_batch_is_filled_and_the_filling_counted():
    work = collector(Script("11", "00", "11", "00", "11", "00"), max_rounds=2)
    batch = work.collect()
    sampled, groups = batch.sampled, batch.groups
    assert len(groups) == 2
    assert len(sampled) == 6
    assert batch.metrics["rollout/groups_without_spread_kept"] == 2


def test_no_rounds_turn_dynamic_sampling_off():
    work = collector(Script("11", "10"), max_rounds=0)
    batch = work.collect()
    sampled, groups = batch.sampled, batch.groups
    assert len(groups) == len(sampled) == 2
    assert batch.metrics["rollout/groups_without_spread_kept"] == 1


def test_an_unscorable_completion_has_no_reward_and_leaves_its_group_spread():
    work = collector(Script("?10", "???", "100"), group_size=3)
    batch = work.collect()
    sampled, groups = batch.sampled, batch.groups
    assert [sample.reward for sample in groups[0].samples] == [None, 1.0, 0.0]
    assert sampled[1].kind == "unscorable"
    assert batch.metrics["rollout/unscorable"] == 4


def test_the_overlong_punishment_makes_spread_and_is_kept_apart():
    lengths = iter([0.0, -0.5, 0.0, 0.0, 0.0, -1.0])
    work = collector(Script("11", "11", "11"), overlong=lambda tokens: next(lengths))
    groups = work.collect().groups
    assert [sample.reward for sample in groups[0].samples] == [1.0, 0.5]
    assert [sample.graded.total for sample in groups[0].samples] == [1.0, 1.0]
    assert [sample.reward for sample in groups[1].samples] == [1.0, 0.0]


def test_a_round_asks_for_as_many_prompts_as_should_fill_the_batch():
    # nothing is known of the prompts: half of them are expected to have spread, and 1.5 x 2 is the most
    work = collector(Script("10", "11", "01", "11", "10"), oversample=1.5)
    first = work.collect()
    assert (len(first.sampled), first.metrics["rollout/rounds"]) == (3, 1)
    # two of three had spread: two prompts are expected to give 1.25 groups, so a third is asked again
    assert len(work._draw(2)) == 3


def test_surplus_groups_wait_for_the_next_batch_and_are_trained_on_once():
    pool = Script("10", "01", "10", "01", "10")  # three, then two for the one that is missing
    work = collector(pool, oversample=1.5, carry=True)
    first, second = work.collect(), work.collect()
    ids = [group.row["id"] for batch in (first, second) for group in batch.groups]
    assert len(set(ids)) == 4
    assert second.metrics["rollout/groups_carried"] == 1
    assert pool.groups == []


def test_carried_groups_that_are_too_old_are_dropped_and_counted():
    work = collector(Script(*["10", "01"] * 3), oversample=1.5, carry=True, max_staleness=0)
    work.collect()
    work.version += 1
    second = work.collect()
    assert second.metrics["rollout/groups_too_old"] == 1
    assert {group.version for group in second.groups} == {1}


def test_settled_prompts_are_passed_over_for_an_epoch():
    work = collector(Script(), rest_epochs=1, retry_share=0.0)
    settled = [row["id"] for row in work.stream.take(20)][:5]
    for prompt in settled:
        work.ledger.record(prompt, correct=2, of=2, epoch=1, spread=False)
    second = [row["id"] for row in work.stream.take(15)]
    assert not set(settled) & set(second)
    third = [row["id"] for row in work.stream.take(20)]
    assert set(settled) <= set(third)


def test_when_every_prompt_is_settled_they_are_drawn_all_the_same():
    stream = PromptStream([{"id": str(n)} for n in range(5)], seed=0, passes_over=lambda id_, epoch: True)
    assert len(stream.take(3)) == 3
    assert stream.passed_over == 15


def test_a_share_of_the_settled_prompts_is_retried():
    rows = [{"id": str(n)} for n in range(400)]
    stream = PromptStream(rows, seed=0, passes_over=lambda id_, epoch: True, retry_share=0.25)
    stream.take(50)
    assert 90 < stream.passed_over < 250  # 150 expected


def test_with_overlap_a_batch_is_sampled_before_the_weights_change_and_its_staleness_is_told():
    work = collector(Script("10", "01", "10", "01"), overlap=True)
    rollouts = Pipeline(work, batches=2, overlap=True)
    first = rollouts.take()
    rollouts.sample_ahead()
    rollouts.settle()
    work.version += 1
    second = rollouts.take()
    rollouts.sample_ahead()  # the last batch has been taken: nothing more is sampled
    assert [batch.metrics["rollout/staleness"] for batch in (first, second)] == [0, 1]
    assert [group.staleness for group in second.groups] == [1, 1]
    assert rollouts._next is None


def test_overlap_without_staleness_is_refused():
    with pytest.raises(ValueError, match=r"overlap samples with weights one batch old.*max_staleness=0"):
        config(overlap=True, max_staleness=0)


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


def test_an_empty_set_of_prompts_is_an_error():
    with pytest.raises(ValueError, match="no rows to draw prompts from"):
        PromptStream([], seed=0)
