"""A run on a Ray cluster of two simulated nodes: one rank and one rollout server on each."""

import re
import signal
from contextlib import contextmanager

import psutil
import pytest

from core.files import read_jsonl

from ..rl.conftest import tiny_core  # noqa: F401 - fixture
from .test_several_hosts import below, site, wait_until_gone

pytestmark = pytest.mark.slow
cluster_utils = pytest.importorskip("ray.cluster_utils")
OWN = {"count": 2}


@contextmanager
def cluster():
    """A head without CPUs, where the driver attaches, and two nodes; everything on loopback."""
    here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **here})
    try:
        nodes = [made.add_node(num_cpus=2, node_ip_address="127.0.0.1") for _ in range(2)]
        yield made, nodes
    finally:
        made.shutdown()


def run(place, made, name):
    return place.run(name, name, "--ray", made.address)


def processes_of(word):
    """Children of Ray's workers by a word of their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if word in words and "processes.py" not in words:
            found.append(process)
    return found


def test_two_nodes_train_what_two_ranks_on_one_host_train(tiny_core, tmp_path):  # noqa: F811
    with cluster() as (made, _), site(tmp_path, tiny_core, "hf", OWN) as place:
        place.finish(run(place, made, "two"))
        place.finish(place.run("one", "one", "--set", "hardware.nodes=1"))
        one, two = place.metrics("one"), place.metrics("two")
        assert [line["step"] for line in two] == [1, 2, 3]
        for ours, theirs in zip(two, one, strict=True):
            for name in ("loss", "reward", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (name, ours["step"])
            assert ours["rollout/servers"] == 2
        assert_same_weights(*(tmp_path / name / "chain" / "rlvr" / "checkpoint" for name in ("one", "two")))
        assert re.search(r"Ray node 1: up to 1 rank; server 1 \(.+\)", place.output("two"))
        assert not list((tmp_path / "weights").iterdir())
        assert not (tmp_path / "two" / "chain" / ".servers.json").exists()


def test_a_killed_server_actor_and_a_killed_node_are_replaced(tiny_core, tmp_path):  # noqa: F811
    with (
        cluster() as (made, nodes),
        site(tmp_path, tiny_core, "hf", OWN, batches=1000, save_every=1) as place,
    ):
        process = run(place, made, "two")
        stage = tmp_path / "two" / "chain" / "rlvr.partial"
        place.wait_for('"step": 2', stage / "metrics.jsonl")
        actor = next(iter(processes_of("ray::ServerOfNode")))
        children = actor.children(recursive=True)
        actor.kill()
        wait_until_gone(children)
        place.wait_for("is back with the current weights", stage / "alarms.jsonl")
        made.remove_node(nodes[1], allow_graceful=False)
        made.add_node(num_cpus=2, node_ip_address="127.0.0.1")
        place.wait_for("it starts again on the nodes that Ray has", tmp_path / "two" / "output.txt")
        steps = len(read_jsonl(stage / "metrics.jsonl"))
        place.wait_for(f'"step": {steps + 3},', stage / "metrics.jsonl")
        process.send_signal(signal.SIGINT)
        place.finish(process, code=130)
        lines = read_jsonl(stage / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert lines[-1]["rollout/servers"] == 2
        assert all(line["parity/max_logprob_difference"] < 1e-3 for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_leaves_nothing_on_the_nodes(tiny_core, tmp_path, number):  # noqa: F811
    with cluster() as (made, _), site(tmp_path, tiny_core, "hf", OWN, batches=1000) as place:
        process = run(place, made, "two")
        place.wait_for('"step": 1', tmp_path / "two" / "chain" / "rlvr.partial" / "metrics.jsonl")
        started = [one for word in ("chain.worker", "rl.rollout.hf", "ray::") for one in processes_of(word)]
        own = [one for one in started if str(tmp_path) in " ".join(one.cmdline()) or "OfNode" in one.name()]
        assert len(own) >= 4, "two ranks and two servers"
        process.send_signal(number)
        assert process.wait(120) == (130 if number == signal.SIGINT else -number)
        wait_until_gone(own + below(process) if process.poll() is None else own)


def assert_same_weights(one, two):
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= 1e-5, name
