"""The placement of ranks and servers on Ray's nodes, from a recipe's hardware; no Ray needed."""

import pytest

from chain.placement import check_one_host, check_weights_reach, placement
from chain.recipe import Recipe
from core.strict import ConfigError

from .test_several_hosts import STAGE


def recipe(nodes, gpus=None, processes=2, **servers):
    pool = {"max_model_tokens": 256, **servers}
    if gpus:
        pool["device"] = "gpu"
    learner = {"processes": processes, "threads": 3, "deepspeed": None}
    rollout = {**STAGE["rollout"], "prompts_per_batch": 48}
    return Recipe.model_validate(
        {
            "name": "placed",
            "hardware": {"nodes": nodes, **({"gpus_per_node": gpus, "gpu_gib": 80} if gpus else {})},
            "data": {"sets": {"rl": "rl.parquet"}},
            "servers": pool,
            "core": {"path": "core"},
            "rlvr": {
                **STAGE,
                "learner": learner,
                "rollout": rollout,
                "mini_batch": 192,
                "optim": {"learning_rate": 1e-3},
            },
        }
    )


def test_without_gpus_ranks_and_servers_are_spread_over_the_nodes():
    found = placement(recipe(2, processes=2, count=3, threads=2))
    assert found.ranks == {"core": (1,), "rlvr": (1, 1)}
    assert found.servers == (0, 1, 0)
    assert [found.slot(server) for server in range(3)] == [0, 0, 1]
    assert found.bundles == ({"CPU": 3 + 2 * 2}, {"CPU": 3 + 2})  # a rank of 3 threads, servers of 2 each
    assert found.lines() == ["Ray node 0: up to 1 rank; servers 0, 2", "Ray node 1: up to 1 rank; server 1"]


def test_ranks_fill_nodes_and_servers_take_the_gpus_that_they_leave():
    found = placement(recipe(2, gpus=8, processes=8, count=4, gpus_per_server=2))
    assert found.ranks["rlvr"] == (8,)
    assert found.servers == (1, 1, 1, 1)
    assert [bundle["GPU"] for bundle in found.bundles] == [8, 8]
    assert placement(recipe(3, gpus=8, processes=16, count=2)).ranks["rlvr"] == (8, 8)


def test_ranks_that_need_two_nodes_share_them_equally():
    found = placement(recipe(2, gpus=8, processes=12, count=3))
    assert found.ranks["rlvr"] == (6, 6)
    assert found.servers == (0, 0, 1)


def test_servers_that_share_gpus_may_stand_on_every_gpu():
    found = placement(recipe(2, gpus=4, processes=8, count=8, share_gpus=True))
    assert found.servers == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_run_on_one_node_of_a_larger_cluster_reserves_one():
    assert placement(recipe(4, gpus=8, processes=4, count=2)).nodes == 1


@pytest.mark.parametrize(
    ("nodes", "gpus", "servers", "message"),
    [
        (1, 8, {"processes": 12}, "rlvr.learner.processes=12: hardware has 1 node of 8 GPUs"),
        (
            2,
            None,
            {"processes": 3},
            "rlvr.learner.processes=3: hardware has 2 nodes, and ranks need equal shares of 2",
        ),
        (
            1,
            8,
            {"processes": 6, "count": 3},
            "servers.count=3: 1 node of 8 GPUs have room for 2 servers of 1 GPUs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_keys_to_change(nodes, gpus, servers, message):
    with pytest.raises(ConfigError, match=message):
        placement(recipe(nodes, gpus, **servers))


def test_a_recipe_for_two_nodes_is_refused_on_one_host():
    with pytest.raises(ConfigError, match=r"take 2 nodes. Start a Ray cluster and add --ray"):
        check_one_host(recipe(2, gpus=8, processes=8, count=4))
    check_one_host(recipe(2, gpus=8, processes=8, urls=["http://127.0.0.1:8000"]))
    check_one_host(recipe(1, gpus=8, processes=8, share_gpus=True))


def test_weights_in_shared_memory_do_not_reach_servers_on_other_nodes():
    without = recipe(2, processes=2)
    with pytest.raises(ConfigError, match=r"set servers.weights_dir"):
        check_weights_reach(without.servers, placement(without))
    given = recipe(2, processes=2, weights_dir="/shared")
    check_weights_reach(given.servers, placement(given))
