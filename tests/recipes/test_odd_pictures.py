"""The smoke chain on pictures as people have them ends, and says what it dropped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import ImageChops

from core.model.pictures import as_rgb
from corpus.records import load_records, picture_of

from .odd_panels import KINDS, LOSSLESS

ROOT = Path(__file__).parents[2]
DROP = {"unaskable": "drop"}
RECIPE = {
    "extends": str(ROOT / "recipes/smoke"),
    "about": "the smoke chain on odd pictures",
    "data": {"generate": {"by": "odd_panels:generate"}},
    "eval": {
        "sets": {"thinking": {"set": "heldout_think", **DROP}, "direct": {"set": "heldout_direct", **DROP}}
    },
    "basic_sft": {"overlong": "drop"},
    "longcot_sft": {"overlong": "drop"},
    "think_fusion": {
        "overlong": "drop",
        "prepare": {"harvest": {"source": {"set": "rl", "rows": 48, **DROP}}},
    },
    "rlvr": {
        "prepare": {"pass_at_k": {"source": {"set": "rl", **DROP}}},
        "watch": {"held_out": {"set": "validation_think", "rows": 16, **DROP}},
    },
    "mixed_rl": {
        "data": [{"set": "hard", **DROP}, {"set": "mixed_direct", **DROP}],
        "watch": {"held_out": {"set": "validation_think", "rows": 16, **DROP}},
    },
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_lossless_kinds_show_the_panel_itself(kind):
    from recipes.demo.panels import rows

    (row,) = rows("rl", 0, 1, "train", ("xy",), lambda question: {})
    panel = as_rgb(picture_of({"bytes": row["images"][0]}))
    seen = as_rgb(picture_of({"bytes": LOSSLESS[kind](panel)}))
    assert ImageChops.difference(seen, panel).getbbox() is None


@pytest.mark.slow
def test_the_chain_ends_and_counts_what_it_dropped(tmp_path):
    recipe = tmp_path / "odd"
    recipe.mkdir()
    (recipe / "pipeline.yaml").write_text(yaml.safe_dump(RECIPE))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "WANDB_MODE": "offline"}
    command = [sys.executable, "-P", "-m", "chain.cli.main", "run", str(recipe), "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "odd"
    assert (run / "mixed_rl" / "checkpoint" / "config.json").exists()
    rows = list(load_records(run / "data" / "heldout_think.parquet"))
    assert len(rows) == 24 + 2
    held_out = [json.loads(line) for line in (run / "mixed_rl" / "held_out.jsonl").read_text().splitlines()]
    asked = {line["id"] for line in held_out}
    assert "heldout_think-text" in asked
    assert "heldout_think-nine" not in asked
    assert {row["id"] for row in rows if row["id"][-1].isdigit()} <= asked
    assert len(KINDS) <= 24, "every kind is among the held-out rows"
    said = " ".join((done.stdout + done.stderr).split())
    assert "heldout_think: dropped 1 of 26 rows beyond the servers' limits: {'pictures': 1}" in said
