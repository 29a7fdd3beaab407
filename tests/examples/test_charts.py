"""examples/charts: its splits, golds, pictures and reward; `plan` accepts its recipe; its core sees what stages see."""

import json
import shutil
import subprocess
import sys
from random import Random

import pytest

from chain.cli.main import main
from sailvl2_posttrain import Example, load_records
from sailvl2_posttrain.names import ROOT

FOLDER = ROOT / "examples" / "charts"
sys.path.append(str(FOLDER))

from chart_data import generate  # noqa: E402
from chart_drawing import SIDE, draw  # noqa: E402
from chart_lessons import MIXTURES, draw_lessons  # noqa: E402
from chart_reward import Readings, RelaxedAccuracy, Shuffled  # noqa: E402
from chart_scenes import HELDOUT, LEVELS, REASONING, TRAIN, VALIDATION, Chart, ask, split_of  # noqa: E402

SIZES = dict.fromkeys(
    ("general", "dense", "worked", "longcot", "rl", "fusion_direct", "mixed_direct", "validation", "heldout"),
    30,
)
CHART = Chart("line", "Rainfall", "mm", ("Mar", "Apr", "May"), (4, 7, 2), 10)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charts")
    generate(folder, seed=0, hasty_share=0.6, **SIZES)
    return {file.stem: load_records(file) for file in folder.glob("*.parquet")}


def levels_of(row):
    values = [row["meta"]["values"][label] for label in row["meta"]["labels"]]
    return [value // (10 if max(values) >= 10 else 1) for value in values]


def test_a_fifth_of_the_triples_is_held_out_and_no_stage_sees_them(sets):
    triples = [(a, b, c) for a in LEVELS for b in LEVELS for c in LEVELS]
    assert sum(split_of(one) == HELDOUT for one in triples) / len(triples) == pytest.approx(0.2, abs=0.03)
    for name, rows in sets.items():
        expected = {"heldout": HELDOUT, "validation": VALIDATION}.get(name.split("_")[0], TRAIN)
        assert {split_of(levels_of(row)) for row in rows} == {expected}, name
    lessons = [one for phase in MIXTURES for _ in range(10) for one in draw_lessons(phase, Random(phase))]
    assert {split_of(one.chart.levels) for one in lessons if one.chart} == {TRAIN}


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("sum", {"110 mm", "60 mm", "90 mm"}),
        ("difference", {"30 mm", "20 mm", "50 mm"}),
        ("total", {"130 mm"}),
        ("range", {"50 mm"}),
        ("compare", {"Apr", "Mar"}),
        ("value", {"40 mm", "70 mm", "20 mm"}),
        ("list", {"Mar=40;Apr=70;May=20"}),
    ],
)
def test_golds_follow_from_the_chart(kind, answers):
    assert {ask(Random(seed), kind, CHART).answer for seed in range(40)} == answers


def test_chains_are_right_and_hasty_ones_have_no_steps():
    for kind in REASONING:
        question = ask(Random(1), kind, CHART)
        for step in question.steps:
            left, sign, right = step.partition("=" if "=" in step else ">")
            assert eval(left) == int(right) if sign == "=" else int(left) > int(right)
        assert question.chain.startswith(question.hasty + ";")
        assert all(reading in CHART_READINGS for reading in question.hasty.split(";"))


CHART_READINGS = {"Mar=40", "Apr=70", "May=20"}


def test_the_asked_share_of_long_chains_is_hasty(sets):
    hasty = [row for row in sets["longcot"] if row["meta"].get("made_hasty")]
    assert len(hasty) == 18
    assert all(row["chain"] == row["meta"]["hasty"] for row in hasty)


def test_the_same_seed_gives_the_same_rows_and_pixels(sets, tmp_path):
    generate(tmp_path, seed=0, hasty_share=0.6, **SIZES)
    again = load_records(tmp_path / "rl.parquet")
    assert [row["question"] for row in again] == [row["question"] for row in sets["rl"]]
    assert again[7]["images"][0].data == sets["rl"][7]["images"][0].data
    assert sets["rl"][7]["images"][0].size == (SIDE, SIDE)


def test_a_value_shows_in_the_picture():
    low, high = (Chart("bar", "Yield", "t", ("Rye", "Oats", "Rice"), (level, 5, 5), 1) for level in (2, 3))
    assert draw(low, Random(0)).tobytes() != draw(high, Random(0)).tobytes()


def completion(answer, thought="40+70=110"):
    return rf"<think>{thought}</think>\boxed{{{answer}}}"


ROW = Example(
    "row", "What is the sum of Mar and Apr?", "1200 mm", "think", meta={"values": {"Mar": 40, "Apr": 70}}
)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("1200 mm", 1), ("1,200mm", 1), ("1200.0 mm", 1), ("1140 mm", 1), ("1260mm", 1),  # up to 5%
        ("1139 mm", 0), ("1261mm", 0), ("-1200 mm", 0), ("1200", 0), ("1200 cm", 0), ("1200 mmm", 0),
        ("12,00 mm", 0), ("1e3 mm", 0), ("nan mm", 0), ("inf mm", 0), ("٣ mm", 0), ("１２００ mm", 0),
        ("1200 mm or 3 mm", 0), ("1199 mm" + " " * 2000, 1), ("9" * 1900, 0), ("1" + ",000" * 400, 0), ("", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy_takes_5_percent_in_the_same_unit_and_nothing_else(answer, score):
    assert RelaxedAccuracy()(completion(answer), ROW).score == score


def test_relaxed_accuracy_is_exact_for_texts_and_keeps_the_prompt_contract():
    row = Example("row", "Which is higher?", "Apr", "direct")
    assert [RelaxedAccuracy()(text, row).score for text in ("Apr", "apr", "Apr Mar", "")] == [1, 1, 0, 0]
    assert RelaxedAccuracy()("1200 mm", ROW).reason == "no thought"
    assert RelaxedAccuracy()(completion("1200 mm") + r"\boxed{3}", ROW).score == 0


@pytest.mark.parametrize(
    ("thought", "score"),
    [
        ("Mar=40;Apr=70;40+70=110", 1),
        ("Mar=40;Apr=60", 0.5),
        ("40+70=110", 0),
        (";" * 5000, 0),
        ("Mar=40;Mai=4", 0.5),
    ],
)
def test_readings_counts_what_the_chart_shows(thought, score):
    assert Readings()(completion("1200 mm", thought), ROW).score == score


def test_a_shuffled_reward_gives_the_scores_of_the_completions_in_another_order():
    reward = Shuffled("chart_reward:RelaxedAccuracy")
    scores = [reward(completion("1200 mm" if turn % 2 else "3 mm"), ROW).score for turn in range(400)]
    assert sum(scores) / 400 == pytest.approx(0.5, abs=0.1)
    right = [score for turn, score in enumerate(scores) if turn % 2]
    assert sum(right) / 200 == pytest.approx(0.5, abs=0.15)


def test_golds_earn_1_and_corrupted_answers_0(sets, tmp_path, monkeypatch, capsys):
    from sailvl2_posttrain import write_records

    monkeypatch.chdir(tmp_path)
    write_records("rows.parquet", [*sets["heldout_think"], *sets["heldout_direct"]])
    reward = f"{FOLDER / 'chart_reward.py'}:RelaxedAccuracy"
    assert main(["rewards", "test", reward, "rows.parquet"]) == 0, capsys.readouterr()


def test_plan_accepts_the_recipe_and_its_control(capsys):
    assert main(["plan", str(FOLDER / "shuffled")]) == 0
    assert "0.8 answer (chart_reward:Shuffled)" in capsys.readouterr().out
    assert main(["plan", str(FOLDER)]) == 0
    shown = capsys.readouterr().out
    assert "0.8 answer (chart_reward:RelaxedAccuracy) + 0.2 format (think_format)" in shown
    assert f"code chart_core:build: {FOLDER / 'chart_core.py'}" in shown


def test_every_number_has_a_source():
    from chain.yaml_files import check_sources

    assert check_sources(FOLDER) == []


def test_the_example_imports_no_package_but_the_public_one():
    import ast

    found = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    ours = {file.name for file in ROOT.iterdir() if (file / "__init__.py").is_file()}
    assert found & ours == {"sailvl2_posttrain"}


def test_a_built_core_reads_the_prompts_of_the_stages(tmp_path):
    """The builder's ids and pixels equal the processor's for the same row."""
    import torch
    from chart_core import build, normalized, tokens
    from chart_lessons import Lesson
    from transformers import AutoProcessor

    from sailvl2_posttrain import messages

    build(tmp_path / "core", seed=0, ordered_steps=1, reading_steps=0, mixed_steps=1, warmup_steps=1)
    assert (tmp_path / "metrics.jsonl").read_text().count("loss") == 1
    processor = AutoProcessor.from_pretrained(tmp_path / "core")
    picture = draw(CHART, Random(0))
    row = {"images": [picture], "question": "Which is the highest?", "mode": "direct"}
    inputs = processor.apply_chat_template(
        [messages(row)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = tokens([Lesson("Which is the highest?", (("Apr", True),), CHART)], processor)
    length = inputs["input_ids"].shape[1]
    assert ours["input_ids"][0, :length].tolist() == inputs["input_ids"][0].tolist()
    assert ours["trained"][0].tolist() == [False] * length + [True, True]
    import numpy as np

    torch.testing.assert_close(
        normalized(np.asarray(picture)[None], processor), inputs["pixel_values"], atol=1e-4, rtol=0
    )


def run(runs, folder, *words):
    """`posttrain run`; stage -> set -> scores."""
    command = [sys.executable, "-P", "-m", "chain.cli.main", "run", str(folder), "--runs-dir", str(runs)]
    done = subprocess.run([*command, "--seed", "1", *words], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((runs / f"{folder.name}-seed1" / "report.json").read_text())
    return {stage["name"]: stage["eval"] for stage in report["stages"]}


@pytest.mark.slow
def test_it_learns_from_its_rewards_and_keeps_its_direct_answers(tmp_path):
    stages = run(tmp_path, FOLDER)
    before = stages["longcot_sft"]["thinking"]["accuracy"]
    assert stages["rlvr"]["thinking"]["accuracy"] - before >= 0.25
    assert stages["mixed_rl"]["direct"]["accuracy"] >= stages["basic_sft"]["direct"]["accuracy"] - 0.03
    assert all(one["format_rate"] >= 0.98 for one in stages["mixed_rl"].values())
    # Rewards that say nothing about a completion teach nothing.
    shutil.copytree(tmp_path / "charts-seed1", tmp_path / "shuffled-seed1")
    control = run(tmp_path, FOLDER / "shuffled", "--from", "rlvr", "--until", "rlvr")
    assert control["rlvr"]["thinking"]["accuracy"] - before < 0.1
