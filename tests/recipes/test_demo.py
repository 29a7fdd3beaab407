"""The demo's data: nothing of the held-out set appears in training, answers are right, the same seed gives the same."""

from pathlib import Path
from random import Random

import pytest
from PIL import Image

from chain.recipe import load_recipe
from corpus.records import load_records
from recipes.demo.drawing import scans_of
from recipes.demo.lessons import MIXTURES, Frame, draw_lessons
from recipes.demo.panels import SETS, generate
from recipes.demo.scenes import CELLS, HELDOUT, TRAIN, VALIDATION, is_heldout, split_of
from rewards import Example
from rewards.answer import validate_gold

ROOT = Path(__file__).parents[2]
FEW = dict.fromkeys(("general", "dense", "worked", "longcot", "rl", "fusion_direct", "mixed_direct"), 40)
SIZES = {**FEW, "validation": 20, "heldout": 60}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate(folder, seed=0, **SIZES)
    return {name: list(load_records(folder / f"{name}.parquet")) for name in SETS}


def digits_of(row):
    return tuple(row["meta"]["scene"][cell] for cell in CELLS)


def test_a_fifth_of_the_combinations_is_held_out():
    share = sum(is_heldout((n // 1000, n // 100 % 10, n // 10 % 10, n % 10)) for n in range(10_000)) / 10_000
    assert share == pytest.approx(0.2, abs=0.02)


def test_the_splits_share_no_scan_and_360_are_held_out():
    scans = {
        split: {scan for some in scans_of(split).values() for scan in some}
        for split in (TRAIN, VALIDATION, HELDOUT)
    }
    assert len(scans[HELDOUT]) == 360
    assert not scans[HELDOUT] & scans[TRAIN]
    assert not scans[VALIDATION] & (scans[TRAIN] | scans[HELDOUT])
    assert sum(map(len, scans.values())) == 1797


def test_no_stage_sees_a_held_out_combination_or_scan(sets):
    held_out_scans = {scan for some in scans_of(HELDOUT).values() for scan in some}
    for name, rows in sets.items():
        for row in rows:
            expected = {"heldout": HELDOUT, "validation": VALIDATION}.get(name.split("_")[0], TRAIN)
            assert split_of(digits_of(row)) == expected, name
            used = set(row["meta"]["scans"].values())
            assert used <= held_out_scans if expected == HELDOUT else not used & held_out_scans, name


def test_no_training_stage_of_the_recipe_names_a_held_out_set():
    recipe = load_recipe(ROOT / "recipes/demo")
    stages = [
        recipe.basic_sft,
        recipe.longcot_sft,
        recipe.rlvr,
        recipe.think_fusion,
        recipe.mixed_rl,
        recipe.soup,
    ]
    assert not [stage for stage in stages if "heldout" in stage.model_dump_json()]


def test_pre_training_draws_training_scenes_alone():
    frame = Frame("<img>", "<u>", "<a>", "<end>", "<pad>")
    rng = Random(0)
    held_out_scans = {scan for some in scans_of(HELDOUT).values() for scan in some}
    scenes = [
        lesson.scene for phase in MIXTURES for _ in range(20) for lesson in draw_lessons(phase, frame, rng)
    ]
    drawn = [scene for scene in scenes if scene]
    assert len(drawn) > 1000
    assert all(split_of(scene.digits) == TRAIN for scene in drawn)
    assert not {scan for scene in drawn for scan in scene.scans} & held_out_scans


def test_gold_answers_follow_from_the_scene(sets):
    for row in sets["rl"] + sets["heldout_think"]:
        scene, expr = row["meta"]["scene"], row["meta"]["expr"]
        if row["meta"]["kind"] == "spread":
            value = max(scene.values()) - min(scene.values())
        else:
            value = scene[expr[0]]
            for sign, cell in zip(expr[1::2], expr[2::2], strict=True):
                value += scene[cell] if sign == "+" else -scene[cell]
        assert str(value) == row["answer"]


def test_every_gold_answer_can_be_graded(sets):
    for row in (row for rows in sets.values() for row in rows if row["verifier"] != "none"):
        validate_gold(Example(row["id"], row["question"], row["answer"], row["mode"], row["verifier"]))


def test_the_asked_share_of_long_chains_is_hasty(sets):
    hasty = [row for row in sets["longcot"] if row["meta"].get("hasty")]
    assert len(hasty) == round(0.6 * 40)
    assert all("+" not in row["chain"] and "-" not in row["chain"] for row in hasty)


def test_the_same_seed_gives_the_same_rows_and_pixels(sets, tmp_path):
    generate(tmp_path, seed=0, **SIZES)
    for name in ("rl", "longcot"):
        again = list(load_records(tmp_path / f"{name}.parquet"))
        assert [row["question"] for row in again] == [row["question"] for row in sets[name]]
        assert again[7]["images"][0].data == sets[name][7]["images"][0].data
    generate(tmp_path / "other", seed=1, **SIZES)
    other = list(load_records(tmp_path / "other" / "rl.parquet"))
    assert [digits_of(row) for row in other] != [digits_of(row) for row in sets["rl"]]


def test_pre_training_reads_what_the_processor_gives(tmp_path):
    """Same prompt ids and pixels as every later stage's, so that the chain goes on from what the core learnt."""
    import numpy as np
    import torch

    from core.model.prompts import messages
    from core.model.tiny import build_tiny
    from core.training.model import load_processor
    from recipes.demo.drawing import render
    from recipes.demo.lessons import frame_of
    from recipes.demo.pretrain import normalized, tokens
    from recipes.demo.scenes import WORDS

    processor = load_processor(build_tiny(tmp_path / "tiny", words=WORDS, seed=0))
    rng, frame = Random(0), frame_of(processor)
    lesson = next(
        one for one in draw_lessons("mixed", frame, rng) if one.pieces[0][0].startswith(frame.before)
    )
    panels = render([lesson.scene], np.random.default_rng(0))
    asked, answer = lesson.pieces[0][0], lesson.pieces[1][0]
    question = asked.removeprefix(f"{frame.before}{frame.picture}").removesuffix(frame.after)
    row = {"images": [Image.fromarray(panels[0])], "question": question, "mode": "direct"}
    inputs = processor.apply_chat_template(
        [messages(row)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = tokens([lesson], processor.tokenizer)
    length = inputs["input_ids"].shape[1]
    assert ours["input_ids"][0, :length].tolist() == inputs["input_ids"][0].tolist()
    assert ours["trained"][0].tolist() == [False] * length + [True] * (ours["input_ids"].shape[1] - length)
    assert answer.endswith("<|im_end|>")
    torch.testing.assert_close(normalized(panels, processor), inputs["pixel_values"], atol=1e-5, rtol=0)
