"""A tiny random core and one real vLLM server of it, shared by the tests that need the engine."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.model.videos import Caps, Clip
from rl.rollout.config import PoolConfig

from ..core.films import film

WORDS = [
    "compute",
    "largest",
    "minus",
    "smallest",
    "digit",
    "in",
    "cell",
    "plus",
    "A",
    "B",
    "C",
    "D",
    "yes",
    "no",
]
POOL = PoolConfig(max_model_tokens=1024, max_sequences=64)


@pytest.fixture(scope="session")
def tiny_core(tmp_path_factory) -> Path:
    from core.model.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("core") / "tiny", words=WORDS, seed=0)


@pytest.fixture(scope="session")
def server_url(tiny_core, tmp_path_factory):
    from rl.rollout.server import rollout_pool

    with rollout_pool(POOL, tiny_core, tmp_path_factory.mktemp("server")) as urls:
        yield urls[0]


@pytest.fixture
def client(server_url, tiny_core):
    from rl.rollout.client import RolloutClient
    from rl.rollout.messages import CoreFacts

    client = RolloutClient([server_url], CoreFacts.of(tiny_core))
    client.load_checkpoint(tiny_core)  # whatever the test before left there
    yield client
    client.close()


def record(number: int, *, mode: str = "think", image: bool = True, answer: str = "7") -> dict:
    """A row whose picture is noise of its own."""
    pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return {
        "id": f"row-{number}",
        "images": [Image.fromarray(pixels)] if image else [],
        "question": "compute A plus B",
        "answer": answer,
        "chain": None,
        "response": None,
        "mode": mode,
        "verifier": "number",
        "source": "test",
        "meta": {},
    }


@pytest.fixture(scope="session")
def records() -> list[dict]:
    rows = [record(n, mode="think" if n % 3 else "direct", image=bool(n % 4)) for n in range(24)]
    history = [
        {"user": "compute A minus B", "assistant": "<think>A</think>\\boxed{7}"},
        {"user": "yes", "assistant": "no"},
    ]
    rows[1]["videos"] = [Clip(film(noise=True), Caps(frames=3))]
    rows[2] |= {"system": "compute in A", "history": history}
    return rows


TEMPERATURE = 0.7


def prompt_inputs(processor, row):
    """The model's inputs for a row's prompt: token ids (1, tokens), and the pixels of its images, if any."""
    from rl.data import prompt_messages

    return processor.apply_chat_template(
        [prompt_messages(row)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def plain_logprobs(model, processor, row, prompt_ids, completion, *, grad=False, temperature=TEMPERATURE):
    """Plain transformers, one row, no padding: log-probabilities (tokens,) of a completion."""
    import torch

    inputs = prompt_inputs(processor, row)
    assert inputs["input_ids"][0].tolist() == prompt_ids
    ids = torch.tensor([prompt_ids + completion])
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    scores = (logits / temperature).log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return scores.gather(1, torch.tensor(completion)[:, None])[:, 0]
