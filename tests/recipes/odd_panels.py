"""The demo's data with its pictures stored as people have them; the rows that no server takes are added."""

import io
from pathlib import Path

from PIL import Image

from core.model.pictures import as_rgb
from corpus.records import load_records, write_records
from recipes.demo.panels import generate as panels

ORIENTATION = 0x0112
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> what turns a picture so that this orientation shows it upright."""


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = image.transpose(UNDO[orientation]) if orientation in UNDO else image
    return encoded(stored, exif=exif)


def sixteen_bits(image: Image.Image) -> bytes:
    import cv2
    import numpy as np

    values = np.asarray(image).astype(np.uint16)[..., ::-1] * 257
    return cv2.imencode(".png", values)[1].tobytes()


LOSSLESS = {
    **{f"exif {number}": lambda image, number=number: turned(image, number) for number in range(1, 9)},
    "cmyk": lambda image: encoded(image.convert("CMYK"), "TIFF"),
    "alpha": lambda image: encoded(image.convert("RGBA")),
    "sixteen bits": sixteen_bits,
}
"""Files that show the same pixels as the picture."""
LOSSY = {
    "palette": lambda image: encoded(image.quantize(64)),
    "phone": lambda image: encoded(image, "JPEG", quality=95, exif=Image.Exif()),
    "one pixel": lambda image: encoded(image.resize((1, 1))),
    "strip": lambda image: encoded(image.resize((20_000, 20))),
}
KINDS = LOSSLESS | LOSSY


def generate(out: Path, *, seed: int, **sizes) -> None:
    """The demo's sets; in each the rows' pictures take the kinds in turn."""
    panels(out, seed=seed, **sizes)
    ways = list(KINDS.values())
    for file in sorted(out.glob("*.parquet")):
        rows = []
        for number, row in enumerate(load_records(file)):
            own = [ways[number % len(ways)](as_rgb(picture)) for picture in row["images"]]
            rows.append({**row, "images": own})
        first = rows[0]
        rows.append({**first, "id": f"{file.stem}-text", "images": []})
        if first["mode"] == "think" or file.stem.startswith("heldout"):
            rows.append({**first, "id": f"{file.stem}-nine", "images": first["images"] * 9})
        write_records(file, rows)
