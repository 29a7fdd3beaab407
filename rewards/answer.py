r"""The answer reward: compares a completion's answer with the row's gold answer.

In thinking mode, the single box after the thought is the answer. In direct mode, the single box, or else the whole
text, is the answer (rewards.extract). The row's `verifier` names the comparison:

| kind | an answer is right if it is |
|---|---|
| auto | right under the kind that `kind_of` chooses by the form of the gold; a verdict's reason names that kind |
| math | mathematically equal: exact rules, then math-verify in a process that can be killed |
| integer | the same integer: 1,000 = 1000.0 |
| number | the same number, or one within `tolerance` or `relative_tolerance` |
| exact | the same text up to case, spaces and a full stop, or equal to one of meta["answers"] in this sense |
| choice | the option's letter, or its text if meta["choices"] lists the options (a list, or letter -> text) |
| set | the same elements in any order, each compared as math; in {}, [] or without brackets |
| list | the same elements in the same order, each compared as math; in (), [] or without brackets |
| json | the same JSON value: keys in any order, text compared as exact, numbers as number |
| box | the same number of boxes, matched one to one with an IoU of at least `iou_threshold`, and none degenerate |
| point | the same number of points, matched one to one within `max_distance`, or inside the gold's box |
| quantity | the same number and unit, or convertible: 1.5 km = 1500 m; for a gold without unit, any unit is right |
| judge, none | not graded here: unscored |

A number in a row's meta under the name of a parameter (`tolerance`, `relative_tolerance`, `iou_threshold`,
`max_distance`) overrides the parameter.
"""

import difflib
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
from rewards.answers.kind import Kind
from rewards.answers.math import MATH
from rewards.answers.notation import elements, has_relation, is_words, joined
from rewards.answers.number import INTEGER, NUMBER, exact_number
from rewards.answers.quantity import QUANTITY
from rewards.answers.text import EXACT
from rewards.example import Example
from rewards.extract import MAX_BOX_CHARS, parse
from rewards.verdict import Verdict

_OPTION = re.compile(r"\(?[A-H]\)?\.?")
_OTHER = re.compile(r"[0-9<>^_]")


class GoldError(ValueError):
    """A row's gold answer is invalid under the row's verifier."""


@dataclass(frozen=True)
class AnswerReward:
    r"""1 for the gold answer; 0 for a different, unreadable or missing answer; None if the row cannot be graded.

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
    """Largest error of such a number relative to the gold. The wider of the two tolerances applies."""
    iou_threshold: float = 0.5
    """Smallest intersection over union at which a `box` is right. The default is PASCAL VOC's."""
    graded: bool = False
    """Score a `box` answer by its mean IoU, not by 1 or 0 with the threshold."""
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
        problem = gold_problem(example)
        if problem:
            return Verdict.unscored(problem)
        kind = _kind(example)
        if kind in UNGRADED:
            return Verdict.unscored(f'verifier "{kind}": no rule grades this row; a judge may')
        parsed = parse(completion, example.mode, self.thought_open)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        verdict = _KINDS[kind].compare(parsed.answer, example, self)
        # A direct completion may be pages long, but a record is kept short.
        if len(parsed.answer) > MAX_BOX_CHARS:
            verdict = replace(verdict, answer=parsed.answer[:MAX_BOX_CHARS])
        if example.verifier == "auto":
            said = f": {verdict.reason}" if verdict.reason else ""
            verdict = replace(verdict, reason=f"auto took it for {kind}{said}")
        return verdict

    def limit(self, name: str, example: Example) -> Fraction:
        """The row's own limit of this name, else the parameter, as an exact fraction of its decimal notation."""
        return Fraction(str(example.meta.get(name, getattr(self, name))))


def kind_of(gold: str, meta: Mapping[str, Any] | None = None) -> str:
    r"""The kind that `auto` chooses for a gold answer.

    >>> [kind_of(gold) for gold in ("4", "5 cm", r"\frac{x}{2}", "(1, 2)", "B", "dark blue", r"\{1, 2\}", "[1, 2, 3]")]
    ['math', 'math', 'math', 'math', 'choice', 'exact', 'set', 'list']
    >>> kind_of('{"a": 1}'), kind_of('{"bbox_2d": [1, 2, 3, 4]}'), kind_of("red", {"choices": ["red", "blue"]})
    ('json', 'box', 'choice')

    Numbers and quantities become math, which accepts the most spellings; a row that requires the unit names `quantity`.
    Four numbers are a box, and two numbers a point, only if the meta has iou_threshold or max_distance.
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
    """Refuse a row whose gold answer is unusable for grading. This is the cheapest audit of a data set.

    >>> validate_gold(Example("row-1", "Which?", "E", "direct", "choice", meta={"choices": ["red", "blue"]}))
    Traceback (most recent call last):
    rewards.answer.GoldError: row 'row-1': gold answer 'E' names no option (A: red, B: blue); correct it ...

    Raises GoldError naming the row, the rule and a remedy.
    """
    problem = gold_problem(example)
    if problem:
        raise GoldError(f"row {example.id!r}: {problem}")


def gold_problem(example: Example) -> str:
    """The fault of a row's gold answer under its verifier, with a remedy; "" for a valid gold answer."""
    if example.verifier not in KINDS:
        close = difflib.get_close_matches(example.verifier, KINDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"verifier={example.verifier!r}: {hint}it must be one of {', '.join(KINDS)}"
    if example.verifier in UNGRADED:
        return ""
    given = {name: example.meta[name] for name in _LIMITS if name in example.meta}
    problem = _limits_problem(given)
    return f"meta: {problem}" if problem else _KINDS[_kind(example)].gold_problem(example)


def _kind(example: Example) -> str:
    return kind_of(example.answer, example.meta) if example.verifier == "auto" else example.verifier


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
UNGRADED = ("judge", "none")
KINDS = ("auto", *_KINDS, *UNGRADED)
"""Valid values of a row's verifier."""
