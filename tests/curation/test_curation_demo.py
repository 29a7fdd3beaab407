"""The curation demo: every step, with a tiny core on a real vLLM server and two SFT runs."""

from pathlib import Path

import pytest

from chain.cli.main import main
from core.files import read_json, read_jsonl
from corpus.curation.steps import OPERATORS
from corpus.records import load_records
from recipes.curation_demo.expert import reply
from recipes.curation_demo.rows import generate

DEMO = Path(__file__).parents[2] / "recipes" / "curation_demo"


def test_the_data_have_the_defects_and_can_be_read(tmp_path):
    generate(tmp_path, seed=0, chains=40, sums=8, digits=40, held=8)
    ids = [row["id"] for row in load_records(tmp_path / "chains.parquet")]
    assert [
        sum(name.startswith(kind) for name in ids) for kind in ("curated", "again", "near", "leak", "rest")
    ] == [*(40, 4, 4, 2, 4)]
    lines = read_jsonl(tmp_path / "digits.jsonl")
    assert (len(lines), sum("label" not in line for line in lines)) == (40, 1)
    assert not (tmp_path / "pictures" / "0007.png").exists()


def test_the_expert_answers_by_rules():
    choice = {"question": "compute 3+4-2\nA. 5\nB. 6", "answer": "A"}
    assert reply("Rewrite this question without its options", choice) == "compute 3+4-2"
    assert reply("Work out the reasoning", choice) == "3+4=7;7-2=5\\boxed{5}"
    assert reply("How good are", choice) == "7"
    assert reply("How good are", {"question": "How many elephants stand on it? compute"}) == "1"


@pytest.mark.slow
def test_all_steps_run(tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    small = [
        "generate.params={chains: 80, sums: 16, digits: 40, held: 12}",
        "workers=1",
        "incremental.optim.max_steps=12",
    ]
    assert main(["data", "curate", str(DEMO), "--set", f"output={tmp_path / 'out'}", *small]) == 0
    told = read_json(tmp_path / "out" / "steps.json")
    assert {step["op"] for step in told["steps"]} == {"read", "ids", *OPERATORS}
    (digits,) = told["import"]
    assert digits[:3] == ["digits", 40, 38]
    assert told["incremental"]["better"]
    dropped = read_jsonl(tmp_path / "out" / "dropped.jsonl")
    by_step = {(row["step"], row["id"].partition("/")[2].partition("-")[0]) for row in dropped}
    assert {("duplicates", "again"), ("duplicates", "near"), ("decontaminate", "leak")} <= by_step
    assert ("redundancy", "restating") in by_step
    rates = [row["meta"]["pass_rate"] for row in load_records(tmp_path / "out") if "pass_rate" in row["meta"]]
    assert rates
    assert max(rates) < 1
