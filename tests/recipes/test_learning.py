"""The demo learns, and from its rewards: RLVR raises held-out accuracy, and with shuffled rewards it does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHUFFLED = '''
"""Rewards that say nothing: each completion gets the score of one that came before it, whichever."""
import random, threading
from rewards.answer import AnswerReward
from rewards.style.format import ThinkFormat


class Shuffled:
    def __init__(self, of: str):
        self.reward = {"answer": AnswerReward(), "format": ThinkFormat()}[of]
        self.scores, self.rng, self.lock = [], random.Random(0), threading.Lock()

    def __call__(self, completion, example):
        score = self.reward(completion, example).score
        with self.lock:
            self.scores.append(score)
            return self.rng.choice(self.scores)
'''


def run(runs: Path, name: str, *words: str) -> dict:
    """`posttrain run recipes/demo`; the stages of its report by name."""
    command = [sys.executable, "-P", "-m", "chain.cli.main", "run", str(ROOT / "recipes/demo")]
    done = subprocess.run(
        [*command, "--name", name, "--runs-dir", str(runs), *words], cwd=runs, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {stage["name"]: stage for stage in json.loads((runs / name / "report.json").read_text())["stages"]}


def thinking(stage: dict) -> float:
    return stage["eval"]["thinking"]["accuracy"]


@pytest.mark.slow
def test_rlvr_learns_from_its_rewards_and_not_without_them(tmp_path):
    short = ["--set", "soup=null", "--set", "rlvr.batches=20"]
    start = thinking(run(tmp_path, "real", *short, "--until", "longcot_sft")["longcot_sft"])
    shutil.copytree(tmp_path / "real", tmp_path / "control")
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    rewards = [
        {"name": name, "use": "shuffled:Shuffled", "weight": weight, "params": {"of": name}}
        for name, weight in (("answer", 0.8), ("format", 0.2))
    ]
    span = ["--from", "rlvr", "--until", "rlvr"]
    real = thinking(run(tmp_path, "real", *short, *span)["rlvr"])
    control = thinking(
        run(tmp_path, "control", *short, *span, "--set", f"rlvr.rewards={json.dumps(rewards)}")["rlvr"]
    )
    assert real - start > 0.25
    assert control - start < 0.1
