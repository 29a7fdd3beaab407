"""transformers' own ways in, on a folder that vLLM serves: `pipeline("image-text-to-text")` and the Auto classes."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import core

QUESTION = "what digit is in the image?"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random core whose processor cuts an image into one to six tiles and adds a thumbnail."""
    core.register()
    words = ["A", "B", "compute", "digit", "what", "is", "in", "image", "the"]
    path = core.build_tiny(tmp_path_factory.mktemp("pipeline") / "core", words=words, seed=0)
    processor = core.SailVL2Processor.from_pretrained(path)
    processor.image_processor.max_patches = 6
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    from transformers import pipeline

    return pipeline("image-text-to-text", model=str(folder))


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chat(*sizes: tuple[int, int], question: str = QUESTION) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "image": noise(*size)} for size in sizes]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


CHATS = {
    "no image": chat(question="compute A + B"),
    "one image": chat((131, 60)),
    "three odd images": chat((301, 207), (9, 90), (60, 61)),
    "several turns": [
        {"role": "system", "content": [{"type": "text", "text": "compute"}]},
        *chat((56, 120)),
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        *chat((120, 56), (60, 60), question="compute A + B"),
    ],
}


def generated(parts: tuple[Any, Any], rows: list[Any]) -> list[str]:
    """What `generate` continues a batch of chats with, padded on the left."""
    model, processor = parts
    inputs = processor.apply_chat_template(
        rows,
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    ids = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(ids, skip_special_tokens=True)


def test_the_pipeline_continues_a_chat_as_generate_does(pipe: Any, parts: tuple[Any, Any]) -> None:
    for messages in CHATS.values():
        reply = pipe(text=messages, return_full_text=False, generate_kwargs=GREEDY)
        assert reply[0]["generated_text"] == generated(parts, [messages])[0]


def test_a_batch_of_rows_of_all_lengths_reads_as_the_rows_one_by_one(parts: tuple[Any, Any]) -> None:
    rows = list(CHATS.values())
    assert generated(parts, rows) == [generated(parts, [row])[0] for row in rows]


def test_the_pipeline_takes_many_chats_and_batches_those_with_images(
    pipe: Any, parts: tuple[Any, Any]
) -> None:
    expected = {name: generated(parts, [messages])[0] for name, messages in CHATS.items()}
    illustrated = [name for name in CHATS if name != "no image"]  # a batch of transformers' is all or none
    for names, batch_size in ((list(CHATS), 1), (illustrated, len(illustrated))):
        rows = [CHATS[name] for name in names]
        replies = pipe(text=rows, return_full_text=False, generate_kwargs=GREEDY, batch_size=batch_size)
        assert [reply[0]["generated_text"] for reply in replies] == [expected[name] for name in names]


def test_an_image_may_be_a_picture_a_path_or_a_data_url(
    pipe: Any, parts: tuple[Any, Any], tmp_path: Path
) -> None:
    picture = noise(131, 60)
    picture.save(tmp_path / "picture.png")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    expected = generated(parts, [chat((131, 60))])[0]
    ways = [
        {"image": picture},
        {"url": str(tmp_path / "picture.png")},
        {"path": str(tmp_path / "picture.png")},
        {"url": url},
        {"base64": url.partition("base64,")[2]},
    ]
    for way in ways:
        messages = [
            {"role": "user", "content": [{"type": "image", **way}, {"type": "text", "text": QUESTION}]}
        ]
        reply = pipe(text=messages, return_full_text=False, generate_kwargs=GREEDY)
        assert reply[0]["generated_text"] == expected


def test_the_pipeline_takes_a_text_with_placeholders_and_its_images(
    pipe: Any, parts: tuple[Any, Any]
) -> None:
    _, processor = parts
    messages = chat((131, 60), (9, 90))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [part["image"] for part in messages[0]["content"][:2]]
    reply = pipe(images=images, text=prompt, return_full_text=False, generate_kwargs=GREEDY)
    assert reply[0]["generated_text"] == generated(parts, [messages])[0]
