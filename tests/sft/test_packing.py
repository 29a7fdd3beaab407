"""The plan of a packed run: which rows go together. Counts only, no model."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import dealt_imbalance, full_scale_sizes
from sft.balance import PackingError, balance, imbalance
from sft.packing import ByRows, ByTokens, Overlong, Plan, stream

SIZES = full_scale_sizes(512, seed=3)


def by_rows(rows=64, **changes):
    return Plan(SIZES, ByRows(rows), **{"budget": 16384, "ranks": 2, "seed": 0, "epochs": 2, **changes})


def by_tokens(**changes):
    fields = {"budget": 16384, "ranks": 2, "seed": 0, "epochs": 2, **changes}
    return Plan(SIZES, ByTokens(4 * 16384, buffer=64, max_wait=3), **fields)


def rows_of(packs):
    return [row for pack in packs for row in pack]


@pytest.mark.parametrize("make", [by_rows, by_tokens])
def test_each_row_comes_once_per_epoch_and_no_pack_exceeds_its_budget(make):
    plan = make(epochs=1)
    assert sorted(rows_of(plan)) == list(range(len(SIZES)))
    assert max(SIZES[pack].sum() for pack in plan if pack) <= plan.budget
    assert len(plan) == plan.updates * plan.steps * plan.ranks
    assert sorted(rows_of(make())) == sorted([*range(len(SIZES))] * 2)  # two epochs


def test_updates_by_rows_hold_the_rows_of_the_padded_path():
    from accelerate.data_loader import SeedableRandomSampler

    plan, sampler = by_rows(rows=100), SeedableRandomSampler(range(len(SIZES)), data_seed=0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for place in range(6):  # 512 rows: five updates of 100 and one of 12
            update = epoch * 6 + place
            packs = plan[update * plan.packs : (update + 1) * plan.packs]
            assert sorted(rows_of(packs)) == sorted(order[place * 100 : (place + 1) * 100])


@pytest.mark.parametrize("make", [by_rows, by_tokens])
def test_the_seed_decides_the_order(make):
    assert list(make()) == list(make()) != list(make(seed=1))


@pytest.mark.parametrize("make", [by_rows, by_tokens])
def test_a_run_resumed_at_any_pack_continues_as_an_unbroken_one(make):
    whole = list(make())
    for first in (len(whole) - 3, 1, len(whole) // 2):  # the last epoch, back, and forth
        plan = make()
        assert plan[first] == whole[first]
        assert plan[:first] == whole[:first]
        assert plan[first:] == whole[first:]


def test_a_run_may_end_within_an_epoch_by_updates_or_by_epochs():
    assert by_rows(epochs=None, max_updates=5)[:] == by_rows()[: 5 * by_rows().packs]
    assert by_rows(epochs=0.5).updates == 4  # half of 512 / 64
    first, both = by_tokens(epochs=1).updates, by_tokens(epochs=2).updates
    assert by_tokens(epochs=1.5).updates == first + math.ceil((both - first) / 2)


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120),
    packs=st.integers(1, 4),
    buffer=st.integers(1, 40),
    max_wait=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_stream_keeps_to_its_buffer_and_starves_nobody(lengths, packs, buffer, max_wait):
    tokens = np.array(lengths)
    taken, served = [0], {}
    updates = stream(range(len(lengths)), tokens, packs=packs, budget=100, buffer=buffer, max_wait=max_wait)
    for update, bins in enumerate(updates):
        assert len(bins) == packs
        assert all(tokens[pack].sum() <= 100 for pack in bins if pack)
        served |= dict.fromkeys(rows_of(bins), update)
        taken.append(len(served))
    assert taken[-1] == len(lengths)
    for row, update in served.items():
        # A row is in the buffer from the update on before which all but `buffer` of those up to it were taken.
        arrival = next(number for number, count in enumerate(taken) if row < count + buffer)
        assert arrival <= update <= arrival + max_wait + math.ceil(buffer / packs)


def test_a_row_that_was_passed_over_goes_first():
    # Longest first, the row of 40 tokens would only go at the end: no longer one leaves it room.
    tokens = np.array([40] + [70] * 9)
    updates = [rows_of(bins) for bins in stream(range(10), tokens, packs=1, budget=100, buffer=3, max_wait=2)]
    assert updates[:4] == [[1], [2], [0], [3]]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=80),
    packs=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_balance_places_every_item_within_the_budget_or_says_that_it_cannot(sizes, packs):
    sizes = np.array(sizes)
    try:
        pack_of = balance(sizes, packs, budget=200)
    except PackingError:
        assert sizes.sum() > 200 * packs - 100 * packs  # best fit leaves less room than the longest item, 100
        return
    assert len(pack_of) == len(sizes)
    assert np.bincount(pack_of, sizes.sum(axis=1), packs).max() <= 200


def test_on_the_documented_mixture_no_rank_carries_5_percent_more_than_the_mean():
    # Four updates of 1,024 rows on 8 ranks: text tokens and image tokens, each against its own mean.
    stock, packed = dealt_imbalance(full_scale_sizes(4096, seed=11))
    assert packed <= 0.05
    assert stock > 0.2  # rows dealt as they come


def test_ranks_are_even_within_the_steps_too():
    sizes = full_scale_sizes(2048, seed=5)
    plan = Plan(sizes, ByRows(1024), budget=32768, ranks=8, seed=0, epochs=1)
    loads = np.array([sizes[pack].sum(axis=0) for pack in plan]).reshape(-1, 8, 2)
    waited = loads.max(axis=1).sum(axis=0) / loads.mean(axis=1).sum(axis=0)  # the slowest rank of each step
    assert waited.max() <= 1.10


def test_streamed_updates_are_even_as_well():
    plan = Plan(
        full_scale_sizes(4096, seed=7), ByTokens(8 * 4 * 32768), budget=32768, ranks=8, seed=0, epochs=1
    )
    summary = plan.summary(updates=2)  # the third drains the buffer
    assert summary["imbalance"] <= 0.05
    assert summary["fill"] > 0.9


def test_images_balance_even_where_tokens_alone_would_not():
    sizes = np.array([[0, 100]] * 8 + [[100, 0]] * 8)  # as many tokens each
    plan = Plan(sizes, ByRows(16), budget=400, ranks=4, seed=0, epochs=1)
    assert [sizes[pack].sum(axis=0).tolist() for pack in plan] == [[200, 200]] * 4


def test_imbalance_is_the_busiest_over_the_mean_of_its_kind():
    assert imbalance(np.array([[100, 4], [100, 0]])) == 1.0  # 4 over a mean of 2
    assert imbalance(np.array([[110, 0], [90, 0]])) == pytest.approx(0.1)  # no image anywhere


def test_an_update_with_fewer_rows_than_packs_has_empty_packs():
    plan = Plan(np.array([[10, 0]] * 5), ByRows(4), budget=10, ranks=2, seed=0, epochs=1)
    assert plan.packs == 4  # the last update is one row
    assert sorted(map(len, plan[4:])) == [0, 0, 0, 1]


def test_a_row_longer_than_the_budget_is_refused_by_number():
    with pytest.raises(
        PackingError, match=r"row 1 has 13 tokens.*holds 12; raise packing.micro_batch_tokens to 13"
    ):
        Plan(np.array([[5, 0], [9, 4]]), ByRows(1), budget=12, ranks=1, seed=0, epochs=1)


def test_a_plan_without_rows_or_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        Plan(np.zeros((0, 2), dtype=int), ByRows(1), budget=12, ranks=1, seed=0, epochs=1)
    with pytest.raises(ValueError, match="give one of them"):
        by_rows(max_updates=3)


def test_the_summary_counts_what_is_packed():
    summary = json.loads(json.dumps(by_rows(epochs=1).summary()))
    assert (summary["rows"], summary["updates"], summary["micro_batch_tokens"]) == (512, 8, 16384)
    assert summary["fill"] == pytest.approx(
        SIZES.sum() / (8 * summary["micro_batches_per_update"] * 16384), abs=1e-4
    )


LENGTHS = np.array([[900 if n % 10 == 3 else 20 + n % 30, 0] for n in range(100)])
OVERLONG = Overlong(tokens=100, every=4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_over_long_rows_fill_packs_of_their_own_in_every_fourth_update(ranks):
    plan = Plan(LENGTHS, ByRows(5), budget=100, ranks=ranks, seed=0, epochs=1, overlong=OVERLONG)
    long = set(np.flatnonzero(LENGTHS[:, 0] > 100).tolist())
    updates = [plan[at * plan.packs : (at + 1) * plan.packs] for at in range(plan.updates)]
    assert sorted(row for packs in updates for pack in packs for row in pack) == list(range(100))
    counts = [sum(row in long for pack in packs for row in pack) for packs in updates]
    assert counts == [2, 0, 0, 0] * 5
    assert all(len(pack) == 1 for packs in updates for pack in packs if long & set(pack))
    assert plan.summary()["overlong_rows"] == 10
    assert plan.summary()["fill"] <= 1


def test_a_stream_lets_over_long_rows_in_periodically_and_loses_none():
    by = ByTokens(400, buffer=30)
    plan = Plan(LENGTHS, by, budget=100, ranks=2, seed=0, epochs=1, overlong=OVERLONG)
    long = set(np.flatnonzero(LENGTHS[:, 0] > 100).tolist())
    updates = [plan[at * plan.packs : (at + 1) * plan.packs] for at in range(plan.updates)]
    assert sorted(row for packs in updates for pack in packs for row in pack) == list(range(100))
    counts = [sum(row in long for pack in packs for row in pack) for packs in updates]
    assert set(np.flatnonzero(counts[:-1]) % 4) == {0}  # the last one takes those that are left
    assert max(counts) < 10


def test_without_over_long_rows_the_plan_is_the_same():
    plain = Plan(LENGTHS[LENGTHS[:, 0] < 100], ByRows(5), budget=100, ranks=1, seed=0, epochs=1)
    periodic = Plan(
        LENGTHS[LENGTHS[:, 0] < 100], ByRows(5), budget=100, ranks=1, seed=0, epochs=1, overlong=OVERLONG
    )
    assert list(plain) == list(periodic)
