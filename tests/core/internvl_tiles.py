"""InternVL's dynamic tiling, from its published definition, on Pillow alone.

Source: InternVL 1.5 (arXiv:2404.16821), section 3.2 and the preprocessing of its model cards, which the
released SAIL-VL2 image processor repeats. An image becomes a grid of i x j square tiles, least <= i*j <= most:
the grid whose i/j is closest to width/height; of two as close, the later in the order of i*j if the image has
more than half the pixels of that grid. Resizing is Pillow's bicubic on bytes; the thumbnail comes last.
"""

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grid(width: int, height: int, least: int, most: int, side: int) -> tuple[int, int]:
    """Tiles side by side, and rows of them."""
    every = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most}
    best, closest = (1, 1), float("inf")
    for i, j in sorted(every, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - i / j)
        roomy = width * height > 0.5 * side * side * i * j
        if distance < closest or (distance == closest and roomy):
            best, closest = (i, j), distance
    return best


def tiles(picture: Image.Image, least: int, most: int, side: int, thumbnail: bool) -> list[np.ndarray]:
    """The tiles (side, side, 3), bytes, row by row."""
    columns, rows = grid(*picture.size, least, most, side)
    canvas = np.asarray(picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
    cut = [
        canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]
    if thumbnail and len(cut) > 1:
        cut.append(np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)))
    return cut


def second(width: int, height: int, least: int, most: int, side: int) -> tuple[int, int]:
    """Tiles side by side, and rows of them, of MSAC's second grid; (0, 0) if no grid is left.

    MSAC (two-scale tiling) as the SAIL-VL2 authors' evaluation describes it: every grid whose columns divide the first
    grid's and whose rows divide the first grid's is struck out; the nearest of the others is taken.
    """
    across, down = grid(width, height, least, most, side)
    left = [
        (i, j)
        for i in range(1, most + 1)
        for j in range(1, most + 1)
        if least <= i * j <= most and (across % i or down % j)
    ]
    if not left:
        return 0, 0
    closest = min(abs(width / height - i / j) for i, j in left)
    ties = sorted((i * j, i, j) for i, j in left if abs(width / height - i / j) == closest)
    roomy = [(i, j) for size, i, j in ties if width * height > 0.5 * side * side * size]
    return (roomy or [ties[0][1:]])[-1]


def two_scale_tiles(
    picture: Image.Image, least: int, most: int, side: int, thumbnail: bool
) -> list[np.ndarray]:
    """The first grid's tiles, the second grid's, and the thumbnail, which a first grid of one tile already is."""
    first = tiles(picture, least, most, side, thumbnail=True)
    columns, rows = second(*picture.size, least, most, side)
    resized = picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC) if columns else None
    boxes = [
        (i * side, j * side, (i + 1) * side, (j + 1) * side) for j in range(rows) for i in range(columns)
    ]
    cut = [*first[:-1], *(np.asarray(resized.crop(box)) for box in boxes), first[-1]]
    return cut if thumbnail or len(cut) == 1 else cut[:-1]


def normalized(cut: list[np.ndarray]) -> np.ndarray:
    """What the model is given of these tiles: (tiles, 3, side, side), float32."""
    scaled = np.stack(cut).astype(np.float32) / np.float32(255)
    return ((scaled - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2)


def random_sizes(count: int, seed: int, longest: int) -> list[tuple[int, int]]:
    """(width, height) pairs: of every order of magnitude, squares, and exact ties between two grids."""
    random = np.random.default_rng(seed)
    free = np.exp(random.uniform(0, np.log(longest), (count, 2))).astype(int)
    # Midway between the aspect ratios of two grids, both are as close.
    ties = [(3, 2), (3, 4), (5, 4), (7, 4), (5, 2), (5, 12), (7, 24), (11, 2), (1, 1), (2, 1)]
    scaled = [(w * times, h * times) for w, h in ties for times in random.integers(1, longest // 12, 4)]
    return [*((int(w), int(h)) for w, h in free), *((int(w), int(h)) for w, h in scaled)]
