"""Rollout servers on other hosts, by URL: `posttrain rollout-server` and `run` in sessions of their own on loopback.

They share only the run's folder and the weights' folder: working directory and home differ.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from core.files import read_jsonl
from corpus.records import write_records

from ..rl.conftest import record, tiny_core  # noqa: F401 - fixture

REWARD = '''
def count(completion, example):
    """A reward with spread: the share of digits that the completion could hold."""
    return min(1.0, sum(letter.isdigit() for letter in completion) / 6)
'''
STAGE = {
    "data": [{"set": "rl"}],
    "rewards": [{"name": "digits", "use": "counted_digits:count", "weight": 1.0}],
    "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
    "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 12, "temperature": 0.7},
    "dynamic_sampling": {"max_rounds": 0},
    "batches": 3,
    "mini_batch": 16,
    "optim": {"learning_rate": 1e-3, "micro_batch_size": 4, "schedule": "constant"},
    "learner": {"processes": 2, "deepspeed": None},
    "parity": {"bound": 1e-3, "sequences": 2, "tokens": 6},
    "self_test_rows": 0,
    "watch": {"max_repeats": 1.0},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    """A recipe, its servers, and the hosts that run it."""

    def __init__(self, root: Path, core: Path, engine: str, own: dict | None = None, **stage):
        """`own`: settings of servers that the run starts itself; None: servers by URL."""
        self.root, self.core, self.started = root, core, []
        self.ports = [free_port(), free_port()]
        (root / "code").mkdir()
        (root / "code" / "counted_digits.py").write_text(REWARD)
        write_records(root / "rl.parquet", [record(n, image=bool(n % 4)) for n in range(24)])
        recipe = {
            "name": "chain",
            "data": {"sets": {"rl": str(root / "rl.parquet")}},
            "servers": {
                **{"engine": engine, "max_model_tokens": 256, "max_sequences": 64},
                "weights_dir": str(root / "weights"),
                **({**self.by_url(), "token_file": str(root / "token")} if own is None else own),
            },
            "hardware": {"nodes": 1 if own is None else 2},
            "wandb": {"mode": "disabled"},
            "core": {"path": str(core)},
            "rlvr": {**STAGE, **stage},
        }
        (root / "recipe").mkdir()
        (root / "recipe" / "pipeline.yaml").write_text(yaml.safe_dump(recipe))

    def by_url(self) -> dict:
        return {"urls": [f"http://127.0.0.1:{port}" for port in self.ports]}

    def posttrain(self, name: str, *words: str) -> subprocess.Popen:
        """The command on a simulated host: separate session, working directory and home."""
        home = self.root / name
        home.mkdir(exist_ok=True)
        path = os.pathsep.join([str(self.root / "code"), str(Path(__file__).parents[2])])
        with (home / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "chain.cli.main", *words],
                cwd=home,
                env={**os.environ, "HOME": str(home), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def serve(self, index: int) -> subprocess.Popen:
        recipe, port = str(self.root / "recipe"), str(self.ports[index])
        return self.posttrain(
            f"server-{index}", "rollout-server", str(self.core), "--recipe", recipe, "--port", port
        )

    def run(self, name: str, runs: str, *words: str) -> subprocess.Popen:
        return self.posttrain(
            name, "run", str(self.root / "recipe"), "--runs-dir", str(self.root / runs), *words
        )

    def output(self, name: str) -> str:
        return (self.root / name / "output.txt").read_text()

    def wait_for(self, pattern: str, file: Path, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not (file.exists() and re.search(pattern, file.read_text(errors="replace"))):
            assert time.monotonic() < end, (
                f"no {pattern!r} in {file}:\n{file.exists() and file.read_text()[-3000:]}"
            )
            time.sleep(0.05)

    def finish(self, *processes: subprocess.Popen, code: int = 0) -> None:
        for process in processes:
            process.wait(300)
        everything = "\n".join(self.output(path.parent.name) for path in self.root.glob("*/output.txt"))
        assert [process.returncode for process in processes] == [code] * len(processes), everything[-6000:]

    def metrics(self, runs: str) -> list[dict]:
        return read_jsonl(self.root / runs / "chain" / "rlvr" / "metrics.jsonl")

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.started:
            process.wait(60)


@contextmanager
def site(*args, **stage):
    place = Site(*args, **stage)
    try:
        yield place
    finally:
        place.end()


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_a_server_that_is_killed_and_replaced_serves_again_with_the_current_weights(
    tiny_core,  # noqa: F811
    tmp_path,
    engine,
):
    with site(tmp_path, tiny_core, engine, batches=1000) as place:
        servers = [place.serve(0), place.serve(1)]
        for index in range(2):
            place.wait_for("Ctrl-C stops the servers", tmp_path / f"server-{index}" / "output.txt")
        run = place.run("alone", "one")
        stage = tmp_path / "one" / "chain" / "rlvr.partial"
        place.wait_for('"step": 2', stage / "metrics.jsonl")
        engines = below(servers[0])
        servers[0].kill()
        for process in engines:  # as when their machine fails
            process.kill()
        wait_until_gone(engines)
        place.wait_for('"rollout/servers": 1', stage / "metrics.jsonl")
        place.serve(0)
        place.wait_for("is back with the current weights", stage / "alarms.jsonl")
        steps = len(read_jsonl(stage / "metrics.jsonl"))
        place.wait_for(f'"step": {steps + 2},', stage / "metrics.jsonl")
        run.send_signal(signal.SIGINT)
        place.finish(run, code=130)
        lines = read_jsonl(stage / "metrics.jsonl")
        serving = [line["rollout/servers"] for line in lines]
        assert (serving[0], min(serving), serving[-1]) == (2, 1, 2)
        assert lines[-1]["rollout/servers_lost"] == 1
        assert all(line["parity/max_logprob_difference"] < 1e-3 for line in lines)
        assert "ALARM rollout_server" in place.output("alone")
