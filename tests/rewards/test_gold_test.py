"""`posttrain rewards test`, called as a user calls it."""

import json
import sys

import pytest

from chain.cli.main import main
from corpus.records import write_records

RECORD = {"images": [], "chain": None, "response": None, "source": "", "meta": {}}


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [
        {"id": "a", "question": "2 + 2?", "answer": "4", "mode": "think", "verifier": "number"},
        {"id": "b", "question": "Who?", "answer": "Ada", "mode": "direct", "verifier": "exact"},
        {"id": "c", "question": "Say it.", "answer": "well", "mode": "direct", "verifier": "judge"},
    ]
    write_records(tmp_path / "rows.parquet", [RECORD | row for row in rows])
    (tmp_path / "mine.py").write_text(
        "class Kind:\n"
        "    def __init__(self, score=1.0):\n"
        "        self.score = score\n"
        "    def __call__(self, completion, example):\n"
        "        return self.score\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "reward", ["answer", "format", "think_format", "direct_format", "language", "repetition"]
)
def test_our_rewards_pass_on_records(work, reward, capsys):
    assert main(["rewards", "test", reward, "rows.parquet"]) == 0
    tested = {"answer": "2 rows", "think_format": "1 row", "direct_format": "2 rows"}.get(reward, "3 rows")
    shown = capsys.readouterr().out
    assert f"{reward}: {tested}; " in shown
    # the third row's verifier is none, so its verdict is not checked
    assert ("answer: 1 row of verifier judge or none got a verdict" in shown) == (reward == "answer")


def test_a_reward_that_always_pays_ends_with_code_1_and_shows_file_and_row(work, capsys):
    assert main(["rewards", "test", "mine.py:Kind", "rows.parquet"]) == 1
    shown = capsys.readouterr()
    assert (
        "rows.parquet: empty: 2 rows; the first: row 0 ('a'): mine.py:Kind: empty: expected 0, got 1 (correct)"
        in shown.out
    )
    assert "('c')" not in shown.out  # rules cannot check any of these rows
    assert "failures on 2 of 3 rows" in shown.err
    assert len(shown.out.splitlines()) <= 10


def test_parameters_and_a_sample(work, capsys):
    assert (
        main(["rewards", "test", "mine.py:Kind", "rows.parquet", "--param", "score=0.5", "--rows", "1"]) == 1
    )
    assert "got 0.5 (wrong)" in capsys.readouterr().out
    assert main(["rewards", "test", "answer", "rows.parquet", "--rows", "2", "--seed", "1"]) == 0
    assert "answer: 1 row; gold answers" in capsys.readouterr().out
    assert main(["rewards", "test", "answer", "rows.parquet", "--rows", "99"]) == 0


def test_a_row_of_a_sample_keeps_its_number_in_the_file(work, capsys):
    rows = [
        RECORD | {"id": f"r{n}", "question": "q", "answer": "x", "mode": "direct", "verifier": "exact"}
        for n in range(40)
    ]
    write_records(work / "many.parquet", rows)
    assert main(["rewards", "test", "mine.py:Kind", "many.parquet", "--rows", "3"]) == 1
    shown = [line for line in capsys.readouterr().out.splitlines() if "empty" in line]
    (line,) = shown
    number = line.split(" row ")[1].split()[0]
    assert f"empty: 3 rows; the first: row {number} ('r{number}')" in line
    assert number != "0"


def test_every_row_under_another_contract(work, capsys):
    assert main(["rewards", "test", "think_format", "rows.parquet", "--mode", "think"]) == 0
    assert main(["rewards", "test", "direct_format", "rows.parquet", "--mode", "think"]) == 2
    assert "no row of mode 'direct'" in capsys.readouterr().err


def test_jsonl_rows_are_tested_and_a_bad_gold_is_found(work, capsys):
    rows = [
        {"gold": "B", "kind": "choice", "meta": {"choices": ["red", "blue"]}},
        {"gold": "E", "kind": "choice"},
    ]
    rows[1]["meta"] = rows[0]["meta"]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["rewards", "test", "answer", "rows.jsonl"]) == 1
    shown = capsys.readouterr().out
    assert (
        "rows.jsonl: gold: 1 row; the first: row 2 ('line-2'): answer: gold: expected 1, got no score"
        in shown
    )
    assert "row 1 " not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("anser", "rows.parquet"), "did you mean answer"),
        (("answer", "gone.parquet"), "no such file"),
        (("answer", "gone.jsonl"), "no such file"),
        (("answer", "bad.jsonl"), "line 2: not valid JSON"),
        (("answer", "rows.parquet", "--param", "tolerance"), "write KEY=VALUE"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2(work, capsys, arguments, says):
    (work / "bad.jsonl").write_text('{"gold": "4"}\n{\n')
    assert main(["rewards", "test", *arguments]) == 2
    assert says in capsys.readouterr().err
