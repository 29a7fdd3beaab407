"""The relay between the harness and the servers: one HTTP server on loopback, for policy and judge.

The harness speaks the OpenAI API. The relay adds what the harness does not know: the thinking contract, the token ban,
the servers' token, and the part of a completion that counts as the answer. It writes every reply to a file, and answers
a repeated request from there: an interrupted bench asks nothing twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

from chain.bench.prompt import PICTURES, Rules, asked
from chain.bench.suite import Benchmark
from core.files import append_jsonl, read_jsonl
from rewards.extract import parse
from rl.rollout.client import RolloutClient
from rl.rollout.config import MODEL_NAME
from rl.rollout.messages import Prompt, Sampling, completion_request, read_answer

REPLIES = "replies.jsonl"
"""File in a benchmark's folder: a line per reply of the policy and the judge, in the order of arrival."""
JUDGE_S = 120.0
"""Seconds for one request to the judge."""
MOST_BYTES = 256 * 2**20
"""Largest request that the relay reads."""


@dataclass(frozen=True)
class JudgeServer:
    """An OpenAI-compatible judge."""

    url: str
    """Base URL, such as http://127.0.0.1:8100/v1."""
    model: str
    key: str = ""


@dataclass
class Relay:
    """Answers the harness for one benchmark in one mode.

    Args:
        client: the rollout servers; None: every policy request fails.
        folder: folder of replies.jsonl and the pictures.
        mode: "think" or "direct".
        benchmark: how prompts are sent, and which part of a completion the harness gets.
        max_tokens: longest completion. It replaces the harness's limit, which is too short for a thought.
        blind: whether images are replaced by grey ones.
        judge: the judge, or None.
        own_tiles: the checkpoint's tile cap; None: requests name no tile cap.
        seed: seed of sampled requests.
    """

    client: RolloutClient | None
    folder: Path
    mode: str
    benchmark: Benchmark
    max_tokens: int
    blind: bool = False
    judge: JudgeServer | None = None
    own_tiles: int | None = None
    seed: int = 0
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    failures: dict[str, dict[str, str]] = field(default_factory=lambda: {"policy": {}, "judge": {}})
    """Role -> request -> its error, for requests that no later try has answered."""

    def __post_init__(self) -> None:
        self._known = {line["key"]: line for line in read_jsonl(self.folder / REPLIES)}
        self._writing, self._turn = threading.Lock(), itertools.count()
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        self._rules = Rules(
            self.benchmark,
            self.mode,
            self.client.core.frame_px if self.client else 0,
            self.folder,
            self.video,
            self.blind,
            self.own_tiles,
        )

    def __enter__(self) -> Relay:
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                _serve(self, relay)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="relay", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def video(self) -> str:
        """Start of a text part that names a video's file."""
        return f"{self.token}:"

    def url(self, role: str) -> str:
        """Base URL of the OpenAI API of a role, "policy" or "judge"."""
        return f"http://127.0.0.1:{self._server.server_port}/{role}/v1"

    def answer(self, role: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one chat request, in OpenAI's form. Raises the exceptions of the servers' clients."""
        line = self._policy(body) if role == "policy" else self._judged(body)
        content = self.extracted(line["completion"]) if role == "policy" else line["completion"]
        # The harness logs these counts with each sample, so the first one can name the reply (harness.py).
        usage = {"prompt_tokens": line["number"], "completion_tokens": line["tokens"] or 0, "total_tokens": 0}
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        frame = {"id": line["key"][:16], "object": "chat.completion", "created": 0, "model": MODEL_NAME}
        return {**frame, "choices": [choice], "usage": usage}

    def _policy(self, body: Mapping[str, Any]) -> dict[str, Any]:
        prompt = asked(body["messages"], self._rules)
        sampling = Sampling(max_tokens=self.max_tokens, temperature=float(body.get("temperature") or 0.0))

        def ask() -> dict[str, Any]:
            if self.client is None:
                raise RuntimeError("no rollout server")
            serving = self.client.fleet.serving
            url = serving[next(self._turn) % len(serving)]
            prompted = Prompt([], self.seed if sampling.temperature else None)
            request = completion_request(prompted, sampling, self.client.core) | {"messages": prompt.messages}
            if prompt.processor:
                request["mm_processor_kwargs"] = prompt.processor
            reply = read_answer(self.client.http.ask(url, "v1/chat/completions", request), self.client.core)
            (given,) = reply.completions
            return {"completion": given.text, "tokens": len(given.token_ids), "truncated": not given.finished}

        settings = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        key = {"messages": prompt.messages, "processor": prompt.processor, **settings}
        return self._remembered("policy", key, {"text": prompt.text, "pictures": prompt.pictures}, ask)

    def _judged(self, body: Mapping[str, Any]) -> dict[str, Any]:
        judge = self.judge
        if judge is None:
            raise RuntimeError("this task asks a judge; name one with --judge URL")

        def ask() -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {judge.key}"} if judge.key else {}
            request = {**body, "model": judge.model}
            reply = requests.post(
                f"{judge.url}/chat/completions", json=request, headers=headers, timeout=JUDGE_S
            )
            reply.raise_for_status()
            content = reply.json()["choices"][0]["message"]["content"]
            if not isinstance(content, str) or not content.strip():
                raise ValueError("the judge's reply is empty")
            return {"completion": content, "tokens": None, "truncated": False}

        return self._remembered("judge", {**body, "model": judge.model, "url": judge.url}, {}, ask)

    def _remembered(
        self, role: str, key: Mapping[str, Any], more: Mapping[str, Any], ask: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The known reply to this request, or a new one, which is written to the file."""
        digest = hashlib.sha256(json.dumps([role, key], sort_keys=True).encode()).hexdigest()
        if digest in self._known:
            return self._known[digest]
        try:
            line = {"key": digest, "role": role, **more, **ask()}
        except Exception as error:
            self.failures[role][digest] = f"{type(error).__name__}: {error}"
            raise
        with self._writing:
            self.failures[role].pop(digest, None)
            if digest in self._known:  # two equal requests at a time
                return self._known[digest]
            line["number"] = len(self._known) + 1
            self._known[digest] = line
            append_jsonl(self.folder / REPLIES, line)
        return line

    def extracted(self, completion: str) -> str:
        """The part of a completion that the harness scores."""
        if self.benchmark.extract == "contract":
            opened = bool(self.client and self.client.core.thought_open)
            return parse(completion, self.mode, opened).answer or ""
        return (
            last_box(completion) if self.benchmark.extract == "box" and self.mode == "think" else completion
        )


def last_box(completion: str) -> str:
    r"""The content of the last box after `</think>`, else of the last box, else the whole text.

    Source: the SAIL-VL2 authors' public VLMEvalKit wrapper, vlmeval/vlm/sail_vl.py.

    >>> last_box(r"<think>\boxed{1}</think> so \boxed{\frac{1}{2}}."), last_box(r"<think>\boxed{1}</think> 2")
    ('\\frac{1}{2}', '1')
    """
    for text in (completion.rpartition("</think>")[2], completion):
        start = text.rfind(r"\boxed{")
        if start < 0:
            continue
        depth = 0
        for place in range(start + len(r"\boxed"), len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[start + len(r"\boxed{") : place].strip()
    return completion


def _serve(handler: BaseHTTPRequestHandler, relay: Relay) -> None:
    """Answer one request of the harness."""
    size = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(min(size, MOST_BYTES))
    role = handler.path.strip("/").partition("/")[0]
    given = handler.headers.get("Authorization", "").removeprefix("Bearer ")
    if not secrets.compare_digest(given.encode(), relay.token.encode()):
        status, reply = 401, {"error": {"message": "wrong token"}}
    elif role not in relay.failures or size > MOST_BYTES:
        status, reply = 404, {"error": {"message": f"no such role, or more than {MOST_BYTES} bytes"}}
    else:
        try:
            status, reply = 200, relay.answer(role, json.loads(body))
        except Exception as error:  # the harness gets the error, and `failures` keeps it
            status, reply = 502, {"error": {"message": f"{type(error).__name__}: {error}"[:2000]}}
    data = json.dumps(reply).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
