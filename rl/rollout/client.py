"""Client of the rollout servers: chat completions in, token ids and log-probabilities out; weight updates.

Imports no torch, so that evaluation and data curation run in light processes.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.rollout.server import MODEL_NAME

BAN = -100.0
"""Logit bias of a banned token: the lowest that the API takes, e**-100 of any other token's probability."""

TRIES = 3
"""Of a request for completions, when its connection is lost."""
RETRY_PAUSE_S = 0.2
DISCARD_ALL = 2
"""vLLM's sleep level that keeps no copy of the weights: whoever wakes a server brings new ones."""


class RolloutError(RuntimeError):
    """A rollout server refused a request or did not answer. The message has its URL and its words."""


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

    Args:
        urls: base URLs of the servers.
        core: facts of the served core.
        concurrency: requests in flight per server.
        timeout_s: one request's limit.
        share_gpus: the servers are put to sleep between weight updates, so that an update has to wake them.
    """

    def __init__(
        self,
        urls: Sequence[str],
        core: CoreFacts,
        *,
        concurrency: int = 64,
        timeout_s: float = 600,
        share_gpus: bool = False,
    ) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        if not urls:
            raise ValueError("no rollout server: give at least one URL")
        self.urls, self.core, self.timeout_s, self.share_gpus = list(urls), core, timeout_s, share_gpus
        self._session = requests.Session()
        self._session.mount("http://", HTTPAdapter(pool_maxsize=concurrency * len(urls)))
        self._threads = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="rollout")

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
        Raises RolloutError when a server fails; nothing is silently left out.
        """
        futures = [
            self._threads.submit(self._ask, self.urls[index % len(self.urls)], prompt, sampling)
            for index, prompt in enumerate(prompts)
        ]
        answers = []
        try:
            for done, future in enumerate(futures, 1):
                answers.append(future.result())
                if on_answer:
                    on_answer(done)
        finally:
            for future in futures:
                future.cancel()
        return answers

    def load_checkpoint(self, folder: Path) -> None:
        """Make every server serve the weights of a checkpoint folder on this machine."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.safetensors file to load into the rollout servers")
        self.load_files(files)

    def load_files(self, files: Sequence[Path]) -> None:
        """Load safetensors files (checkpoint names, whole model) into every server, then forget old features.

        Servers that share their GPUs are awake afterwards. Room for keys and values is taken last, so that the update
        itself has it to work in; servers that were awake already are left as they are.
        """
        update = {"paths": [str(path.resolve()) for path in files], "aliases": dict(self.core.tied)}
        if self.share_gpus:
            self.on_every_server("wake_up?tags=weights")
        self.on_every_server("start_weight_update")
        self.on_every_server("update_weights", {"update_info": update})
        self.on_every_server("finish_weight_update")
        self.reset_caches()
        if self.share_gpus:
            self.on_every_server("wake_up?tags=kv_cache")

    def sleep(self) -> None:
        """Free the GPUs of every server: weights and caches are gone until `load_files`.

        No request may be under way; there is none once `generate` has returned.
        """
        self.on_every_server(f"sleep?level={DISCARD_ALL}")

    def reset_caches(self) -> None:
        """Forget everything computed with old weights.

        All three: image features live in the multimodal and encoder caches, keys and values in the prefix cache.
        Leaving one out lets rollouts see images through an old vision tower.
        """
        for cache in ("reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"):
            for url, reply in self.on_every_server(cache).items():
                if reply.get("success") is False:
                    raise RolloutError(
                        f"{url}/{cache}: the server could not reset it; are requests still running?"
                    )

    def on_every_server(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, dict]:
        """POST the same body to every server at once; reply per URL."""
        futures = {url: self._threads.submit(self._post, url, path, body or {}) for url in self.urls}
        return {url: future.result() for url, future in futures.items()}

    def _post(self, url: str, path: str, body: Mapping[str, Any], tries: int = 1) -> dict:
        """POST and return the reply; of several tries, all but the last may lose their connection.

        A single try opens a connection of its own: the server may just be closing one that was kept alive.
        """
        import requests

        post = requests.post if tries == 1 else self._session.post
        try:
            response = post(f"{url}/{path}", json=body, timeout=self.timeout_s)
        except requests.RequestException as error:
            if tries > 1 and isinstance(error, requests.ConnectionError):
                time.sleep(RETRY_PAUSE_S)
                return self._post(url, path, body, tries - 1)
            raise RolloutError(
                f"{url}/{path}: no answer ({type(error).__name__}: {error}). Is the rollout server up? See its log."
            ) from error
        if not response.ok:
            raise RolloutError(f"{url}/{path}: HTTP {response.status_code}: {response.text[:2000]}")
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
    """The conversation with PIL images inlined as PNG data URLs."""
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
    buffer = io.BytesIO()
    part["image"].convert("RGB").save(buffer, format="PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


@contextmanager
def shared_memory_file(name: str):
    """Path of a new file in shared memory (or the temporary folder where there is none); removed afterwards."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sailvl2-", dir=root) as folder:
        yield Path(folder) / name
