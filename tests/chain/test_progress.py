"""The live line shows step, metrics and remaining time, and copes with faulty files."""

import json
from io import StringIO
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from chain import progress
from chain.display import Display
from chain.progress import Follower, Outlook, metrics_text
from chain.recipe import load_recipe
from core.files import append_jsonl, write_json
from core.manifest import Manifest

NAMES = ("core", "basic_sft", "rlvr")


class Track:
    """A stage's trackers that record their input."""

    def __init__(self):
        self.logged, self.rows, self.alerts = [], [], []

    def log(self, record):
        self.logged.append(record["step"])

    def completions(self, rows):
        self.rows += rows

    def alert(self, title, text):
        self.alerts.append(title)


def finished(folder, seconds: float, steps: int) -> None:
    for step in range(1, steps + 1):
        append_jsonl(folder / "metrics.jsonl", {"step": step})
    times = {"started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:01:00+00:00"}
    Manifest(stage=folder.name, fingerprint="f", config_hash="c", seed=0, seconds=seconds, **times).write(
        folder
    )


@pytest.fixture
def outlook(toy) -> Outlook:
    """The toy chain's: 20 rows in updates of 8, then RL of two batches of one update each."""
    pq.write_table(pa.table({"id": ["row"] * 20}), toy.root / "train.parquet")
    recipe = load_recipe(toy.recipe_dir)
    found = Outlook(recipe, toy.run_dir, NAMES)
    found._sets["train"] = str(toy.root / "train.parquet")
    return found


def test_updates_are_known_from_recipe_and_rows(outlook, toy):
    assert [outlook.updates(name) for name in NAMES] == [None, 3, 2]
    (toy.root / "train.parquet").write_text("no Parquet")
    assert outlook.updates("basic_sft") is None
    assert outlook.label("rlvr") == "stage 3/3 rlvr"


def test_a_harvest_counts_with_its_most_rows_until_it_is_made(toy):
    harvest = {"source": {"set": "train"}, "into": "own", "keep": 20}
    phase = {"name": "only", "data": [{"set": "own"}]}
    optim = {"learning_rate": 0.001, "epochs": 1, "global_batch_size": 8}
    config = {"max_tokens": 64, "prepare": {"harvest": harvest}, "phases": [{**phase, "optim": optim}]}
    recipe = load_recipe(toy.recipe_dir, [f"think_fusion={json.dumps(config)}"])
    found = Outlook(recipe, toy.run_dir, ("core", "think_fusion"))
    assert found.updates("think_fusion") == 3
    made = toy.run_dir / "prepared" / "think_fusion"
    made.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["row"] * 7}), made / "own.parquet")
    assert found.updates("think_fusion") == 1


def test_later_stages_take_what_they_took_or_what_their_kind_takes(outlook, toy):
    assert outlook.later("basic_sft", pace=1.0) is None  # no RL stage has run yet
    assert outlook.later("rlvr", pace=1.0) == 0
    finished(toy.run_dir / "rlvr", seconds=40, steps=2)
    assert outlook.later("basic_sft", pace=1.0) == 40
    assert outlook.later("core", pace=None) is None  # no SFT stage has run yet
    finished(toy.run_dir / "basic_sft", seconds=30, steps=3)
    write_json(toy.run_dir / "basic_sft" / "eval.json", {"seconds": 5})
    assert outlook.later("core", pace=None) == 30 + 40 + 3 * 5
    (toy.run_dir / "basic_sft" / "manifest.json").unlink()
    assert outlook._paces() == {"rl": 20}


def test_the_line_tells_step_figures_and_time_left(outlook, toy, monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 20.0, 20.0, 40.0, 40.0, 60.0, 60.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    display = Display(Console(file=StringIO(), width=120))
    monkeypatch.setattr("chain.display.PLAIN_EVERY_S", 0)
    follower = Follower("rlvr", toy.run_dir, display, Track(), outlook)
    with display.step(outlook.label("rlvr")):
        # The second update of a batch logs no reward.
        for figures in ({"step": 1, "reward": 0.85, "rollout/correct": 1.0}, {"step": 2, "loss": 0.5}):
            append_jsonl(toy.run_dir / "metrics.jsonl", figures)
            follower.look()
    first, second = display.console.file.getvalue().splitlines()
    assert first.startswith("stage 3/3 rlvr · step 1/2 · reward .85 · correct 1.00 · ")
    assert second == "stage 3/3 rlvr · step 2/2 · reward .85 · correct 1.00 · 0s left · chain 0s left"


def test_a_resumed_stage_sends_each_line_on_and_tells_alarms_once(toy):
    track, display = Track(), Display(Console(file=StringIO(), width=120))
    follower = Follower("rlvr", toy.run_dir, display, track)
    toy.run_dir.mkdir(parents=True)
    metrics, alarms = toy.run_dir / "metrics.jsonl", toy.run_dir / "alarms.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    alarms.write_text(json.dumps({"batch": 0, "name": "jump", "text": "up"}) + "\n")
    (toy.run_dir / "completions.jsonl").write_text('{"id": "a"}\n')
    follower.look()
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "elapsed": 123456.789}\nhalf a li')
    alarms.write_text(json.dumps({"batch": 0, "name": "jump", "text": "up"}) + "\n")
    follower.look()
    assert track.logged == [1, 2, 3, 4, 5, 3]  # StageTrack drops records that it has sent
    assert (track.alerts, track.rows) == (["rlvr: jump"], [{"id": "a"}])
    assert display.console.file.getvalue().count("ALARM") == 1


def test_an_alarm_of_every_batch_is_shown_less_and_less_often(toy):
    track, display = Track(), Display(Console(file=StringIO(), width=120))
    follower = Follower("rlvr", toy.run_dir, display, track)
    for batch in range(9):
        append_jsonl(toy.run_dir / "alarms.jsonl", {"batch": batch, "name": "status", "text": "all wrong"})
    follower.look()
    assert track.alerts == ["rlvr: status", *(f"rlvr: status ({count} times)" for count in (2, 4, 8))]
    assert display.console.file.getvalue().count("ALARM status") == 4


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"step": 12, "phase": "mixed", "loss": 0.5, "lr": 1e-3}, "phase mixed · step 12/80 · loss 0.500"),
        ({"step": 1, "loss": None, "mean_token_accuracy": 0.25}, "step 1/80 · token accuracy .25"),
        (
            {"step": 2, "loss": 0.1, "reward": -0.05, "rollout/correct": 1},
            "step 2/80 · reward -.05 · correct 1.00",
        ),
    ],
)
def test_a_metrics_line_in_few_words(record, text):
    assert metrics_text(record, 80) == text
