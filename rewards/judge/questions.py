"""Questions to a judge, its replies and failures, and their form in the OpenAI chat API."""

import base64
import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rewards.judge.address import check_url

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
"""Causes of a missing reply. no_chat: HTTP 200 without a chat completion; no_choice: a reply that is not
a choice, or a text that is empty or cut off."""
_FORMAT = 1
"""Part of the cache's keys. Increase it when the format of requests changes."""
_REPLY_TOKENS = 8
_MARK = "<image>"
"""core.model.prompts.IMAGE."""


@dataclass(frozen=True)
class Endpoint:
    """A model on a server. `api_key_env` names the environment variable with the key; None sends "EMPTY".

    Raises ValueError for a URL with a password or a query (rewards.judge.address).
    """

    base_url: str
    model: str
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        check_url(self.base_url)

    def key(self) -> str:
        """The API key. Raises ValueError if its environment variable is not set."""
        if self.api_key_env is None:
            return "EMPTY"
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ValueError(f"api_key_env={self.api_key_env!r}: this environment variable is not set")
        return key


@dataclass(frozen=True)
class Picture:
    """A PIL picture. Two pictures are equal if their pixels are equal."""

    digest: str
    image: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, image: Any) -> "Picture":
        """The picture of a PIL image. Its pixels are read once."""
        plain = image.convert("RGB")
        return cls(hashlib.sha256(f"{plain.size}".encode() + plain.tobytes()).hexdigest(), image)


@dataclass(frozen=True)
class Question:
    """One request: instructions, pictures, the material and a question about it. The reply is one of `choices`.

    >>> Question("Be brief.", "| 2 + 2 = 5", "Is that right? Answer yes or no.").choices
    ('yes', 'no')
    """

    system: str
    material: str
    asked: str
    images: tuple[Picture, ...] = ()
    choices: tuple[str, ...] = ("yes", "no")
    """(): the reply is any text."""
    max_tokens: int = _REPLY_TOKENS
    """Most tokens of the reply."""
    temperature: float = 0.0
    sample: int = 0
    """Number of the sample, which seeds the server's sampling: equal questions with different numbers are all sent."""


@dataclass(frozen=True)
class Reply:
    """The model's choice, or its text for a question without choices. `tokens` is its cost; 0 if it is cached."""

    choice: str
    tokens: int = 0
    cached: bool = False


@dataclass(frozen=True)
class Failure:
    """The cause of a missing reply, one of CAUSES, and its details."""

    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


def key_of(model: str, question: Question) -> str:
    """A hash of the model's name, the request's text and the pictures' pixels."""
    parts: tuple[Any, ...] = (
        _FORMAT,
        model,
        question.system,
        question.material,
        question.asked,
        question.choices,
        [picture.digest for picture in question.images],
    )
    if not question.choices:
        parts += (question.max_tokens, question.temperature, question.sample)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def reply_of(content: bytes, question: Question) -> tuple[Reply | Failure, int]:
    """The reply in a chat completion, and its cost in tokens, also for a failure.

    A reply must be one of the question's choices, with at most a full stop or quotes around it. Without choices it is
    any text that is not empty and that ended before `max_tokens`.
    """
    try:
        reply = json.loads(content)
        said = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return Failure("no_chat", f"not a chat completion ({type(error).__name__}): {content[:80]!r}"), 0
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 0:
        tokens = (len(question.system) + len(question.material) + len(question.asked)) // 4 + 1
    if not question.choices:
        return _text_of(said, reply["choices"][0], question, tokens), tokens
    word = said.strip().strip(".\"'`*").casefold() if isinstance(said, str) else None
    if word not in question.choices:
        words = " or ".join(question.choices)
        return Failure("no_choice", f"the judge said {said!r:.80}, not {words}"), tokens
    return Reply(word, tokens), tokens


def _text_of(said: Any, choice: Any, question: Question, tokens: int) -> Reply | Failure:
    if not isinstance(said, str) or not said.strip():
        return Failure("no_choice", f"the model said {said!r:.80}, not a text")
    if choice.get("finish_reason") == "length":
        return Failure("no_choice", f"the reply was cut off after {question.max_tokens} tokens")
    return Reply(said.strip(), tokens)


def body_of(model: str, question: Question, constrained: bool) -> bytes:
    system = [{"role": "system", "content": question.system}] if question.system else []
    request: dict[str, Any] = {
        "model": model,
        "messages": [*system, {"role": "user", "content": _content(question)}],
        "temperature": question.temperature,
        "max_tokens": question.max_tokens,
    }
    if question.temperature:
        request["seed"] = question.sample
    if (
        constrained and question.choices
    ):  # vLLM restricts the reply to these choices. Other servers ignore or refuse the field.
        request["structured_outputs"] = {"choice": list(question.choices)}
    return json.dumps(request).encode()


def _content(question: Question) -> list[dict[str, Any]]:
    """The parts of the user's turn: pictures, material and question; pictures stand at `<image>` marks if it has them.

    Quoted material never has marks (rewards.judge.quoting).
    """
    pictures = [
        {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in question.images
    ]
    texts = [text for text in (question.material, question.asked) if text]
    pieces = question.asked.split(_MARK)
    if question.material or len(pieces) != len(pictures) + 1:
        return [*pictures, *({"type": "text", "text": text} for text in texts)]
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
    for picture, words in zip(pictures, pieces[1:], strict=True):
        parts += [picture, {"type": "text", "text": words}]
    return [part for part in parts if part["type"] != "text" or part["text"]]


@lru_cache(maxsize=32)  # the same picture occurs in several requests: per criterion and per completion
def _data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
