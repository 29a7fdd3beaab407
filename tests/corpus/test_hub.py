"""Data sets on the hub, without a network: the hub's own cache, and a client that counts its downloads."""

import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from core.files import read_jsonl
from core.strict import ConfigError
from corpus.formats.files import files_of, root_of
from corpus.formats.table import Options
from corpus.hub import HubFiles, hub_set
from corpus.importing import import_set
from corpus.records import load_records

from .test_formats import cell, parquet

ADDRESS = "hf://datasets/org/set"


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


@pytest.mark.parametrize("name", ["hf://datasets/org/set", "hf://datasets/org/set@main/maths"])
def test_a_data_set_in_the_cache_is_imported_without_a_connection(cached, tmp_path, name):
    summary = import_set(name, tmp_path / "out.parquet")
    assert (summary.format, summary.written) == ("columns", 3)
    assert load_records(tmp_path / "out.parquet")[2]["question"] == "Find 2."
    assert import_set(name, tmp_path / "out.parquet", split="test").written == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://datasets/org/other", "the hub does not serve it.*download it"),
        ("hf://datasets/org/set/physics", "there is no file of the split 'train'"),
        (
            "org/set",
            "org/set: there is no such file or folder; a data set on the hub is written hf://datasets/org/set",
        ),
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
    files = HubFiles(hub_set(ADDRESS))
    assert (files.names, asked) == (["a.jsonl", "b.jsonl"], [])
    assert import_set(ADDRESS, tmp_path / "out.parquet", rows=10).written == 10
    assert set(asked) == {"a.jsonl"}
    assert import_set(ADDRESS, tmp_path / "out.parquet").written == 60


def test_only_an_address_is_a_data_set_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("org/set", "data/rows.tsv", "/data/rows", "./org/set"):
        assert hub_set(path) is None
    assert hub_set(str(Path(ADDRESS))) == ("org/set", None, "")
    Path("org/set").mkdir(parents=True)
    Path("org/set/rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert import_set("org/set", tmp_path / "out.parquet").written == 1


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A fake hub: its files by name, and the names of those that were downloaded."""
    files, asked = dict[str, bytes](), list[str]()

    def download(filename, **where):
        asked.append(filename)
        file = tmp_path / "cache" / filename
        file.parent.mkdir(parents=True, exist_ok=True)
        blob = (
            tmp_path / "blobs" / str(len(asked))
        )  # as in the hub's cache, names are links out of their folder
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(files[filename])
        file.unlink(missing_ok=True)
        file.symlink_to(blob)
        return str(file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, **where: list(files))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files, asked


def rows_with(*names: str) -> bytes:
    rows = [{"question": f"{name}?", "answer": "4", "image": name} for name in names]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_picture_files_beside_the_rows_are_downloaded(served, tmp_path):
    files, asked = served
    files |= {"maths/train.jsonl": rows_with("images/1.png", "maths/images/2.png"), "maths/images/3.png": b""}
    files |= {"maths/images/1.png": cell(1)["bytes"], "maths/images/2.png": cell(2)["bytes"]}
    assert import_set(ADDRESS, tmp_path / "out.parquet").written == 2
    assert load_records(tmp_path / "out.parquet")[1]["images"][0].data == cell(2)["bytes"]
    assert set(asked) == {"maths/train.jsonl", "maths/images/1.png", "maths/images/2.png"}
    assert import_set(f"{ADDRESS}/maths/train.jsonl", tmp_path / "out.parquet").written == 2  # one file


def test_the_folder_of_the_pictures_may_be_on_the_hub(served, tmp_path):
    files, _ = served
    files |= {"train.jsonl": rows_with("1.png"), "shots/1.png": cell(1)["bytes"]}
    root = root_of(ADDRESS, files_of(ADDRESS), f"{ADDRESS}/shots")
    assert import_set(ADDRESS, tmp_path / "out.parquet", options=Options(root)).written == 1


def test_missing_pictures_of_the_hub_are_rejected_with_the_archives_that_may_hold_them(served, tmp_path):
    files, asked = served
    files |= {"train.jsonl": rows_with("1.png", "../../etc/passwd", "/etc/passwd", "2.png")}
    files |= {"2.png": cell(2)["bytes"], "images.zip": b""}
    assert import_set(ADDRESS, tmp_path / "out.parquet").written == 1
    rejected = read_jsonl(tmp_path / "out.rejected.jsonl")
    assert [one["row"] for one in rejected] == [0, 1, 2]
    assert "in an archive of hf://datasets/org/set (images.zip): unpack it" in rejected[0]["remedy"]
    assert set(asked) == {"train.jsonl", "2.png"}


def test_a_repository_with_files_of_several_kinds_names_them(served, tmp_path):
    files, _ = served
    files |= {"a.jsonl": rows_with("1.png"), "info.json": b"[]"}
    with pytest.raises(
        ConfigError, match=r"several kinds \(a.jsonl, info.json\); name a folder or a file: hf://"
    ):
        import_set(ADDRESS, tmp_path / "out.parquet")


def test_a_hub_that_does_not_answer_leaves_its_cache(cached, tmp_path, monkeypatch, caplog):
    def nobody(self, **where):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", nobody)
    assert hub_set(ADDRESS) is not None
    with pytest.raises(ConfigError, match="org/other: the hub does not serve it"):
        HubFiles(hub_set("hf://datasets/org/other"))
    assert len(HubFiles(hub_set(ADDRESS))) == 1
    assert "the hub does not answer; looking in its cache" in caplog.text
