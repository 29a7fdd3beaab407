"""Asks a model on an OpenAI-compatible server to choose a word or to write a text: many questions concurrently.

Callers from any thread or event loop submit a batch to the background event loop (rewards.calls) and wait for it, at
most until the batch's deadline. A batch has its own connections. All batches for a server share its circuit and slots.

A failure is a value, never an exception: `Failure` with one of CAUSES. Temporary failures are no connection, no reply
in time, HTTP 408, 425, 429, 5xx, and a reply that is not a chat completion. They are retried after a growing, jittered
pause, or after the pause that the server requests, if that pause fits into the budget. After several questions in a
row have failed after all retries, the circuit opens: for a while no request is sent, and then one question probes the
server.

We measured the official openai client in place of this client (version 3.57, server on loopback, 64 concurrent
requests). It takes 2.4 ms of CPU per question, and this client 0.16 ms; with a picture 15 ms, and this client 6.5 ms.
It reads replies of any size (400 MiB cost 640 MiB of memory); this client stops at 1 MiB. It waits for a Retry-After
that exceeds the batch's time; this client gives up at once.
"""

import asyncio
import email.utils
import io
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rewards.calls import on_loop
from rewards.forks import PerProcess
from rewards.judge.breaker import Breaker
from rewards.judge.cache import ReplyCache
from rewards.judge.meter import Limits, Meter
from rewards.judge.questions import Endpoint, Failure, Question, Reply, body_of, key_of, reply_of

if TYPE_CHECKING:
    import aiohttp

_OUTAGES = frozenset(("connection", "timeout", "http_429", "http_5xx", "no_chat"))
"""Causes that may be temporary and that indicate a fault of the server."""
_MAX_REPLY_BYTES = 1 << 20
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_GRACE_S = 1.0
"""Extra time after a batch's deadline before the caller gives up, for an event loop that is starved of CPU."""
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def ask(
    endpoint: Endpoint,
    questions: Sequence[Question],
    limits: Limits,
    meter: Meter,
    cache: ReplyCache | None = None,
    deadline: float | None = None,
) -> list[Reply | Failure]:
    """A reply or failure per question, in order, by the deadline (`time.monotonic()`; None: in budget_s seconds).

    Equal questions of a batch are sent once. Raises ValueError if the key's environment variable is not set.
    """
    key = endpoint.key()
    with meter.waiting():
        now = time.monotonic()
        deadline = now + limits.budget_s if deadline is None else deadline
        if limits.run_s is not None:
            deadline = min(deadline, now + limits.run_s - meter.to_dict()["seconds"])
        keys = [key_of(endpoint.model, question) for question in questions]
        asked = dict(zip(keys, questions, strict=True))
        settled: dict[str, Reply | Failure] = dict(_kept(asked, cache))
        open_questions = {name: question for name, question in asked.items() if name not in settled}
        if open_questions and time.monotonic() < deadline:
            step = _Step(endpoint.model, limits, meter, cache, deadline, open_questions)
            server = _servers().setdefault((endpoint.base_url, key), _Server(endpoint.base_url, key))
            settled.update(server.run(step))
    late = Failure("budget", f"no reply within this batch's {max(0.0, deadline - now):.3g} s")
    outcomes = [settled.get(name, late) for name in keys]
    meter.add(cache_hits=sum(isinstance(outcome, Reply) and outcome.cached for outcome in outcomes))
    meter.fail([outcome for outcome in outcomes if isinstance(outcome, Failure)])
    return outcomes


def _kept(asked: Mapping[str, Question], cache: ReplyCache | None) -> dict[str, Reply]:
    """Key -> reply, for the questions in the cache."""
    found = cache.get(list(asked)) if cache is not None else {}
    return {
        name: Reply(choice, cached=True)
        for name, choice in found.items()
        if not asked[name].choices or choice in asked[name].choices
    }


class _Step:
    """A running batch: its questions by key, its cost and its outcomes."""

    def __init__(
        self,
        model: str,
        limits: Limits,
        meter: Meter,
        cache: ReplyCache | None,
        deadline: float,
        questions: dict[str, Question],
    ) -> None:
        self.model, self.limits, self.meter, self.cache = model, limits, meter, cache
        self.deadline, self.questions = deadline, questions
        self.outcomes: dict[str, Reply | Failure] = {}
        self.calls = self.tokens = self.replies = 0

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def spent(self) -> str:
        """The limit that is used up, or "". Requests in flight may still exceed a limit on tokens."""
        limits, meter = self.limits, self.meter
        for name, used, limit in (
            ("step_calls", self.calls, limits.step_calls),
            ("step_tokens", self.tokens, limits.step_tokens),
            ("run_calls", meter.calls, limits.run_calls),
            ("run_tokens", meter.tokens, limits.run_tokens),
        ):
            if limit is not None and used >= limit:
                return f"{name}={limit} used up"
        return ""

    def called(self) -> None:
        self.calls += 1
        self.meter.add(calls=1)

    def paid(self, tokens: int) -> None:
        self.tokens += tokens
        self.meter.add(tokens=tokens)


class _Server:
    """One server's circuit and slots, and the batches that are sent to it. It belongs to the background event loop."""

    def __init__(self, base_url: str, key: str) -> None:
        import aiohttp  # noqa: F401  # in the caller's thread, because it would block the event loop for 0.4 s

        self.url, self.key = f"{base_url.rstrip('/')}/chat/completions", key
        self.constrained = True
        """Whether to send vLLM's structured_outputs. Set to False after the server refuses the field."""
        self.breaker = Breaker()
        self.slots: dict[int, asyncio.Semaphore] = {}
        """By limit on concurrent requests."""
        self.jitter = random.Random()  # a separate generator keeps a seeded run independent of the judge

    def run(self, step: _Step) -> dict[str, Reply | Failure]:
        """The step's outcomes, when the step is done or its deadline has passed."""
        future = on_loop(self._run(step))
        try:
            future.result(max(0.0, step.left_s()) + _GRACE_S)
        except TimeoutError:
            pass
        finally:
            future.cancel()
        return dict(step.outcomes)  # a copy, because the loop may still write to the original

    def _session(self) -> "aiohttp.ClientSession":
        import aiohttp

        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.key}", "Accept-Encoding": "identity"},
            # vLLM closes connections that were idle for 5 s. A request on such a connection fails.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=None),  # each request has a total time limit of its own
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,  # no proxy for loopback
        )

    async def _run(self, step: _Step) -> None:
        began = time.monotonic()
        todo = iter(step.questions.items())
        workers = min(step.limits.max_concurrency, len(step.questions))
        try:
            async with (
                asyncio.timeout(max(0.0, step.left_s())),
                self._session() as session,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(workers):
                    group.create_task(self._work(step, session, todo))
        except TimeoutError:
            waited = time.monotonic() - began
            if step.calls and not step.replies and waited >= _PAUSE_S:
                self.breaker.trip()  # the whole batch got no reply: the next batch must not wait as long

    async def _work(
        self, step: _Step, session: "aiohttp.ClientSession", todo: Iterator[tuple[str, Question]]
    ) -> None:
        for key, question in todo:
            outcome = await self._settle(step, session, question)
            step.outcomes[key] = outcome
            if isinstance(outcome, Reply) and step.cache is not None:
                await asyncio.to_thread(step.cache.put, key, step.model, outcome.choice, outcome.tokens)

    async def _settle(
        self, step: _Step, session: "aiohttp.ClientSession", question: Question
    ) -> Reply | Failure:
        """The question's reply, or the failure after all retries."""
        limit, tries = step.limits.max_concurrency, step.limits.max_retries + 1
        slots = self.slots.setdefault(limit, asyncio.Semaphore(limit))
        outcome: Reply | _Problem
        for attempt in range(tries):
            async with slots:
                spent = step.spent()
                if spent:
                    return Failure("budget", spent)
                admitted = await self.breaker.admit()
                if admitted == "refuse":
                    return Failure(
                        "circuit_open", f"{self.url} failed several times in a row; no request was sent"
                    )
                try:
                    outcome = await self._attempt(step, session, question)
                except BaseException:  # the batch's deadline, most likely
                    if admitted == "probe":
                        self.breaker.failed(probe=True)
                    raise
            well = isinstance(outcome, Reply) or outcome.cause not in _OUTAGES
            if well:
                step.replies += 1
                self.breaker.succeeded()
            if isinstance(outcome, Reply):
                return outcome
            pause = max(self._pause_s(attempt), outcome.wait_s)
            last = well or admitted == "probe" or attempt + 1 == tries
            if last or pause >= step.left_s():
                if not well:
                    self.breaker.failed(probe=admitted == "probe")
                later = "" if last else f"; it asks to wait {outcome.wait_s:.3g} s, beyond this batch's time"
                detail = outcome.detail + (later if outcome.wait_s else "")
                return Failure(outcome.cause, f"{self.url}: {detail}")
            step.meter.add(retries=1)
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns")

    def _pause_s(self, attempt: int) -> float:
        longest = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**attempt)
        return longest * self.jitter.uniform(0.5, 1)

    async def _attempt(
        self, step: _Step, session: "aiohttp.ClientSession", question: Question
    ) -> "Reply | _Problem":
        import aiohttp

        step.called()
        try:
            async with asyncio.timeout(step.limits.timeout_s):
                # A thread encodes the pictures and serialises the request, so that the loop can serve other requests.
                body = await asyncio.to_thread(body_of, step.model, question, self.constrained)
                async with session.post(
                    self.url,
                    data=io.BytesIO(body),
                    headers={"Content-Type": "application/json"},
                    allow_redirects=False,
                ) as response:
                    content = await _content(response)
        except TimeoutError:
            return _Problem("timeout", f"no reply in {step.limits.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return _Problem("connection", f"{type(error).__name__}: {error}")
        if response.status == 200:
            outcome, tokens = reply_of(content, question)
            step.paid(tokens)
            return outcome if isinstance(outcome, Reply) else _Problem(outcome.cause, outcome.detail)
        words = content[:300].decode("utf-8", "replace")
        if self.constrained and response.status in (400, 422) and "structured_outputs" in words:
            self.constrained = False
            return await self._attempt(step, session, question)
        return _Problem(_cause_of(response.status), f"HTTP {response.status}: {words}", _wait_s(response))


@dataclass(frozen=True)
class _Problem:
    """A failed attempt, and the pause that the server requests, in seconds."""

    cause: str
    detail: str
    wait_s: float = 0.0


def _cause_of(status: int) -> str:
    if status == 429:
        return "http_429"
    return "http_5xx" if status >= 500 or status in (408, 425) else "http_4xx"


def _wait_s(response: "aiohttp.ClientResponse") -> float:
    """Seconds from Retry-After, which holds a number or a date; 0 without the header."""
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isascii() and asked.isdecimal():
        return float(asked[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


async def _content(response: "aiohttp.ClientResponse") -> bytes:
    """The body, up to the largest accepted size of a reply."""
    content = b""
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            break
    return content


_servers: PerProcess[dict[tuple[str, str], _Server]] = PerProcess(dict)
