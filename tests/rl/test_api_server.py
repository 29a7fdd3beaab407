"""The module that starts vLLM: engine processes end with the process that started them. vLLM is a substitute here."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ENTRY = """
import multiprocessing, os, time

def engine(at):
    if at:
        multiprocessing.get_context("spawn").Process(target=engine, args=(at - 1,)).start()
    print(os.getpid(), flush=True)
    time.sleep(600)

def main():
    engine(2)
"""


@pytest.fixture
def tree(tmp_path):
    """A server, its engine and the engine's worker."""
    package = tmp_path.joinpath("vllm", "entrypoints", "launchers", "api_server")
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:3]):
        (folder / "__init__.py").touch()
    (package / "entry.py").write_text(ENTRY)
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "rl.rollout.api_server"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = [psutil.Process(int(server.stdout.readline())) for _ in range(3)]
    yield server, found
    server.kill()
    server.communicate()


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_killing_a_process_ends_those_that_it_started(tree, victim):
    server, found = tree
    below = sorted(found, key=lambda one: len(one.parents()))
    assert [one.ppid() for one in below[1:]] == [server.pid, below[1].pid]
    below[victim == "engine"].kill()
    ended = below[1:] if victim == "server" else below[2:]
    assert psutil.wait_procs(ended, timeout=30)[1] == []
    assert (server.poll() is None) == (victim == "engine")


def test_an_engine_whose_server_ended_first_does_not_begin():
    code = (
        "import runpy, sys; runpy.run_module('rl.rollout.api_server', run_name='__mp_main__'); print('lives')"
    )
    for parent, output in ((os.getpid(), "lives\n"), (os.getppid(), "")):
        environment = {**os.environ, "POSTTRAIN_SERVER_PROCESS": str(parent), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout == output
