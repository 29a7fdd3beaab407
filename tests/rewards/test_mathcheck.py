"""The checking process: whatever it is asked, whoever kills it, one job is lost and the next is answered."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards import mathcheck
from rewards.equality import Outcome
from rewards.mathcheck import MathChecker

HANGS = ("3x", "9^{9^{9^{9}}}")
EASY = ("(x+1)^2", "x^2+2x+1")


@pytest.fixture
def checker():
    checker = MathChecker(deadline_s=30)  # a shared machine may make an honest job wait
    yield checker
    checker.close()


def worker_of(keeper: int) -> int:
    """The keeper's one child."""
    (child,) = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    return int(child)


def gone(pid: int, within_s: float = 20) -> bool:
    """Whether the process ends (a zombie has)."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def run(code: str, *args: str, returncode: int = 0, **where) -> str:
    """What the code prints in an interpreter of its own."""
    command = [sys.executable, "-P", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **where)
    assert done.returncode == returncode, done.stderr
    return done.stdout


def test_a_hung_job_times_out_and_its_process_is_replaced(checker):
    assert checker.compare("x", "2x") == Outcome.DIFFERENT
    keeper, worker = checker.pid, worker_of(checker.pid)
    checker.deadline_s = 0.2
    assert checker.compare(*HANGS) == Outcome.TIMEOUT
    checker.deadline_s = 30
    assert checker.compare(*EASY) == Outcome.EQUAL
    assert gone(worker)
    assert checker.pid == keeper
    assert worker_of(keeper) != worker


def test_a_killed_worker_costs_one_job(checker):
    checker.compare("x", "2x")
    worker = worker_of(checker.pid)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    assert checker.compare(*HANGS) == Outcome.CRASHED
    assert checker.compare(*EASY) == Outcome.EQUAL


def test_a_killed_keeper_costs_one_job_and_leaves_no_worker(checker):
    checker.compare("x", "2x")
    keeper, worker = checker.pid, worker_of(checker.pid)
    threading.Timer(0.3, os.kill, (keeper, signal.SIGKILL)).start()
    assert checker.compare(*HANGS) == Outcome.CRASHED
    assert gone(worker)
    assert checker.compare(*EASY) == Outcome.EQUAL


def test_memory_is_limited(checker):
    checker.compare("x", "2x")
    limits = Path(f"/proc/{worker_of(checker.pid)}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(2 << 30)


def test_answers_are_remembered_without_the_process(checker):
    assert checker.compare(*EASY) == Outcome.EQUAL
    checker.close()
    assert checker.pid is None
    assert checker.compare(*EASY) == Outcome.EQUAL
    assert checker.pid is None


def test_it_works_off_the_main_thread_and_from_many(checker):
    found = {}

    def ask(n):
        found[n] = checker.compare(f"x+{n}", f"{n}+x"), checker.compare(f"x+{n}", f"{n}-x")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(1, 9), (Outcome.EQUAL, Outcome.DIFFERENT))


FORKED = """
import os
from rewards.mathcheck import SHARED
SHARED.compare("x", "2x")
keeper = SHARED.pid
child = os.fork()
if child == 0:
    assert SHARED.pid is None
    assert SHARED.compare("x+1", "1+x") == "equal"
    assert SHARED.pid != keeper
    raise SystemExit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert SHARED.compare("x+2", "2+x") == "equal"
assert SHARED.pid == keeper
"""


def test_a_forked_child_starts_a_process_of_its_own():
    run(FORKED)


ORPHAN = """
import os, sys
from rewards.mathcheck import SHARED
SHARED.compare("x", "2x")
print(SHARED.pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("way", ["killed", "finished"])
def test_no_process_outlives_its_caller(way):
    said = run(ORPHAN, way, returncode=-signal.SIGKILL if way == "killed" else 0)
    assert gone(int(said))


SHADOWED = """
from rewards.mathcheck import SHARED
assert SHARED.compare("x+1", "1+x") == "equal"
"""


def test_a_folder_named_rewards_where_one_works_is_not_ours(tmp_path):
    for name in ("rewards", "math_verify", "sympy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('a stranger called {name}')")
    run(SHADOWED, cwd=tmp_path)


def test_a_process_that_cannot_start_says_why(checker, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("""print('{"error": "ImportError: no algebra"}')""")
    monkeypatch.setattr(mathcheck, "_WORKER", broken)
    with pytest.raises(mathcheck.MathCheckError, match="ImportError: no algebra"):
        checker.compare(*EASY)
    monkeypatch.undo()
    assert checker.compare(*EASY) == Outcome.EQUAL


def test_text_that_is_no_text_is_answered(checker):
    # a lone surrogate, a line break, a null: none may break the protocol
    for odd in ("\ud800x", "x\n+1", "x\0"):
        assert checker.compare("x+y", odd) in (Outcome.DIFFERENT, Outcome.UNPARSEABLE)
    assert checker.compare(*EASY) == Outcome.EQUAL
