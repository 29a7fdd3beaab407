"""Where ranks meet: in a private file on one host, at the named address alone on several."""

from datetime import timedelta

import psutil
import pytest
import torch

from core.processes import free_port
from core.training import group


def listening():
    return {one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}


@pytest.fixture
def store(monkeypatch):
    """`store(place, ranks)`: what rank 0 makes; the interface variables are as they were afterwards."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")

    def make(place, ranks):
        monkeypatch.setenv(group.MEETING, place)
        return group._store(torch.distributed, ranks, 0, timedelta(seconds=20))

    return make


def test_the_store_of_several_hosts_listens_on_the_leaders_address_alone(store):
    port, before = free_port(), listening()
    kept = store(f"tcp://127.0.0.1:{port}", 1)
    assert listening() - before == {("127.0.0.1", port)}
    other = torch.distributed.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20))
    kept.set("key", "value")
    assert other.get("key") == b"value"


def test_ranks_of_one_host_meet_without_a_port(store, tmp_path):
    before = listening()
    assert isinstance(store(str(tmp_path / "store"), 2), torch.distributed.FileStore)
    assert isinstance(store("", 1), torch.distributed.HashStore)
    assert store("", 2) is None  # torchrun's ranks meet where its variables say
    assert listening() == before
