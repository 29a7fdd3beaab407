"""Any process of a run is killed at random moments; the runs that follow end as an undisturbed one.

`KILLS=8 pytest -m slow tests/recipes/test_kills.py` makes it shorter.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from core import processes

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "40"))
MARK = "POSTTRAIN_KILL_TEST"
ROLES = {
    "learner": ("chain.worker",),
    "server": ("api_server", "EngineCore", "rl.rollout.hf"),
    "grader": ("mathworker", "isolation_worker", "forkserver", "pebble"),
}
SAVING = ("sft.save_every=2", "longcot_sft.save_every=2", "think_fusion.save_every=2")
SAVING += ("rlvr.save_every=1", "mixed_rl.save_every=1")
TIMES = ("elapsed", "seconds", "time", "idle", "_per_second", "rollout_server", "tokens_per_s")


class Run:
    """The smoke chain in a folder, run as often as it takes."""

    def __init__(self, folder: Path, overrides: tuple[str, ...] = ()) -> None:
        self.folder, self.overrides, self.log = folder, overrides, folder / "output.txt"
        self.seen: set[psutil.Process] = set()
        """Processes that were below a runner: some overwrite the environment that holds MARK."""
        folder.mkdir(parents=True)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-P", "-m", "chain.cli.main", "run", "recipes/smoke"]
        command += ["--runs-dir", str(self.folder)]
        for override in self.overrides:
            command += ["--set", override]
        environment = {**os.environ, MARK: str(self.folder), "WANDB_MODE": "offline"}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def processes(self) -> dict[str, list[psutil.Process]]:
        """What is alive of the run, by role; the runner and unnamed helpers are `other`."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                ours = process in self.seen or process.environ().get(MARK) == str(self.folder)
                if not ours or process.status() == "zombie":
                    continue
                self.seen |= {process, *process.children(recursive=True)}
                words = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            role = next(
                (role for role, names in ROLES.items() if any(name in words for name in names)), "other"
            )
            found.setdefault(role, []).append(process)
        return found

    def orphans(self, patience_s: float = 60) -> list[str]:
        """What is still alive so long after the runner's end."""
        until = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.5)
        return [" ".join(one.cmdline()) for some in left.values() for one in some]


def results(run: Path) -> dict[str, object]:
    """Weights by hash, metrics and scores without times, of every stage."""
    found: dict[str, object] = {}
    for file in sorted(run.rglob("*.safetensors")):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(run.glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(run))] = [
            {key: value for key, value in line.items() if not any(part in key for part in TIMES)}
            for line in lines
        ]
    for file in sorted(run.glob("*/eval.json")):
        found[str(file.relative_to(run))] = json.loads(file.read_text())["scores"]
    return found


def killed_run(run: Run, kills: int, seed: int) -> list[str]:
    """Kill `kills` times, then let the chain end; returns the killed roles in order."""
    draw, made = random.Random(seed), []
    while True:
        runner, before = run.start(), len(made)
        while len(made) < kills:
            try:
                runner.wait(draw.uniform(1, 45))
                break
            except subprocess.TimeoutExpired:
                alive = run.processes()
            role = draw.choice(["runner", *sorted(set(alive) & set(ROLES))])
            victim = runner if role == "runner" else draw.choice(alive[role])
            victim.kill()
            made.append(role)
            if role == "runner":
                break
        code = runner.wait(600)
        assert run.orphans() == [], made
        if len(made) == before:
            assert code == 0, (
                f"a run that nobody disturbed failed, after {made}:\n{run.log.read_text()[-3000:]}"
            )
        if code == 0 and len(made) >= kills:
            return made
        if code == 0:  # it was faster than we: once more from the beginning
            shutil.rmtree(run.folder / "smoke")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), SAVING], ids=["stages start again", "stages are resumed"])
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(overrides, tmp_path):
    undisturbed = Run(tmp_path / "undisturbed", overrides)
    assert undisturbed.start().wait(1200) == 0, undisturbed.log.read_text()[-3000:]
    run = Run(tmp_path / "killed", overrides)
    made = killed_run(run, KILLS // 2, seed=len(overrides))
    print(f"{len(made)} kills: {made}")
    assert results(run.folder / "smoke") == results(undisturbed.folder / "smoke")
    time.sleep(processes.SETTLED_S)  # until then a file might belong to a process that is just starting
    assert processes.remove_leftovers(processes.SHARED_MEMORY) == []
