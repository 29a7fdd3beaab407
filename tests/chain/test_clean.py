"""What killed runs left in shared memory goes, and nothing that anybody uses."""

import os
import time

from chain import clean as module
from chain.clean import clean


def old(path, content=b"x"):
    path.write_bytes(content)
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    return path


def test_what_nobody_uses_goes_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED_S", -1.0)  # the time of a file's last change cannot be set back
    left = [old(tmp_path / name) for name in ("psm_0a1b2c3d", "sem.loky-1", "torch_77_1")]
    used, foreign = old(tmp_path / "psm_used"), old(tmp_path / "theirs")
    weights = tmp_path / "sailvl2-abc"
    weights.mkdir()
    old(weights / "in-use")
    with used.open("rb"):
        lines = clean(tmp_path)
    assert not any(path.exists() for path in (*left, weights))
    assert used.exists()
    assert foreign.exists()
    assert len(lines) == 4


def test_a_young_file_may_be_about_to_be_used(tmp_path):
    old(tmp_path / "psm_new")
    assert clean(tmp_path) == []


def test_without_shared_memory_there_is_nothing_to_do(tmp_path):
    assert clean(tmp_path / "none") == []
