"""Prompts and completions, and their form in vLLM's chat API."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import read_json
from core.model.pictures import Picture
from core.model.videos import tiles
from rl.rollout.config import MODEL_NAME
from rl.rollout.routing import Routing

if TYPE_CHECKING:
    import numpy as np

BAN = -100.0
"""Logit bias of a banned token, the lowest that the API takes: e**-100 of any other token's probability."""

_OPENING = threading.Lock()
"""Guards Pillow, which decodes at first access and fails if two threads do so at once: one image may be encoded for
several servers at the same time."""


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
    log-probabilities are those of the sampling distribution (temperature and token ban applied).
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool
    """False if the completion was truncated at max_tokens or at a banned token."""
    experts: np.ndarray | None = None
    """Routing replay: the experts (tokens - 1, layers, experts per token) of every token but the last."""


@dataclass(frozen=True)
class Answer:
    """A prompt's token ids, as the server rendered it, and its completions."""

    prompt_ids: list[int]
    completions: list[Completion]
    experts: np.ndarray | None = None
    """Routing replay: the experts (prompt tokens, layers, experts per token) of the prompt."""


@dataclass(frozen=True)
class CoreFacts:
    """Facts about the served core that a client needs, from its checkpoint folder."""

    banned_ids: tuple[int, ...]
    """Id of the image token; a completion must not contain it, because no image belongs to it."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Weights that a checkpoint omits because they are tied: name -> name of the stored weight."""
    frame_px: int = 448
    """Side in pixels of the tile that a frame of a video is."""
    thought_open: bool = False
    """Whether the chat template opens the thought, so that completions of thinking rows start inside it."""
    routing: Routing | None = None
    """Routing replay: what the servers return with each completion; None: nothing."""

    @classmethod
    def of(cls, model: Path, *, routing_replay: bool = False) -> CoreFacts:
        """Read `model/config.json` and the chat template."""
        from core.training.model import opens_thought

        config = read_json(model / "config.json")
        tied = config.get("tie_word_embeddings") or config["text_config"].get("tie_word_embeddings", False)
        # vLLM's CPU engine packs lm_head's weights separately from the embedding's. Unless both are sent, it keeps the
        # old head, and every log-probability after the first update belongs to another policy.
        twins = {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tied else {}
        side = config["vision_config"]["image_size"]
        routing = Routing.of(config["text_config"]) if routing_replay else None
        return cls((config["image_token_id"],), twins, side, opens_thought(model), routing)


def completion_request(prompt: Prompt, sampling: Sampling, core: CoreFacts) -> dict[str, Any]:
    """The body of a request to /v1/chat/completions."""
    return {
        "model": MODEL_NAME,
        "messages": openai_messages(prompt.messages, core.frame_px),
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": prompt.seed,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "logit_bias": {str(token): BAN for token in core.banned_ids},
    }


def read_answer(reply: Mapping[str, Any], core: CoreFacts) -> Answer:
    """The answer in a server's reply. Raises ValueError if the reply is incomplete."""
    prompt = reply["prompt_token_ids"]
    completions = [_completion(choice, core) for choice in reply["choices"]]
    if core.routing is None:
        return Answer(prompt, completions)
    # The completions of a group read one prompt. The learner computes it once, with the first completion's experts.
    found = [
        core.routing.read(choice.get("routed_experts"), len(prompt) + len(choice["token_ids"]) - 1)
        for choice in reply["choices"]
    ]
    completions = [
        replace(one, experts=experts[len(prompt) : len(prompt) + len(one.token_ids) - 1].copy())
        for one, experts in zip(completions, found, strict=True)
    ]
    return Answer(prompt, completions, found[0][: len(prompt)].copy())


def _completion(choice: Mapping[str, Any], core: CoreFacts) -> Completion:
    ids = list(choice["token_ids"])
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if len(ids) != len(logprobs):
        raise ValueError(f"a completion has {len(ids)} tokens but {len(logprobs)} log-probabilities")
    finished = choice["finish_reason"] == "stop"
    # The ban makes image tokens almost impossible, but a server that ignores it must not break the learner's forward.
    banned = next((at for at, token in enumerate(ids) if token in core.banned_ids), None)
    if banned is not None:
        ids, logprobs, finished = ids[:banned], logprobs[:banned], False
    return Completion(ids, logprobs, choice["message"]["content"] or "", finished)


def openai_messages(messages: Sequence[Mapping[str, Any]], frame_px: int) -> list[dict[str, Any]]:
    """The conversation with pictures inlined as data URLs: files as they are stored, PIL images and frames as PNG.

    A server decodes a file by the rule of core.model.pictures (core/model/vllm_plugin.py, rl/rollout/hf.py). A frame of
    a video is sent as a picture of one tile, `frame_px` by `frame_px`.
    """
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    shown = [part["image"] for content in contents for part in content if part["type"] == "image"]
    images = iter(tiles(shown, frame_px))
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_openai_part(part, images) for part in content]
        out.append({"role": message["role"], "content": content})
    return out


def _openai_part(part: Mapping[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    with _OPENING:
        picture = Picture.of(next(images))
    data = base64.b64encode(picture.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}}
