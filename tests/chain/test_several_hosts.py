"""Two hosts on loopback: two `posttrain run` in sessions of their own, one rank each, and two rollout servers by URL.

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

    def __init__(self, root: Path, core: Path, engine: str, **stage):
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
                "urls": [f"http://127.0.0.1:{port}" for port in self.ports],
                "weights_dir": str(root / "weights"),
                "token_file": str(root / "token"),
            },
            "wandb": {"mode": "disabled"},
            "core": {"path": str(core)},
            "rlvr": {**STAGE, **stage},
        }
        (root / "recipe").mkdir()
        (root / "recipe" / "pipeline.yaml").write_text(yaml.safe_dump(recipe))

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

    def hosts(self, runs: str) -> list[subprocess.Popen]:
        return [self.run(f"host-{node}", runs, "--nnodes", "2", "--node-rank", str(node)) for node in (0, 1)]

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
def test_two_hosts_train_what_two_ranks_on_one_host_train(tiny_core, tmp_path):  # noqa: F811
    with site(tmp_path, tiny_core, "hf") as place:
        servers = [place.serve(0), place.serve(1)]
        for index in range(2):
            place.wait_for("Ctrl-C stops the servers", tmp_path / f"server-{index}" / "output.txt")
        place.finish(*place.hosts("two"))
        place.finish(place.run("alone", "one"))
        one, two = place.metrics("one"), place.metrics("two")
        assert [line["step"] for line in two] == [1, 2, 3]
        for ours, theirs in zip(two, one, strict=True):
            for name in ("loss", "reward", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (name, ours["step"])
            assert ours["rollout/servers"] == 2
            assert ours["parity/max_logprob_difference"] < 1e-4  # of both servers
        assert "the leader has finished" in place.output("host-1")
        assert "rlvr: ranks here: 1" in place.output("host-1")
        assert not list((tmp_path / "weights").iterdir())
        assert [server.poll() for server in servers] == [None, None]


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
        hosts = place.hosts("two")
        stage = tmp_path / "two" / "chain" / "rlvr.partial"
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
        hosts[0].send_signal(signal.SIGINT)
        place.finish(hosts[0], code=130)
        place.finish(hosts[1], code=1)
        lines = read_jsonl(stage / "metrics.jsonl")
        serving = [line["rollout/servers"] for line in lines]
        assert (serving[0], min(serving), serving[-1]) == (2, 1, 2)
        assert lines[-1]["rollout/servers_lost"] == 1
        assert all(line["parity/max_logprob_difference"] < 1e-3 for line in lines)
        assert "ALARM rollout_server" in place.output("host-0")


@pytest.mark.slow
def test_ctrl_c_on_either_host_and_a_killed_host_end_everything_that_was_started(tiny_core, tmp_path):  # noqa: F811
    with site(tmp_path, tiny_core, "hf", batches=1000) as place:
        for index in range(2):
            place.serve(index)
            place.wait_for("Ctrl-C stops the servers", tmp_path / f"server-{index}" / "output.txt")
        for runs, node, number, codes in (
            ("leader", 0, signal.SIGINT, (130, 1)),
            ("follower", 1, signal.SIGINT, (1, 130)),
            ("killed", 1, signal.SIGKILL, (1, -signal.SIGKILL)),
        ):
            hosts = place.hosts(runs)
            place.wait_for('"step": 1', tmp_path / runs / "chain" / "rlvr.partial" / "metrics.jsonl")
            children = [child for host in hosts for child in below(host)]
            hosts[node].send_signal(number)
            for host in hosts:
                host.wait(120)
            assert tuple(host.returncode for host in hosts) == codes, place.output("host-0") + place.output(
                "host-1"
            )
            wait_until_gone(children)
        assert "the leader has ended: it was interrupted" in place.output("host-1")
        assert "posttrain was interrupted there" in place.output("host-0")
        assert re.search(r"node 1 \(.*\) is lost: its connection ended", place.output("host-0"))
        assert not list((tmp_path / "weights").iterdir())
