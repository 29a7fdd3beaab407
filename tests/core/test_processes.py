"""Children end with their parent, however it ends, and with everything below them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from core import processes

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pids", below.pid, __import__("os").getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from core import processes
processes.start([sys.executable, "-c", sys.argv[2]], log=Path(sys.argv[1]), environment={}, grace_s=0.2)
time.sleep(600)
"""


def begin(tmp_path, *command, grace_s=0.2):
    return processes.start(
        [sys.executable, "-c", *command], log=tmp_path / "log", environment={}, grace_s=grace_s
    )


def pids(log):
    end = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.02)
    return [int(word) for word in log.read_text().split()[1:]]


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(found):
    end = time.monotonic() + 30
    while not all(gone(pid) for pid in found):
        assert time.monotonic() < end, "an orphan"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [processes.stop, processes.kill])
def test_a_child_that_ignores_the_signal_ends_with_what_it_started(tmp_path, how):
    process = begin(tmp_path, STUBBORN)
    found = pids(tmp_path / "log")
    how(process)
    assert process.returncode == -signal.SIGKILL
    wait_until_gone(found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_nothing_outlives_a_parent_that_could_stop_nothing(tmp_path, number):
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-P", "-c", PARENT, str(log), STUBBORN])
    found = pids(log)
    parent.send_signal(number)
    parent.wait()
    wait_until_gone(found)


def test_a_killed_guard_takes_its_child_along(tmp_path):
    process = begin(tmp_path, "import os, time; print('pids', os.getpid(), flush=True); time.sleep(600)")
    found = pids(tmp_path / "log")
    os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(found)
    process.wait()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
        ("pass", "ended with exit code 0"),
    ],
)
def test_the_parent_sees_how_a_child_ended(tmp_path, code, words):
    process = begin(tmp_path, code)
    assert processes.ended(process, 30)
    assert processes.how_it_ended(process.returncode) == words


def test_a_segmentation_fault_leaves_a_trace(tmp_path):
    code = "def deep():\n    import ctypes; ctypes.string_at(0)\ndeep()"
    environment = processes.inherited_environment()
    process = processes.start([sys.executable, "-c", code], log=tmp_path / "log", environment=environment)
    assert processes.ended(process, 30)
    assert "in deep" in processes.last_lines(tmp_path / "log")


HOLDS = """
import time
from multiprocessing import get_context
held = get_context("spawn").Semaphore()
print("name", held._semlock.name.strip("/"), flush=True)
time.sleep(600)
"""


def test_semaphores_of_a_killed_process_are_removed_and_held_ones_stay(tmp_path):
    files = []
    for name in ("killed", "running"):
        log = tmp_path / name
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDS], stdout=out, stderr=subprocess.DEVNULL, start_new_session=True
            )
        end = time.monotonic() + 30
        while not log.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        files.append(processes.SHARED_MEMORY / f"sem.{log.read_text().split()[1]}")
        os.utime(files[-1], (0, 0))
        if name == "killed":
            os.killpg(process.pid, signal.SIGKILL)  # the tracker as well, which would remove it
            process.wait()
    try:
        assert str(files[0]) in processes.remove_leftovers()
        assert [file.exists() for file in files] == [False, True]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_leftovers_are_recognised_by_name_owner_and_process(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f"torch_{os.getpid()}_1_0", "someone-elses", "psm_new"]
    for name in (f"sem.loky-{dead.pid}-abc", f"torch_{dead.pid}_7_0", *kept):
        (tmp_path / name).touch()
    assert len(processes.remove_leftovers(tmp_path)) == 2
    assert {file.name for file in tmp_path.iterdir()} == set(kept)


def test_a_child_whose_parent_ended_before_it_asked_to_end_with_it_ends_at_once():
    code = "import os\nfrom core.processes import end_with_parent\nend_with_parent({})\nprint('lives')"
    for parent, output in (("os.getppid()", "lives\n"), ("os.getppid() + 1", "")):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code.format(parent)], capture_output=True, text=True
        )
        assert done.stdout == output
        assert done.returncode == (0 if output else 1)
