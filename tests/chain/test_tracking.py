"""Trackers: W&B never prompts for a key, and a tracker cannot end or disturb training."""

import io
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chain.recipe import WandbConfig
from chain.tracking import Tracker
from chain.tracking.content import PictureIndex, table_of, with_advantages
from chain.tracking.wandb_run import resolve_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """A user without a key and without settings."""
    for name in ("API_KEY", "MODE", "PROJECT", "ENTITY", "DIR", "DISABLED", "RUN_GROUP", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class FakeRun:
    """Records its input; `fails` makes every call raise."""

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
    say = (said if said is not None else []).append
    return Tracker(["wandb"], WandbConfig(**config), "toy-1234", tmp_path, {}, say)


def test_without_a_key_runs_are_offline(monkeypatch, tmp_path):
    assert resolve_mode(WandbConfig()) == "offline"
    assert resolve_mode(WandbConfig(mode="online")) == "offline"  # online mode would prompt for a key
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


def test_a_failing_wandb_is_reported_once_and_stops_nothing(tmp_path, fake):
    fake.fails = True
    said: list[str] = []
    track = tracker(tmp_path, said)
    for name in ("longcot_sft", "rlvr"):
        with track.stage(name, {}) as stage:
            stage.log({"step": 1})
            stage.log({"step": 2})
    assert said == ["wandb: ConnectionError: no route; the chain runs on without it"]
    assert [run.exit_code for run in fake.runs] == [0, 0]  # their runs are still ended


def test_a_wandb_that_does_not_start_is_reported_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    with tracker(tmp_path, said).stage("rlvr", {}) as stage:
        stage.log({"step": 1})
    assert len(said) == 1


def test_a_netrc_that_cannot_be_read_means_offline(tmp_path):
    (tmp_path / "netrc").write_bytes(b"machine \xff\xfe")
    assert resolve_mode(WandbConfig()) == "offline"


def test_a_step_that_a_resumed_stage_writes_again_is_logged_once(tmp_path, fake):
    with tracker(tmp_path).stage("rlvr", {}) as stage:
        for step in (1, 2, 3, 2, 3, 4):
            stage.log({"step": step})
    assert [record["step"] for record in fake.runs[0].logged] == [1, 2, 3, 4]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, **changes) -> dict:
    verdicts = {"answer": {"score": 1.0, "status": "correct", "answer": "4", "reason": "4 equals 4"}}
    found = {"batch": 0, "id": f"r{number}", "mode": "think", "question": "2+2?", "answer": "4"}
    found |= {"completion": "<think>2+2</think>\\boxed{4}", "reward": 1.0, "advantage": 0.7}
    return {**found, "verdicts": verdicts, **changes}


@pytest.mark.parametrize(
    "stored", [png(), {"bytes": png(), "path": None}], ids=["list of binary", "list of struct"]
)
def test_both_kinds_of_images_column_are_read(tmp_path, stored):
    table = pa.Table.from_pylist([{"id": "r0", "images": [stored]}, {"id": "r1", "images": []}])
    pq.write_table(table, tmp_path / "rl.parquet")
    for place in (tmp_path / "rl.parquet", tmp_path):
        found = PictureIndex([str(place)]).of(["r0", "r1", "unknown"])
        assert found["r0"][0].getpixel((0, 0)) == (255, 0, 0)
        assert found["r1"] == []
        assert set(found) == {"r0", "r1"}


def test_a_broken_picture_is_left_out_with_a_warning(tmp_path, caplog):
    pq.write_table(pa.Table.from_pylist([{"id": "r0", "images": [b"no picture"]}]), tmp_path / "rl.parquet")
    assert PictureIndex([str(tmp_path / "rl.parquet"), "no/such.parquet"]).of(["r0"]) == {}
    assert "row r0" in caplog.text


def test_a_table_has_every_verdict_and_no_column_twice():
    second = row(1, verdicts={"prompt": {"score": None, "status": "unscorable", "reason": "late"}})
    table = table_of([row(0), second], {"r0": [Image.new("RGB", (4, 4))] * 2})
    assert len(set(table.columns)) == len(table.columns)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert first["gold"] == "4"
    assert first["prompt"].startswith("2+2?\nYou FIRST think")
    assert (first["score/answer"], first["why/answer"]) == (1.0, "correct: 4 equals 4")
    assert (first["advantage"], first["score/prompt"]) == (0.7, None)
    assert table.pictures == 2
    assert table.rows[1][:2] == (None, None)


@pytest.mark.parametrize(
    "algorithm", [{"name": "dapo", "scale_by_std": True}, {"name": "dr_grpo", "scale_by_std": None}]
)
def test_advantages_are_trls(algorithm):
    import numpy as np

    rewards = [1.0, 0.25, None, 0.0, 0.5, 0.5, 0.5, 0.5]
    rows = [row(number // 4, reward=reward) for number, reward in enumerate(rewards)]
    for one in rows:
        del one["advantage"]
    found = [one["advantage"] for one in with_advantages(rows, algorithm)]
    groups = np.array([np.nan if reward is None else reward for reward in rewards]).reshape(2, 4)
    expected = groups - np.nanmean(groups, axis=1, keepdims=True)
    if algorithm["scale_by_std"]:  # TRL's nanstd is unbiased
        expected = expected / (np.nanstd(groups, axis=1, ddof=1, keepdims=True) + 1e-4)
    assert found == pytest.approx(np.nan_to_num(expected).ravel().tolist(), abs=1e-12)
    assert "advantage" not in with_advantages(rows, {"name": "gdpo"})[0]


class Recorder:
    """A tracker's run that records its tables."""

    def __init__(self):
        self.tables, self.logged = [], []

    def log(self, record, step):
        self.logged.append(step)

    def table(self, name, table, step):
        self.tables.append((name, step, [found[table.columns.index("id")] for found in table.rows]))

    def summary(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_each_batch_of_completions_is_one_table(tmp_path, monkeypatch):
    run = Recorder()
    monkeypatch.setattr("chain.tracking.open_wandb", lambda *_: run)
    (tmp_path / "samples.jsonl").write_text(json.dumps(row(9)) + "\n")
    with tracker(tmp_path, table_rows=2).stage("rlvr", {}) as stage:
        stage.log({"step": 1})
        stage.completions([row(0), row(1)])
        assert run.tables == []  # the batch may continue
        stage.log({"step": 2})
        stage.completions([row(2, batch=4), row(3, batch=4), row(4, batch=4)])
        stage.results({"thinking": {"accuracy": 0.5, "ci95": [0.4, 0.6]}}, tmp_path)
    rollouts = [("rollouts", 2, ["r0", "r1"]), ("rollouts", 2, ["r2", "r3"])]
    assert run.tables == [*rollouts, ("held_out", 2, ["r9"])]
    assert run.logged[-1]["eval/thinking/ci95_low"] == 0.4


def test_a_malformed_sample_loses_only_its_own_table(tmp_path, monkeypatch):
    run, said = Recorder(), []
    monkeypatch.setattr("chain.tracking.open_wandb", lambda *_: run)
    with tracker(tmp_path, said).stage("rlvr", {}) as stage:
        stage.completions([{"batch": 0, "nothing": 1}])
        stage.results({}, tmp_path)
        stage.log({"step": 7})
    assert run.logged == [{}, 7]
    assert run.exit_code == 0
    assert said[0].startswith("table rollouts: KeyError")


@pytest.fixture
def rl_set(tmp_path) -> str:
    pq.write_table(pa.Table.from_pylist([{"id": "r0", "images": [png()]}]), tmp_path / "rl.parquet")
    return str(tmp_path / "rl.parquet")


def follow_a_stage(tmp_path, names, rl_set) -> None:
    """A stage with a curve, a table, an alert and scores; fails if a tracker complains."""
    said: list[str] = []
    chain = Tracker(names, WandbConfig(), "toy-1234", tmp_path, {"rl": rl_set}, said.append)
    with chain.stage("rlvr", {"seed": 0, "data": [{"set": "rl"}]}) as run:
        run.log({"step": 1, "reward": 0.5, "phase": "text", "loss": None})
        run.completions([row(0)])
        run.alert("repeats", "the same text")
        run.results({"thinking": {"accuracy": 0.5}}, tmp_path)
    assert said == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_wandb_itself_writes_an_offline_run_with_a_table(tmp_path, rl_set):
    follow_a_stage(tmp_path, ["wandb"], rl_set)
    offline = next((tmp_path / "wandb").glob("offline-run-*"))
    assert list(offline.glob("*.wandb"))
    (table,) = [json.loads(file.read_text()) for file in offline.rglob("*.table.json")]
    assert table["columns"][:2] == ["picture 1", "prompt"]
    assert "correct: 4 equals 4" in table["data"][0]
    # The table travels as an artifact, with its pictures, which wait here for `wandb sync`.
    staged = (tmp_path / "data").rglob("artifacts/staging/*")
    assert sum(file.read_bytes().startswith(b"\x89PNG") for file in staged) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_itself_gets_curves_pictures_and_text(tmp_path, rl_set):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second start replaces the first
        follow_a_stage(tmp_path, ["tensorboard"], rl_set)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "rlvr"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5)]
    assert events.Scalars("eval/thinking/accuracy")[0].value == 0.5
    assert events.Tags()["images"] == ["rollouts/0 picture 1"]
    text = events.Tensors("rollouts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "correct: 4 equals 4" in text
    assert "&lt;think>" in text


def test_a_tracker_that_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, rl_set):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said: list[str] = []
    with Tracker(["mlflow"], WandbConfig(), "toy", tmp_path, {}, said.append).stage("rlvr", {}) as stage:
        stage.log({"step": 1})
    assert len(said) == 1
    assert "sailvl2-posttrain[mlflow]" in said[0]


class FakeMlflow:
    """The methods of MlflowClient that we call; records its input."""

    def __init__(self, tracking_uri):
        self.uri, self.metrics, self.files, self.tags = tracking_uri, [], {}, {}

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location):
        return "1"

    def create_run(self, experiment_id, run_name, tags):
        self.tags |= tags
        return SimpleNamespace(info=SimpleNamespace(run_id="run"))

    def log_dict(self, run_id, value, file):
        self.files[file] = value

    def log_image(self, run_id, picture, file):
        self.files[file] = picture.size

    def log_batch(self, run_id, metrics):
        self.metrics += metrics

    def set_tag(self, run_id, name, value):
        self.tags[name] = value

    def set_terminated(self, run_id, status):
        self.status = status


def test_mlflow_gets_the_same(tmp_path, monkeypatch, rl_set):
    clients: list[FakeMlflow] = []
    module = SimpleNamespace(
        MlflowClient=lambda tracking_uri: clients.append(FakeMlflow(tracking_uri)) or clients[-1]
    )
    entities = SimpleNamespace(Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    follow_a_stage(tmp_path, ["mlflow"], rl_set)
    (client,) = clients
    assert client.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert [(name, value, step) for name, value, _, step in client.metrics] == [
        ("reward", 0.5, 1),
        ("eval/thinking/accuracy", 0.5, 1),
    ]
    assert client.files["rollouts/000001/0-1.png"] == (8, 8)
    assert client.files["rollouts/000001.json"]["picture 1"] == ["rollouts/000001/0-1.png"]
    assert client.tags["alert 1 repeats"] == "the same text"
    assert client.status == "FINISHED"
