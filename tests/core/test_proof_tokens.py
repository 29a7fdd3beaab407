"""Everyone counts the same image tokens: InternVL's rule, our processor, the learners, and vLLM's processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from core import SailVL2ImageProcessor, SailVL2Processor, TinySize, build_tiny
from rl.shared_prefix.tiles import TileStore
from sft.data import count_tokens, prepare

from . import internvl_tiles as internvl

SIDE, PER_TILE = 56, 4
CORES = {
    "10 tiles": (10, True, False),
    "12 tiles, no thumbnail": (12, False, False),
    "10 tiles at two scales": (10, True, True),
}
"""Most tiles, thumbnail, two scales."""


def rows_of_sizes() -> list[list[tuple[int, int]]]:
    """240 sizes, one to five of them per row, the extreme ones first, and a row without an image."""
    extreme = [(1, 1), (1, 5000), (5000, 1), (56, 56), (57, 56)]
    sizes = [*extreme, *internvl.random_sizes(195, seed=0, longest=1200)]
    rows: list[list[tuple[int, int]]] = [[]]
    while sizes:
        count = len(rows) % 5 + 1
        rows.append(sizes[:count])
        del sizes[:count]
    return rows


def record(sizes: list[tuple[int, int]]) -> dict:
    images = [Image.new("RGB", size, (90, 120, 30)) for size in sizes]
    return {
        **{"id": "a", "images": images, "question": "compute A", "answer": "3", "mode": "direct"},
        **{"chain": None, "response": None, "verifier": "exact", "source": "", "meta": {}},
    }


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (most, thumbnail, msac) in CORES.items():
        made[name] = build_tiny(tmp_path_factory.mktemp("cores") / "core", words=["A", "compute"], seed=0)
        processor = SailVL2Processor.from_pretrained(made[name])
        processor.image_processor = SailVL2ImageProcessor(
            size={"height": SIDE, "width": SIDE}, max_patches=most, use_thumbnail=thumbnail, use_msac=msac
        )
        processor.save_pretrained(made[name])
    return made


def prompt_of(sizes: list[tuple[int, int]]) -> str:
    return "<IMG_CONTEXT>compute" * len(sizes) + "A"


def tokens_by_rule(size: tuple[int, int], most: int, thumbnail: bool, msac: bool) -> int:
    columns, rows = internvl.grid(*size, 1, most, SIDE)
    count = columns * rows + (columns * rows > 1)
    if msac:
        columns, rows = internvl.second(*size, 1, most, SIDE)
        count += columns * rows
    return PER_TILE * (count if thumbnail or count == 1 else count - 1)


@pytest.mark.parametrize("most", [2, 10, 24])
def test_no_image_has_more_tokens_than_the_costliest(cores: dict[str, Path], most: int) -> None:
    processor = SailVL2Processor.from_pretrained(cores["10 tiles at two scales"])
    processor.image_processor.max_patches = most
    height, width = processor.costliest_image()
    largest = tokens_by_rule((width, height), most, True, True)
    sizes = internvl.random_sizes(400, seed=most, longest=4000)
    assert max(tokens_by_rule(size, most, True, True) for size in sizes) <= largest


@pytest.mark.parametrize("name", CORES)
def test_processor_and_learners_count_what_the_rule_says(cores: dict[str, Path], name: str) -> None:
    processor = SailVL2Processor.from_pretrained(cores[name])
    rl_processor = SailVL2Processor.from_pretrained(cores[name])
    rl_processor.image_processor = TileStore(processor.image_processor)  # as the RL learner replaces it
    for sizes in rows_of_sizes():
        expected = [tokens_by_rule(size, *CORES[name]) for size in sizes]
        counted = processor._get_num_multimodal_tokens([(height, width) for width, height in sizes])
        assert counted.num_image_tokens == [2 + count for count in expected]  # <img> and </img>

        row = record(sizes)
        lesson = prepare(row, processor)
        pixels = lesson["pixel_values"]
        assert (0 if pixels is None else len(pixels)) * PER_TILE == sum(expected)
        assert int((lesson["input_ids"] == processor.image_token_id).sum()) == sum(expected)
        assert count_tokens(row, processor) == (len(lesson["input_ids"]) - sum(expected), sum(expected))

        images = [row["images"]] if sizes else None
        ids = rl_processor(images=images, text=[prompt_of(sizes)])["input_ids"][0]
        assert ids == expanded(processor, expected)


@pytest.mark.slow
def test_vllm_prepares_the_same_tokens(cores: dict[str, Path], tmp_path: Path) -> None:
    rows = rows_of_sizes()
    answers = prepared_by_vllm(cores, rows, tmp_path)
    for name, folder in cores.items():
        processor = SailVL2Processor.from_pretrained(folder)
        for sizes, answer in zip(rows, answers[name], strict=True):
            expected = [tokens_by_rule(size, *CORES[name]) for size in sizes]
            assert answer["ids"] == expanded(processor, expected)
            assert answer["embeddings"] == expected
            assert answer["holders"] == image_places(processor, answer)
            starts = [at for at, token in enumerate(answer["ids"]) if token == processor.image_token_ids[1]]
            ranges = zip(starts, (2 + count for count in expected), strict=True)
            assert answer["ranges"] == [list(span) for span in ranges]


@pytest.mark.slow
def test_vllm_puts_an_images_features_where_its_tokens_are_even_if_there_is_only_one(tmp_path: Path) -> None:
    core = build_tiny(tmp_path / "core", words=["A", "compute"], seed=0, size=TinySize(any_resolution=True))
    processor = SailVL2Processor.from_pretrained(core)
    rows = [[(1, 1)], [(41, 41), (56, 28)]]
    answers = prepared_by_vllm({"any": core}, rows, tmp_path)["any"]
    assert [answer["embeddings"] for answer in answers] == [[1], [1, 2]]
    assert [answer["holders"] for answer in answers] == [image_places(processor, each) for each in answers]


def image_places(processor: SailVL2Processor, answer: dict) -> list[int]:
    return [at for at, token in enumerate(answer["ids"]) if token == processor.image_token_id]


def expanded(processor: SailVL2Processor, image_tokens: list[int]) -> list[int]:
    """The ids of `prompt_of` a given number of images with a given number of tokens each."""
    images = [f"<img>{'<IMG_CONTEXT>' * count}</img>compute" for count in image_tokens]
    return processor.tokenizer("".join(images) + "A")["input_ids"]


def prepared_by_vllm(
    cores: dict[str, Path], rows: list[list[tuple[int, int]]], folder: Path
) -> dict[str, list[dict]]:
    job, out = folder / "job.json", folder / "out.json"
    prompts = [[prompt_of(sizes), sizes] for sizes in rows]
    folders = {name: str(core) for name, core in cores.items()}
    job.write_text(json.dumps({"cores": folders, "prompts": prompts, "out": str(out)}))
    child = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("vllm_tokens.py")), str(job)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(out.read_text())
