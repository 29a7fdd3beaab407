"""A faulty user's reward is named, affects only its own row, and never freezes or ends the stage."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core.strict import ConfigError, parse
from rewards.calls import RewardError
from rewards.example import Example
from rewards.isolation import load_limited
from rewards.isolation.isolated import Isolated
from rewards.isolation.shared import Shared
from rewards.mix import Mixture, Term
from rewards.registry import UnknownReward
from rl.config import RewardTerm

ROWS = [Example(f"row-{n}", "q", str(n), "direct", meta={"bad": n == 3}) for n in range(20)]
TEXTS = [str(n) for n in range(20)]
HOSTILE = """
import asyncio, json, os, re, signal, sys, threading, time

def fine(completion, example):
    return completion == example.answer
def bad(name):
    def reward(completion, example):
        if example.meta["bad"]:
            return DEEDS[name]()
        return 1.0
    return reward
def waits_for_a_thread():
    thread = threading.Thread(target=time.sleep, args=(600,))
    thread.start()
    thread.join()
def prints():
    for _ in range(1024):
        print("x" * (1 << 20))
def replaces_json():
    json.dumps = lambda *args, **keys: "[1.0]"
DEEDS = {
    "hangs": lambda: time.sleep(600), "thread": waits_for_a_thread,
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"), "exits": lambda: os._exit(0),
    "sys_exits": lambda: sys.exit(0), "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfaults": lambda: __import__("ctypes").string_at(0), "moves": lambda: os.chdir("/"),
    "closes": lambda: os.closerange(0, 1000), "patches": replaces_json, "prints": prints,
    "memory": lambda: len("x" * (8 << 30)), "nan": lambda: float("nan"), "text": lambda: "1.0",
}
for name in DEEDS:
    globals()[name] = bad(name)
async def sleeps(completion, example):
    await asyncio.sleep(600 if example.meta["bad"] else 0)
    return 1.0
async def blocks(completion, example):
    time.sleep(600 if example.meta["bad"] else 0)
    return 1.0
class Exits:
    def batch(self, completions, examples):
        os._exit(3)
class TooFew:
    def batch(self, completions, examples):
        return [1.0] * (len(completions) - 1)
def always(completion, example):
    os._exit(1)
def sees(completion, example):
    return len(example.images) == 2 and example.images[1].size == (3, 2) and example.images[1].getpixel((2, 1)) == 7
def leaves_a_thread(completion, example):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1.0
def pid(completion, example):
    return None if completion == "no" else os.getpid() % 1000 / 1000
def fails(completion, example):
    raise KeyError("scene")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "hostile_rewards.py").write_text(HOSTILE)
    yield tmp_path
    sys.modules.pop("hostile_rewards", None)


@pytest.fixture
def load(folder):
    made = []

    def load_one(name, **limits):
        made.append(load_limited(f"hostile_rewards:{name}", None, [folder], name="mine", **limits))
        return made[-1]

    yield load_one
    for reward in made:
        if isinstance(reward, Isolated):
            reward.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hangs", "TimeoutError: no verdict within deadline_s=1"),
        ("thread", "TimeoutError: no verdict within deadline_s=1"),
        ("regex", "TimeoutError: no verdict within deadline_s=1"),
        ("sleeps", "TimeoutError: no verdict within deadline_s=1"),
        ("blocks", "TimeoutError: no verdict within deadline_s=1"),
        ("exits", "its process ended with exit status 0"),
        ("sys_exits", "SystemExit: 0"),
        ("dies", "killed by SIGKILL"),
        ("segfaults", "killed by SIGSEGV; its last output: 'Fatal Python error: Segmentation fault"),
        ("moves", "it changed the working folder to /"),
        ("closes", "it closed the connection on which it answers"),
        ("patches", "it replaced json.dumps"),
        ("prints", "it printed more than 1 MiB during one batch"),
        ("memory", "MemoryError.* memory_gib=4"),
        ("nan", "returned nan"),
        ("text", "returned str '1.0'"),
    ],
)
def test_a_bad_call_is_named_and_costs_its_own_row_alone(load, name, says):
    results = load(name, deadline_s=1).batch(TEXTS, ROWS)
    failed = [row for row, result in enumerate(results) if isinstance(result, RewardError)]
    assert 3 in failed
    # a call that held the interpreter may also have delayed the other calls beyond the deadline
    assert failed == [3] or name in ("regex", "blocks")
    with pytest.raises(RewardError, match=rf"reward 'mine' failed on row 'row-3': .*{says}"):
        raise results[3]
    assert {results[row].score for row in range(20) if row not in failed} == {1}


def test_the_policy_stops_the_run_or_leaves_the_row_unscored(load):
    with pytest.raises(RewardError, match="reward 'mine' failed on row 'row-3'"):
        Mixture([Term("mine", load("exits"), 1.0)]).grade_batch(TEXTS, ROWS)
    mixture = Mixture([Term("mine", load("exits"), 1.0, on_error="unscorable")])
    graded = mixture.grade_batch(TEXTS, ROWS)
    assert [one.total for one in graded] == [None if row == 3 else 1 for row in range(20)]
    assert mixture.errors == {"mine": 1}


@pytest.mark.parametrize(
    ("name", "says"), [("Exits", "exit status 3"), ("TooFew", "19 verdicts for a batch of 20")]
)
def test_a_bad_batch_is_named(load, name, says):
    with pytest.raises(
        RewardError, match=rf"'mine' failed on a batch of 20 that begins with row 'row-0': .*{says}"
    ):
        Mixture([Term("mine", load(name), 1.0)]).grade_batch(TEXTS, ROWS)


def test_a_reward_that_always_dies_is_given_up(load):
    results = load("always").batch(TEXTS, ROWS)
    assert "exit status 1" in results[0].problem
    assert "not graded: its process has ended 4 times" in results[-1].problem
    assert all(isinstance(result, RewardError) for result in results)


def test_the_process_lives_between_batches_and_starts_again_after_a_kill(load, caplog):
    reward = load("pid")
    (first,), (second,) = reward.batch([""], ROWS[:1]), reward.batch([""], ROWS[:1])
    assert first.score == second.score
    assert reward.batch(["no"], ROWS[:1])[0].score is None
    os.kill(reward._process()._popen.pid, signal.SIGKILL)
    reward._process()._popen.wait()
    (third,) = reward.batch([""], ROWS[:1])
    assert third.score != first.score
    assert "its process ended between two batches (its process was killed by SIGKILL" in caplog.text


def test_pictures_reach_an_isolated_reward(load):
    from PIL import Image

    second = Image.new("L", (3, 2))
    second.putpixel((2, 1), 7)
    row = Example("r", "q", "", "direct", images=(Image.new("RGB", (1, 1)), second))
    assert [result.score for result in load("sees").batch(["", ""], [row, ROWS[0]])] == [1, 0]


def test_a_reward_that_raises_shows_its_own_traceback(load):
    (result,) = load("fails").batch([""], ROWS[:1])
    assert result.problem == "KeyError: 'scene'"
    assert 'raise KeyError("scene")' in result.__notes__[0]


@pytest.mark.parametrize("name", ["hangs", "sleeps", "blocks"])
def test_without_isolation_the_deadline_still_holds(load, name):
    # The hanging call may block other rows, but all scores are right.
    reward = load(name, isolate=False, deadline_s=0.5)
    assert isinstance(reward, Shared)
    reward._reward = _short_sleep(reward._reward)
    results = reward.batch(TEXTS, ROWS)
    with pytest.raises(
        RewardError, match="reward 'mine' failed on row 'row-3': TimeoutError: no verdict within"
    ):
        raise results[3]
    assert all(isinstance(result, RewardError) or result.score == 1 for result in results)
    if name != "blocks":  # an event loop that a coroutine blocks cannot be freed
        assert [result.score for result in reward.batch(TEXTS[:3], ROWS[:3])] == [1, 1, 1]


def _short_sleep(reward):
    """Sleeps 2 s in place of 600 s, so that the test's process can end."""
    import asyncio
    import time as real
    from types import SimpleNamespace

    scope = reward.__globals__
    scope["time"] = SimpleNamespace(sleep=lambda seconds: real.sleep(min(seconds, 2)))
    scope["asyncio"] = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(min(seconds, 2)))
    return reward


def test_what_cannot_be_loaded_is_refused_as_before(folder):
    with pytest.raises(UnknownReward, match="did you mean fine"):
        load_limited("hostile_rewards:fin", None, [folder])
    with pytest.raises(UnknownReward, match="no module 'nobodys_rewards'"):
        load_limited("nobodys_rewards:x", None, [folder])
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    with pytest.raises(RewardError, match=r"'leaves.py:x' cannot be loaded: SystemExit: 3"):
        load_limited("leaves.py:x", None, [folder])
    (folder / "dies.py").write_text("import os; os._exit(5)")
    with pytest.raises(
        RewardError, match=r"'dies.py:x' cannot be loaded: its process ended with exit status 5"
    ):
        load_limited("dies.py:x", None, [folder])


def test_attributes_for_the_self_test_are_known_here(folder):
    (folder / "form.py").write_text(
        "class Form:\n    self_test = 'form'\n    def __call__(self, completion, example):\n        return 1.0\n"
    )
    for isolate in (True, False):
        assert load_limited("form.py:Form", None, [folder], isolate=isolate).self_test == "form"


def test_the_process_and_its_threads_end_with_ours(folder):
    code = f"""
        import os
        from rewards.example import Example
        from rewards.isolation import load_limited
        reward = load_limited("hostile_rewards:leaves_a_thread", None, [{str(folder)!r}])
        assert reward("", Example("r", "q", "", "direct")).score == 1
        print(reward._process()._popen.pid, flush=True)
        {{}}
    """
    for end in ("pass", "os._exit(0)", "os.kill(os.getpid(), 9)"):
        command = [sys.executable, "-P", "-c", textwrap.dedent(code).format(end)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -9), done.stderr
        _gone(int(done.stdout))


def _gone(pid):
    """Wait until the kernel has ended the process. Its parent may not have waited for it yet."""
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            return


@pytest.mark.parametrize("key", [{"isolate": False}, {"deadline_s": 5.0}, {"memory_gib": 1.0}])
def test_limits_are_for_users_rewards(key):
    with pytest.raises(ConfigError, match=f"{next(iter(key))} is for users' own rewards"):
        parse(RewardTerm, {"name": "a", "use": "answer", "weight": 1.0, **key}, "recipe")
    assert parse(RewardTerm, {"name": "a", "use": "mine:A", "weight": 1.0, **key}, "recipe").use == "mine:A"
