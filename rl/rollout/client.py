"""Client of the rollout servers: prompts in, answers out; weight updates; servers that come and go.

Imports no torch, so that evaluation and data curation run in light processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from core.files import read_json
from rl.rollout import access
from rl.rollout.config import PoolConfig
from rl.rollout.fleet import Fleet
from rl.rollout.http import Http, RolloutError, ServerLost
from rl.rollout.messages import Answer, CoreFacts, Prompt, Sampling, completion_request, read_answer
from rl.rollout.served import Served

log = logging.getLogger(__name__)

DISCARD_ALL = 2
"""vLLM's sleep level that discards the weights: a server that wakes needs new weights."""
LOOK_S = 5.0
"""Seconds without a finished request after which the client checks the servers' health."""
RETURN_PAUSE_S = 1.0
"""Seconds between two checks for a returned server when no server is left."""
CACHES = ("reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache")
WAKE_WEIGHTS, WAKE_CACHE = "wake_up?tags=weights", "wake_up?tags=kv_cache"
"""Memory for weights is allocated before an update and memory for keys and values last, so the update can use it."""


class RolloutClient:
    """Talks to every server of a pool. Safe to use from one thread at a time.

    A lost server is left out, and its requests go to the others. It gets requests again after it has loaded the current
    weights and passed `served.gate`. Answers from a server with another version of the weights are discarded.

    Args:
        urls: base URLs of the servers.
        core: facts of the served core.
        concurrency: requests in flight per server.
        timeout_s: seconds after which a server without an answer to a request is lost.
        patience_s: seconds to wait for a server to come back when none is left.
        max_returns: how often each server may come back.
        warn: called with a line about every lost and every returned server.
        share_gpus: whether the servers sleep between weight updates; an update then wakes them.
        token: the run's token; None: the environment's, if it has one.
        addresses: JSON file with the servers' URLs in the order of `urls`, rewritten when a server is started again at
            another URL; None: servers keep their URLs.
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
        token: str | None = None,
        addresses: Path | None = None,
    ) -> None:
        if not urls:
            raise ValueError("no rollout server: give at least one URL")
        self.urls, self.core, self.patience_s, self.share_gpus = list(urls), core, patience_s, share_gpus
        self.fleet, self.served = Fleet(urls, max_returns, warn), Served()
        self.addresses = addresses
        self._under_way = concurrency * len(urls)
        self.http = Http(token or access.known_token(None), timeout_s, self._under_way)
        self._threads = self._new_threads()

    @classmethod
    def of_pool(
        cls,
        pool: PoolConfig,
        urls: Sequence[str],
        model: Path,
        warn: Callable[[str], None] = log.warning,
        addresses: Path | None = None,
    ) -> RolloutClient:
        """The client for a recipe's `servers`, which serve the core at `model`."""
        return cls(
            urls,
            CoreFacts.of(model, routing_replay=pool.routing_replay),
            concurrency=pool.concurrency,
            timeout_s=pool.request_timeout_s,
            patience_s=pool.patience_s,
            max_returns=pool.max_restarts,
            share_gpus=pool.share_gpus,
            token=access.known_token(pool.token_file),
            warn=warn,
            addresses=addresses,
        )

    def close(self) -> None:
        """Abandon running requests and close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.http.close()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_answer: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Sample `sampling.n` completions for each prompt; answers are in the prompts' order.

        One request asks for all completions of a prompt, so the images are sent once and the server's prefix and
        multimodal caches serve the group. `on_answer(done)` is called with the number of finished prompts.
        Raises RolloutError if a server refuses a request or no server is left; no prompt is silently dropped.
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

        The answers of servers that are lost meanwhile are left out for all prompts.
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

    def load_checkpoint(self, folder: Path, what: Hashable | None = None) -> None:
        """Load the weights of a checkpoint folder, which every server must be able to read, into every server.

        The files must stay until the next update, because a server that comes back loads them too. Caches of old
        weights are reset. Servers that share their GPUs are awake afterwards.

        Args:
            folder: holds the whole model as safetensors files.
            what: the name of these weights in `served`; default: the folder's path.
        """
        files = sorted(folder.resolve().glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.safetensors file to load into the rollout servers")
        with self.served.update(folder.resolve() if what is None else what, files) as version:
            for path, body in self._update(version):
                self.on_every_server(path, body)
            self.reset_caches()
            if self.share_gpus:
                self.on_every_server(WAKE_CACHE)
        self._muster()

    def sleep(self) -> None:
        """Free the GPUs of every server: weights and caches are gone until the next update.

        No request may be running. After `generate` has returned, none is.
        """
        self.served.asleep = True
        self.on_every_server(f"sleep?level={DISCARD_ALL}")

    def weights_sent(self, what: Hashable | None = None) -> None:
        """Note that weights have reached the servers by another way than files."""
        with self.served.update(what) as version:
            self.on_every_server("update_weight_version", {"new_version": version})

    def ask(self, url: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """One server's answers, serving or not. Raises ServerLost if the server is down."""
        futures = [self._threads.submit(self._ask, url, prompt, sampling) for prompt in prompts]
        ended = list(self._ended({future: [url] for future in futures}))
        if len(ended) < len(futures):
            raise ServerLost(f"{url}: it is down, with requests in flight")
        return [future.result() for future in futures]

    def find_lost(self) -> None:
        """Check every serving server, and mark dead ones as lost."""
        for url in self.fleet.serving:
            if self.http.gone(url):
                self.fleet.lose(url, "it refuses connections, or reports to be unhealthy")

    def reset_caches(self) -> None:
        """Reset the three caches of values that were computed with old weights.

        Image features are in the multimodal and encoder caches, keys and values in the prefix cache. If one were not
        reset, rollouts would see images through an old vision tower.
        """
        for cache in CACHES:
            for url, reply in self.on_every_server(cache).items():
                _check_reset(url, cache, reply)

    def on_every_server(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, dict]:
        """POST the same body to every serving server at once; reply per URL. Servers lost meanwhile are left out."""
        futures = {
            self._threads.submit(self.http.tell, url, path, body or {}): url for url in self.fleet.serving
        }
        replies = {}
        for future in self._ended({future: [url] for future, url in futures.items()}):
            try:
                replies[futures[future]] = future.result()
            except ServerLost as error:
                self.fleet.lose(futures[future], str(error))
        return replies

    def _new_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._under_way, thread_name_prefix="rollout")

    def _update(self, version: str | None) -> list[tuple[str, dict]]:
        """The requests that load the current weights into a server, without the cache resets."""
        files = {"paths": [str(path) for path in self.served.files], "aliases": dict(self.core.tied)}
        return [
            *([(WAKE_WEIGHTS, {})] if self.share_gpus else []),
            ("start_weight_update", {}),
            ("update_weights", {"update_info": files}),
            ("finish_weight_update", {"weight_version": version}),
        ]

    def _muster(self) -> None:
        """Take back lost servers that have returned; if no server is left, wait for one.

        Raises RolloutError when none comes within `patience_s`.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            self._look_up()
            awaited = self.fleet.awaited if self.served.can_be_sent_again() else []
            for url in awaited if not self.fleet.serving else self.fleet.due:
                if url in awaited:
                    self._take_back(url)
            if self.fleet.serving:
                return
            if time.monotonic() >= deadline or not awaited:
                raise RolloutError(
                    f"no rollout server is left, and none came back within {self.patience_s:g} s:\n{self.fleet}"
                )
            time.sleep(RETURN_PAUSE_S)

    def _look_up(self) -> None:
        """Read where servers that were started again are now."""
        if self.addresses is not None:
            for old, new in zip(self.fleet.urls, read_json(self.addresses), strict=True):
                if old != new:
                    self.fleet.relocate(old, new)

    def _take_back(self, url: str) -> None:
        """If a lost server is up, load the current weights into it; readmit it if it passes the gate."""
        if not self.http.healthy(url):
            self.fleet.put_off(url)
            return
        try:
            if self.served.version:
                for path, body in self._update(self.served.version):
                    self.http.tell(url, path, body)
                for cache in CACHES:
                    _check_reset(url, cache, self.http.tell(url, cache, {}))
                if self.share_gpus:
                    self.http.tell(url, WAKE_CACHE, {})
            if self.served.gate:
                self.served.gate(url)
        except ServerLost:
            return  # down again
        except RuntimeError as error:
            self.fleet.refuse(url, str(error))
            return
        self.fleet.readmit(url)

    def _current(self, url: str) -> bool:
        """Whether the server has held the current weights ever since they were sent; if not, it is marked as lost."""
        if self.served.version is None:
            return True
        try:
            reply = self.http.get(url, "weight_info")
        except ServerLost as error:
            self.fleet.lose(url, str(error))
            return False
        if reply.get("weight_version") == self.served.version:
            return True
        self.fleet.lose(
            url, "it was restarted, or another program changed its weights; its answers are discarded"
        )
        return False

    def _round(
        self,
        prompts: Mapping[int, Prompt],
        sampling: Sampling,
        answers: dict[int, Answer],
        on_answer: Callable[[int], None] | None,
    ) -> dict[int, str]:
        """Send each prompt to a serving server; add the answers to `answers`, and return each answer's server.

        A prompt without an answer afterwards went only to servers that are lost.
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
        """The requests in the order they end, without those to lost servers.

        The last URL in a request's list is the server that has it. Requests that no server has yet are left out too
        once a server is lost. This check is needed because a stopping server may close its port and leave requests
        unanswered with their connections open.
        """
        waiting = set(asked)
        while waiting:
            done, waiting = wait(waiting, LOOK_S, FIRST_COMPLETED)
            yield from done
            if done:
                continue
            for url in {asked[future][-1] for future in waiting if asked[future]}:
                if self.http.gone(url):
                    self.fleet.lose(url, "it is down, with requests in flight")
            lost = [
                future for future in waiting if asked[future] and asked[future][-1] not in self.fleet.serving
            ]
            if lost:
                # All threads may be waiting for lost servers: requests that no thread has started are returned.
                waiting -= {future for future in waiting if not asked[future] and future.cancel()}
                self._threads.shutdown(wait=False)
                self._threads = self._new_threads()
            for future in lost:
                asked[future].clear()  # the thread that still waits there then tries no other server
                self.fleet.move()
            waiting = waiting - set(lost) if self.fleet.serving else set()

    def _ask_one(self, turn: int, prompt: Prompt, sampling: Sampling, asked: list[str]) -> Answer | None:
        """The answer of the next server in turn, or of the one after it if that server is lost; None if all are lost.

        Adds each server's URL to `asked` before it sends the request there. A caller that abandons the request empties
        `asked`.
        """
        while serving := self.fleet.serving:
            url = serving[turn % len(serving)]
            asked.append(url)
            try:
                return self._ask(url, prompt, sampling)
            except ServerLost as error:
                if not asked:  # the server may have returned
                    return None
                self.fleet.lose(url, str(error))
                self.fleet.move()
        return None

    def _ask(self, url: str, prompt: Prompt, sampling: Sampling) -> Answer:
        path = "v1/chat/completions"
        # The seed makes a request repeatable: if it is sent again after a lost connection, the answer is the same.
        reply = self.http.ask(url, path, completion_request(prompt, sampling, self.core))
        if any(choice["finish_reason"] == "abort" for choice in reply["choices"]):
            raise ServerLost(f"{url}/{path}: the server ended the request early")
        try:
            return read_answer(reply, self.core)
        except ValueError as error:
            raise RolloutError(f"{url}/{path}: {error}") from None


def _check_reset(url: str, cache: str, reply: Mapping[str, Any]) -> None:
    if reply.get("success") is False:
        raise RolloutError(f"{url}/{cache}: the server could not reset it; are requests still running?")
