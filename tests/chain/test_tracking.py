"""W&B: never asks, follows the environment, and never stops a training."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from chain.recipe import WandbConfig
from chain.tracking import Tracker, resolve_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A user without a key and without settings."""
    for name in ("API_KEY", "MODE", "PROJECT", "ENTITY", "DIR", "DISABLED", "RUN_GROUP", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class FakeRun:
    """Remembers what it was given; `fails` makes every call raise."""

    def __init__(self, fails: bool = False) -> None:
        self.logged, self.summary, self.exit_code, self.fails = [], {}, None, fails

    def define_metric(self, *args, **options) -> None:
        pass

    def log(self, record) -> None:
        if self.fails:
            raise ConnectionError("no route")
        self.logged.append(record)

    def finish(self, exit_code) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    """A wandb module whose runs are FakeRuns."""
    fake = SimpleNamespace(runs=[], options=[], fails=False)

    def init(**options):
        fake.options.append(options)
        fake.runs.append(FakeRun(fake.fails))
        return fake.runs[-1]

    module = SimpleNamespace(init=init, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return fake


def tracker(tmp_path, said=None, **config) -> Tracker:
    return Tracker(WandbConfig(**config), "toy-1234", tmp_path, {}, (said if said is not None else []).append)


def test_without_a_key_runs_are_offline(monkeypatch, tmp_path):
    assert resolve_mode(WandbConfig()) == "offline"
    assert resolve_mode(WandbConfig(mode="online")) == "offline"  # online would ask for a key
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode(WandbConfig()) == "online"


def test_a_key_in_netrc_counts_for_its_own_server(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert resolve_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolve_mode(WandbConfig()) == "offline"


def test_the_environment_wins_over_the_recipe(monkeypatch, tmp_path, fake):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(WandbConfig(mode="offline")) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "us")
    with tracker(tmp_path, mode="disabled", project="theirs").stage("rlvr", {}):
        pass
    options = fake.options[0]
    assert (options["mode"], options["project"], options["entity"]) == ("offline", "mine", "us")


def test_disabled_does_not_even_import_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with tracker(tmp_path, mode="disabled").stage("rlvr", {}) as track:
        track.log({"step": 1})


def test_one_run_per_stage_in_the_chains_group(tmp_path, fake):
    track = tracker(tmp_path)
    for name in ("longcot_sft", "rlvr"):
        with track.stage(name, {"parent": "x"}) as stage:
            stage.log({"step": 1, "reward": 0.5})
    assert [options["group"] for options in fake.options] == ["toy-1234"] * 2
    assert [options["job_type"] for options in fake.options] == ["longcot_sft", "rlvr"]
    assert fake.options[1]["config"] == {"parent": "x"}
    assert fake.runs[1].logged == [{"step": 1, "reward": 0.5}]
    assert [run.exit_code for run in fake.runs] == [0, 0]


def test_a_failed_stage_is_a_failed_run(tmp_path, fake):
    with pytest.raises(RuntimeError), tracker(tmp_path).stage("rlvr", {}):
        raise RuntimeError
    assert fake.runs[0].exit_code == 1


def test_a_failing_wandb_is_told_once_and_stops_nothing(tmp_path, fake):
    fake.fails = True
    said: list[str] = []
    track = tracker(tmp_path, said)
    for name in ("longcot_sft", "rlvr"):
        with track.stage(name, {}) as stage:
            stage.log({"step": 1})
            stage.log({"step": 2})
    assert said == ["W&B: ConnectionError: no route; the chain goes on without it"]


def test_a_wandb_that_does_not_start_is_told_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    with tracker(tmp_path, said).stage("rlvr", {}) as stage:
        stage.log({"step": 1})
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_real_library_writes_an_offline_run_with_a_table(tmp_path):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    stage = tmp_path / "rlvr"
    (stage / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stage / "images" / "000.png")
    verdict = {"score": 1.0, "status": "correct", "answer": "4", "reason": "4 equals 4"}
    row = {"id": "a", "mode": "think", "question": "2+2?", "answer": "4", "completion": "4"}
    row["verdicts"] = {"answer": verdict}
    (stage / "samples.jsonl").write_text(json.dumps({**row, "image": "images/000.png"}) + "\n")
    (stage / "completions.jsonl").write_text(json.dumps({**row, "id": "b", "reward": 1.0}) + "\n")
    png = (stage / "images" / "000.png").read_bytes()
    table = pa.table({"id": ["b"], "images": [[{"bytes": png, "path": None}]]})
    pq.write_table(table, tmp_path / "rl.parquet")
    said: list[str] = []
    track = Tracker(WandbConfig(), "toy-1234", tmp_path, {"rl": str(tmp_path / "rl.parquet")}, said.append)
    with track.stage("rlvr", {"seed": 0}) as run:
        run.log({"step": 1, "reward": 0.5})
        run.results({"thinking": {"accuracy": 0.5}}, stage)
    assert said == []
    offline = next((tmp_path / "wandb").glob("offline-run-*"))
    assert list(offline.glob("*.wandb"))
    tables = [json.loads(file.read_text()) for file in offline.rglob("*.table.json")]
    assert len(tables) == 2
    assert all(found["columns"][0] == "image" for found in tables)
    assert all("1.0 correct: 4 equals 4" in found["data"][0] for found in tables)
    # The tables travel as artifacts, with their pictures, which wait here for `wandb sync`.
    staged = (tmp_path / "data").rglob("artifacts/staging/*")
    assert sum(file.read_bytes().startswith(b"\x89PNG") for file in staged) == 2
