r"""The answer reward: does the completion give the row's gold answer?

In thinking mode the answer is the one box after the thought. In direct mode it is the one box, or the whole
text if there is no box (rewards.extract). No other place is searched. The row's `verifier` chooses the comparison:

| kind | an answer is right if it is |
|---|---|
| auto | right under the kind that `kind_of` chooses by the shape of the gold; the verdict's reason names that kind |
| math | mathematically equal: exact rules, then math-verify in a process that can be killed |
| integer | the same integer: 1,000 = 1000.0 |
| number | the same number, or one within `tolerance` or `relative_tolerance` |
| exact | the same text up to case, spaces and a full stop, or equal to one of meta["answers"] in this sense |
| choice | the option's letter, or its text if meta["choices"] lists the options (a list, or letter -> text) |
| set | the same elements in any order, each as math; in {}, [] or no brackets |
| list | the same elements in the same order, each as math; in (), [] or no brackets |
| json | the same JSON value: keys in any order, text as exact, numbers as number |
| box | as many boxes, paired one to one, each pair with an IoU of at least `iou_threshold`; a degenerate box is wrong |
| point | as many points, paired one to one, each within `max_distance` of its gold point or inside its gold box |
| quantity | the same quantity, in any unit that converts: 1.5 km = 1500 m; any unit if the gold has none |
| judge, none | not graded here: unscored |

A row's meta may set `tolerance`, `relative_tolerance`, `iou_threshold` and `max_distance`; such a number overrides
the parameter of that name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from rewards.answers.boxes import BOX, POINT, gold_boxes, gold_targets
from rewards.answers.choice import CHOICE, option_letter, options_of
from rewards.answers.collection import LIST, SET
from rewards.answers.json import JSON, JsonError, read_json
from rewards.answers.kind import GoldError, Kind
from rewards.answers.math import MATH
from rewards.answers.notation import elements, has_relation, is_words, joined
from rewards.answers.number import INTEGER, NUMBER, exact_number
from rewards.answers.quantity import QUANTITY
from rewards.answers.text import EXACT
from rewards.example import UNGRADED, Example
from rewards.extract import MAX_BOX_CHARS, parse
from rewards.names import nearest
from rewards.verdict import Verdict

_OPTION = re.compile(r"\(?[A-H]\)?\.?")
_OTHER = re.compile(r"[0-9<>^_]")


@dataclass(frozen=True)
class AnswerReward:
    r"""1 for the gold answer, 0 for a wrong, unreadable or missing answer; None if the row cannot be graded.

    Source: SAIL-VL2 (arXiv:2509.14033), answer reward.

    >>> row = Example("row-1", "What is a half and a half?", "1", "think")
    >>> AnswerReward()(r"<think>0.5 + 0.5</think> \boxed{1.0}", row).score
    1.0
    >>> AnswerReward()(r"<think>\boxed{1}</think> It is 1.", row).status.value
    'no_answer'
    """

    tolerance: float = 0.0
    """Largest absolute error at which a `number`, a `quantity` or a number in `json` is right."""
    relative_tolerance: float = 0.0
    """Largest difference at which such a number is right, as a share of the gold; the wider tolerance applies."""
    iou_threshold: float = 0.5
    """Smallest intersection over union at which a `box` is right; the default is PASCAL VOC's."""
    graded: bool = False
    """Whether a `box` answer earns its mean IoU instead of 1 or 0 by the threshold."""
    max_distance: float = 0.0
    """Largest distance, in the gold's coordinates, at which a `point` is right."""
    thought_open: bool = False
    """Whether the chat template has already opened <think>, so that the completion starts inside the thought."""

    self_test: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        problem = _limits_problem({name: getattr(self, name) for name in _LIMITS})
        if problem:
            raise ValueError(problem)

    def __call__(self, completion: str, example: Example) -> Verdict:
        try:
            kind, gold = _read_gold(example)
        except GoldError as error:
            return Verdict.unscored(str(error))
        if kind in UNGRADED:
            return Verdict.unscored(f'verifier "{kind}": no rule grades this row; a judge may')
        parsed = parse(completion, example.mode, self.thought_open)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        verdict = _KINDS[kind].compare(parsed.answer, gold, example, self)
        if len(parsed.answer) > MAX_BOX_CHARS:  # a direct completion may be pages long
            verdict = replace(verdict, answer=parsed.answer[:MAX_BOX_CHARS])
        if example.verifier == "auto":
            said = f": {verdict.reason}" if verdict.reason else ""
            verdict = replace(verdict, reason=f"auto read the gold as {kind}{said}")
        return verdict

    def limit(self, name: str, example: Example) -> Fraction:
        """The row's number of that name, or the parameter if the row has none, as an exact fraction."""
        return Fraction(str(example.meta.get(name, getattr(self, name))))


def kind_of(gold: str, meta: Mapping[str, Any] | None = None) -> str:
    r"""The kind of answer that `auto` chooses for a gold.

    >>> [kind_of(gold) for gold in ("4", "5 cm", r"\frac{x}{2}", "(1, 2)", "B", "dark blue", r"\{1, 2\}", "[1, 2, 3]")]
    ['math', 'math', 'math', 'math', 'choice', 'exact', 'set', 'list']
    >>> kind_of('{"a": 1}'), kind_of('{"bbox_2d": [1, 2, 3, 4]}'), kind_of("red", {"choices": ["red", "blue"]})
    ('json', 'box', 'choice')

    Numbers and quantities are math, which accepts the most spellings; a row that requires the unit sets `quantity`.
    Four numbers are a box only if the meta has iou_threshold; two are a point only if it has max_distance.
    """
    meta = meta or {}
    if meta.get("choices") and option_letter(gold, options_of(meta["choices"])):
        return "choice"
    if meta.get("answers"):
        return "exact"
    shape = _shape(gold, meta)
    if shape:
        return shape
    if _OPTION.fullmatch(gold.strip()):
        return "choice"
    brackets, parts, _ = elements(joined(gold))
    if brackets == "{}" and len(parts) > 1:
        return "set"
    if brackets in ("[]", "()") and len(parts) > 2:
        return "list"
    words = (
        is_words(joined(gold))
        and not exact_number(gold)
        and not has_relation(gold)
        and not _OTHER.search(gold)
    )
    return "exact" if words else "math"


def _shape(gold: str, meta: Mapping[str, Any]) -> str:
    """box, point, json or list if the gold has that form, else ""."""
    if "iou_threshold" in meta and gold_boxes(gold):
        return "box"
    if "max_distance" in meta and gold_targets(gold):
        return "point"
    if not any(mark in gold for mark in '{["'):
        return ""
    try:
        value = read_json(gold)
    except JsonError:
        return ""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return "box" if gold_boxes(gold) else "point" if gold_targets(gold) else "json"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "list"
    nested = isinstance(value, list) and any(isinstance(one, list | str | bool | None) for one in value)
    return "json" if nested else ""


def validate_gold(example: Example) -> None:
    """Refuse a row whose gold answer its verifier cannot use: the cheapest audit of a data set.

    >>> validate_gold(Example("row-1", "Which?", "E", "direct", "choice", meta={"choices": ["red", "blue"]}))
    Traceback (most recent call last):
    rewards.answers.kind.GoldError: row 'row-1': gold answer 'E' is not an option (A: red, B: blue); correct it ...

    Raises GoldError naming the row, the rule and a remedy.
    """
    problem = gold_problem(example)
    if problem:
        raise GoldError(f"row {example.id!r}: {problem}")


def gold_problem(example: Example) -> str:
    """The fault of a row's gold answer under its verifier, with a remedy; "" for a valid gold answer."""
    try:
        _read_gold(example)
    except GoldError as error:
        return str(error)
    return ""


def _read_gold(example: Example) -> tuple[str, Any]:
    """The kind that grades a row, and the gold as that kind reads it. Raises GoldError."""
    if example.verifier not in KINDS:
        raise GoldError(f"verifier={example.verifier!r}: {nearest(example.verifier, KINDS)}")
    if example.verifier in UNGRADED:
        return example.verifier, None
    problem = _limits_problem({name: example.meta[name] for name in _LIMITS if name in example.meta})
    if problem:
        raise GoldError(f"meta: {problem}")
    auto = example.verifier == "auto"
    kind = kind_of(example.answer, example.meta) if auto else example.verifier
    return kind, _KINDS[kind].gold(example)


def _limits_problem(limits: Mapping[str, Any]) -> str:
    for name, value in limits.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            return f"{name}={value!r}: it must be a finite number of at least 0"
        if name == "iou_threshold" and not 0 < value <= 1:
            return f"{name}={value!r}: an intersection over union must be in (0, 1]"
    return ""


_LIMITS = ("tolerance", "relative_tolerance", "iou_threshold", "max_distance")
_KINDS: dict[str, Kind] = {
    "math": MATH,
    "integer": INTEGER,
    "number": NUMBER,
    "exact": EXACT,
    "choice": CHOICE,
    "set": SET,
    "list": LIST,
    "json": JSON,
    "box": BOX,
    "point": POINT,
    "quantity": QUANTITY,
}
KINDS = ("auto", *_KINDS, *UNGRADED)
"""The values that a row's verifier may have."""
