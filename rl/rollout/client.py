"""Client of the rollout servers: chat completions in, token ids and log-probabilities out; weight updates.

Imports no torch, so that evaluation and data curation run in light processes.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from core.model.pictures import Picture
from rl.config import PoolConfig
from rl.rollout.fleet import Fleet
from rl.rollout.server import MODEL_NAME

log = logging.getLogger(__name__)

BAN = -100.0
"""Logit bias of a banned token: the lowest that the API takes, e**-100 of any other token's probability."""

TRIES = 3
"""Of a request for completions, when its connection is lost."""
RETRY_PAUSE_S = 0.2
DISCARD_ALL = 2
"""vLLM's sleep level that keeps no copy of the weights: whoever wakes a server brings new ones."""
LOOK_S = 5.0
"""When no request has ended for so long, a look at whether the servers are still there."""
RETURN_PAUSE_S = 1.0
"""Between two looks at whether a lost server is back, when none is left to ask."""
CACHES = ("reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache")
WAKE_WEIGHTS, WAKE_CACHE = "wake_up?tags=weights", "wake_up?tags=kv_cache"
"""Room for weights comes before an update, and for keys and values last, so that the update has that to work in."""
CONNECT_S = 10.0
"""To connect to a server: a machine that is gone refuses nothing."""
HEALTH_S = (2.0, 10.0)
"""To connect to a server and to hear whether it is healthy; a CPU engine in the middle of a step answers after it."""


_OPENING = threading.Lock()
"""Pillow reads a file's pixels when they are first asked for, and breaks when two threads ask: the same image goes to
several servers at once."""


class RolloutError(RuntimeError):
    """A rollout server refused a request or did not answer. The message has its URL and its words."""


class ServerLost(RolloutError):
    """The server is gone or going: what it was asked can be asked elsewhere."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """One conversation (content parts `{"type": "image", "image": PIL image}` or text) and its seed."""

    messages: Sequence[Mapping[str, Any]]
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    token_ids and logprobs have one entry per token, the end-of-turn token included when it was sampled; the
    log-probabilities are of the distribution that was sampled from (temperature and token ban applied).
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool
    """False when it was cut at max_tokens or at a banned token."""


@dataclass(frozen=True)
class Answer:
    """A prompt's token ids, as the server rendered it, and its completions."""

    prompt_ids: list[int]
    completions: list[Completion]


@dataclass(frozen=True)
class CoreFacts:
    """What a client must know about the served core; read from its checkpoint folder."""

    banned_ids: tuple[int, ...]
    """The image token: a completion must not hold one, as no image belongs to it."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Weights that a checkpoint leaves out because they share another's storage: name -> twin's name."""

    @classmethod
    def of(cls, model: Path) -> CoreFacts:
        config = json.loads((model / "config.json").read_text())
        tied = config.get("tie_word_embeddings") or config["text_config"].get("tie_word_embeddings", False)
        # vLLM's CPU engine packs lm_head's weights apart from the embedding's: unless both are sent, it keeps the old
        # head and every log-probability after the first update is of another policy.
        twins = {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tied else {}
        return cls(banned_ids=(config["image_token_id"],), tied=twins)


class RolloutClient:
    """Talks to every server of a pool. Safe to use from one thread at a time.

    A server that dies is left out, and its requests go to the others. It is asked again once it has taken the current
    weights and passed `gate`. Weights have a version that the servers report: one that was restarted without our
    noticing gives itself away, and what it answered is thrown away.

    Args:
        urls: base URLs of the servers.
        core: facts of the served core.
        concurrency: requests in flight per server.
        timeout_s: a server that has not answered a request by then is lost.
        patience_s: with no server left, how long to wait for one to come back.
        max_returns: how often each server may come back.
        warn: takes a line about every server lost and found again.
        share_gpus: the servers are put to sleep between weight updates, so that an update has to wake them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        core: CoreFacts,
        *,
        concurrency: int = 64,
        timeout_s: float = 1800,
        patience_s: float = 0,
        max_returns: int = 3,
        warn: Callable[[str], None] = log.warning,
        share_gpus: bool = False,
    ) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        if not urls:
            raise ValueError("no rollout server: give at least one URL")
        self.urls, self.core, self.timeout_s, self.patience_s = list(urls), core, timeout_s, patience_s
        self.share_gpus = share_gpus
        self.fleet = Fleet(urls, max_returns, warn)
        self.gate: Callable[[str], None] | None = None
        """Called with the URL of a server that has come back and holds the current weights; raises RuntimeError to
        keep it out. Forgotten at every update."""
        self._version: str | None = None
        self._files: list[Path] = []
        self._session = requests.Session()
        self._under_way = concurrency * len(urls)
        self._session.mount("http://", HTTPAdapter(pool_maxsize=self._under_way))
        self._threads = self._new_threads()

    @classmethod
    def of_pool(
        cls,
        pool: PoolConfig,
        urls: Sequence[str],
        model: Path,
        warn: Callable[[str], None] = log.warning,
    ) -> RolloutClient:
        """The client that a recipe's `rollout` describes, of servers of the core at `model`."""
        return cls(
            urls,
            CoreFacts.of(model),
            concurrency=pool.concurrency,
            timeout_s=pool.request_timeout_s,
            patience_s=pool.patience_s,
            max_returns=pool.max_restarts,
            share_gpus=pool.share_gpus,
            warn=warn,
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._session.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_answer: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Sample `sampling.n` completions for each prompt; answers are in the prompts' order.

        One request carries a prompt's images once for all its completions, so that the server's prefix and
        multimodal caches serve the group. `on_answer(done)` is told how many prompts are done.
        Raises RolloutError when a server refuses, or when none is left; nothing is silently left out.
        """
        answers: dict[int, Answer] = {}
        while len(answers) < len(prompts):
            self._muster()
            found = self._round(
                {i: p for i, p in enumerate(prompts) if i not in answers}, sampling, answers, on_answer
            )
            stale = {url for url in set(found.values()) if not self._current(url)}
            for index, url in found.items():
                if url in stale:
                    del answers[index]
                    self.fleet.move()
        return [answers[index] for index in range(len(prompts))]

    def ask_each(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Every serving server's answer to every prompt: the first prompt's from each server, then the second's.

        Servers that are lost meanwhile are left out throughout.
        """
        while True:
            self._muster()
            serving = self.fleet.serving
            futures = {
                self._threads.submit(self._ask, url, prompt, sampling): (url, index)
                for url in serving
                for index, prompt in enumerate(prompts)
            }
            given: dict[str, dict[int, Answer]] = {url: {} for url in serving}
            for future in self._ended({future: [url] for future, (url, _) in futures.items()}):
                url, index = futures[future]
                try:
                    given[url][index] = future.result()
                except ServerLost as error:
                    self.fleet.lose(url, str(error))
            found = [own for url, own in given.items() if len(own) == len(prompts) and self._current(url)]
            if found:
                return [own[index] for index in range(len(prompts)) for own in found]

    def load_checkpoint(self, folder: Path) -> None:
        """Make every server serve the weights of a checkpoint folder, which all of them can read."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.safetensors file to load into the rollout servers")
        self.load_files(files)

    def load_files(self, files: Sequence[Path]) -> None:
        """Load safetensors files (checkpoint names, whole model) into every server, then forget old features.

        The files must stay until the next update: a server that comes back gets them as well. Servers that share
        their GPUs are awake afterwards; those that were awake before take no notice of being woken.
        """
        self._version, self._files, self.gate = uuid4().hex, [path.resolve() for path in files], None
        for path, body in self._update():
            self.on_every_server(path, body)
        self.reset_caches()
        if self.share_gpus:
            self.on_every_server(WAKE_CACHE)
        self._muster()

    def sleep(self) -> None:
        """Free the GPUs of every server: weights and caches are gone until `load_files`.

        No request may be under way; there is none once `generate` has returned.
        """
        self.on_every_server(f"sleep?level={DISCARD_ALL}")

    def weights_sent(self) -> None:
        """Whoever brought the servers their weights by another way than files has done so."""
        self._version, self._files, self.gate = uuid4().hex, [], None
        self.on_every_server("update_weight_version", {"new_version": self._version})

    def ask(self, url: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """One server's answers, serving or not. Raises ServerLost if it is gone."""
        futures = [self._threads.submit(self._ask, url, prompt, sampling) for prompt in prompts]
        ended = list(self._ended({future: [url] for future in futures}))
        if len(ended) < len(futures):
            raise ServerLost(f"{url}: it is gone, with requests under way")
        return [future.result() for future in futures]

    def find_lost(self) -> None:
        """Look at every serving server, and leave out those that are gone."""
        for url in self.fleet.serving:
            if self._gone(url):
                self.fleet.lose(url, "it takes no connection, or says that it is not healthy")

    def reset_caches(self) -> None:
        """Forget everything computed with old weights.

        All three: image features live in the multimodal and encoder caches, keys and values in the prefix cache.
        Leaving one out lets rollouts see images through an old vision tower.
        """
        for cache in CACHES:
            for url, reply in self.on_every_server(cache).items():
                _check_reset(url, cache, reply)

    def on_every_server(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, dict]:
        """POST the same body to every serving server at once; reply per URL. Servers lost meanwhile are left out."""
        futures = {self._threads.submit(self._post, url, path, body or {}): url for url in self.fleet.serving}
        replies = {}
        for future in self._ended({future: [url] for future, url in futures.items()}):
            try:
                replies[futures[future]] = future.result()
            except ServerLost as error:
                self.fleet.lose(futures[future], str(error))
        return replies

    def _new_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._under_way, thread_name_prefix="rollout")

    def _update(self) -> list[tuple[str, dict]]:
        """The requests that bring a server the current weights, caches aside."""
        files = {"paths": [str(path) for path in self._files], "aliases": dict(self.core.tied)}
        return [
            *([(WAKE_WEIGHTS, {})] if self.share_gpus else []),
            ("start_weight_update", {}),
            ("update_weights", {"update_info": files}),
            ("finish_weight_update", {"weight_version": self._version}),
        ]

    def _muster(self) -> None:
        """Take back the lost servers that have returned; wait for one where none is left.

        Raises RolloutError when none comes within `patience_s`.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            # Weights that came without files only their sender has: no lost server can get them.
            awaited = self.fleet.awaited if self._files or not self._version else []
            for url in awaited:
                self._take_back(url)
            if self.fleet.serving:
                return
            if time.monotonic() >= deadline or not awaited:
                raise RolloutError(
                    f"no rollout server is left, and none came back within {self.patience_s:g} s:\n{self.fleet}"
                )
            time.sleep(RETURN_PAUSE_S)

    def _take_back(self, url: str) -> None:
        """Bring a lost server the current weights if it is up, and let it be asked again if it passes the gate."""
        if not self._healthy(url):
            return
        try:
            if self._version:
                for path, body in self._update():
                    self._post(url, path, body)
                for cache in CACHES:
                    _check_reset(url, cache, self._post(url, cache, {}))
                if self.share_gpus:
                    self._post(url, WAKE_CACHE, {})
            if self.gate:
                self.gate(url)
        except ServerLost:
            return  # gone again
        except RuntimeError as error:
            self.fleet.refuse(url, str(error))
            return
        self.fleet.readmit(url)

    def _current(self, url: str) -> bool:
        """Whether the server has had the current weights all the time since they were sent; else it is lost."""
        if self._version is None:
            return True
        try:
            reply = self._get(url, "weight_info")
        except ServerLost as error:
            self.fleet.lose(url, str(error))
            return False
        if reply.get("weight_version") == self._version:
            return True
        self.fleet.lose(
            url, "it was started anew, or somebody else changed its weights; its answers are void"
        )
        return False

    def _round(
        self,
        prompts: Mapping[int, Prompt],
        sampling: Sampling,
        answers: dict[int, Answer],
        on_answer: Callable[[int], None] | None,
    ) -> dict[int, str]:
        """Ask every prompt of a server that serves; add to `answers`, return which server gave each.

        What is missing afterwards was asked of servers that are lost, the last one included.
        """
        asked: dict[Future, list[str]] = {}
        indices: dict[Future, int] = {}
        for turn, (index, prompt) in enumerate(prompts.items()):
            whom: list[str] = []
            future = self._threads.submit(self._ask_one, turn, prompt, sampling, whom)
            asked[future], indices[future] = whom, index
        found: dict[int, str] = {}
        try:
            for future in self._ended(asked):
                answer = future.result()
                if answer is None:
                    continue
                found[indices[future]], answers[indices[future]] = asked[future][-1], answer
                if on_answer:
                    on_answer(len(answers))
        finally:
            for future in asked:
                future.cancel()
        return found

    def _ended(self, asked: Mapping[Future, list[str]]) -> Iterator[Future]:
        """Requests as they end, whom each asks given by its last URL; left out are those to servers that are gone,
        and then those of whom nobody has been asked yet.

        A server that is told to stop may close its port and leave requests unanswered, their connections open.
        """
        waiting = set(asked)
        while waiting:
            done, waiting = wait(waiting, LOOK_S, FIRST_COMPLETED)
            yield from done
            if done:
                continue
            for url in {asked[future][-1] for future in waiting if asked[future]}:
                if self._gone(url):
                    self.fleet.lose(url, "it is gone, with requests under way")
            lost = [
                future for future in waiting if asked[future] and asked[future][-1] not in self.fleet.serving
            ]
            if lost:
                # Threads that wait for no one may be all there are: what nobody has been asked yet is given back.
                waiting -= {future for future in waiting if not asked[future] and future.cancel()}
                self._threads.shutdown(wait=False)
                self._threads = self._new_threads()
            for future in lost:
                asked[future].clear()  # the thread that still waits there need not go on elsewhere
                self.fleet.move()
            waiting = waiting - set(lost) if self.fleet.serving else set()

    def _ask_one(self, turn: int, prompt: Prompt, sampling: Sampling, asked: list[str]) -> Answer | None:
        """The answer of the server whose turn it is, or of the next one when that one is lost; None if all are.

        Adds each server's URL to `asked` before it asks there. Whoever empties `asked` has given the request up.
        """
        while serving := self.fleet.serving:
            url = serving[turn % len(serving)]
            asked.append(url)
            try:
                return self._ask(url, prompt, sampling)
            except ServerLost as error:
                if not asked:  # the server may be back since
                    return None
                self.fleet.lose(url, str(error))
                self.fleet.move()
        return None

    def _gone(self, url: str) -> bool:
        """Whether the server takes no connection or says that it is not healthy; a busy one may be slow to answer."""
        import requests

        try:
            return not requests.get(f"{url}/health", timeout=HEALTH_S).ok
        except requests.ConnectionError:
            return True
        except requests.RequestException:
            return False

    def _healthy(self, url: str) -> bool:
        import requests

        try:
            return requests.get(f"{url}/health", timeout=HEALTH_S).ok
        except requests.RequestException:
            return False

    def _get(self, url: str, path: str) -> dict:
        import requests

        try:
            response = requests.get(f"{url}/{path}", timeout=(CONNECT_S, self.timeout_s))
        except requests.RequestException as error:
            raise _no_answer(url, path, error) from error
        return self._reply(url, path, response)

    def _post(self, url: str, path: str, body: Mapping[str, Any], tries: int = 1) -> dict:
        """POST and return the reply; of several tries, all but the last may lose their connection.

        A single try opens a connection of its own: the server may just be closing one that was kept alive.
        """
        import requests

        post = requests.post if tries == 1 else self._session.post
        try:
            response = post(f"{url}/{path}", json=body, timeout=(CONNECT_S, self.timeout_s))
        except requests.RequestException as error:
            if tries > 1 and isinstance(error, requests.ConnectionError):
                time.sleep(RETRY_PAUSE_S)
                return self._post(url, path, body, tries - 1)
            raise _no_answer(url, path, error) from error
        return self._reply(url, path, response)

    def _reply(self, url: str, path: str, response: Any) -> dict:
        """The reply's JSON. Raises ServerLost if it is the words of a dying server, RolloutError if it is a refusal."""
        if not response.ok:
            dying = response.status_code >= 500 and self._gone(url)
            kind = ServerLost if dying else RolloutError
            raise kind(f"{url}/{path}: HTTP {response.status_code}: {response.text[:2000]}")
        return response.json() if response.content else {}

    def _ask(self, url: str, prompt: Prompt, sampling: Sampling) -> Answer:
        body = {
            "model": MODEL_NAME,
            "messages": openai_messages(prompt.messages),
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": prompt.seed,
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "logit_bias": {str(token): BAN for token in self.core.banned_ids},
        }
        # Asked again with the same seed, the server answers the same.
        reply = self._post(url, "v1/chat/completions", body, tries=TRIES)
        if any(choice["finish_reason"] == "abort" for choice in reply["choices"]):
            raise ServerLost(f"{url}/v1/chat/completions: the server ended the request before its time")
        return Answer(
            prompt_ids=reply["prompt_token_ids"],
            completions=[self._completion(choice) for choice in reply["choices"]],
        )

    def _completion(self, choice: Mapping[str, Any]) -> Completion:
        ids = list(choice["token_ids"])
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        if len(ids) != len(logprobs):
            raise RolloutError(f"a completion has {len(ids)} tokens but {len(logprobs)} log-probabilities")
        finished = choice["finish_reason"] == "stop"
        # The ban makes this all but impossible; a server that ignores it must not break the learner's forward pass.
        banned = next((at for at, token in enumerate(ids) if token in self.core.banned_ids), None)
        if banned is not None:
            ids, logprobs, finished = ids[:banned], logprobs[:banned], False
        return Completion(ids, logprobs, choice["message"]["content"] or "", finished)


def openai_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with pictures inlined as data URLs: files as they are stored, PIL images as PNG.

    A server decodes a file by the rule of core.model.pictures (core/model/vllm_plugin.py, rl/rollout/hf.py).
    """
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_openai_part(part) for part in content]
        out.append({"role": message["role"], "content": content})
    return out


def _openai_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    with _OPENING:
        picture = Picture.of(part["image"])
    data = base64.b64encode(picture.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}}


def _no_answer(url: str, path: str, error: Exception) -> ServerLost:
    return ServerLost(
        f"{url}/{path}: no answer ({type(error).__name__}: {error}). Is the rollout server up? See its log. One that "
        "only takes longer needs a larger servers.request_timeout_s."
    )


def _check_reset(url: str, cache: str, reply: Mapping[str, Any]) -> None:
    if reply.get("success") is False:
        raise RolloutError(f"{url}/{cache}: the server could not reset it; are requests still running?")
