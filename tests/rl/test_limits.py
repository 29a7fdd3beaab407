"""Every row is compared with the servers' limits before a stage trains: refused with file, row and key, or dropped."""

import pytest

from core.files import read_json
from core.training.job import Job
from core.training.model import load_processor
from corpus.records import DataSource, load_records, write_records
from rl.data import prompt_messages
from rl.limits import FOUND, Asked, Limits, askable, check, prompt_tokens
from rl.rollout.config import PoolConfig

from .conftest import record


@pytest.fixture
def rows(tmp_path):
    """Three rows that fit, one with nine pictures, one with a long question; the file that holds them."""
    good = [record(number) for number in range(3)]
    many = {**record(3), "id": "many", "images": record(3)["images"] * 9}
    long = {**record(4), "id": "long", "question": "compute A plus B " * 40}
    write_records(tmp_path / "mine.parquet", [*good, many, long])
    return tmp_path / "mine.parquet"


def found(rows, out, core, **source):
    out.mkdir(exist_ok=True)
    asked = Asked(key="rlvr.data[0]", source=DataSource(set="mine", **source), max_completion_tokens=48)
    limits = Limits(max_images=8, max_model_tokens=160, asked=(asked,))
    check(limits, Job(stage="rows", model=core, out=out, sets={"mine": rows}))
    return read_json(out / FOUND)


def test_prompt_tokens_are_those_that_the_processor_makes(tiny_core):
    processor = load_processor(tiny_core)
    for row in (record(1), record(2, mode="direct"), record(3, image=False)):
        made = processor.apply_chat_template(
            [prompt_messages(row)], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert prompt_tokens(row, processor) == len(made["input_ids"][0])


def test_rows_beyond_the_limits_are_refused_with_file_row_and_key(rows, tiny_core, tmp_path):
    (problem,) = found(rows, tmp_path / "out", tiny_core)["problems"]
    assert problem.startswith(
        f"rlvr.data[0]: {rows}: row 3 ('many'): 9 pictures, servers.max_images=8 (2 such rows of 5)"
    )
    assert "unaskable: drop" in problem


def test_without_a_core_pictures_alone_are_counted(rows, tmp_path):
    assert "9 pictures" in found(rows, tmp_path / "out", None)["problems"][0]
    assert found(rows, tmp_path / "out", None, unaskable="drop")["dropped"] == {
        "rlvr.data[0]": {"pictures": 1}
    }


def test_rows_beyond_the_limits_are_dropped_and_counted_on_request(rows, tiny_core, tmp_path, caplog):
    assert found(rows, tmp_path / "out", tiny_core, unaskable="drop") == {
        "problems": [],
        "dropped": {"rlvr.data[0]": {"pictures": 1, "tokens": 1}},
        "warnings": [],
    }
    source = DataSource(set="mine", unaskable="drop")
    pool = PoolConfig(max_model_tokens=160)
    kept = askable(load_records(rows), source, pool, tiny_core, 48)
    assert [row["id"] for row in kept] == ["row-0", "row-1", "row-2"]
    assert "dropped 2 of 5 rows beyond the servers' limits" in caplog.text
    assert len(askable(load_records(rows), DataSource(set="mine"), pool, tiny_core, 48)) == 5


def test_a_set_of_which_nothing_is_left_is_refused_even_where_rows_are_dropped(tiny_core, tmp_path):
    long = {**record(4), "question": "compute A plus B " * 40}
    write_records(tmp_path / "mine.parquet", [long])
    (problem,) = found(tmp_path / "mine.parquet", tmp_path / "out", tiny_core, unaskable="drop")["problems"]
    assert "servers.max_model_tokens=160 less 48 for the completion leaves 112" in problem
