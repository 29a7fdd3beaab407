"""The demo's data sets: panels, questions and chains as records, one Parquet file per set.

| set | rows are | split |
|---|---|---|
| general | one digit read, answered directly | train |
| dense | several readings in one answer | train |
| worked | reasoning questions with worked solutions, without tags | train |
| longcot | chains to imitate, a share of them hasty | train |
| rl | reasoning questions without chains, for thinking mode | train |
| fusion_direct, mixed_direct | as general, with other panels | train |
| validation_think, validation_direct | as rl and general; for model selection | validation |
| heldout_think, heldout_direct | as rl and general; only for the reported results | held-out |

The splits share neither scans nor digit 4-tuples. The same seed and sizes give the same rows and pixels, and
a set does not change with the size of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from recipes.demo.drawing import png, render, scans_of
from recipes.demo.scenes import HELDOUT, REASONING, TRAIN, VALIDATION, Question, ask, draw_scene, hash_of

Fill = Callable[[Question], dict[str, Any]]
SETS = (
    *("general", "dense", "worked", "longcot", "rl", "fusion_direct", "mixed_direct"),
    *("validation_think", "validation_direct", "heldout_think", "heldout_direct"),
)
"""Names of the sets that `generate` writes."""
_CHUNK = 512


def generate(
    out: Path,
    *,
    seed: int,
    general: int = 1000,
    dense: int = 1000,
    worked: int = 1500,
    longcot: int = 640,
    hasty_share: float = 0.6,
    rl: int = 2000,
    fusion_direct: int = 900,
    mixed_direct: int = 1500,
    validation: int = 200,
    heldout: int = 500,
) -> None:
    """Write `<set>.parquet` for every set of SETS to the folder `out`.

    Args:
        seed: seed of scenes, questions and pixels.
        hasty_share: share of the LongCoT chains that jump from the readings to the answer. RL can then improve on
            them; at 0 it has nothing to improve.
        validation: rows of each of the two validation sets.
        heldout: rows of each of the two held-out sets.
        general: rows of the set of that name, and so for the others.
    """
    from corpus.records import write_records

    if not 0 <= hasty_share <= 1:
        raise ValueError(f"hasty_share={hasty_share}: must be between 0 and 1")
    hasty = round(hasty_share * longcot)
    sets: dict[str, tuple[int, str, tuple[str, ...], Fill]] = {
        "general": (general, TRAIN, ("digit",), _direct),
        "dense": (dense, TRAIN, ("cells", "panel"), _direct),
        "worked": (worked, TRAIN, REASONING, _worked),
        "rl": (rl, TRAIN, REASONING, _prompt),
        "fusion_direct": (fusion_direct, TRAIN, ("digit",), _direct),
        "mixed_direct": (mixed_direct, TRAIN, ("digit",), _direct),
        "validation_think": (validation, VALIDATION, REASONING, _prompt),
        "validation_direct": (validation, VALIDATION, ("digit",), _direct),
        "heldout_think": (heldout, HELDOUT, REASONING, _prompt),
        "heldout_direct": (heldout, HELDOUT, ("digit",), _direct),
    }
    for name, (count, split, kinds, fill) in sets.items():
        write_records(out / f"{name}.parquet", rows(name, seed, count, split, kinds, fill))
    chains = list(rows("longcot", seed, longcot, TRAIN, REASONING, _chain))
    for index in Random(f"{seed} hasty").sample(range(longcot), hasty):
        chains[index] = _made_hasty(chains[index])
    write_records(out / "longcot.parquet", chains)


def rows(
    name: str, seed: int, count: int, split: str, kinds: tuple[str, ...], fill: Fill
) -> Iterator[dict[str, Any]]:
    """`count` records of a set, with the kinds of question in turn; `fill` returns the fields specific to the set."""
    import numpy as np

    rng = Random(f"{seed} {name}")
    noise = np.random.default_rng([seed, hash_of(name)])
    for start in range(0, count, _CHUNK):
        scenes = [draw_scene(rng, split, scans_of(split)) for _ in range(min(_CHUNK, count - start))]
        for number, (scene, panel) in enumerate(zip(scenes, render(scenes, noise), strict=True), start):
            question = ask(rng, kinds[number % len(kinds)], scene.digits)
            yield {
                "id": f"{name}-{number:05d}",
                "images": [png(panel)],
                "question": question.text,
                "answer": question.answer,
                "source": f"demo/{name}",
                "meta": {**scene.meta(), "kind": question.kind, "expr": list(question.expr)},
                **fill(question),
            }


def _direct(question: Question) -> dict[str, Any]:
    # Only a single digit is graded as a number; a description is not one.
    return {"mode": "direct", "verifier": "number" if question.kind == "digit" else "exact"}


def _worked(question: Question) -> dict[str, Any]:
    return {"mode": "direct", "verifier": "none", "response": question.chain}


def _prompt(question: Question) -> dict[str, Any]:
    return {"mode": "think", "verifier": "number"}


def _chain(question: Question) -> dict[str, Any]:
    return {"mode": "think", "verifier": "number", "chain": question.chain}


def _made_hasty(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a chain that consists only of readings."""
    statements = row["chain"].split(";")
    readings = [statement for statement in statements if statement[0].isalpha()]
    return {**row, "chain": ";".join(readings), "meta": {**row["meta"], "hasty": True}}
