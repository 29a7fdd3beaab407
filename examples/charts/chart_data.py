"""The data sets: charts, questions and chains as records, one Parquet file per set, with the names of the demo's sets.

| set | rows are | split |
|---|---|---|
| general | a value, answered directly | train |
| dense | all values in one answer | train |
| worked | reasoning questions with worked solutions, without tags | train |
| longcot | chains to imitate, a share of them hasty | train |
| rl | reasoning questions without chains, for thinking mode | train |
| fusion_direct, mixed_direct | as general, with other charts | train |
| validation_think, validation_direct | as rl and general; for model selection | validation |
| heldout_think, heldout_direct | as rl and general; only for the reported results | held-out |

The same seed and sizes give the same rows and pixels, and a set does not change with the size of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from chart_drawing import draw, png
from chart_scenes import HELDOUT, REASONING, TRAIN, VALIDATION, Question, ask, draw_chart

from sailvl2_posttrain import write_records

DIRECT = ("value",)
Fill = Callable[[Question], dict[str, Any]]


def generate(
    out: Path,
    *,
    seed: int,
    general: int,
    dense: int,
    worked: int,
    longcot: int,
    hasty_share: float,
    rl: int,
    fusion_direct: int,
    mixed_direct: int,
    validation: int,
    heldout: int,
) -> None:
    """Write `<set>.parquet` for every set to the folder `out`.

    Args:
        seed: seed of charts, questions and looks.
        hasty_share: share of the LongCoT chains that jump from the readings to the answer, which leaves RL room.
        validation: rows of each of the two validation sets; `heldout` likewise.
        general: rows of the set of that name, and so for the others.
    """
    sets: dict[str, tuple[int, str, tuple[str, ...], Fill]] = {
        "general": (general, TRAIN, DIRECT, _direct),
        "dense": (dense, TRAIN, ("list",), _direct),
        "worked": (worked, TRAIN, REASONING, _worked),
        "longcot": (longcot, TRAIN, REASONING, _chain),
        "rl": (rl, TRAIN, REASONING, _prompt),
        "fusion_direct": (fusion_direct, TRAIN, DIRECT, _direct),
        "mixed_direct": (mixed_direct, TRAIN, DIRECT, _direct),
        "validation_think": (validation, VALIDATION, REASONING, _prompt),
        "validation_direct": (validation, VALIDATION, DIRECT, _direct),
        "heldout_think": (heldout, HELDOUT, REASONING, _prompt),
        "heldout_direct": (heldout, HELDOUT, DIRECT, _direct),
    }
    for name, (count, split, kinds, fill) in sets.items():
        made = rows(name, seed, count, split, kinds, fill)
        if name == "longcot":
            hasty = set(Random(f"{seed} hasty").sample(range(count), round(hasty_share * count)))
            made = (_made_hasty(row) if number in hasty else row for number, row in enumerate(made))
        write_records(out / f"{name}.parquet", made)


def rows(
    name: str, seed: int, count: int, split: str, kinds: tuple[str, ...], fill: Fill
) -> Iterator[dict[str, Any]]:
    """`count` records of a set, with the kinds of question in turn; `fill` returns the fields specific to the set."""
    rng = Random(f"{seed} {name}")
    for number in range(count):
        chart = draw_chart(rng, split)
        question = ask(rng, kinds[number % len(kinds)], chart)
        yield {
            "id": f"{name}-{number:05d}",
            "images": [png(draw(chart, rng))],
            "question": question.text,
            "answer": question.answer,
            "verifier": "quantity" if question.answer[0].isdigit() else "exact",
            "source": f"charts/{name}",
            "meta": {
                **chart.meta(),
                "question": question.kind,
                "hasty": question.hasty,
            },
            **fill(question),
        }


def _direct(question: Question) -> dict[str, Any]:
    return {"mode": "direct"}


def _worked(question: Question) -> dict[str, Any]:
    return {"mode": "direct", "verifier": "none", "response": f"{question.chain};{question.answer}"}


def _prompt(question: Question) -> dict[str, Any]:
    return {"mode": "think"}


def _chain(question: Question) -> dict[str, Any]:
    return {"mode": "think", "chain": question.chain}


def _made_hasty(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chain": row["meta"]["hasty"], "meta": {**row["meta"], "made_hasty": True}}
