r"""The kinds `box` and `point`: boxes and points in a picture, in the spellings that models use.

A box is x1, y1, x2, y2 with x1 < x2 and y1 < y2, in the coordinates of the gold: `[10, 20, 30, 40]`,
`(10, 20), (30, 40)`, `\left[10, 20, 30, 40\right]`, `{"bbox_2d": [10, 20, 30, 40], "label": "cat"}`, a list of such.
A point is x, y: `(10, 20)`, `{"point_2d": [10, 20]}`, `{"x": 10, "y": 20}`.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from rewards.answers.json import JsonError, JsonLimitError, read_json
from rewards.answers.kind import GoldError, Kind, Limits, decided, unparseable
from rewards.answers.outcome import matches_all
from rewards.answers.plain import plain_latex, plain_text
from rewards.example import Example
from rewards.verdict import Status, Verdict

MAX_SHAPES = 100
MAX_COORDINATE = 10**6
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_POINT_KEYS = ("point_2d", "point")
_BARE = re.compile(r"[-+0-9.,() \[\]]+")


class Box(NamedTuple):
    """A rectangle in the gold's coordinates; `label` is "" if it has none."""

    x1: Fraction
    y1: Fraction
    x2: Fraction
    y2: Fraction
    label: str = ""

    @property
    def area(self) -> Fraction:
        return (self.x2 - self.x1) * (self.y2 - self.y1)


class Point(NamedTuple):
    """A point in the gold's coordinates; `label` is "" if it has none."""

    x: Fraction
    y: Fraction
    label: str = ""


def read_boxes(text: str) -> list[Box]:
    """The boxes that a text spells; [] if it spells anything else, or if a box is empty or has its corners swapped.

    >>> [len(read_boxes(text)) for text in ("[1,2,3,4]", "(1,2),(3,4)", "[[1,2,3,4],[5,6,7,8]]", "[3,2,1,4]")]
    [1, 1, 2, 0]

    Raises JsonLimitError if the text breaks a cap.
    """
    value = _read(text)
    shapes = [_box(value)] if _is_box(value) else [_box(one) for one in _sequence(value)]
    boxes = [shape for shape in shapes if shape]
    return boxes if len(boxes) == len(shapes) else []


def read_points(text: str) -> list[Point]:
    """The points that a text spells; [] if it spells anything else. Raises JsonLimitError if it breaks a cap.

    >>> [len(read_points(text)) for text in ("(1, 2)", '{"x": 1, "y": 2}', "[[1,2],[3,4]]", "[1,2,3]")]
    [1, 1, 2, 0]
    """
    value = _read(text)
    shapes = [_point(value)] if _point(value) else [_point(one) for one in _sequence(value)]
    points = [shape for shape in shapes if shape]
    return points if len(points) == len(shapes) else []


def iou(one: Box, other: Box) -> Fraction:
    """Intersection over union.

    >>> iou(Box(0, 0, 2, 2), Box(1, 0, 3, 2))  # 2 of 4 + 4 - 2
    Fraction(1, 3)
    """
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    if width <= 0 or height <= 0:
        return Fraction(0)
    shared = width * height
    return Fraction(shared, 1) / (one.area + other.area - shared)


def boxes_match(gold: Sequence[Box], given: Sequence[Box], threshold: Fraction) -> bool:
    """Whether gold and given boxes pair one to one, each pair with an IoU of at least the threshold."""
    return len(gold) == len(given) and matches_all(
        len(gold), len(given), lambda want, give: _overlap(gold[want], given[give]) >= threshold
    )


def overlap(gold: Sequence[Box], given: Sequence[Box]) -> Fraction:
    """Mean IoU in [0, 1] of pairs, matched greedily from the highest IoU; a box without a partner counts as 0.

    >>> box = Box(0, 0, 2, 2)
    >>> overlap([box], [box, Box(5, 5, 6, 6)])
    Fraction(1, 2)
    """
    pairs = [
        (_overlap(one, other), -want, -give)
        for want, one in enumerate(gold)
        for give, other in enumerate(given)
    ]
    total, done = Fraction(0), (set[int](), set[int]())
    for shared, want, give in sorted(pairs, reverse=True):
        if want not in done[0] and give not in done[1]:
            total += shared
            done[0].add(want)
            done[1].add(give)
    return total / max(len(gold), len(given), 1)


def points_match(gold: Sequence[Point | Box], given: Sequence[Point], distance: Fraction) -> bool:
    """Whether gold and given points pair one to one: each given point is near its gold point or in its gold box."""
    return len(gold) == len(given) and matches_all(
        len(gold), len(given), lambda want, give: _hits(gold[want], given[give], distance)
    )


def _overlap(gold: Box, given: Box) -> Fraction:
    return iou(gold, given) if gold.label in ("", given.label) else Fraction(0)


def _hits(gold: Point | Box, given: Point, distance: Fraction) -> bool:
    if gold.label not in ("", given.label):
        return False
    if isinstance(gold, Box):
        return gold.x1 <= given.x <= gold.x2 and gold.y1 <= given.y <= gold.y2
    return (gold.x - given.x) ** 2 + (gold.y - given.y) ** 2 <= distance**2


def _read(text: str) -> Any:
    """The value of JSON, or of numbers in any brackets."""
    try:
        return read_json(text)
    except JsonLimitError:
        raise
    except JsonError:
        pass
    bare = plain_latex(text).replace(r"\{", "[").replace(r"\}", "]").replace("{", "[").replace("}", "]")
    if not _BARE.fullmatch(bare):
        return None
    bare = bare.replace("(", "[").replace(")", "]")
    try:
        value = read_json(f"[{bare}]")
    except JsonLimitError:
        raise
    except JsonError:
        return None
    return value[0] if len(value) == 1 else value


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) and 0 < len(value) <= MAX_SHAPES else [None]


def _is_box(value: Any) -> bool:
    pair_of_corners = isinstance(value, list) and len(value) == 2 and all(_numbers(one, 2) for one in value)
    return isinstance(value, Mapping) or bool(_numbers(value, 4)) or pair_of_corners


def _box(value: Any) -> Box | None:
    label = ""
    if isinstance(value, Mapping):
        label = _label(value)
        corners = ("x1", "y1", "x2", "y2")
        key = next((key for key in _BOX_KEYS if key in value), None)
        value = value[key] if key else [value.get(name) for name in corners]
    if isinstance(value, list) and len(value) == 2 and all(_numbers(one, 2) for one in value):
        value = [*value[0], *value[1]]
    numbers = _numbers(value, 4)
    if not numbers or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    x1, y1, x2, y2 = numbers
    return Box(x1, y1, x2, y2, label)


def _point(value: Any) -> Point | None:
    label = ""
    if isinstance(value, Mapping):
        label = _label(value)
        key = next((key for key in _POINT_KEYS if key in value), None)
        value = value[key] if key else [value.get("x"), value.get("y")]
    numbers = _numbers(value, 2)
    return Point(numbers[0], numbers[1], label) if numbers else None


def _numbers(value: Any, count: int) -> list[Fraction]:
    """A list of `count` coordinates; [] if the value is anything else."""
    if not isinstance(value, list) or len(value) != count:
        return []
    fits = all(isinstance(one, Fraction) and abs(one) <= MAX_COORDINATE for one in value)
    return value if fits else []


def _label(value: Mapping[str, Any]) -> str:
    label = value.get("label", "")
    return plain_text(label) if isinstance(label, str) else ""


def gold_boxes(text: str) -> list[Box]:
    """The boxes of a gold answer; [] if it is anything else."""
    try:
        return read_boxes(text)
    except JsonLimitError:
        return []


def gold_targets(text: str) -> list[Point] | list[Box]:
    """The points, or else the boxes, of a gold answer; [] if it is anything else."""
    try:
        return read_points(text) or read_boxes(text)
    except JsonLimitError:
        return []


def _box_gold(example: Example) -> list[Box]:
    boxes = gold_boxes(example.answer)
    if not boxes:
        raise GoldError(
            f"gold answer {example.answer[:80]!r} is not a box; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
        )
    return boxes


def _point_gold(example: Example) -> list[Point] | list[Box]:
    targets = gold_targets(example.answer)
    if not targets:
        raise GoldError(
            f"gold answer {example.answer[:80]!r} is neither a point nor a box; "
            "write [x, y] or [x1, y1, x2, y2]"
        )
    return targets


def _judge_box(answer: str, gold: list[Box], example: Example, limits: Limits) -> Verdict:
    given = read_boxes(answer)
    if not given:
        return unparseable(answer, "box with x1 < x2 and y1 < y2")
    if limits.graded:
        score = float(overlap(gold, given))
        status = Status.CORRECT if score == 1 else Status.WRONG
        return Verdict(score, status, answer, f"mean IoU {score:.3f}")
    return decided(boxes_match(gold, given, limits.limit("iou_threshold", example)), answer)


def _judge_point(answer: str, gold: list[Point] | list[Box], example: Example, limits: Limits) -> Verdict:
    given = read_points(answer)
    if not given:
        return unparseable(answer, "point")
    return decided(points_match(gold, given, limits.limit("max_distance", example)), answer)


BOX = Kind(_box_gold, _judge_box)
POINT = Kind(_point_gold, _judge_point)
