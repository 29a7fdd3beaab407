"""Written files and folders are whole or absent, and a manifest records their origin."""

import json
import platform
import subprocess
from pathlib import Path

import pytest

from core.files import (
    NoRoom,
    append_jsonl,
    atomic_dir,
    hash_tree,
    read_json,
    read_jsonl,
    require_room,
    sha256_file,
    write_json,
    write_text,
)
from core.manifest import Manifest, hash_config, versions
from core.stats import wilson


def test_a_folder_appears_only_when_its_block_ends(tmp_path):
    with atomic_dir(tmp_path / "stage") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
        assert partial == tmp_path / "stage.partial"
        assert not (tmp_path / "stage").exists()
    assert (tmp_path / "stage" / "deep" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_failed_block_leaves_the_old_folder_and_the_partial_one(tmp_path):
    with atomic_dir(tmp_path / "stage") as partial:
        (partial / "version").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(tmp_path / "stage") as partial:  # noqa: PT012
        (partial / "version").write_text("new")
        raise RuntimeError
    assert (tmp_path / "stage" / "version").read_text() == "old"
    assert (tmp_path / "stage.partial" / "version").read_text() == "new"


def test_weights_have_the_permissions_of_the_other_files(tmp_path):
    import torch
    from safetensors.torch import save_file

    with atomic_dir(tmp_path / "stage") as partial:
        (partial / "config.json").write_text("{}")
        save_file({"a": torch.zeros(1)}, partial / "model.safetensors")
    modes = [path.stat().st_mode for path in (tmp_path / "stage").iterdir()]
    assert modes[0] == modes[1]


def test_a_stale_partial_folder_does_not_leak_into_the_next_attempt(tmp_path):
    (tmp_path / "stage.partial").mkdir()
    (tmp_path / "stage.partial" / "stale").write_text("x")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "old").write_text("x")
    with atomic_dir(tmp_path / "stage") as partial:
        (partial / "new").write_text("x")
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["new"]


def test_an_interrupted_block_continues_only_for_the_same_identity(tmp_path):
    def fill(same, *, fail=False):
        with atomic_dir(tmp_path / "stage", same=same) as partial:
            seen = sorted(path.name for path in partial.iterdir() if not path.name.startswith("."))
            (partial / f"file{len(seen)}").write_text("x")
            if fail:
                raise RuntimeError
        return seen

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fill("one", fail=True)
    assert fill("one") == ["file0", "file1"]
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["file0", "file1", "file2"]
    for before, after in (("one", "other"), ("one", None), (None, "one"), (None, None)):
        with pytest.raises(RuntimeError):
            fill(before, fail=True)
        assert fill(after) == []


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(TypeError):
        write_text(tmp_path / "file", 5)
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_surrogate_pair_comes_back_from_json_and_stops_no_writer(tmp_path):
    value = {"answer": "a\ud800b", "path": "not \udcff UTF-8"}
    write_json(tmp_path / "file.json", value)
    append_jsonl(tmp_path / "file.jsonl", value)
    assert read_json(tmp_path / "file.json") == value
    assert read_jsonl(tmp_path / "file.jsonl") == [value]


def test_json_holds_paths_numbers_of_numpy_and_configs_but_no_nan(tmp_path):
    import numpy as np

    value = {"path": Path("a/b"), "float": np.float32(0.5), "array": np.arange(2), "set": {"b", "a"}}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == {
        "path": "a/b",
        "float": 0.5,
        "array": [0, 1],
        "set": ["a", "b"],
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", float("nan"))


def test_a_diverged_metric_is_null_and_the_line_is_still_written(tmp_path):
    append_jsonl(tmp_path / "m.jsonl", {"step": 1, "loss": 0.5})
    append_jsonl(tmp_path / "m.jsonl", {"step": 2, "loss": float("nan"), "more": [float("inf"), 1]})
    assert read_jsonl(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "more": [None, 1]},
    ]


def test_a_broken_jsonl_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a JSON line"):
        read_jsonl(tmp_path / "m.jsonl")
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_drafts_of_killed_processes_are_removed(tmp_path):
    host = platform.node()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".report.html.{host}.{dead.pid}").write_text("half")
    (tmp_path / f".report.html.{host}.1").write_text("a live process's")
    (tmp_path / f".report.html.{host}-2.{dead.pid}").write_text("another host's")
    write_text(tmp_path / "report.html", "whole")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [f".report.html.{host}-2.{dead.pid}", f".report.html.{host}.1", "report.html"]


def test_a_torn_last_line_is_dropped_with_a_warning_and_never_continued(tmp_path, caplog):
    file = tmp_path / "m.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    assert read_jsonl(file) == [{"a": 1}]
    assert "m.jsonl:2" in caplog.text
    append_jsonl(file, {"a": 3})
    assert file.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_tree_hash_sees_names_and_contents_and_nothing_else(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x").write_text("same")
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
    (tmp_path / "two" / "sub" / "x").write_text("other")
    assert hash_tree(tmp_path / "one") != hash_tree(tmp_path / "two")
    (tmp_path / "two" / "sub" / "x").write_text("same")
    (tmp_path / "two" / "sub" / "x").rename(tmp_path / "two" / "sub" / "y")
    assert hash_tree(tmp_path / "one") != hash_tree(tmp_path / "two")
    # Of a single file, the hash of its bytes: printf same | sha256sum
    assert hash_tree(tmp_path / "one" / "sub" / "x") == sha256_file(tmp_path / "one" / "sub" / "x")
    assert sha256_file(tmp_path / "one" / "sub" / "x").startswith("0967115f2813a3541eaef77de9d9d577")
    with pytest.raises(FileNotFoundError):
        hash_tree(tmp_path / "none")


def test_a_config_hash_ignores_the_order_of_keys():
    assert hash_config({"a": 1, "b": [1, 2]}) == hash_config({"b": [1, 2], "a": 1})
    assert hash_config({"b": [1, 2]}) != hash_config({"b": [2, 1]})


def test_a_manifest_comes_back_as_it_was_and_a_broken_one_is_none(tmp_path):
    manifest = Manifest(
        stage="rlvr",
        fingerprint="f",
        config_hash="c",
        inputs={"set:a": "1"},
        versions=versions(),
        seed=3,
        parent="longcot_sft",
        started="a",
        finished="b",
        seconds=1.5,
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text[: len(text) // 2])
    assert Manifest.read(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "rlvr"}))
    assert Manifest.read(tmp_path) is None


def test_versions_hold_python_and_what_is_installed():
    assert {"python", "numpy", "pydantic"} <= set(versions())


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # By hand, z = 1.959964: centre (p + z2/2n)/(1 + z2/n),
        # half-width z sqrt(p(1-p)/n + z2/4n2)/(1 + z2/n).
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (500, 500, 0.9924, 1.0),
        (87, 100, 0.7902, 0.9224),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="must not be greater than n"):
        wilson(3, 2)


def test_a_full_disk_is_named_with_needed_and_free_space(tmp_path):
    require_room(tmp_path, 1, "nothing much")
    with pytest.raises(
        NoRoom, match=r"the checkpoint takes 1048576\.0 GiB, and [\d.]+ GiB are free; make room"
    ):
        require_room(tmp_path, 2**50, "the checkpoint")
