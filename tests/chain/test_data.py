"""`posttrain data import`, and a recipe's sets in foreign formats."""

import json
import re
from pathlib import Path

import pytest

from chain import checks
from chain.checks import check
from chain.cli.main import main
from chain.launch import StageFailed
from chain.plan.text import _Sets
from chain.recipe import load_recipe
from chain.run import data
from core.files import write_json
from core.strict import ConfigError
from corpus.records import RecordError, load_records
from rl.limits import Limits

ROWS = [{"q": f"{n}+1?", "answer": str(n + 1), "note": ""} for n in range(5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS, {"q": "no answer"}])
    )
    return tmp_path / "rows.jsonl"


def test_import_prints_the_mapping_three_rows_and_every_reason(source, tmp_path, capsys):
    out = tmp_path / "mine.parquet"
    assert main(["data", "import", str(source), str(out), "--columns", "question=q"]) == 0
    said = capsys.readouterr().out
    assert "format columns: question = q, answer = answer" in said
    assert said.count("-> ") == 3
    assert "5 records of 6 rows, 1 rejected\n  1 x answer: no column holds it" in said
    assert "gold answers: number 100%" in said
    assert "rewards test, answer: 5 rows; gold answers score 1, empty and corrupted answers score 0" in said
    assert [row["question"] for row in load_records(out)] == [row["q"] for row in ROWS]


def test_import_tests_the_gold_answers_and_shows_the_system_message(tmp_path, capsys):
    rows = [
        {"question": "Half?", "answer": answer, "system": "Be brief."} for answer in ("3", "$\\frac{1}{$")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "import", str(tmp_path / "rows.jsonl"), str(tmp_path / "mine.parquet")]) == 0
    said = capsys.readouterr().out
    assert "mine-0, direct: [system: Be brief.] Half?" in said
    assert "failures on 1 of 2 rows" in said
    assert "rewards test, answer: gold: 1 row; the first: row 1 ('mine-1')" in said


def test_import_refuses_in_one_line(source, tmp_path, capsys):
    assert main(["data", "import", str(source), str(tmp_path / "mine.parquet"), "--columns", "question"]) == 2
    assert "write FIELD=COLUMN" in capsys.readouterr().err
    arguments = [
        "data",
        "import",
        str(source),
        str(tmp_path / "mine.parquet"),
        "--columns",
        "question=q",
        "--strict",
    ]
    assert main(arguments) == 1
    assert "rows.jsonl: row 5: answer: no column holds it" in capsys.readouterr().err
    assert main([*arguments[:4], "--images", str(tmp_path / "gone")]) == 2
    assert "gone: there is no such folder of pictures" in capsys.readouterr().err


def test_a_plan_refuses_a_folder_of_pictures_that_does_not_exist(toy, source):
    given = f"data.sets.mine={{path: {source}, images: gone}}"
    with pytest.raises(ConfigError, match=r"data.sets.mine: .*gone: there is no such folder of pictures"):
        check(load_recipe(toy.recipe_dir, [given, "sft.phases.0.data.0.set=mine"]))


def test_a_recipes_set_in_another_format_is_imported_once(toy, source, capsys):
    given = f"data.sets.mine={{path: {source}, columns: {{question: q}}}}"
    recipe = load_recipe(toy.recipe_dir, [given])
    assert _Sets(recipe, toy.run_dir).state("mine") == "imported (at the first run)"
    data(recipe, runs_dir=toy.root / "runs")
    made = toy.run_dir / "imported" / "mine" / "mine.parquet"
    assert len(load_records(made)) == 5
    assert _Sets(recipe, toy.run_dir).state("mine").startswith("imported (there")
    before = made.stat().st_mtime_ns
    data(recipe, runs_dir=toy.root / "runs")
    assert made.stat().st_mtime_ns == before
    source.write_text(json.dumps(ROWS[0]) + "\n")
    data(recipe, runs_dir=toy.root / "runs")
    assert len(load_records(made)) == 1


def test_a_plan_refuses_a_set_that_is_not_parquet_with_the_remedy(toy, capsys):
    (toy.recipe_dir / "rows.jsonl").write_text('{"id": "a"}')
    given = ["--set", "data.sets={mine: rows.jsonl}", "--set", "sft.phases.0.data.0.set=mine"]
    assert main(["plan", str(toy.recipe_dir), *given]) == 2
    shown = capsys.readouterr()
    assert "rows.jsonl (found)" in shown.out
    assert re.search(r"rows.jsonl is not a Parquet file; .*`mine: {path: rows.jsonl}`", shown.err)


@pytest.mark.parametrize("has_core", [False, True])
def test_a_row_that_cannot_be_read_is_refused_in_one_line(toy, tmp_path, monkeypatch, has_core):
    """By this process, and by the child that has the core's tokenizer."""
    words = "rows.parquet: row 5: images: must decode"

    def refuse(*_):
        raise RecordError(words)

    def child(task, out):
        write_json(out / "error.json", {"text": words, "bug": False, "rank": "0"})
        raise StageFailed("rows: exit code 1, and a traceback")

    monkeypatch.setattr(checks, "hold_against_limits", refuse)
    monkeypatch.setattr("chain.launch.run_job", child)
    limits = Limits(max_images=1, max_model_tokens=9, asked=())
    with pytest.raises(ConfigError) as refused:
        checks._look(limits, {}, tmp_path if has_core else None)
    assert str(refused.value) == words
