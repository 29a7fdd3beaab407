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
"""Why a question has no reply. no_chat: HTTP 200, but no chat completion; no_choice: none of the words."""
_FORMAT = 1
"""Part of the cache's keys: raise it when requests are written in another way."""
_REPLY_TOKENS = 8


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
            raise ValueError(f"api_key_env={self.api_key_env!r}: that environment variable is not set")
        return key


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
    """One request: instructions, pictures, the material and a question about it. The reply is one of `choices`.

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
    """The model's choice. `tokens` is its cost: 0 from the cache."""

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


def reply_of(content: bytes, question: Question) -> tuple[Reply | Failure, int]:
    """The reply in a chat completion, and the tokens that it cost, whatever it says.

    Only one of the question's words counts as a reply, at most with a full stop or quotes.
    """
    try:
        reply = json.loads(content)
        said = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return Failure("no_chat", f"no chat completion ({type(error).__name__}): {content[:80]!r}"), 0
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 0:
        tokens = (len(question.system) + len(question.material) + len(question.asked)) // 4 + 1
    word = said.strip().strip(".\"'`*").casefold() if isinstance(said, str) else None
    if word not in question.choices:
        words = " or ".join(question.choices)
        return Failure("no_choice", f"the judge said {said!r:.80}, not {words}"), tokens
    return Reply(word, tokens), tokens


def body_of(model: str, question: Question, constrained: bool) -> bytes:
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
