"""Growth of the learner's cost with group size, prompt length, images per prompt, completion length and ranks.

    python -P -m benchmarks.scaling [--quick]

One factor is doubled at a time, and the others are constant. The seconds of a step (benchmarks.learner) are fitted by
seconds = a x factor^exponent. For parts that a group shares, our exponents should be near 0 and stock TRL's near 1.
Ranks split one batch by groups. Gradients are compared before timing: between both sides, and between one rank and two
ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import alternate, emit, show
from benchmarks.learner import (
    QUICK,
    SIDES,
    SMALL,
    Shape,
    Size,
    build_core,
    checked_equal,
    repeated,
    rows_of,
    trainer_of,
)
from chain.worker import keep_engine_out

MODULE = "benchmarks.scaling"
BASE = Shape("base", group_size=4, images=1, text=32, completion=64, groups=2)
FACTORS: Mapping[str, Sequence[int]] = {
    "group_size": (2, 4, 8, 16),
    "text": (32, 128, 512),
    "images": (1, 4, 16),
    "completion": (32, 64, 128, 256),
}
"""Field of a shape -> measured values; `text` is the number of text tokens of the prompt."""
RANKS = (1, 2)
RANK_GROUPS = 8
"""Groups in the batch that the ranks split."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all factors and print the exponents; `--quick` uses a smaller core and fewer repetitions."""
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="use a smaller core and two values per factor, without ranks"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    keep_engine_out()
    if chosen.rank:
        _rank(chosen.rank)
    else:
        measure(chosen.quick)


def measure(quick: bool) -> None:
    """Run all measurements one after another."""
    import torch

    torch.set_num_threads(1)
    size, repeats = (QUICK, 3) if quick else (SMALL, 5)
    rows: list[Sequence[Any]] = []
    exponents: dict[str, dict[str, float]] = {}
    for factor, values in FACTORS.items():
        used = values[:: len(values) - 1] if quick else values
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for value in used:
            for side, found in _seconds(
                size, replace(BASE, **dict[str, Any]({factor: value})), repeats
            ).items():
                seconds[side].append(found)
        exponents[factor] = {side: slope(used, seconds[side]) for side in SIDES}
        for side in SIDES:
            shown = "  ".join(
                f"{value}: {found:.3f}" for value, found in zip(used, seconds[side], strict=True)
            )
            rows.append((factor, side, shown, exponents[factor][side]))
    show("Seconds of a learner step", ("factor", "side", "seconds", "exponent"), rows)
    found_with = {} if quick else {str(count): _with_ranks(count) for count in RANKS}
    ranks = {count: one["seconds"] for count, one in found_with.items()}
    if ranks:
        for one, other in zip(*(one["norms"] for one in found_with.values()), strict=True):
            assert math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6), (
                "several ranks compute different gradients than one rank"
            )
        show(
            f"{RANK_GROUPS} groups shared by ranks, one thread each",
            ("ranks", "seconds", "times faster"),
            [(count, found, ranks["1"] / found) for count, found in ranks.items()],
        )
    emit("scaling", exponents=exponents, ranks_s=ranks)


def slope(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent of the power law through the points, by least squares on logarithms.

    >>> round(slope([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    xs, ys = [math.log(value) for value in values], [math.log(one) for one in seconds]
    return statistics.linear_regression(xs, ys).slope


def _seconds(size: Size, shape: Shape, repeats: int) -> dict[str, float]:
    """Median seconds of both sides' steps, in alternating order after a warm-up."""
    model, processor = build_core(size)
    rows = rows_of(shape, size, processor)
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: trainer_of(side, model, processor, rows, folder) for side in SIDES}
        checked_equal(shape.name, model, sides)
        return alternate({side: repeated(*own) for side, own in sides.items()}, repeats)


def _with_ranks(count: int) -> dict[str, Any]:
    """Median `seconds` of a step that `count` gloo ranks split, and the `norms` of its gradients."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
        ]
        done = subprocess.run(
            [*command, "-m", MODULE, "--rank", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{count} ranks failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def _rank(out: Path) -> None:
    """One rank: trains its share of the groups; DDP averages the gradients."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    model, processor = build_core(SMALL)
    rows = rows_of(replace(BASE, group_size=8, groups=RANK_GROUPS), SMALL, processor)
    rows = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
    with tempfile.TemporaryDirectory() as folder:
        trainer, inputs = trainer_of("shared", model, processor, rows, folder)
        trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(model)
        run = repeated(trainer, inputs)
        run(0)
        norms = [
            float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None
        ]

        def together(number: int) -> None:
            run(number)
            torch.distributed.barrier()

        seconds = alternate({"step": together}, 5)["step"]
    if rank == 0:
        out.write_text(json.dumps({"seconds": seconds, "norms": norms}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
