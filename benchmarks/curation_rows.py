"""Rows for the benchmark and the tests of curation: pictures of figures, questions about them, and planted defects."""

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

KINDS = ("red circles", "blue squares", "bars in the chart", "students in the table", "triangles", "cars")
VERBS = (
    "How many {} are there in the picture of {}?",
    "Count the {} that you can see near {}.",
    "What is the number of {} next to {}?",
)
PLACES = (
    "the harbour",
    "a garden",
    "the old school",
    "a market",
    "the station",
    "a kitchen",
    "the river",
    "a museum",
)


def picture(rng: random.Random, side: int = 96) -> Image.Image:
    """A picture with a smooth background and a few figures."""
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        x, y, r = rng.randint(0, side), rng.randint(0, side), rng.randint(4, 14)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.randint(0, 255) for _ in range(3)))
    return image


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def row(rng: random.Random, number: int, side: int = 96) -> dict:
    """A good think row."""
    kind, place, count = rng.choice(KINDS), rng.choice(PLACES), rng.randint(2, 60)
    left = rng.randint(1, count - 1)
    return {
        "id": f"row-{number}",
        "images": [encoded(picture(rng, side), quality=92)],
        "question": rng.choice(VERBS).format(kind, place),
        "answer": str(count),
        "chain": f"On the left I see {left} {kind}, on the right {count - left}. {left} + {count - left} = {count}.",
        "mode": "think",
        "verifier": "number",
        "source": f"made/{place.split()[-1]}",
    }


def near(rng: random.Random, good: dict, number: int) -> dict:
    """A near-duplicate: the picture scaled, compressed or brightened, and the question with a small change."""
    image = Image.open(io.BytesIO(good["images"][0]))
    change = rng.randrange(4)
    if change == 0:
        data = encoded(image, quality=40)
    elif change == 1:
        data = encoded(image.resize((image.width * 3 // 2, image.height * 3 // 2)), "PNG")
    elif change == 2:
        data = encoded(ImageEnhance.Brightness(image).enhance(1.1), quality=85)
    else:
        data = encoded(image.resize((image.width * 2 // 3, image.height * 2 // 3)), "WEBP", quality=80)
    question = good["question"]
    spaced, other = question.replace("?", " ?"), question.replace("the ", "that ", 1)
    words = rng.choice((question, question.upper(), spaced, f"{question} ", other))
    return {**good, "id": f"near-{number}", "images": [data], "question": words}


RESTATED = (
    "The answer is {}.",
    "{}",
    "So the final answer is {}.",
    "It can be seen that the answer is {}.",
    "Therefore, {} is correct.",
)


def restating(rng: random.Random, number: int) -> dict:
    """A row whose chain only restates the answer."""
    made = row(rng, number)
    return {**made, "id": f"restating-{number}", "chain": rng.choice(RESTATED).format(made["answer"])}
