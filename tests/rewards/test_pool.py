"""The checking processes: for any question, kill or stop, the other questions still get their answers."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rewards import pool
from rewards.answers import checker as checker_module
from rewards.answers import expression
from rewards.answers.checker import MathChecker
from rewards.answers.outcome import Outcome, Pair
from rewards.pool import Ending, Pool, PoolError

EASY = (r"\sin^2 x", r"1-\cos^2 x")
"""Needs sympy: the types do not decide it."""
NUMBERS = itertools.count(2)
NOT_IN_TIME = (Outcome.OVER_TIME, Outcome.TIMEOUT)
"""Whose fault it is depends on how busy the machine is."""

HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "tower of variables": "x^{x^{x^{x^{x^{9^{9^{9}}}}}}}",
    "factorial": r"\left(10^{10}\right)!",
    "factorial of a factorial": "((9!)!)!",
    "binomial": r"\binom{10^{12}}{5\cdot 10^{11}}",
    "long product": "(x+1)^{4000}(x+2)^{4000}(x+3)^{4000}",
    "high degree": "+".join(f"{n}x^{{{n}}}" for n in range(1, 90)) + "=7",
    "sparse degree": "x^{1000000000}-1",
    "determinant": r"\det\begin{pmatrix}"
    + r"\\".join("&".join(f"a_{{{row}{column}}}" for column in range(9)) for row in range(9))
    + r"\end{pmatrix}",
    "matrix power": r"\begin{pmatrix}a&b&c\\d&e&f\\g&h&i\end{pmatrix}^{90}",
    "sum": r"\sum_{k=1}^{10^{9}} \frac{1}{k^3+k}",
    "integral": r"3x+\int_0^1 \frac{\sin(t^{t^t})}{\ln(t+e^{t})} dt",
    "deep brackets": "(" * 500 + "x" + ")" * 500,
    "deep fractions": r"\frac{1}{1+" * 120 + "x" + "}" * 120,
    "deep roots": r"\sqrt{1+" * 150 + "x" + "}" * 150,
    "unclosed boxes": r"\boxed{" * 3000,
    "unclosed brackets": "(" * 5000,
    "many minus signs": "-" * 5000 + "x",
    "many primes": "f" + "'" * 3000 + "(x)",
    "huge decimal": "0." + "1" * 3000 + "x",
    "many symbols": "+".join(f"x_{{{n}}}^{{{n}}}" for n in range(300)),
    "nested functions": r"\sin(\cos(" * 60 + "x" + "))" * 60,
    "long equation chain": "=".join("x" * 3 for _ in range(300)),
}


@pytest.fixture
def make():
    """Makes checkers, and closes them."""
    made: list[MathChecker] = []

    def make(**settings) -> MathChecker:
        # on a shared machine, an honest job may have to wait
        made.append(MathChecker(**{"deadline_s": 30, "workers": 1, **settings}))
        return made[-1]

    yield make
    for checker in made:
        checker.close()


@pytest.fixture(scope="module")
def shared():
    """A shared checker for tests that do not damage it."""
    checker = MathChecker(deadline_s=30, workers=2)
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def one_worker():
    return MathChecker(workers=1)


@pytest.fixture
def single(one_worker):
    """One checker with one worker for the tests that let it live; a keeper takes a second to start."""
    one_worker.pool.deadline_s, one_worker.queue_s = 30, 60
    return one_worker


@pytest.fixture
def threads():
    """Threads for calls that are to wait; the checkers must be let go before they are joined."""
    with ThreadPoolExecutor(32) as threads:
        yield threads


def until(condition: Callable[[], object], within_s: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that a parent outside this test has not buried yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def run(code: str, *args: str, returncode: int = 0, **where) -> str:
    """Output of the code in a separate interpreter."""
    command = [sys.executable, "-P", "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **where)
    assert done.returncode == returncode, done.stderr
    return done.stdout


def new() -> tuple[str, str]:
    """Two new equal answers."""
    n = next(NUMBERS)
    return rf"\sin^2 y+{n}", rf"{n + 1}-\cos^2 y"


def hanging() -> tuple[str, str]:
    """A new question that exceeds every deadline."""
    return "3x", f"9^{{9^{{9^{{{next(NUMBERS) + 9}}}}}}}"


def started(checker: MathChecker) -> int:
    """A worker of a checker that has answered."""
    checker.compare(*new())
    until(lambda: checker.pool.pids)
    return checker.pool.pids[0]


def begun(checker: MathChecker) -> bool:
    """Whether a worker has a question."""
    return any(question.job.begun() for question in list(checker._state().open.values()))


def test_a_hung_job_is_the_predictions_fault_and_its_worker_is_replaced(single, monkeypatch):
    monkeypatch.setattr(pool, "CPU_SHARE", 0.01)  # independent of the machine's load
    worker = started(single)
    assert single.compare(*hanging()) == Outcome.OVER_TIME
    monkeypatch.undo()
    assert single.compare(*new()) == Outcome.EQUAL
    until(lambda: gone(worker))
    assert single.pool.pids != [worker]


def test_a_worker_stopped_at_its_job_is_nobodys_fault(single, threads, monkeypatch):
    monkeypatch.setattr(pool, "CPU_SHARE", 1000)
    worker = started(single)
    single.pool.deadline_s = 1
    answer = threads.submit(single.compare, *hanging())
    until(lambda: begun(single))
    os.kill(worker, signal.SIGSTOP)
    assert answer.result() == Outcome.TIMEOUT
    single.pool.deadline_s = 30
    until(lambda: gone(worker))
    assert single.compare(*new()) == Outcome.EQUAL


def test_a_job_that_loses_two_workers_is_crashed_and_not_remembered(single, threads):
    started(single)
    answer = threads.submit(single.compare, *hanging())
    until(lambda: begun(single))
    while not answer.done():  # a worker killed before it took the job up does not count
        for worker in single.pool.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    assert answer.result() == Outcome.CRASHED
    assert single.compare(*new()) == Outcome.EQUAL
    single.pool.deadline_s = 0.2
    assert single.compare(*hanging()) in NOT_IN_TIME


def test_a_job_that_its_worker_took_along_ends_and_the_workers_are_replaced(make, threads):
    checker = make(deadline_s=0.2, queue_s=0.3)
    checker.queue_s = 60
    started(checker)
    checker.queue_s = 0.3
    os.kill(
        checker.pool.pids[0], signal.SIGSTOP
    )  # as a worker that died with the job: nothing acknowledges it
    answer = threads.submit(checker.compare, *new())
    until(lambda: checker._state().open)
    next(iter(checker._state().open.values())).job.tried = True
    assert answer.result() == Outcome.CRASHED
    checker.queue_s = checker.pool.deadline_s = 60
    assert checker.compare(*new()) == Outcome.EQUAL


def test_workers_killed_in_mid_batch_cost_their_own_jobs_at_most(make):
    checker = make(workers=2)
    started(checker)
    pairs = [(rf"\sin^2 x+{n}", rf"{n + 1 + n % 2}-\cos^2 x") for n in range(1, 61)]
    killed = 0

    def kill() -> None:
        nonlocal killed
        draw = random.Random(1)
        while not done.wait(0.2) or not killed:
            for worker in draw.sample(checker.pool.pids, len(checker.pool.pids))[:1]:
                os.kill(worker, signal.SIGKILL)
                killed += 1

    done = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = checker.compare_many(pairs)
    done.set()
    killer.join()
    right = [Outcome.DIFFERENT if n % 2 else Outcome.EQUAL for n in range(1, 61)]
    lost = [found for found, wanted in zip(outcomes, right, strict=True) if found != wanted]
    assert set(lost) <= {Outcome.CRASHED}
    assert len(lost) <= killed // 2  # a job is given up after its second worker


def test_when_all_workers_die_idle_the_next_question_starts_others(make):
    checker = make(workers=2)
    started_pids = (checker.compare(*new()), checker.pool.pids)[1]
    for worker in started_pids:
        os.kill(worker, signal.SIGKILL)
    until(lambda: all(map(gone, started_pids)))
    assert checker.compare_many([new() for _ in range(20)]) == [Outcome.EQUAL] * 20
    assert not {*started_pids} & {*checker.pool.pids}


def test_memory_is_limited(single):
    limits = Path(f"/proc/{started(single)}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(2 << 30)


@pytest.mark.parametrize("error", [RecursionError, OverflowError])
def test_a_failure_of_the_algebra_is_the_answers_fault(error, monkeypatch):
    def stumble(*texts):
        raise error

    monkeypatch.setattr(expression, "compare", stumble)
    assert expression.settled(Pair("x", "y")) == Outcome.UNPARSEABLE


def test_endings_and_errors_of_jobs():
    hungry = Pool(bytearray, "rewards.pool", size=1, deadline_s=30)
    assert hungry.submit(10).future.result() == bytes(10)
    assert hungry.submit(3 << 30).future.result() == Ending.OVER_MEMORY
    hungry.close()
    failing = Pool(int, "rewards.pool", size=1, deadline_s=30)
    with pytest.raises(ValueError, match="seven"):
        failing.submit("seven").future.result()
    failing.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_predictions_settle(shared, name):
    shared.pool.deadline_s = 0.5
    assert shared.compare("3x", HOSTILE[name]) not in (Outcome.EQUAL, Outcome.CRASHED)
    shared.pool.deadline_s = 30
    assert shared.compare(*new()) == Outcome.EQUAL


def test_a_batch_is_in_order_and_answers_repeat(shared):
    pairs = [EASY, ("x+1", "x+2"), ("1/2", "0.5"), EASY, ("x", r"\frac{")]
    different, not_read = Outcome.DIFFERENT, Outcome.UNPARSEABLE
    assert shared.compare_many(pairs) == [Outcome.EQUAL, different, Outcome.EQUAL, Outcome.EQUAL, not_read]
    assert shared.compare_many([]) == []


def test_answers_are_remembered_without_the_processes(make):
    checker = make()
    assert checker.compare(*EASY) == Outcome.EQUAL
    checker.close()
    assert checker.pool.pids == []
    assert checker.compare(*EASY) == Outcome.EQUAL
    assert checker.pool.pids == []


def test_memory_of_answers_is_bounded(make, monkeypatch):
    monkeypatch.setattr(checker_module, "CACHE_SIZE", 3)
    checker = make()
    checker.compare_many([("3x", rf"{n}\sin x") for n in range(4, 12)])
    assert len(checker._state().known) == 3


def test_golds_are_readable_or_not(shared):
    found = [shared.readable(gold) for gold in ("x^2", r"\frac{", "Tuesday")]
    assert found == [Outcome.EQUAL, Outcome.BAD_GOLD, Outcome.EQUAL]


def test_32_threads_ask_at_once(shared, threads):
    start = threading.Barrier(32)

    def ask(n: int) -> tuple[Outcome, Outcome]:
        start.wait()
        return shared.compare(rf"\sin^2 x+{n}y", rf"{n}y+1-\cos^2 x"), shared.compare(
            rf"\sin x+{n}y", rf"{n}y-\sin x"
        )

    assert set(threads.map(ask, range(2, 34))) == {(Outcome.EQUAL, Outcome.DIFFERENT)}


def test_equal_questions_at_the_same_time_are_one(single, threads, monkeypatch):
    started(single)
    jobs = []
    submit = single.pool.submit
    monkeypatch.setattr(single.pool, "submit", lambda result: (jobs.append(result), submit(result))[1])
    pair = hanging()
    answers = [threads.submit(single.compare, *pair) for _ in range(16)]
    until(lambda: [question.askers for question in list(single._state().open.values())] == [16])
    single.close()
    assert {answer.result() for answer in answers} == {Outcome.CRASHED}
    assert len(jobs) == 1


def test_a_question_that_waits_too_long_for_a_worker_times_out(single, threads):
    started(single)
    first = threads.submit(single.compare, *hanging())
    until(lambda: begun(single))
    single.queue_s = 0.1
    assert single.compare("2^{y+1}+1", "1+2*2^y") == Outcome.TIMEOUT
    assert single.compare_many([("2^{y+1}+2", "2+2*2^y"), ("1", "2")], timeout_s=0) == [
        Outcome.TIMEOUT,
        Outcome.DIFFERENT,
    ]
    assert len(single._state().open) == 1  # an abandoned job is not started
    single.close()
    assert first.result() == Outcome.CRASHED


FORKED = """
import os, threading
from rewards.answers.checker import SHARED
SHARED.compare("x", "2^x")
workers = SHARED.pool.pids
SHARED.pool.deadline_s = 30
waiting = threading.Thread(target=SHARED.compare, args=("3x", "9^{9^{9^{9}}}"), daemon=True)
waiting.start()  # a question is open at the fork
child = os.fork()
if child == 0:
    assert SHARED.pool.pids == []
    assert SHARED.compare("2^{x+1}+1", "1+2*2^x") == "equal"
    assert not {*SHARED.pool.pids} & {*workers}
    raise SystemExit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert SHARED.compare("2^{x+1}+2", "2+2*2^x") == "equal"
assert {*SHARED.pool.pids} & {*workers}
"""


def test_a_forked_child_starts_processes_of_its_own():
    run(FORKED, env={**os.environ, "POSTTRAIN_MATH_WORKERS": "2"})


SPAWNED = """
import multiprocessing, os

def ask(n):
    from rewards.answers.checker import SHARED
    return SHARED.compare(f"2^{{x+1}}+{n}", f"{n}+2*2^x"), SHARED.pool.pids

if __name__ == "__main__":
    from rewards.answers.checker import SHARED
    SHARED.compare("x", "2^x")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        outcomes, pids = zip(*pool.map(ask, range(1, 9), chunksize=1))
        assert set(outcomes) == {"equal"}
        print(*SHARED.pool.pids, *{pid for some in pids for pid in some})
"""


def test_spawned_processes_start_their_own_and_leave_none(tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    said = subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    until(lambda: all(map(gone, map(int, said.stdout.split()))))


ORPHAN = """
import os, signal, sys, threading, time
from rewards.answers.checker import SHARED
SHARED.compare("x", "2^x")
hangs = threading.Thread(target=SHARED.compare, args=("3x", "9^{9^{9^{9}}}"), daemon=True)
hangs.start()
while not any(question.job.begun() for question in list(SHARED._state().open.values())):
    time.sleep(0.01)
import psutil
print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
if "killed" in sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["killed", "finished"])
def test_no_process_outlives_its_caller(way):
    said = run(ORPHAN, way, returncode=-signal.SIGKILL if "killed" in way else 0)
    pids = [int(pid) for pid in said.split()]
    assert len(pids) > 1
    until(lambda: all(map(gone, pids)))


def test_no_orphan_and_no_zombie_is_left_behind(make):
    me = psutil.Process()
    before = set(me.children(recursive=True))
    checker = make(workers=2)
    started(checker)
    checker.pool.deadline_s = 0.2
    checker.compare_many([hanging() for _ in range(4)])
    checker.pool.deadline_s = 30
    assert checker.compare(*EASY) == Outcome.EQUAL
    mine = set(me.children(recursive=True)) - before
    assert {process.pid for process in mine} >= {*checker.pool.pids}
    assert not [process for process in mine if process.status() == psutil.STATUS_ZOMBIE]
    workers = checker.pool.pids
    checker.close()
    until(lambda: all(map(gone, workers)))


def test_closing_ends_pending_questions(single, threads):
    started(single)
    answers = [threads.submit(single.compare, *hanging()) for _ in range(2)]
    until(lambda: len(single._state().open) == 2 and begun(single))
    single.close()
    assert {answer.result() for answer in answers} == {Outcome.CRASHED}


SHADOWED = """
from rewards.answers.checker import SHARED
assert SHARED.compare("2^{x+1}+1", "1+2*2^x") == "equal"
"""


def test_a_folder_named_rewards_where_one_works_is_not_ours(tmp_path):
    for name in ("rewards", "math_verify", "sympy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('a stranger called {name}')")
    run(SHADOWED, cwd=tmp_path)


def test_workers_that_cannot_start_say_how_to_find_out_why(tmp_path, monkeypatch):
    (tmp_path / "broken_preload.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PoolError, match="python -m broken_preload` says why"):
        Pool(int, "broken_preload", size=1, deadline_s=30).submit(1)


def test_malformed_text_is_answered(shared):
    # a lone surrogate, a line break or a null must not break the protocol
    for odd in ("\ud800x", "x\n+1", "x\0"):
        assert shared.compare("2^x", odd) in (Outcome.DIFFERENT, Outcome.UNPARSEABLE)
    assert shared.compare(*EASY) == Outcome.EQUAL


def test_overlong_text_is_not_sent_to_a_worker(make):
    checker = make()
    pages = "x+" * 100_000
    assert checker.compare("x", pages) == Outcome.UNPARSEABLE
    assert checker.readable(pages) == Outcome.BAD_GOLD
    assert checker.pool.pids == []


def test_the_environment_says_how_many_workers(monkeypatch):
    monkeypatch.setenv("POSTTRAIN_MATH_WORKERS", "7")
    assert MathChecker().pool.size == 7
    monkeypatch.setenv("POSTTRAIN_MATH_WORKERS", "none")
    with pytest.raises(ValueError, match=r"'none': .* 1 or more"):
        MathChecker()
    monkeypatch.delenv("POSTTRAIN_MATH_WORKERS")
    assert 1 <= MathChecker().pool.size <= 4
