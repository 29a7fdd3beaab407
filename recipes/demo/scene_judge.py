r"""The demo's thinking judge, also an example of a user's reward. It is exact, because the row's meta has the scene.

It scores the chain by the report's three criteria, each with yes or no: factual grounding (every claim about the
picture matches the scene, and every cell that the question needs is read), logical soundness (every step is correct
and continues the previous one) and answer consistency (the box holds the chain's last result).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.example import Example
from rewards.extract import parse_thinking
from rewards.verdict import Status, Verdict

MAX_STATEMENTS = 64
"""Most statements that are read; a longer thought is not a chain of this task."""
_READING = re.compile(r"([A-Z])=([0-9]{1,4})")
_STEP = re.compile(r"([0-9]{1,4})([+-])([0-9]{1,4})=(-?[0-9]{1,4})")


@dataclass(frozen=True)
class SceneJudge:
    r"""The share of the three criteria that a thought meets.

    >>> row = Example("r", "compute A+B", "7", "think",
    ...     meta={"scene": {"A": 3, "B": 4, "C": 0, "D": 9}, "kind": "xy", "expr": ["A", "+", "B"]})
    >>> SceneJudge()(r"<think>A=3;B=4;3+4=7</think>\boxed{7}", row).score
    1.0
    >>> SceneJudge()(r"<think>A=3;B=4</think>\boxed{7}", row).reason
    'logical_soundness: no step; answer_consistency: nothing to compare the box with'
    """

    all_or_nothing: bool = False
    """Whether the score is 1 if all three criteria are met and 0 otherwise."""

    def __call__(self, completion: str, example: Example) -> Verdict:
        if "scene" not in example.meta:
            return Verdict.unscored(f"row {example.id}: meta has no scene to check the thought against")
        parsed = parse_thinking(completion)
        if parsed.thought is None:
            return Verdict.wrong(reason=parsed.problem, status=Status.NO_ANSWER)
        statements = parsed.thought.split(";", MAX_STATEMENTS)
        readings = [match for text in statements if (match := _READING.fullmatch(text.strip()))]
        steps = [match for text in statements if (match := _STEP.fullmatch(text.strip()))]
        strange = [text for text in statements if text.strip()][len(readings) + len(steps) :]
        faults = {
            "factual_grounding": _grounding(readings, example),
            "logical_soundness": "a statement is neither a reading nor a step"
            if strange
            else _soundness(readings, steps, example),
            "answer_consistency": _consistency(steps, parsed.answer),
        }
        met = sum(not fault for fault in faults.values())
        score = float(met == len(faults)) if self.all_or_nothing else met / len(faults)
        reason = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
        return Verdict(score, Status.CORRECT if score == 1 else Status.WRONG, parsed.answer, reason)


def _grounding(readings: list[re.Match], example: Example) -> str:
    """The fault in the claims about the picture; "" if there is none."""
    scene = example.meta["scene"]
    for reading in readings:
        cell, value = reading.groups()
        if str(scene.get(cell)) != value:
            return f"{reading.group()} is not in the picture"
    needed = set(scene) if example.meta["kind"] == "spread" else set(example.meta["expr"]) & set(scene)
    missing = sorted(needed - {reading.group(1) for reading in readings})
    return f"{', '.join(missing)} not read" if missing else ""


def _soundness(readings: list[re.Match], steps: list[re.Match], example: Example) -> str:
    """The fault in the reasoning from the readings; "" if there is none.

    A wrong reading is a fault of grounding only: the steps are checked against the chain's own readings.
    """
    if not steps:
        return "no step"
    operands = _operands(
        {cell: int(value) for cell, value in (reading.groups() for reading in readings)}, example
    )
    if operands is None:
        return "it uses a cell that was not read"
    if len(steps) != len(operands) - 1:
        return f"{len(steps)} steps, the question takes {len(operands) - 1}"
    before = operands[0][1]
    for step, (sign, operand) in zip(steps, operands[1:], strict=True):
        first, its_sign, second, result = step.groups()
        if (int(first), its_sign, int(second)) != (before, sign, operand):
            return f"{step.group()} is not what comes next: {before}{sign}{operand}"
        before = before + operand if sign == "+" else before - operand
        if int(result) != before:
            return f"{step.group()} is wrong"
    return ""


def _operands(read: dict[str, int], example: Example) -> list[tuple[str, int]] | None:
    """(sign, value) of each operand of the question, from the chain's readings; None if a reading is missing."""
    if example.meta["kind"] == "spread":
        return [("+", max(read.values())), ("-", min(read.values()))] if read else None
    cells, signs = example.meta["expr"][::2], ["+", *example.meta["expr"][1::2]]
    if not set(cells) <= set(read):
        return None
    return [(sign, read[cell]) for sign, cell in zip(signs, cells, strict=True)]


def _consistency(steps: list[re.Match], answer: str | None) -> str:
    """The reason why the box does not follow from the chain; "" if it does."""
    if not steps:
        return "nothing to compare the box with"
    result = steps[-1].group(4)
    return "" if answer is not None and answer.strip() == result else f"the box does not hold {result}"
