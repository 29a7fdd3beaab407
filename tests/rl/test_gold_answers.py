"""Rows with unusable gold answers stop the load and are named, or are dropped and counted."""

import logging

import pytest

from corpus.records import VERIFIERS, DataSource, write_records
from rewards.answer import KINDS, GoldError
from rl.data import load_rows


@pytest.fixture
def sets(tmp_path):
    golds = {"good": ("4", "math"), "bad": ("four", "integer"), "worse": ("[4, 3, 2, 1]", "box")}
    rows = [
        {"id": name, "question": "2 + 2?", "answer": gold, "mode": "think", "verifier": kind}
        for name, (gold, kind) in golds.items()
    ]
    write_records(tmp_path / "sums.parquet", rows)
    write_records(tmp_path / "bad.parquet", rows[1:])
    return {name: tmp_path / f"{name}.parquet" for name in ("sums", "bad")}


def test_a_bad_gold_answer_stops_the_load_with_file_row_and_remedy(sets):
    with pytest.raises(
        GoldError, match=r"sums.parquet: row 1 \('bad'\): answer: .*'four' is not an integer.*\n.*1 more"
    ):
        load_rows([DataSource(set="sums")], sets, seed=0)


def test_bad_gold_answers_are_dropped_on_request_and_counted(sets, caplog):
    with caplog.at_level(logging.WARNING):
        rows = load_rows([DataSource(set="sums", on_bad_gold="drop")], sets, seed=0)
    assert [row["id"] for row in rows] == ["good"]
    assert "sums: dropped 2 of 3 rows" in caplog.text


def test_a_set_without_a_usable_gold_answer_is_an_error_all_the_same(sets):
    with pytest.raises(GoldError, match=r"bad\.parquet: row 0"):
        load_rows([DataSource(set="bad", on_bad_gold="drop")], sets, seed=0)


def test_a_record_may_name_every_kind_of_answer_there_is_and_no_other():
    assert VERIFIERS == KINDS
