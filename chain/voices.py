"""Two ways to ask a policy: a checkpoint folder in this process, and a server that speaks the OpenAI API. Both stream.

A voice is called with chat messages (core.model.prompts.messages) and a function that takes each piece of the answer.
It returns the whole answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from chain.serve import require_checkpoint
from core.strict import ConfigError

Say = Callable[[str], None]
Messages = Sequence[Mapping[str, Any]]
Voice = Callable[[Messages, Say], str]


def voice(
    target: str,
    temperature: float,
    max_tokens: int,
    token_file: str | None = None,
    key_env: str | None = None,
) -> Voice:
    """The voice of a checkpoint folder or of a URL. Raises ConfigError for anything else.

    Args:
        temperature: 0 is greedy.
        max_tokens: most tokens of an answer.
        token_file: file with the token of servers that `posttrain rollout-server` started.
        key_env: environment variable with the key of another server.
    """
    if target.startswith(("http://", "https://")):
        return Server(target, temperature, max_tokens, token_file, key_env)
    require_checkpoint(Path(target))
    return Checkpoint(Path(target), temperature, max_tokens)


class Checkpoint:
    """A checkpoint folder, loaded by transformers; on a GPU if there is one. Args: as `voice`."""

    def __init__(self, folder: Path, temperature: float, max_tokens: int) -> None:
        self.temperature, self.max_tokens = temperature, max_tokens
        with redirect_stdout(
            sys.stderr
        ):  # DeepSpeed writes a line at its import; standard output is for answers
            self._load(folder)
        self.context = int(self.model.config.text_config.max_position_embeddings)

    def _load(self, folder: Path) -> None:
        import torch

        import core
        from core.training.model import load_processor

        core.register()
        from transformers import AutoModelForImageTextToText

        self.torch, self.processor = torch, load_processor(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto", trust_remote_code=False
        )
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, messages: Messages, say: Say) -> str:
        """Answer. Raises ConfigError if the conversation leaves no room for an answer."""
        from transformers import TextStreamer

        inputs = self.processor.apply_chat_template(
            [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        used = inputs["input_ids"].shape[1]
        if used >= self.context:
            raise ConfigError(
                f"the prompt has {used} tokens, the core's context {self.context}; /new starts over"
            )
        pieces: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                say(text)

        warm = {"temperature": self.temperature, "top_k": 0} if self.temperature else {}
        with self.torch.no_grad():
            self.model.generate(
                **inputs,
                do_sample=bool(warm),
                max_new_tokens=min(self.max_tokens, self.context - used),
                suppress_tokens=[self.model.config.image_token_id],
                streamer=Streamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **warm,
            )
        return "".join(pieces)


class Server:
    """A server at a URL: ours, whose token the environment or `token_file` holds, or any other. Args: as `voice`."""

    def __init__(
        self, url: str, temperature: float, max_tokens: int, token_file: str | None, key_env: str | None
    ) -> None:
        from rl.rollout import access
        from rl.rollout.http import Http

        self.url, self.temperature, self.max_tokens = (
            url.rstrip("/").removesuffix("/v1"),
            temperature,
            max_tokens,
        )
        if key_env and not os.environ.get(key_env):
            raise ConfigError(f"--api-key-env {key_env}: this variable is not set")
        key = os.environ[key_env] if key_env else None
        self.http = Http(None if key else access.known_token(token_file), timeout_s=600, key=key)
        models = self.http.get(self.url, "v1/models")["data"]
        self.model = models[0]["id"]

    def __call__(self, messages: Messages, say: Say) -> str:
        """Answer. Raises rl.rollout.http.RolloutError if the server refuses or does not answer."""
        from rl.rollout.messages import CoreFacts, openai_messages

        body = {
            "model": self.model,
            "messages": openai_messages(messages, CoreFacts.frame_px),  # a chat shows no videos
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stream": True,
        }
        pieces = []
        for piece in deltas(self.http.lines(self.url, "v1/chat/completions", body)):
            pieces.append(piece)
            say(piece)
        return "".join(pieces)


def deltas(lines: Iterator[str]) -> Iterator[str]:
    """The pieces of text in the lines of a streamed reply (server-sent events, `data: {...}`)."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            for choice in json.loads(data).get("choices", ()):
                yield choice["delta"].get("content") or ""
