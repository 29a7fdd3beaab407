"""Data sets on the hub, without a network: the hub's own cache, and a client that counts its downloads."""

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from core.strict import ConfigError
from corpus.hub import HubFiles, hub_set
from corpus.importing import import_set
from corpus.records import load_records

from .test_formats import cell, parquet


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The hub's cache after a download of org/set, and no connection."""
    repo = tmp_path / "hub" / "datasets--org--set"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    snapshot = repo / "snapshots" / ("a" * 40)
    for split, numbers in (("train", range(3)), ("test", range(5))):
        folder = snapshot / "maths" / split
        folder.mkdir(parents=True)
        parquet(folder, [{"image": cell(n), "problem": f"Find {n}.", "answer": str(n)} for n in numbers])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("name", ["org/set", "hf://datasets/org/set", "hf://datasets/org/set@main/maths"])
def test_a_data_set_in_the_cache_is_imported_without_a_connection(cached, tmp_path, name):
    summary = import_set(name, tmp_path / "out.parquet")
    assert (summary.format, summary.written) == ("columns", 3)
    assert load_records(tmp_path / "out.parquet")[2]["question"] == "Find 2."
    assert import_set(name, tmp_path / "out.parquet", split="test").written == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/other", "the hub does not serve it.*download it"),
        ("hf://datasets/org/set/physics", "there is no file of the split 'train'"),
        ("hf://datasets/org", "write hf://datasets/owner/name"),
        ("hf://datasets/org/set/../x", "write hf://datasets/owner/name"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused_in_one_line(cached, tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        import_set(name, tmp_path / "out.parquet")


def test_files_are_downloaded_when_they_are_read(tmp_path, monkeypatch):
    asked = []

    def download(filename, **where):
        asked.append(filename)
        file = tmp_path / filename
        file.write_text("".join(json.dumps({"question": f"{n}?", "answer": "4"}) + "\n" for n in range(30)))
        return str(file)

    names = ["README.md", "b.jsonl", "a.jsonl", "test.jsonl"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, **where: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    files = HubFiles(hub_set("org/set"))
    assert (files.names, asked) == (["a.jsonl", "b.jsonl"], [])
    assert import_set("org/set", tmp_path / "out.parquet", rows=10).written == 10
    assert set(asked) == {"a.jsonl"}
    assert import_set("org/set", tmp_path / "out.parquet").written == 60


def test_a_path_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/set").mkdir(parents=True)
    assert hub_set("org/set") is None
    assert hub_set("data/rows.tsv") is None
    assert hub_set("/data/rows") is None
    assert hub_set(str(Path("hf://datasets/org/set"))) == ("org/set", None, "")


def test_a_hub_that_does_not_answer_leaves_its_cache(cached, tmp_path, monkeypatch, caplog):
    def nobody(self, **where):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", nobody)
    assert hub_set("org/set") is not None
    with pytest.raises(ConfigError, match="org/other: the hub does not serve it"):
        HubFiles(hub_set("org/other"))
    assert len(HubFiles(hub_set("org/set"))) == 1
    assert "the hub does not answer; looking in its cache" in caplog.text
