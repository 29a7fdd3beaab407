"""A local lmms-eval task made of held-out rows gives the verdicts of `posttrain eval`, row by row.

It needs the second environment (`make bench-setup`). BENCH_RUN names a finished run, such as runs/demo; without it the
smoke recipe runs up to RLVR. BENCH_RECIPE is that run's recipe.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chain.bench.harness import DEFAULT
from core.files import read_json, read_jsonl

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
    runs = tmp_path_factory.mktemp("runs")
    posttrain("run", RECIPE, "--runs-dir", runs, "--until", "rlvr")
    return runs / Path(RECIPE).name


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
        rows, task = [row for row in ours if row["set"] == mode], tasks[f"{mode}.{mode}"]
        seen = [(one["completion"], one["tokens"], bool(one["score"])) for one in task["samples"]]
        assert seen == [(row["completion"], row["tokens"], row["correct"]) for row in rows]
        assert task["score"] == pytest.approx(100 * sum(row["correct"] for row in rows) / len(rows))
    assert any(one["score"] for one in tasks["thinking.thinking"]["samples"])
