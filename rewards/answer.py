r"""The answer reward: is what the completion answers the row's gold answer?

In thinking mode the one box after the thought is the answer, in direct mode the one box or else the whole
text (rewards.extract); nothing else is searched for. How it is compared is the row's `verifier`:

| kind | right is |
|---|---|
| auto | what `kind_of` chooses by the shape of the gold; a verdict's reason names it |
| math | mathematically equal: exact rules, then math-verify in a process that can be killed |
| integer | the same integer: 1,000 = 1000.0 |
| number | the same number, or one within `tolerance` or `relative_tolerance` |
| exact | the same text but for case, spaces and a full stop; any of meta["answers"] will do |
| choice | the option's letter, or its text if meta["choices"] lists the options (a list, or letter -> text) |
| set | the same elements in any order, each as math; in {}, [] or no brackets |
| list | the same elements in the same order, each as math; in (), [] or no brackets |
| json | the same JSON value: keys in any order, text as exact, numbers as number |
| box | as many boxes, each with an IoU of at least `iou_threshold` with one of its own; degenerate boxes never |
| point | as many points, each within `max_distance` of one of its own, or inside the gold's box |
| quantity | the same number and unit, or one that converts: 1.5 km = 1500 m; a gold without unit leaves it open |
| judge, none | not graded here: unscored |

Numbers that a row has in its meta under the name of a parameter (`tolerance`, `relative_tolerance`,
`iou_threshold`, `max_distance`) take the place of the parameter.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from rewards import grounding, normal, quantity, structured
from rewards.equality import Outcome, bare, elements_of, is_plain, is_words, quick, quick_list, restates
from rewards.example import Example
from rewards.extract import MAX_BOX_CHARS, parse
from rewards.mathcheck import SHARED
from rewards.verdict import Status, Verdict

_OPTION = re.compile(r"\(?[A-H]\)?\.?")


class GoldError(ValueError):
    """A row's gold answer does not make sense under the row's verifier."""


@dataclass(frozen=True)
class AnswerReward:
    r"""1 for the gold answer, 0 for another, unreadable or missing one; None if the row cannot be graded.

    Source: SAIL-VL2 (arXiv:2509.14033), answer reward.

    >>> row = Example("row-1", "What is a half and a half?", "1", "think")
    >>> AnswerReward()(r"<think>0.5 + 0.5</think> \boxed{1.0}", row).score
    1.0
    >>> AnswerReward()(r"<think>\boxed{1}</think> It is 1.", row).status.value
    'no_answer'
    """

    tolerance: float = 0.0
    """Largest absolute difference at which a `number`, `quantity` or number in `json` is still right."""
    relative_tolerance: float = 0.0
    """Largest share of the gold by which such a number may be off; the wider of the two counts."""
    iou_threshold: float = 0.5
    """Smallest intersection over union at which a `box` is right; PASCAL VOC's."""
    graded: bool = False
    """A `box` answer earns its mean IoU instead of 1 or 0 by the threshold."""
    max_distance: float = 0.0
    """Largest distance, in the gold's coordinates, at which a `point` is right."""
    thought_open: bool = False
    """The chat template has already opened <think>: the completion starts inside the thought."""

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
        verdict = _COMPARE[kind](parsed.answer, example, self)
        if len(parsed.answer) > MAX_BOX_CHARS:  # a direct completion may be pages long; a record need not
            verdict = replace(verdict, answer=parsed.answer[:MAX_BOX_CHARS])
        if example.verifier == "auto":
            said = f": {verdict.reason}" if verdict.reason else ""
            verdict = replace(verdict, reason=f"auto took it for {kind}{said}")
        return verdict

    def limit(self, name: str, example: Example) -> Fraction:
        """The row's own number of that name, else the parameter; exactly as it is written."""
        return Fraction(str(example.meta.get(name, getattr(self, name))))


def kind_of(gold: str, meta: Mapping[str, Any] | None = None) -> str:
    r"""The kind of answer that `auto` takes a gold for.

    >>> [kind_of(gold) for gold in ("4", "5 cm", r"\frac{x}{2}", "(1, 2)", "B", "dark blue", r"\{1, 2\}", "[1, 2, 3]")]
    ['math', 'math', 'math', 'math', 'choice', 'exact', 'set', 'list']
    >>> kind_of('{"a": 1}'), kind_of('{"bbox_2d": [1, 2, 3, 4]}'), kind_of("red", {"choices": ["red", "blue"]})
    ('json', 'box', 'choice')

    Numbers and quantities are math, the kindest to spelling: a row that needs the unit names `quantity`. Four numbers
    are a box, and two a point, only where the meta has iou_threshold or max_distance.
    """
    meta = meta or {}
    if meta.get("choices") and normal.option_letter(gold, normal.options_of(meta["choices"])):
        return "choice"
    if meta.get("answers"):
        return "exact"
    shape = _shape(gold, meta)
    if shape:
        return shape
    if _OPTION.fullmatch(gold.strip()):
        return "choice"
    brackets, parts = elements_of(gold)
    if brackets == "{}" and len(parts) > 1:
        return "set"
    if brackets in ("[]", "()") and len(parts) > 2:
        return "list"
    return "exact" if is_words(gold) else "math"


def _shape(gold: str, meta: Mapping[str, Any]) -> str:
    """box, point, json or list if the gold is written as one, else ""."""
    if "iou_threshold" in meta and _boxes(gold):
        return "box"
    if "max_distance" in meta and _targets(gold):
        return "point"
    if not any(mark in gold for mark in '{["'):
        return ""
    try:
        value = structured.read_json(gold)
    except structured.JsonError:
        return ""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return "box" if _boxes(gold) else "point" if _targets(gold) else "json"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "list"
    nested = isinstance(value, list) and any(isinstance(one, list | str | bool | None) for one in value)
    return "json" if nested else ""


def validate_gold(example: Example) -> None:
    """Refuse a row whose gold answer could not be graded against: the cheapest audit of a data set.

    >>> validate_gold(Example("row-1", "Which?", "E", "direct", "choice", meta={"choices": ["red", "blue"]}))
    Traceback (most recent call last):
    rewards.answer.GoldError: row 'row-1': gold answer 'E' names no option (A: red, B: blue); correct it ...

    Raises GoldError naming the row, the rule and a remedy.
    """
    problem = gold_problem(example)
    if problem:
        raise GoldError(f"row {example.id!r}: {problem}")


def gold_problem(example: Example) -> str:
    """What is wrong with a row's gold answer under its verifier, with a remedy; "" if nothing is."""
    if example.verifier not in KINDS:
        close = difflib.get_close_matches(example.verifier, KINDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"verifier={example.verifier!r}: {hint}it is one of {', '.join(KINDS)}"
    if example.verifier in UNGRADED:
        return ""
    given = {name: example.meta[name] for name in _LIMITS if name in example.meta}
    problem = _limits_problem(given)
    return f"meta: {problem}" if problem else _GOLD_PROBLEM[_kind(example)](example)


def _kind(example: Example) -> str:
    return kind_of(example.answer, example.meta) if example.verifier == "auto" else example.verifier


def _limits_problem(limits: Mapping[str, Any]) -> str:
    for name, value in limits.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            return f"{name}={value!r}: it is a finite number of at least 0"
        if name == "iou_threshold" and not 0 < value <= 1:
            return f"{name}={value!r}: an intersection over union is in (0, 1]"
    return ""


def _over_limit(text: str) -> str:
    if len(text) > MAX_BOX_CHARS:
        return f"longer than {MAX_BOX_CHARS} characters"
    if normal.too_many_digits(text):
        return f"a number of {normal.MAX_DIGITS} digits or more"
    return ""


def _decided(right: bool, answer: str) -> Verdict:
    return Verdict.correct(answer) if right else Verdict.wrong(answer, "not the gold answer")


def _unparseable(answer: str, what: str) -> Verdict:
    return Verdict.wrong(answer, f"no {what}", Status.UNPARSEABLE)


def _capped(
    judge: Callable[[str, Example, AnswerReward], Verdict],
) -> Callable[[str, Example, AnswerReward], Verdict]:
    """The judge of a kind, behind the caps."""

    def within_caps(answer: str, example: Example, reward: AnswerReward) -> Verdict:
        limit = _over_limit(answer)
        if limit:
            return Verdict.wrong(answer, limit, Status.OVER_LIMIT)
        try:
            return judge(answer, example, reward)
        except structured.JsonLimitError as error:
            return Verdict.wrong(answer, str(error), Status.OVER_LIMIT)

    return within_caps


def _math(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    if restates(example.question, example.answer, answer):
        return Verdict.wrong(answer, "the question's own expression")
    return _settled(quick(example.answer, answer) or SHARED.compare(example.answer, answer), answer)


def _settled(outcome: Outcome, answer: str) -> Verdict:
    if outcome == Outcome.UNPARSEABLE:
        return _unparseable(answer, "mathematics")
    if outcome == Outcome.OVER_TIME:
        reason = f"comparing it with the gold takes over {SHARED.deadline_s:g} s of computing"
        return Verdict.wrong(answer, reason, Status.TIMEOUT)
    if outcome == Outcome.OVER_MEMORY:
        reason = "comparing it with the gold takes more memory than a worker has"
        return Verdict.wrong(answer, reason, Status.OVER_LIMIT)
    if outcome == Outcome.TIMEOUT:
        return Verdict.unscored("the comparison was not done in time", Status.TIMEOUT, answer)
    if outcome == Outcome.CRASHED:
        return Verdict.unscored("comparing it with the gold ended the worker", Status.CRASHED, answer)
    if outcome == Outcome.BAD_GOLD:
        return Verdict.unscored("the gold answer does not parse", answer=answer)
    return _decided(outcome == Outcome.EQUAL, answer)


def _integer(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = _number_of(example.answer), _number_of(answer)
    if not gold or not given or given.percent:
        return _unparseable(answer, "integer")
    return _decided(gold.value == given.value, answer)


def _number(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = _number_of(example.answer), _number_of(answer)
    if not gold or not given:
        return _unparseable(answer, "number")
    share = reward.limit("relative_tolerance", example) * abs(gold.value)
    return _decided(gold.equals(given, max(reward.limit("tolerance", example), share)), answer)


def _exact(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    return _decided(normal.plain_text(answer) in _texts(example), answer)


def _choice(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    options = _options(example)
    given = normal.option_letter(answer, options)
    if given is None:
        return _unparseable(answer, "single option")
    return _decided(given == normal.option_letter(example.answer, options), answer)


def _elements(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    ordered = _kind(example) == "list"
    gold, given = (structured.elements(text, ordered) for text in (example.answer, answer))
    if gold is None or given is None:
        return Verdict.wrong(answer, f"brackets that no {_kind(example)} has")
    outcome = quick_list(gold, given, ordered)
    if not outcome:  # one job for all elements: one deadline
        form = "({})" if ordered else r"\{{{}\}}"
        outcome = SHARED.compare(form.format(", ".join(gold)), form.format(", ".join(given)))
    return _settled(outcome, answer)


def _json(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    tolerance = reward.limit("tolerance", example)
    share = reward.limit("relative_tolerance", example)
    try:
        given = structured.read_json(answer)
    except structured.JsonLimitError:
        raise
    except structured.JsonError as error:
        return Verdict.wrong(answer, str(error), Status.UNPARSEABLE)

    def close(one: Fraction, other: Fraction) -> bool:
        return abs(one - other) <= max(tolerance, share * abs(one))

    return _decided(structured.json_equal(structured.read_json(example.answer), given, close), answer)


def _box(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = grounding.read_boxes(example.answer), grounding.read_boxes(answer)
    if not given:
        return _unparseable(answer, "box with x1 < x2 and y1 < y2")
    if reward.graded:
        score = float(grounding.overlap(gold, given))
        status = Status.CORRECT if score == 1 else Status.WRONG
        return Verdict(score, status, answer, f"mean IoU {score:.3f}")
    return _decided(grounding.boxes_match(gold, given, reward.limit("iou_threshold", example)), answer)


def _point(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = _targets(example.answer), grounding.read_points(answer)
    if not given:
        return _unparseable(answer, "point")
    return _decided(grounding.points_match(gold, given, reward.limit("max_distance", example)), answer)


def _quantity(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = quantity.read(bare(example.answer)), quantity.read(bare(answer))
    if not gold or not given:
        return _unparseable(answer, "number with a unit")
    limits = reward.limit("tolerance", example), reward.limit("relative_tolerance", example)
    return _decided(quantity.equal(gold, given, *limits), answer)


def _math_gold(example: Example) -> str:
    gold = example.answer
    found = Outcome.EQUAL if is_plain(gold) else SHARED.readable(gold)
    if found == Outcome.EQUAL:
        return ""
    remedy = 'correct it, or use verifier "exact"'
    return f"gold answer {gold!r} is not readable as mathematics ({found.value}); {remedy}"


def _number_gold(example: Example) -> str:
    number = _number_of(example.answer)
    if number and (example.verifier == "number" or (number.value.denominator == 1 and not number.percent)):
        return ""
    what = "number" if example.verifier == "number" else "integer"
    return f'gold answer {example.answer!r} is no {what}; correct it, or use verifier "math" or "exact"'


def _exact_gold(example: Example) -> str:
    if isinstance(example.meta.get("answers") or (), str):
        return f'meta["answers"] is the text {example.meta["answers"]!r}; write a list of gold answers'
    if all(_texts(example)):
        return ""
    return f"gold answer {example.answer!r}, or one of meta's answers, holds nothing to compare; correct it"


def _choice_gold(example: Example) -> str:
    options = _options(example)
    if normal.option_letter(example.answer, options):
        return ""
    known = ", ".join(f"{letter}: {text}" for letter, text in options.items()) or "any single letter"
    return f"gold answer {example.answer!r} names no option ({known}); correct it or meta's choices"


def _elements_gold(example: Example) -> str:
    kind = _kind(example)
    elements = structured.elements(example.answer, kind == "list")
    if not elements:
        wanted = "(1, 2)" if kind == "list" else r"\{1, 2\}"
        return f"gold answer {example.answer!r} is no {kind}; write its elements as in {wanted}"
    for element in elements:
        problem = (
            _math_gold(replace(example, answer=element)) if element else "an element is empty; correct it"
        )
        if problem:
            return f"{kind}: {problem}"
    return ""


def _json_gold(example: Example) -> str:
    try:
        structured.read_json(example.answer)
    except structured.JsonError as error:
        return f'gold answer {example.answer[:80]!r}: {error}; correct it, or use verifier "exact"'
    return ""


def _box_gold(example: Example) -> str:
    if _boxes(example.answer):
        return ""
    return f"gold answer {example.answer[:80]!r} is no box; write [x1, y1, x2, y2] with x1 < x2 and y1 < y2"


def _point_gold(example: Example) -> str:
    if _targets(example.answer):
        return ""
    return (
        f"gold answer {example.answer[:80]!r} is neither a point nor a box; write [x, y] or [x1, y1, x2, y2]"
    )


def _quantity_gold(example: Example) -> str:
    if quantity.read(bare(example.answer)):
        return ""
    return f'gold answer {example.answer!r} is no number with a unit; correct it, or use verifier "math"'


def _capped_gold(problem_of: Callable[[Example], str]) -> Callable[[Example], str]:
    """The check of a kind's gold, behind the caps that its answers have."""

    def within_caps(example: Example) -> str:
        limit = _over_limit(example.answer)
        if limit:
            return f"gold answer {example.answer[:40]!r}... is {limit}; shorten it"
        return problem_of(example)

    return within_caps


def _number_of(text: str) -> normal.Number | None:
    return normal.plain_number(bare(text))


def _boxes(text: str) -> list[grounding.Box]:
    try:
        return grounding.read_boxes(text)
    except structured.JsonLimitError:
        return []


def _targets(text: str) -> list[grounding.Point] | list[grounding.Box]:
    try:
        return grounding.read_points(text) or grounding.read_boxes(text)
    except structured.JsonLimitError:
        return []


def _texts(example: Example) -> list[str]:
    return [normal.plain_text(str(gold)) for gold in (example.answer, *(example.meta.get("answers") or ()))]


def _options(example: Example) -> dict[str, str]:
    return normal.options_of(example.meta.get("choices") or ())


_LIMITS = ("tolerance", "relative_tolerance", "iou_threshold", "max_distance")
_COMPARE: dict[str, Callable[[str, Example, AnswerReward], Verdict]] = {
    "math": _capped(_math),
    "integer": _capped(_integer),
    "number": _capped(_number),
    "exact": _exact,
    "choice": _choice,
    "set": _capped(_elements),
    "list": _capped(_elements),
    "json": _capped(_json),
    "box": _capped(_box),
    "point": _capped(_point),
    "quantity": _capped(_quantity),
}
_GOLD_PROBLEM: dict[str, Callable[[Example], str]] = {
    "math": _capped_gold(_math_gold),
    "integer": _capped_gold(_number_gold),
    "number": _capped_gold(_number_gold),
    "exact": _exact_gold,
    "choice": _choice_gold,
    "set": _capped_gold(_elements_gold),
    "list": _capped_gold(_elements_gold),
    "json": _capped_gold(_json_gold),
    "box": _capped_gold(_box_gold),
    "point": _capped_gold(_point_gold),
    "quantity": _capped_gold(_quantity_gold),
}
UNGRADED = ("judge", "none")
KINDS = ("auto", *_COMPARE, *UNGRADED)
"""What a row's verifier may be."""
