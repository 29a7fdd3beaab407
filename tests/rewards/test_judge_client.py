"""The judges' client: retries, budget, circuit, cache; threads, event loops, forks. The server simulates the faults."""

import asyncio
import email.utils
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from rewards.judge import client as judge_client
from rewards.judge.breaker import Breaker
from rewards.judge.cache import ReplyCache
from rewards.judge.client import Endpoint, Failure, Limits, Meter, Question, Reply, ask

from .judge_server import chat, material, serving

FAST = Limits(timeout_s=20, max_retries=2, budget_s=60)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge_client, "_PAUSE_S", 0.01)
    with serving() as server:
        yield server


def questions(count):
    return [Question("system", f"material {n}", "Right?") for n in range(count)]


def put(server, asked, limits=FAST, meter=None, cache=None, **rest):
    return ask(Endpoint(server.url, "m"), asked, limits, meter or Meter(), cache, **rest)


def causes(outcomes):
    return {outcome.cause if isinstance(outcome, Failure) else outcome.choice for outcome in outcomes}


@pytest.mark.parametrize("fault", [(500, b""), (429, b""), (408, b""), (200, b"<html>"), None])
def test_temporary_failures_are_retried(server, fault):
    faults = iter([fault, fault])
    server.reply = lambda request: next(faults, "yes")
    meter = Meter()
    assert put(server, questions(1), meter=meter) == [Reply("yes", 10)]
    assert (meter.calls, meter.retries, meter.tokens) == (3, 2, 10)


@pytest.mark.parametrize("reply", [(400, b"too long"), (401, b""), "perhaps"])
def test_permanent_failures_are_not_retried(server, reply):
    server.reply = lambda request: reply
    meter = Meter()
    (failure,) = put(server, questions(1), meter=meter)
    assert failure.cause in ("http_4xx", "no_choice")
    assert meter.calls == 1


def test_a_question_without_choices_gets_a_text(server, tmp_path):
    server.reply = lambda request: " Canberra, the capital. "
    asked = [Question("s", "m", "Which city?", choices=(), max_tokens=40, temperature=0.5, sample=3)]
    cache = ReplyCache(tmp_path / "replies.sqlite3")
    assert put(server, asked, cache=cache) == [Reply("Canberra, the capital.", 10)]
    assert put(server, asked, cache=cache) == [Reply("Canberra, the capital.", cached=True)]
    (request,) = server.requests
    assert (request["max_tokens"], request["temperature"], request["seed"]) == (40, 0.5, 3)
    assert "structured_outputs" not in request


def test_samples_of_one_question_are_all_sent(server):
    replies = iter(["first", "second"])
    server.reply = lambda request: next(replies)
    one = [Question("s", "m", "?", choices=(), temperature=1.0, sample=n) for n in range(2)]
    assert {reply.choice for reply in put(server, one, Limits(max_concurrency=1))} == {"first", "second"}


def test_a_text_that_is_cut_off_is_a_failure(server):
    cut = chat("half a sen").replace(b'"stop"', b'"length"')
    server.reply = lambda request: (200, cut)
    (failure,) = put(server, [Question("s", "m", "?", choices=(), max_tokens=4)])
    assert failure.cause == "no_choice"
    assert "cut off after 4 tokens" in failure.detail


def test_retry_after_is_respected(server, monkeypatch):
    slept = []
    sleep = asyncio.sleep

    async def note(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(judge_client.asyncio, "sleep", note)
    date = email.utils.formatdate(time.time() + 25, usegmt=True)
    waits = iter(["7", date])
    server.reply = lambda request: (429, b"", {"Retry-After": w}) if (w := next(waits, None)) else "yes"
    assert causes(put(server, questions(1))) == {"yes"}
    assert slept[0] == 7
    assert 7 < slept[1] <= 25


def test_a_longer_pause_than_the_budget_is_not_waited_for(server):
    server.reply = lambda request: (429, b"busy", {"Retry-After": "3600"})
    meter = Meter()
    (failure,) = put(server, questions(1), meter=meter)
    assert failure.cause == "http_429"
    assert "asks to wait 3.6e+03 s" in failure.detail
    assert (meter.calls, meter.retries) == (1, 0)


def test_a_hanging_server_costs_a_batch_its_deadline_and_the_next_one_nothing(server):
    release = threading.Event()
    server.reply = lambda request: release.wait(60) and "yes"
    meter = Meter()
    limits = Limits(timeout_s=50, budget_s=0.6, max_concurrency=4)
    outcomes = put(server, questions(20), limits, meter)
    assert causes(outcomes) == {"budget"}
    assert "no reply within this batch's 0.6 s" in outcomes[0].detail
    assert meter.calls == 4
    assert causes(put(server, questions(20), limits, meter)) == {"circuit_open"}
    assert meter.calls == 4
    assert meter.to_dict()["failed/circuit_open"] == 20
    release.set()


def test_a_reply_that_never_ends_does_not_outlive_the_deadline(server):
    class Cut(bytes):
        def __len__(self):  # announces more bytes than it sends, and keeps the connection open
            return 1000

    server.reply = lambda request: (200, Cut(b"{"))
    assert causes(put(server, questions(1), Limits(timeout_s=50, budget_s=0.5))) == {"budget"}


def test_replies_before_the_deadline_are_kept(server):
    release = threading.Event()
    server.reply = lambda request: "yes" if material(request) == "material 1" else release.wait(60) and "no"
    outcomes = put(server, questions(3), Limits(timeout_s=50, budget_s=2, max_concurrency=3))
    release.set()
    assert [isinstance(outcome, Reply) for outcome in outcomes] == [False, True, False]


def test_no_time_left_asks_nobody(server):
    assert causes(put(server, questions(2), deadline=time.monotonic() - 1)) == {"budget"}
    assert causes(put(server, questions(2), Limits(run_s=0))) == {"budget"}
    assert server.requests == []


@pytest.mark.parametrize(
    ("limits", "sent"),
    [
        ({"step_calls": 3}, 3),
        ({"run_calls": 2}, 2),
        ({"step_tokens": 25}, 3),  # 10 tokens each: after the third reply the limit is passed
        ({"run_tokens": 10}, 1),
        ({"run_calls": 0}, 0),
    ],
)
def test_limits_on_calls_and_tokens_hold(server, limits, sent):
    meter = Meter()
    outcomes = put(server, questions(6), Limits(max_concurrency=1, **limits), meter)
    assert len(server.requests) == meter.calls == sent
    assert [isinstance(outcome, Reply) for outcome in outcomes] == [True] * sent + [False] * (6 - sent)
    assert outcomes[-1] == Failure("budget", f"{next(iter(limits))}={next(iter(limits.values()))} used up")
    again = put(server, questions(9)[6:], Limits(max_concurrency=1, **limits), meter)
    ofstep = next(iter(limits)).startswith("step")
    assert causes(again) == ({"yes"} if ofstep else {"budget"})


def test_requests_in_flight_stay_within_the_smallest_limit_asked_for(server):
    server.reply = lambda request: time.sleep(0.01) or "yes"
    threads = [
        threading.Thread(target=put, args=(server, questions(20)[n::4], Limits(max_concurrency=3)))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 20
    assert 1 < server.most_in_flight <= 3


def test_the_circuit_opens_after_failures_in_a_row_and_a_probe_closes_it():
    clock = [0.0]

    async def story():
        breaker = Breaker(trip_after=2, cool_down_s=10, now=lambda: clock[0])
        breaker.failed()
        breaker.succeeded()
        breaker.failed()
        assert await breaker.admit() == "pass"  # never two in a row
        breaker.failed()
        assert await breaker.admit() == "refuse"
        clock[0] = 10
        assert await breaker.admit() == "probe"
        waiting = asyncio.create_task(breaker.admit())
        await asyncio.sleep(0)
        assert not waiting.done()
        breaker.failed(probe=True)
        assert await waiting == "refuse"  # the probe failed: cooling down again, from now
        clock[0] = 20
        assert await breaker.admit() == "probe"
        waiting = asyncio.create_task(breaker.admit())
        await asyncio.sleep(0)
        breaker.succeeded()
        assert await waiting == "pass"

    asyncio.run(story())


def test_a_server_that_is_down_is_left_alone_until_it_is_back(server, monkeypatch):
    meter = Meter()
    server.reply = lambda request: (503, b"")
    limits = Limits(max_retries=0, max_concurrency=1)
    outcomes = put(server, questions(20), limits, meter)
    assert [outcome.cause for outcome in outcomes] == ["http_5xx"] * 5 + ["circuit_open"] * 15
    server.reply = lambda request: "yes"
    known = judge_client._servers()[server.url, "EMPTY"]
    monkeypatch.setattr(known.breaker, "cool_down_s", 0)
    assert causes(put(server, questions(20), limits, meter)) == {"yes"}


def test_a_resumed_run_repeats_no_request_and_failures_are_not_cached(server, tmp_path):
    path = tmp_path / "cache" / "judge.sqlite3"
    refused = ("material 1", "material 3")
    server.reply = lambda request: (400, b"") if material(request) in refused else "no"
    cache = ReplyCache(path)
    assert causes(put(server, questions(4), cache=cache)) == {"no", "http_4xx"}
    cache.close()
    server.reply = lambda request: "yes"
    meter, cache = Meter(), ReplyCache(path)
    outcomes = put(server, questions(4), meter=meter, cache=cache)
    assert [outcome.choice for outcome in outcomes] == ["no", "yes", "no", "yes"]
    assert (meter.calls, meter.cache_hits, meter.tokens) == (2, 2, 20)
    assert outcomes[0].cached
    cache.close()


def test_another_model_wording_picture_or_material_is_another_key():
    from PIL import Image

    from rewards.judge.questions import Picture
    from rewards.judge.questions import key_of as _key

    red, same, blue = (Picture.of(Image.new("RGB", (4, 4), c)) for c in ("red", "red", "blue"))
    keys = [
        _key(model, Question(system, material, asked, images, choices))
        for model, system, material, asked, images, choices in (
            ("m", "s", "x", "a", (red,), ("yes", "no")),
            ("n", "s", "x", "a", (red,), ("yes", "no")),
            ("m", "t", "x", "a", (red,), ("yes", "no")),
            ("m", "s", "y", "a", (red,), ("yes", "no")),
            ("m", "s", "x", "b", (red,), ("yes", "no")),
            ("m", "s", "x", "a", (blue,), ("yes", "no")),
            ("m", "s", "x", "a", (red, red), ("yes", "no")),
            ("m", "s", "x", "a", (), ("yes", "no")),
            ("m", "s", "x", "a", (red,), ("no", "yes")),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == _key("m", Question("s", "x", "a", (same,)))


def test_a_broken_cache_costs_money_and_not_rows(server, tmp_path, caplog):
    path = tmp_path / "judge.sqlite3"
    path.write_bytes(b"this is no database" * 100)
    cache = ReplyCache(path)
    assert causes(put(server, questions(2), cache=cache)) == {"yes"}
    assert cache.errors == 3
    assert caplog.text.count("judging continues without it") == 1


CHILD = """
import sys
from rewards.judge.cache import ReplyCache
from rewards.judge.client import Endpoint, Limits, Meter, Question, Reply, ask
url, path, start = sys.argv[1:]
asked = [Question("system", f"material {n}", "Right?") for n in range(int(start), int(start) + 60)]
meter = Meter()
outcomes = ask(Endpoint(url, "m"), asked, Limits(), meter, ReplyCache(path and __import__("pathlib").Path(path)))
assert all(isinstance(outcome, Reply) for outcome in outcomes), outcomes
print(meter.calls)
"""


def test_processes_share_a_cache(server, tmp_path):
    path = tmp_path / "judge.sqlite3"

    def child(start):
        command = [sys.executable, "-P", "-c", CHILD, server.url, str(path), str(start)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    together = [child(0), child(30)]  # half of their questions are equal
    for process in together:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM replies").fetchone() == (90,)
    connection.close()
    later = child(15)
    assert later.communicate(timeout=60)[0].strip() == "0"


def test_a_forked_child_asks_on_connections_of_its_own(server):
    assert causes(put(server, questions(2))) == {"yes"}
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if causes(put(server, questions(6)[2:])) == {"yes"} else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert causes(put(server, questions(9)[6:])) == {"yes"}
    assert len(server.requests) == 9


FORK = """
import gc, os, sys, weakref
from rewards import calls
from rewards.judge import client as judge_client
from rewards.judge.cache import cache_at
from rewards.judge.client import Endpoint, Limits, Meter, Question, Reply, ask
def put(material):
    (reply,) = ask(Endpoint(sys.argv[1], "m"), [Question("system", material, "Right?")],
                   Limits(max_retries=0), Meter(), cache_at(sys.argv[2]))
    assert isinstance(reply, Reply), reply
put("before")
loop = weakref.ref(calls._background()[0])
pid = os.fork()
if not pid:
    put("child")
    vars(judge_client).clear()  # as the interpreter does when it ends
    vars(calls).clear()
    gc.collect()
    os._exit(0 if loop() else 3)  # were it let go of, it would close what is the parent's
assert os.waitpid(pid, 0)[1] == 0
put("after")
"""


def test_a_forked_child_that_ends_leaves_the_parents_loop_alone(server, tmp_path):
    path = tmp_path / "judge.sqlite3"
    command = [sys.executable, "-P", "-X", "dev", "-W", "error", "-c", FORK, server.url, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(server.requests) == 3


def test_event_loops_and_threads_may_ask_at_once(server):
    async def loop(n):
        inside = put(server, questions(n + 1)[n:])  # blocks this loop, and still works
        outside = await asyncio.to_thread(put, server, questions(n + 11)[n + 10 :])
        return causes(inside) | causes(outside)

    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(asyncio.run(loop(n)))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"yes"}] * 8


def test_a_missing_key_is_named(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="api_key_env='JUDGE_KEY'"):
        ask(Endpoint(server.url, "m", "JUDGE_KEY"), questions(1), FAST, Meter())


def test_a_server_without_usage_is_counted_by_characters(server):
    server.reply = lambda request: (200, chat("yes").replace(b"total_tokens", b"unknown"))
    (reply,) = put(server, [Question("s" * 20, "m" * 20, "a" * 40)])
    assert reply == Reply("yes", 21)
