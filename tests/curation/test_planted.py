"""Planted defects: all are found, and no good row is lost. docs/curation.md has the figures of a larger run."""

from benchmarks.curation import planted


def test_all_planted_defects_are_found_and_no_good_row_is_lost(tmp_path):
    found = {one["defect"]: one for one in planted(120, tmp_path)}
    assert set(found) == {"duplicate", "near-duplicate", "leak", "restating", "broken", "wrong column"}
    for one in found.values():
        assert one["found"] == one["planted"] > 0
        assert one["precision"] == 1
