"""The work around training: samples for the report, the single pool, the soup's ingredients, hashes."""

import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from chain.evaluate import spread, write_samples
from chain.fingerprints import Hashes
from chain.pool import Pool
from chain.recipe import ALIASES, STAGE_NAMES
from chain.stages import STAGES, stage_named
from core.checkpoint.check import NonFinite
from core.files import read_jsonl
from core.strict import ConfigError
from rl.rollout import client as rollout_client
from rl.rollout.config import PoolConfig
from rl.rollout.served import Served


def test_the_table_of_stages_is_the_chain_in_order():
    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES
    assert set(ALIASES.values()) <= set(STAGE_NAMES)
    assert stage_named("fusion").name == "think_fusion"
    with pytest.raises(ConfigError, match="did you mean rlvr"):
        stage_named("rlrv")


def test_samples_are_spread_over_modes_and_rows():
    modes = ["think"] * 100 + ["direct"] * 50
    assert spread(modes, 4) == [0, 50, 100, 125]
    assert len(spread(modes, 5)) == 5
    assert spread(["think"] * 2, 12) == [0, 1]  # at most the existing rows
    assert spread(modes, 0) == []
    assert spread([], 12) == []


def test_samples_are_written_anew_with_their_images(tmp_path):
    rows = [({"id": str(number), "set": "thinking"}, [Image.new("RGB", (4, 4))]) for number in range(6)]
    write_samples(tmp_path, rows, 6)
    write_samples(tmp_path, [*rows[:2], ({"id": "text", "set": "thinking"}, [])], 3)
    assert len(read_jsonl(tmp_path / "held_out.jsonl")) == 3
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["image"] for row in samples] == ["images/000.png", "images/001.png", None]
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["000.png", "001.png"]


class FakeClient:
    """A RolloutClient that only records the checkpoints to load."""

    def __init__(self, urls):
        self.urls, self.loaded, self.fails, self.closed = urls, [], False, False
        self.served = Served()

    @classmethod
    def of_pool(cls, pool, urls, model, addresses=None):
        return cls(urls)

    def load_checkpoint(self, folder: Path) -> None:
        with self.served.update(folder.resolve()):
            if self.fails:
                raise rollout_client.RolloutError("half-way")
            self.loaded.append(folder.name)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> list[Path]:
    """Two checkpoint folders, and a client that does nothing."""
    monkeypatch.setattr(rollout_client, "RolloutClient", FakeClient)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folders


def pool(tmp_path, events: list[str], **cfg) -> Pool:
    @contextmanager
    def open_pool(config, model, logs):
        events.append(f"start {model.name}")
        yield lambda: ["http://a"]
        events.append("stop")

    return Pool(PoolConfig(max_model_tokens=64, **cfg), tmp_path / "logs", open_pool)


def test_the_pool_starts_once_and_is_handed_weights_only_when_they_change(tmp_path, checkpoints):
    one, two = checkpoints
    events: list[str] = []
    with pool(tmp_path, events) as servers:
        client = servers.serve(one)
        assert client.loaded == []  # the servers started with these weights
        servers.serve(two)
        servers.serve(two)
        assert client.loaded == ["two"]
        servers.weights_changed()  # an RL stage sent its own weights
        servers.serve(two)
        assert client.loaded == ["two", "two"]
        assert events == ["start one"]
    assert events == ["start one", "stop"]
    assert client.closed


def test_a_checkpoint_that_is_not_finite_is_never_served(tmp_path, checkpoints):
    one, two = checkpoints
    save_file({"weight": np.array([1, np.nan], np.float32)}, two / "model.safetensors")
    with pool(tmp_path, []) as servers:
        client = servers.serve(one)
        with pytest.raises(NonFinite, match="weight"):
            servers.serve(two)
        assert client.loaded == []


def test_servers_that_were_already_running_get_the_checkpoint(tmp_path, checkpoints):
    with pool(tmp_path, [], urls=("http://127.0.0.1:1",)) as servers:
        assert servers.serve(checkpoints[0]).loaded == ["one"]


def test_a_failed_update_is_sent_again(tmp_path, checkpoints):
    one, two = checkpoints
    with pool(tmp_path, []) as servers:
        client = servers.serve(one)
        client.fails = True
        with pytest.raises(rollout_client.RolloutError):
            servers.serve(two)
        client.fails = False
        servers.serve(one)
        assert client.loaded == ["one"]


def test_a_step_that_samples_needs_servers_in_the_recipe(tmp_path):
    with Pool(None, tmp_path) as servers, pytest.raises(ConfigError, match="servers is missing"):
        servers.urls(tmp_path)


def test_content_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    from chain import fingerprints

    data = tmp_path / "data.parquet"
    data.write_text("one")
    first = Hashes(tmp_path / "memory").of(str(data))
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: pytest.fail("read again"))
    assert Hashes(tmp_path / "memory").of(str(data)) == first
    monkeypatch.undo()
    data.write_text("two")
    os.utime(data, ns=(1, 1))
    assert Hashes(tmp_path / "memory").of(str(data)) != first
    assert Hashes(tmp_path / "memory").of("hf://datasets/a/b") == "hub:hf://datasets/a/b"
    assert Hashes(tmp_path / "memory").of("./gone") == "missing"


def test_make_has_a_target_for_every_stage_and_no_other():
    """The Makefile has a target per stage: in the chain's order, by names that the command knows."""
    text = (Path(__file__).parents[2] / "Makefile").read_text()
    line = next(line for line in text.splitlines() if line.startswith("core sft"))
    assert tuple(stage_named(word.rstrip(":")).name for word in line.split()) == STAGE_NAMES
