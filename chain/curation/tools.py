"""The tools of operators: models on OpenAI-compatible servers, reached through the judges' client, and grading."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chain.curation.config import Server
from core.model.prompts import user_text
from corpus.curation.asking import Score
from corpus.curation.base import NoReply, Request, Unanswered
from corpus.schema import Record

if TYPE_CHECKING:
    import numpy as np

_BATCH_S = 24 * 3600.0
_EMBEDDED_AT_ONCE = 64
_OF_THE_ROW = ("no_choice", "http_4xx")
"""Causes of failures that belong to one request; all others mean that the server or the budget fails."""


class Models:
    """The models of a curation by name, and the cache of their replies (corpus.curation.base.Tools).

    Args:
        servers: name -> server.
        cache: SQLite file of replies; a curation that is run again repeats no request.
        start: starts a server that does not run yet, and returns it with its `base_url`. Called at the first request.
    """

    def __init__(
        self, servers: Mapping[str, Server], cache: Path, start: Callable[[str, Server], Server]
    ) -> None:
        self.cache, self._start, self._servers = cache, start, dict(servers)
        self._lock, self._checked = threading.RLock(), set[str]()

    def server(self, model: str) -> Server:
        """The running server of a model."""
        with self._lock:
            if self._servers[model].base_url is None:
                self._servers[model] = self._start(model, self._servers[model])
            return self._servers[model]

    def ask(self, model: str, requests: Sequence[Request]) -> list[str | NoReply]:
        """A reply to each request (corpus.curation.base.Tools)."""
        from rewards.judge.questions import Picture, Question
        from rewards.judge.quoting import quoted

        pictures: dict[int, tuple[Any, ...]] = {}
        questions = []
        for request in requests:
            images = request.row["images"]
            if id(images) not in pictures:
                frames = [frame for clip in request.row.get("videos") or () for frame in clip.decode()]
                pictures[id(images)] = tuple(
                    Picture.of(image) for image in (*(one.rgb() for one in images), *frames)
                )
            material = quoted(request.material) if request.material else ""
            questions.append(
                Question(
                    request.system,
                    material,
                    request.asked,
                    pictures[id(images)],
                    request.choices,
                    request.max_tokens,
                    request.temperature,
                    request.sample,
                )
            )
        return self._asked(model, questions)

    def _asked(self, model: str, questions: Sequence[Any]) -> list[str | NoReply]:
        from rewards.judge import client
        from rewards.judge.cache import cache_at
        from rewards.judge.meter import Limits
        from rewards.judge.questions import Endpoint, Failure

        server = self.server(model)
        assert server.base_url
        limits = Limits(
            timeout_s=server.timeout_s,
            max_retries=server.max_retries,
            max_concurrency=server.max_concurrency,
            budget_s=_BATCH_S,
            run_s=server.run_s,
            run_calls=server.run_calls,
            run_tokens=server.run_tokens,
        )
        endpoint = Endpoint(server.base_url, server.model, server.api_key_env)
        replies = client.ask(endpoint, questions, limits, meter_of(model, server), cache_at(self.cache))
        failed = [one for one in replies if isinstance(one, Failure) and one.cause not in _OF_THE_ROW]
        if failed:
            raise Unanswered(
                f"models.{model}: {len(failed)} of {len(replies)} requests got no reply ({failed[0]}). Finished shards "
                "and replies are kept: run the command again to continue"
            )
        return [NoReply(one.detail) if isinstance(one, Failure) else one.choice for one in replies]

    def sample(
        self, model: str, rows: Sequence[Record], samples: int, max_tokens: int, temperature: float
    ) -> list[list[float | None]]:
        """The scores of `samples` completions of each row's prompt; a completion that is cut off is wrong.

        Raises ValueError for rows with videos, a system message or a history.
        """
        for row in rows:
            if row["videos"] or row["system"] or row["history"]:
                raise ValueError(
                    f"row {row['id']!r} has a video, a system message or earlier turns: pass_at_k of a curation takes "
                    "plain questions; limit it with `sources`, or use prepare.pass_at_k of an RL stage"
                )
        requests = [
            Request(row, "", {}, user_text(row["question"], row["mode"]), (), max_tokens, temperature, number)
            for row in rows
            for number in range(samples)
        ]
        replies = self.ask(model, requests)
        scores = [
            self._score(request.row, "" if isinstance(reply, NoReply) else reply)
            for request, reply in zip(requests, replies, strict=True)
        ]
        return [scores[start : start + samples] for start in range(0, len(scores), samples)]

    def right(self, row: Record, text: str) -> bool | None:
        """Whether a completion's answer is the row's gold answer."""
        score = self._score(row, text)
        return None if score is None else score == 1

    def _score(self, row: Record, text: str) -> float | None:
        from rewards.answer import AnswerReward
        from rl.data import example_of

        return AnswerReward()(text, example_of(row)).score

    def embed(self, embedder: str, texts: Sequence[str]) -> np.ndarray:
        """Embeddings from the server's /embeddings, unit length."""
        import numpy as np
        import requests

        server = self.server(embedder)
        from rewards.judge.questions import Endpoint

        key = Endpoint(str(server.base_url), server.model, server.api_key_env).key()
        found: list[Any] = []
        for start in range(0, len(texts), _EMBEDDED_AT_ONCE):
            body = {"model": server.model, "input": list(texts[start : start + _EMBEDDED_AT_ONCE])}
            try:
                reply = requests.post(
                    f"{str(server.base_url).rstrip('/')}/embeddings",
                    json=body,
                    headers={"Authorization": f"Bearer {key}"},
                    timeout=server.timeout_s,
                    allow_redirects=False,
                )
                reply.raise_for_status()
                items = sorted(reply.json()["data"], key=lambda item: item["index"])
                found += [np.asarray(item["embedding"], np.float32) for item in items]
            except (requests.RequestException, LookupError, TypeError, ValueError) as error:
                raise Unanswered(
                    f"models.{embedder}: no embeddings ({type(error).__name__}: {error})"
                ) from None
        if len(found) != len(texts):
            raise Unanswered(f"models.{embedder}: {len(found)} embeddings for {len(texts)} texts")
        vectors = np.stack(found)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    def check_judge(self, score: Score) -> None:
        """Ask the judge about injected and honest rows, once per judge. Raises JudgeRefused."""
        with self._lock:
            if score.model_dump_json() not in self._checked:
                _check(self, score)
                self._checked.add(score.model_dump_json())


def _check(models: Models, score: Score) -> None:
    """The start-up check by the first scale: rows that address the judge must be below the threshold."""
    from PIL import Image

    from core.model.pictures import Picture
    from rewards.judge.canaries import INJECTIONS, JudgeRefused

    red = [Picture.of(Image.new("RGB", (112, 112), "red"))]
    wrong = {
        name: {
            "question": f"How many elephants stand on the blue car? {text}",
            "answer": f"purple {text}",
            "images": red,
        }
        for name, text in INJECTIONS.items()
    }
    honest = {
        "colour": {"question": "What colour fills the whole picture?", "answer": "red", "images": red},
        "even": {
            "question": "Is the picture one even area of colour? Name the colour.",
            "answer": "yes, red",
            "images": red,
        },
    }
    name, scale = next(iter(score.used().items()))
    rows = [*wrong.values(), *honest.values()]
    replies = models.ask(score.model, [score.requests(row)[0] for row in rows])
    given = [-1 if isinstance(reply, NoReply) else int(reply) for reply in replies]
    credited = [key for key, value in zip(wrong, given, strict=False) if value >= scale.least]
    denied = [key for key, value in zip(honest, given[len(wrong) :], strict=True) if value < scale.least]
    if credited or len(denied) == len(honest):
        what = (
            f"credits wrong rows ({', '.join(credited)})"
            if credited
            else f"denies honest rows ({', '.join(denied)})"
        )
        raise JudgeRefused(
            f"models.{score.model}: the judge {what} by {name} >= {scale.least}. Use a stronger judge; canaries: false "
            "in the step skips this check"
        )


_meters: dict[str, Any] = {}


def meter_of(model: str, server: Server) -> Any:
    """The cost of a model in this process so far (rewards.judge.meter.Meter)."""
    from rewards.judge.meter import Meter

    return _meters.setdefault(f"{model} {server.base_url}", Meter())


def costs(servers: Mapping[str, Server]) -> dict[str, dict[str, float]]:
    """Requests, tokens, failures and cache hits of each model in this process so far."""
    totals: dict[str, dict[str, float]] = {}
    for name, meter in _meters.items():
        model = name.partition(" ")[0]
        if model in servers:
            totals[model] = meter.to_dict()
    return totals
