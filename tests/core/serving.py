"""A stock vLLM server as a user starts it, and what transformers makes of the same conversations."""

import base64
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import requests
import torch
from PIL import Image

import core
from core import processes
from core.processes import free_port

MAX_TOKENS = 8
"""Of a completion, unless a test asks for another number."""
CPU_ENVIRONMENT = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    # Part of the sampler compiles even under --enforce-eager.
    **{"TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""},
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Starts in less time, with the flag `--distributed-executor-backend uni`."""
START_S = 600


@contextmanager
def vllm_server(
    model: Path, log: Path, *flags: str, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """The URL of a stock vLLM server of a checkpoint folder; ended with the block."""
    port = free_port("127.0.0.1")
    process = processes.start(
        [
            *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *flags),
        ],
        log=log,
        environment={**os.environ, **CPU_ENVIRONMENT, **(environment or {}), "PYTHONSAFEPATH": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(url):
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, f"the server did not start:\n{log.read_text()[-4000:]}"
            time.sleep(0.25)
        yield url
    finally:
        processes.stop(process)


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


class Reference:
    """The same folder in plain transformers, one conversation at a time."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        core.register()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    def inputs(self, messages: list[dict[str, Any]]) -> Any:
        return self.processor.apply_chat_template(
            [[{**turn, "content": [_opened(part) for part in _parts(turn)]} for turn in messages]],
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        )

    def greedy(self, messages: list[dict[str, Any]], tokens: int = MAX_TOKENS) -> tuple[list[int], Any]:
        """Completion ids of greedy decoding and the log-probabilities of every token at each: (ids, vocabulary)."""
        inputs = self.inputs(messages)
        out = self.model.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": tokens, "return_dict_in_generate": True},
            output_logits=True,
        )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return ids, torch.cat(out.logits).log_softmax(-1)

    def score(self, messages: list[dict[str, Any]], ids: list[int]) -> list[float]:
        """Log-probability of every token but the first of prompt and completion, by one forward pass."""
        inputs = self.inputs(messages)
        row = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
        pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        with torch.no_grad():
            logprobs = self.model(input_ids=row, **pixels).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, row[0, 1:, None])[:, 0].tolist()


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _opened(part: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI image part as what transformers' templates take: the picture itself."""
    if part["type"] != "image_url":
        return part
    data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(data))}


def picture(width: int, height: int, kind: str = "png", mode: str = "RGB") -> dict[str, Any]:
    """An OpenAI content part with an image of noise as a data URL."""
    return data_url(encoded(width, height, kind, mode), kind)


def encoded(width: int, height: int, kind: str = "png", mode: str = "RGB") -> bytes:
    """The file of an image of noise."""
    noise = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    """One chat completion, greedy and of MAX_TOKENS tokens unless told otherwise; with token ids."""
    model = client.models.list().data[0].id
    extra = {"return_token_ids": True, **options.pop("extra_body", {})}
    defaults = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return client.chat.completions.create(
        model=model, messages=messages, extra_body=extra, **{**defaults, **options}
    )
