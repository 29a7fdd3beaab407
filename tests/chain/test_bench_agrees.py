"""A local lmms-eval task made of held-out rows gives the verdicts of `posttrain eval`, row by row.

The smoke recipe runs up to RLVR, which asks a small task of lmms-eval at each of its two batches. The tests need the
second environment (`make bench-setup`). BENCH_RUN names a finished run in place of this one, such as runs/demo, and
BENCH_RECIPE its recipe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chain.bench.harness import DEFAULT
from chain.bench.local import local_task
from core.files import read_json, read_jsonl
from corpus.records import write_records

ROOT = Path(__file__).parents[2]
RECIPE = os.environ.get("BENCH_RECIPE", "recipes/smoke")
SETS = {"thinking": "heldout_think", "direct": "heldout_direct"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / DEFAULT).exists(), reason="lmms-eval is missing: make bench-setup"),
]


def posttrain(*arguments: object) -> None:
    command = [sys.executable, "-P", "-m", "chain.cli.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "WANDB_MODE": "offline"}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    if "BENCH_RUN" in os.environ:
        return Path(os.environ["BENCH_RUN"]).resolve()
    runs, mine = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("mine")
    rows = [
        {"id": f"{n}", "question": f"compute A + {n}", "answer": "1", "verifier": "number"} for n in range(3)
    ]
    write_records(mine / "rows.parquet", [{**row, "mode": "think", "images": []} for row in rows])
    one = local_task("sums", mine / "rows.parquet", mine / "sums").model_dump(exclude_unset=True)
    (mine / "suite.yaml").write_text(yaml.safe_dump({"about": "x", "benchmarks": {"sums": one}}))
    every = {"batches": 1, "suite": str(mine / "suite.yaml"), "include": [str(mine / "sums")]}
    posttrain(
        "run", RECIPE, "--runs-dir", runs, "--until", "rlvr", "--set", f"eval.every={json.dumps(every)}"
    )
    return runs / Path(RECIPE).name


@pytest.mark.skipif("BENCH_RUN" in os.environ, reason="that run need not have eval.every")
def test_curves_over_training_show_the_subset(run):
    lines = read_jsonl(run / "rlvr" / "metrics.jsonl")
    looks = [line["bench/sums"] for line in lines if "bench/sums" in line]
    assert len(looks) == 2
    assert all(0 <= score <= 100 for score in looks)
    assert not any("bench_failed/sums" in line for line in lines)


def test_the_harness_gives_the_verdicts_of_posttrain_eval_in_both_modes(run, tmp_path):
    rlvr = run / "rlvr" / "checkpoint"
    posttrain("eval", rlvr, "--recipe", RECIPE, "--runs-dir", run.parent, "--out", tmp_path / "eval")
    local = [f"{mode}={run / 'data' / name}.parquet" for mode, name in SETS.items()]
    bench = (
        "bench",
        rlvr,
        "--recipe",
        RECIPE,
        "--mode",
        "both",
        "--out",
        tmp_path / "bench",
        "--local",
        *local,
    )
    posttrain(*bench)
    ours = read_jsonl(tmp_path / "eval" / "held_out.jsonl")
    tasks = read_json(tmp_path / "bench" / "bench.json")["tasks"]
    for mode in SETS:
        rows = [row for row in ours if row["set"] == mode]
        task = tasks["thinking" if mode == "thinking" else "direct.direct"]
        seen = [(one["completion"], one["tokens"], bool(one["score"])) for one in task["samples"]]
        assert seen == [(row["completion"], row["tokens"], row["correct"]) for row in rows]
        assert task["score"] == pytest.approx(100 * sum(row["correct"] for row in rows) / len(rows))
    assert any(one["score"] for one in tasks["thinking"]["samples"])
