import random

import pytest
from PIL import Image

WORDS = ["compute", "What", "is", "in", "cell", "A", "B", "C", "four", "seven"]


@pytest.fixture(scope="session")
def core_path(tmp_path_factory):
    """A core of 30,000 parameters, untrained: these tests are not about what it learns."""
    from core.model.tiny import TinySize, build_tiny

    size = TinySize(
        vision_hidden=32,
        vision_layers=1,
        vision_mlp=32,
        text_hidden=32,
        text_layers=1,
        text_heads=2,
        text_mlp=32,
    )
    return build_tiny(tmp_path_factory.mktemp("core"), words=WORDS, seed=0, size=size)


@pytest.fixture(scope="session")
def processor(core_path):
    from core.training.model import load_processor

    return load_processor(core_path)


@pytest.fixture(scope="session")
def make_record():
    def make(number: int = 0, **changes):
        numbers = random.Random(number)
        digits = [numbers.randrange(10) for _ in range(3)]
        colour = tuple(numbers.randrange(256) for _ in range(3))
        row = {
            **{
                "id": f"row-{number}",
                "images": [Image.new("RGB", (56, 56), colour)],
                "question": "compute A + B",
            },
            **{"answer": str(digits[2]), "verifier": "exact", "mode": "think", "response": None},
            **{"chain": f"A = {digits[0]} . B = {digits[1]} .", "source": "test", "meta": {}},
        }
        return {**row, **changes}

    return make


@pytest.fixture(scope="session")
def mixed_set(make_record, tmp_path_factory):
    """24 rows: thinking and direct, every third one without an image, every fifth one with a video of two frames."""
    from corpus.records import write_records

    path = tmp_path_factory.mktemp("data") / "mixed.parquet"
    rows = [
        make_record(
            n,
            mode="think" if n % 2 else "direct",
            videos=[] if n % 5 else [[Image.new("RGB", (40, 20), (9 * n + k, 0, k)) for k in (0, 99)]],
            **({} if n % 3 else {"images": []}),
        )
        for n in range(24)
    ]
    write_records(path, rows)
    return path
