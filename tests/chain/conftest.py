"""A toy chain: real runner, real child processes, stages that only write files."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from chain import run as runner
from chain.display import Display
from chain.recipe import load_recipe
from chain.run import run
from chain.stages import Stage

TOY = '''
"""What the toy chain's processes do. Every call is noted in calls.txt beside the run folder."""
import json, os, sys, time
from pathlib import Path

def note(out, text):
    with open(os.environ["TOY_CALLS"], "a") as file:
        file.write(text + chr(10))

def checkpoint(out):
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")

def generate(out, *, seed, flavour="plain"):
    note(out, "data")
    for name in ("train", "extra", "held"):
        (out / f"{name}.parquet").write_text(f"{name} {seed} {flavour if name == 'extra' else ''}")

def build(out, *, seed, **params):
    note(out, "core")
    checkpoint(out)

def train(cfg, job):
    out = job.out
    note(out, job.stage)
    if os.environ.get("TOY_FAIL") == job.stage:
        (out / "checkpoint").mkdir()
        print("the reason is here")
        sys.exit(3)
    if os.environ.get("TOY_WAIT") == job.stage:
        time.sleep(60)
    if os.environ.get("TOY_RAISE") == job.stage:
        from core.strict import ConfigError
        raise ConfigError("the judge refused") if os.environ["TOY_AS"] == "ours" else KeyError("colour")
    with open(out / "metrics.jsonl", "a") as file:
        for step in range(1, 4):
            file.write(json.dumps({"step": step, "reward": step / 4, "urls": len(getattr(job, "urls", ()))}) + chr(10))
    checkpoint(out / "checkpoint")
'''

PIPELINE = {
    "name": "toy",
    "data": {"generate": {"by": "toy_stages:generate", "sets": ["train", "extra", "held"]}},
    "servers": {"max_model_tokens": 128},
    "eval": {
        "sets": {
            "thinking": {"set": "held", "split": "think"},
            "direct": {"set": "held", "split": "direct"},
        },
        "max_completion_tokens": 8,
    },
    "wandb": {"mode": "disabled"},
    "core": {"build": "toy_stages:build"},
}
BASIC_SFT = {
    "max_tokens": 64,
    "phases": [
        {
            "name": "only",
            "data": [{"set": "train"}],
            "optim": {"learning_rate": 0.001, "epochs": 1, "global_batch_size": 8},
        }
    ],
}
RLVR = {
    "prepare": {"pass_at_k": {"source": {"set": "extra"}, "into": "hard"}},
    "data": [{"set": "hard"}],
    "rewards": [{"name": "own", "use": "toy_stages:train", "weight": 1.0}],
    "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
    "rollout": {"prompts_per_batch": 4, "group_size": 2, "max_completion_tokens": 8},
    "batches": 2,
    "mini_batch": 8,
    "optim": {"learning_rate": 0.001},
    "parity": {"bound": 0.01},
}


def scores_of(accuracy: float) -> dict:
    mode = {"accuracy": accuracy, "n": 10, "ci95": [0.1, 0.9], "format_rate": 1.0, "mean_tokens": 4.0}
    return {"thinking": mode, "direct": mode}


@dataclass
class Toy:
    """The toy chain's recipe folder, and a record of its run."""

    root: Path
    evaluated: list[str] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    pools: list[str] = field(default_factory=list)
    printed: str = ""
    before_scores: Callable[[str], None] = lambda stage: None
    """Called with a stage's name when its evaluation begins."""

    @property
    def recipe_dir(self) -> Path:
        return self.root / "recipe"

    @property
    def run_dir(self) -> Path:
        return self.root / "runs" / "toy"

    @property
    def stages(self) -> tuple[Stage, ...]:
        def evaluate(context) -> dict:
            self.before_scores(context.stage)
            self.evaluated.append(context.stage)
            sample = {"id": "a", "mode": "think", "question": "2+2?", "answer": "4", "completion": "4"}
            (context.out / "samples.jsonl").write_text(json.dumps({**sample, "correct": True}) + "\n")
            return scores_of(0.5)

        def prepare(context) -> dict:
            self.prepared.append(context.stage)
            (context.out / "hard.parquet").write_text("rows")
            return {"pass_at_k": {"kept": 3, "dropped": {"never solved": 2}}}

        return (
            Stage("core", "chain.make:core", "Core", evaluate=evaluate),
            Stage("basic_sft", "toy_stages:train", "SFT", evaluate=evaluate),
            Stage("rlvr", "toy_stages:train", "RL", needs_pool=True, prepare=prepare, evaluate=evaluate),
        )

    @contextmanager
    def open_pool(self, cfg, model, logs):
        self.pools.append(f"start with {model.parent.name}")
        try:
            yield lambda: ["http://toy"]
        finally:
            self.pools.append("stop")

    def calls(self) -> list[str]:
        """Stages whose process has run since the last call."""
        file = self.root / "calls.txt"
        calls = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return calls

    def run(self, *overrides: str, **options) -> None:
        console = Console(file=StringIO(), width=200)
        try:
            run(
                load_recipe(self.recipe_dir, overrides),
                runs_dir=self.root / "runs",
                stages=self.stages,
                open_pool=self.open_pool,
                display=Display(console),
                **options,
            )
        finally:
            self.printed = console.file.getvalue()


@pytest.fixture
def write_recipe(tmp_path) -> Callable[..., Path]:
    """Writes a recipe folder: name, then a mapping per file."""

    def write(name: str, **files: dict) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, values in files.items():
            (folder / f"{file}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return folder

    return write


@pytest.fixture
def toy(tmp_path, monkeypatch, write_recipe) -> Toy:
    """A recipe of data, core, basic_sft and rlvr whose processes only write files."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_stages.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setenv("TOY_CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    # The sets are not Parquet, and the core has no tokenizer.
    monkeypatch.setattr(runner, "check_rows", lambda *_: None)
    monkeypatch.setattr(runner, "room_for", lambda *_: None)
    write_recipe("recipe", pipeline=PIPELINE, sft={"basic_sft": BASIC_SFT}, rlvr={"rlvr": RLVR})
    return Toy(tmp_path)
