"""A stage whose node is lost starts again on the nodes that are left. No Ray needed: the cluster is a substitute."""

import pytest

from chain import run as runner
from chain.cluster import MOST_LOSSES, NodeLost
from chain.ranks import Ranks


class Lossy:
    """A cluster that loses a node `losses` times while basic_sft trains."""

    addresses = None
    losses = 1

    def __init__(self, *_):
        self.left = self.losses

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, job_file, processes, threads):
        if job_file.parent.name == "basic_sft.partial" and self.left:
            self.left -= 1
            (job_file.parent / "half.safetensors").touch()
            raise NodeLost("a node with ranks is lost")
        return Ranks(job_file, processes, threads, None)


def test_a_stage_without_checkpoints_starts_from_its_beginning(toy, monkeypatch):
    monkeypatch.setattr(runner, "Cluster", Lossy)
    toy.run("servers.weights_dir=weights", "rlvr=null", ray="auto")
    assert toy.calls() == ["data", "core", "basic_sft"]
    assert "basic_sft: a node with ranks is lost; it starts again on the nodes that Ray has" in toy.printed
    assert not (toy.run_dir / "basic_sft" / "half.safetensors").exists()


def test_a_stage_that_loses_nodes_again_and_again_ends_the_run(toy, monkeypatch):
    monkeypatch.setattr(runner, "Cluster", Lossy)
    monkeypatch.setattr(Lossy, "losses", MOST_LOSSES + 1)
    with pytest.raises(NodeLost):
        toy.run("servers.weights_dir=weights", "rlvr=null", ray="auto")
    assert toy.printed.count("it starts again") == MOST_LOSSES
