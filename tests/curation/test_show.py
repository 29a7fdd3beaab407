"""`posttrain data show`: statistics, the page, and one row as the model sees it."""

import random
from pathlib import Path

import pytest

from benchmarks.curation_rows import row
from chain.cli.main import main
from core.model.tiny import TinySize, build_tiny
from corpus.records import write_records


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny core and a set of twelve rows, one of them for RL alone."""
    folder = tmp_path_factory.mktemp("show")
    rows = [row(random.Random(n), n) for n in range(12)]
    rows[3]["chain"] = None
    rows[4] |= {"mode": "direct", "chain": None, "source": "<script>alert(1)</script>"}
    write_records(folder / "mine.parquet", rows)
    size = TinySize(
        vision_hidden=32, vision_layers=1, vision_mlp=32, text_hidden=32, text_layers=1, text_mlp=32
    )
    build_tiny(folder / "core", words=["How", "many", "cars"], seed=0, size=size)
    return folder


def show(place: Path, *options: object) -> int:
    """The exit code of `posttrain data show` on the set."""
    return main(["data", "show", *map(str, (place / "mine.parquet", *options))])


def test_statistics_are_printed_and_a_page_written(place, capsys):
    page = place / "page.html"
    assert show(place, "--model", place / "core", "--out", page, "--n", 5) == 0
    said = capsys.readouterr().out
    assert "91.7%" in said
    assert "83.3%" in said
    assert "tokens, median" in said
    text = page.read_text()
    assert text.count("<img") == 5
    assert "<script" not in text


def test_one_row_is_shown_with_its_trained_tokens(place, capsys):
    assert show(place, "--model", place / "core", "--tokens", "row-2") == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    count, trained = (int(word) for word in first.split() if word.isdigit())
    assert 0 < trained < count
    assert "image tokens]" in rest


def test_tokens_need_a_model_and_a_row(place, capsys):
    assert show(place, "--tokens", 2) == 2
    assert "--model" in capsys.readouterr().err
    assert show(place, "--model", place / "core", "--tokens", "other") == 2
    assert "no row has this id" in capsys.readouterr().err
