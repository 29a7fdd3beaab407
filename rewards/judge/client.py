"""Asks a model on any OpenAI-compatible server to choose a word, many questions at once, within a budget.

Per process and server there is one engine: an event loop in a thread of its own, which holds the
connections. Callers from any thread or event loop hand it a batch and wait for it, at most until the batch's
deadline; a forked child starts an engine of its own.

A failure is a value, never an exception: `Failure` with one of CAUSES. What may pass (no connection, no reply
in time, HTTP 408, 425, 429, 5xx, a reply that is no chat completion) is tried again after a growing, jittered
pause, or after the pause that the server asks for if it fits into the budget. When several questions in a row
have failed for good, the circuit opens: for a while nobody waits for that server, then one question probes it.
"""

import asyncio
import atexit
import base64
import email.utils
import hashlib
import io
import json
import logging
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rewards.judge.cache import ReplyCache, keep_for_ever

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

CAUSES = (
    "connection",
    "timeout",
    "http_429",
    "http_4xx",
    "http_5xx",
    "no_chat",
    "no_choice",
    "circuit_open",
    "budget",
)
"""Why a question has no reply. no_chat: HTTP 200, but no chat completion; no_choice: none of the words."""
_OUTAGES = frozenset(("connection", "timeout", "http_429", "http_5xx", "no_chat"))
"""Causes that may pass, and that say the server is not well."""
_FORMAT = 1
"""Part of the cache's keys: raise it when requests are put together in another way."""
_REPLY_TOKENS = 8
_MAX_REPLY_BYTES = 1 << 20
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_TRIP_AFTER, _COOL_DOWN_S = 5, 15.0
_GRACE_S = 1.0
"""How much longer than its deadline a batch may take to give up: for an engine whose thread gets no CPU."""
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


@dataclass(frozen=True)
class Endpoint:
    """A model on a server. `api_key_env` names the environment variable with the key; None sends "EMPTY"."""

    base_url: str
    model: str
    api_key_env: str | None = None

    def key(self) -> str:
        """The API key. Raises ValueError if its environment variable is not set."""
        if self.api_key_env is None:
            return "EMPTY"
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(f"api_key_env={self.api_key_env!r}: that environment variable is not set")
        return key


@dataclass(frozen=True)
class Limits:
    """What a batch may cost. None is no limit; a limit on the run counts over this process's life."""

    timeout_s: float = 30.0
    max_retries: int = 2
    max_concurrency: int = 8
    step_s: float = 120.0
    step_calls: int | None = None
    step_tokens: int | None = None
    run_s: float | None = None
    run_calls: int | None = None
    run_tokens: int | None = None


@dataclass(frozen=True)
class Picture:
    """A PIL picture; equal to any other with the same pixels."""

    digest: str
    image: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, image: Any) -> "Picture":
        """The picture, its pixels read once."""
        plain = image.convert("RGB")
        return cls(hashlib.sha256(f"{plain.size}".encode() + plain.tobytes()).hexdigest(), image)


@dataclass(frozen=True)
class Question:
    """One request: instructions, then pictures, the material and what is asked of it; a word is the reply.

    >>> Question("Be brief.", "| 2 + 2 = 5", "Is that right? Answer yes or no.").choices
    ('yes', 'no')
    """

    system: str
    material: str
    asked: str
    images: tuple[Picture, ...] = ()
    choices: tuple[str, ...] = ("yes", "no")


@dataclass(frozen=True)
class Reply:
    """What the model chose. `tokens` is what it cost: 0 from the cache."""

    choice: str
    tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Failure:
    """Why there is no reply."""

    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


@dataclass
class Meter:
    """What one judge has cost this process, for metrics and for the limits on the run."""

    calls: int = 0
    """HTTP requests sent, those that failed included."""
    cache_hits: int = 0
    retries: int = 0
    tokens: int = 0
    """As the server counts them; where it does not, a quarter of the characters, pictures not included."""
    seconds: float = 0.0
    """Time during which at least one batch was waiting."""
    failures: Counter[str] = field(default_factory=Counter)
    """Questions without a reply, by cause."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _waiting: int = 0
    _since: float = 0.0

    def add(self, *, calls: int = 0, cache_hits: int = 0, retries: int = 0, tokens: int = 0) -> None:
        """Count; from any thread."""
        with self._lock:
            self.calls += calls
            self.cache_hits += cache_hits
            self.retries += retries
            self.tokens += tokens

    def fail(self, failures: Sequence[Failure]) -> None:
        """Count failures by cause."""
        with self._lock:
            self.failures.update(failure.cause for failure in failures)

    def started(self) -> None:
        """A batch begins to wait."""
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting += 1

    def ended(self) -> None:
        """A batch is done."""
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self.seconds += time.monotonic() - self._since

    def to_dict(self) -> dict[str, float]:
        """Counts so far: calls, cache_hits, retries, tokens, seconds, failed, and failed/<cause>."""
        with self._lock:
            waiting = time.monotonic() - self._since if self._waiting else 0.0
            counts: dict[str, float] = {
                "calls": self.calls,
                "cache_hits": self.cache_hits,
                "retries": self.retries,
                "tokens": self.tokens,
                "seconds": self.seconds + waiting,
                "failed": self.failures.total(),
            }
            return counts | {f"failed/{cause}": count for cause, count in sorted(self.failures.items())}


def ask(
    endpoint: Endpoint,
    questions: Sequence[Question],
    limits: Limits,
    meter: Meter,
    cache: ReplyCache | None = None,
    deadline: float | None = None,
) -> list[Reply | Failure]:
    """A reply or failure per question, in order, by the deadline (`time.monotonic()`; None: step_s from now).

    Equal questions of a batch are asked once. Raises ValueError if the key's environment variable is not set.
    """
    key = endpoint.key()
    meter.started()
    try:
        now = time.monotonic()
        deadline = now + limits.step_s if deadline is None else deadline
        if limits.run_s is not None:
            deadline = min(deadline, now + limits.run_s - meter.to_dict()["seconds"])
        keys = [_key(endpoint.model, question) for question in questions]
        first: dict[str, int] = {}
        for place, name in enumerate(keys):
            first.setdefault(name, place)
        settled: dict[str, Reply | Failure] = {}
        if cache is not None:
            for name, choice in cache.get(list(first)).items():
                if choice in questions[first[name]].choices:
                    settled[name] = Reply(choice, cached=True)
        open_questions = {name: questions[place] for name, place in first.items() if name not in settled}
        if open_questions and time.monotonic() < deadline:
            engine = _engine(endpoint.base_url, key)
            step = _Step(endpoint.model, limits, meter, cache, deadline, open_questions)
            engine.run(step)
            settled.update(step.outcomes)
        late = Failure("budget", f"no reply within this batch's {max(0.0, deadline - now):.3g} s")
        outcomes = [settled.get(name, late) for name in keys]
    finally:
        meter.ended()
    meter.add(cache_hits=sum(isinstance(outcome, Reply) and outcome.cached for outcome in outcomes))
    meter.fail([outcome for outcome in outcomes if isinstance(outcome, Failure)])
    return outcomes


def close() -> None:
    """Stop this process's engines and close their connections; the next question starts them again."""
    with _lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


def _key(model: str, question: Question) -> str:
    """The model, every word of the request and the pictures' pixels, as a hash."""
    parts = (
        _FORMAT,
        model,
        question.system,
        question.material,
        question.asked,
        question.choices,
        [picture.digest for picture in question.images],
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Step:
    """One batch on its way: its questions by key, what it may still spend, what came of them."""

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
        """Which limit is used up; "" if none is. Requests in flight may still go beyond a limit on tokens."""
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


class Breaker:
    """Closed while the server answers; open after several failures in a row; then one probe at a time.

    Belongs to one event loop. `now` is a clock in seconds.
    """

    def __init__(self, trip_after: int = _TRIP_AFTER, cool_down_s: float = _COOL_DOWN_S, now: Any = None):
        self.trip_after, self.cool_down_s = trip_after, cool_down_s
        self._now = now or time.monotonic
        self._in_a_row = 0
        self._opened: float | None = None
        self._probe: asyncio.Event | None = None

    async def admit(self) -> str:
        """ "pass", "probe" (say how it went) or "refuse"; waits while another question probes."""
        while self._probe is not None:
            await self._probe.wait()
        if self._opened is None:
            return "pass"
        if self._now() - self._opened < self.cool_down_s:
            return "refuse"
        self._probe = asyncio.Event()
        return "probe"

    def succeeded(self) -> None:
        """The server answered, whatever it said."""
        self._in_a_row, self._opened = 0, None
        self._probed()

    def failed(self, probe: bool = False) -> None:
        """A question failed for good."""
        self._in_a_row += 1
        if probe or (self._opened is None and self._in_a_row >= self.trip_after):
            self.trip()
        if probe:
            self._probed()

    def trip(self) -> None:
        """Open."""
        self._opened = self._now()

    def _probed(self) -> None:
        if self._probe is not None:
            self._probe.set()
            self._probe = None


class _Slots:
    """Requests in flight on one server, first come first served; each says how many there may be with it."""

    def __init__(self) -> None:
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, limit: int) -> AsyncIterator[None]:
        if self._waiting or self._used >= limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((limit, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._used -= 1
                self._wake()
                raise
        else:
            self._used += 1
        try:
            yield
        finally:
            self._used -= 1
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            limit, turn = self._waiting[0]
            if not turn.done() and self._used >= limit:
                return
            self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)


class _Engine:
    """Connections to one server, and the thread whose event loop runs them."""

    def __init__(self, base_url: str, key: str) -> None:
        import aiohttp

        self.url, self.key = f"{base_url.rstrip('/')}/chat/completions", key
        self.session: aiohttp.ClientSession | None = None
        self.constrained = True
        """Sends vLLM's structured_outputs, until the server refuses the field."""
        self.breaker, self.slots = Breaker(), _Slots()
        self.jitter = random.Random()  # its own: a seeded run's draws must not depend on a judge's health
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="judge", daemon=True)
        self.thread.start()

    def run(self, step: _Step) -> None:
        """Fill the step's outcomes until it is done or its deadline is over."""
        future = asyncio.run_coroutine_threadsafe(self._run(step), self.loop)
        try:
            future.result(max(0.0, step.left_s()) + _GRACE_S)
        except (TimeoutError, CancelledError):  # cancelled: the engine is being closed
            future.cancel()
            step.outcomes = dict(step.outcomes)  # the engine may still be filling the other one
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self.loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(_GRACE_S)
        except TimeoutError:
            log.warning("the judge at %s: its connections did not close in time", self.url)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(_GRACE_S)
        if not self.thread.is_alive():
            self.loop.close()

    async def _stop(self) -> None:
        mine = asyncio.current_task()
        for task in asyncio.all_tasks():
            if task is not mine:
                task.cancel()
        if self.session is not None:
            await self.session.close()
        await self.loop.shutdown_default_executor()

    def _open(self) -> "aiohttp.ClientSession":
        import aiohttp

        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.key}", "Accept-Encoding": "identity"},
            # vLLM hangs up on connections that were idle for 5 s; one that is reused then fails.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=None),  # each request as a whole has one: a server may drip
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,  # no proxy between us and ourselves
        )

    async def _run(self, step: _Step) -> None:
        self.session = self.session or self._open()
        began = time.monotonic()
        todo = iter(step.questions.items())
        workers = min(step.limits.max_concurrency, len(step.questions))
        try:
            async with asyncio.timeout(max(0.0, step.left_s())), asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work(step, todo))
        except TimeoutError:
            waited = time.monotonic() - began
            if step.calls and not step.replies and waited >= _PAUSE_S:
                self.breaker.trip()  # a whole batch's time for nothing: the next one shall not wait as long

    async def _work(self, step: _Step, todo: Iterator[tuple[str, Question]]) -> None:
        for key, question in todo:
            outcome = await self._settle(step, question)
            step.outcomes[key] = outcome
            if isinstance(outcome, Reply) and step.cache is not None:
                await asyncio.to_thread(step.cache.put, key, step.model, outcome.choice, outcome.tokens)

    async def _settle(self, step: _Step, question: Question) -> Reply | Failure:
        """The question's reply, or why there is none after all retries."""
        tries = step.limits.max_retries + 1
        outcome: Reply | _Problem
        for attempt in range(tries):
            async with self.slots.take(step.limits.max_concurrency):
                spent = step.spent()
                if spent:
                    return Failure("budget", spent)
                admitted = await self.breaker.admit()
                if admitted == "refuse":
                    return Failure("circuit_open", f"{self.url} failed several times in a row; not asked")
                try:
                    outcome = await self._attempt(step, question)
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

    async def _attempt(self, step: _Step, question: Question) -> "Reply | _Problem":
        import aiohttp

        assert self.session is not None
        step.called()
        try:
            async with asyncio.timeout(step.limits.timeout_s):
                # Pictures are encoded and the request written out in a thread: the loop serves others meanwhile.
                body = await asyncio.to_thread(_body, step.model, question, self.constrained)
                async with self.session.post(
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
            return _parsed(content, question, step)
        words = content[:300].decode("utf-8", "replace")
        if self.constrained and response.status in (400, 422) and "structured_outputs" in words:
            self.constrained = False
            return await self._attempt(step, question)
        return _Problem(_cause_of(response.status), f"HTTP {response.status}: {words}", _wait_s(response))


@dataclass(frozen=True)
class _Problem:
    """What became of one attempt that brought no reply, and how long the server asks to be left alone."""

    cause: str
    detail: str
    wait_s: float = 0.0


def _cause_of(status: int) -> str:
    if status == 429:
        return "http_429"
    return "http_5xx" if status >= 500 or status in (408, 425) else "http_4xx"


def _wait_s(response: "aiohttp.ClientResponse") -> float:
    """Seconds that Retry-After asks for, as a number or a date; 0 if it does not."""
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isascii() and asked.isdecimal():
        return float(asked[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


async def _content(response: "aiohttp.ClientResponse") -> bytes:
    """The body, or as much of it as any chat completion has."""
    content = b""
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            break
    return content


def _parsed(content: bytes, question: Question, step: _Step) -> "Reply | _Problem":
    """The reply in a chat completion. Only one of the words counts, at most with a full stop or quotes."""
    try:
        reply = json.loads(content)
        said = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return _Problem("no_chat", f"no chat completion ({type(error).__name__}): {content[:80]!r}")
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 0:
        tokens = (len(question.system) + len(question.material) + len(question.asked)) // 4 + 1
    step.paid(tokens)
    word = said.strip().strip(".\"'`*").casefold() if isinstance(said, str) else None
    if word not in question.choices:
        return _Problem("no_choice", f"the judge said {said!r:.80}, not {' or '.join(question.choices)}")
    return Reply(word, tokens)


def _body(model: str, question: Question, constrained: bool) -> bytes:
    pictures = [
        {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in question.images
    ]
    texts = [{"type": "text", "text": text} for text in (question.material, question.asked)]
    request: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": question.system},
            {"role": "user", "content": [*pictures, *texts]},
        ],
        "temperature": 0.0,
        "max_tokens": _REPLY_TOKENS,
    }
    if constrained:  # vLLM: the reply can be nothing else. Other servers ignore the field, or refuse it.
        request["structured_outputs"] = {"choice": list(question.choices)}
    return json.dumps(request).encode()


@lru_cache(maxsize=32)  # a picture is asked about several times in a row: per criterion, per completion
def _data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_engines: dict[tuple[str, str], _Engine] = {}
_lock = threading.Lock()


def _engine(base_url: str, key: str) -> _Engine:
    with _lock:
        if (base_url, key) not in _engines:
            _engines[base_url, key] = _Engine(base_url, key)
        return _engines[base_url, key]


def _after_fork() -> None:
    global _engines, _lock
    keep_for_ever(_engines)
    _engines, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close)
