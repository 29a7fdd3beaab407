"""Builds of DeepSpeed's operators: one at a time, and a killed one does not stop the next."""

import fcntl
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from deepspeed.ops.op_builder.builder import OpBuilder

ROOT = Path(__file__).parents[2]
BUILD = """
import sys, time, types
from pathlib import Path
from core.training.operators import _guarded

folder, work = Path(sys.argv[1]), sys.argv[2]

def build(builder):
    lock = folder / "op" / "lock"
    lock.touch(exist_ok=False)  # as torch does, which waits forever if the file exists
    print("builds", flush=True)
    while work == "killed":
        time.sleep(1)
    lock.unlink()

_guarded(build)(types.SimpleNamespace(name="op"))
"""


def start(folder, work):
    (folder / "op").mkdir(exist_ok=True)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", BUILD, str(folder), work]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_build_waits_for_a_running_one_and_takes_over_from_a_killed_one(tmp_path):
    first = start(tmp_path, "killed")
    assert first.stdout.readline() == "builds\n"
    with (tmp_path / "op.in-use").open("wb") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    second = start(tmp_path, "finished")
    first.kill()
    first.communicate()
    assert second.communicate()[0] == "builds\n"
    assert second.returncode == 0


def test_deepspeed_builds_by_the_method_that_is_guarded_and_keeps_what_it_loaded():
    load = inspect.getsource(OpBuilder.load)
    assert "self.jit_load(verbose)" in load
    assert "_loaded_ops[self.name]" in load
    assert "os.path.join(build_directory, 'lock')" in inspect.getsource(
        torch.utils.cpp_extension._jit_compile
    )
