"""Two evaluations of the same questions: planted differences, independent p-values, gates, the page."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chain.cli.main import main
from chain.compare.answers import read_all
from chain.compare.gate import Gate
from chain.compare.measures import of_samples
from chain.compare.page import page
from chain.compare.paired import compare
from core.files import write_json
from core.strict import ConfigError
from corpus.records import write_records

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def write(folder: Path, right: list[bool], **changes) -> Path:
    """An evaluation of one set: question n is answered correctly if `right[n]`."""
    folder.mkdir(parents=True)
    lines = [
        {
            **{"id": f"q{n}", "set": "mcq", "mode": "direct", "source": "ab"[n % 2], "kind": "choice"},
            **{"images": n % 3, "question": f"{n}?", "answer": "A", "completion": ATTACK, "correct": ok},
            **{"tokens": n % 7, "truncated": False, **changes},
        }
        for n, ok in enumerate(right)
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "eval.json", {"scores": {}})
    return folder


def planted(tmp_path, n: int = 500, points: int = 5) -> tuple[Path, Path]:
    """Two evaluations of n questions, the second right on `points` percent more of them; 20 flip the other way."""
    drawn = random.Random(0)
    base = [drawn.random() < 0.6 for _ in range(n)]
    wrong = [place for place, ok in enumerate(base) if not ok]
    right = [place for place, ok in enumerate(base) if ok]
    other = list(base)
    for place in drawn.sample(wrong, 20 + n * points // 100) + drawn.sample(right, 20):
        other[place] = not other[place]
    return write(tmp_path / "base", base), write(tmp_path / "other", other)


def test_a_planted_difference_of_5_points_is_found_with_the_p_value_of_plain_arithmetic(tmp_path):
    found = compare(*read_all(planted(tmp_path))).sets[0]
    assert (found.n, found.wins, found.losses) == (500, 45, 20)
    assert found.difference == pytest.approx(0.05)
    # Exact McNemar: two tails of a fair coin's 65 throws
    tail = sum(math.comb(65, k) for k in range(21)) / 2**65
    assert found.p == pytest.approx(2 * tail, rel=1e-12)
    assert found.p < 0.05
    assert found.low > 0
    # The normal approximation of a paired difference: sd = sqrt((45 + 20) / 500 - 0.05**2)
    half = 1.96 * math.sqrt(65 / 500 - 0.05**2) / math.sqrt(500)
    assert (found.low, found.high) == pytest.approx((0.05 - half, 0.05 + half), abs=0.004)


def test_a_run_does_not_differ_from_itself(tmp_path):
    base, _ = planted(tmp_path)
    comparison = compare(*read_all([base, base]))
    one = comparison.sets[0]
    assert (one.wins, one.losses, one.difference, one.low, one.high, one.p) == (0, 0, 0, 0, 0, 1)
    assert comparison.flipped == []


def test_wins_and_losses_add_up_in_every_grouping(tmp_path):
    comparison = compare(*read_all(planted(tmp_path)))
    assert set(comparison.groups) == {"source", "images", "tokens of base"}
    for rows in comparison.groups.values():
        assert (sum(row.wins for row in rows), sum(row.losses for row in rows)) == (45, 20)
        assert sum(row.n for row in rows) == 500
    assert {row.name for row in comparison.groups["images"]} == {"0", "1", "2"}


def test_questions_of_one_side_are_counted(tmp_path):
    base, other = write(tmp_path / "a", [True] * 6), write(tmp_path / "b", [True] * 4)
    assert compare(*read_all([base, other])).unpaired == (2, 0)


def test_other_questions_under_the_same_ids_are_refused(tmp_path):
    base, other = write(tmp_path / "a", [True]), write(tmp_path / "b", [True], question="another?")
    with pytest.raises(ConfigError, match=r"set 'mcq', id 'q0': a and b have different questions"):
        compare(*read_all([base, other]))
    with pytest.raises(ConfigError, match=r"share no question"):
        compare(*read_all([base, write(tmp_path / "c", [True], set="ocr")]))


@pytest.mark.parametrize(
    ("gate", "fails"),
    [
        ("mcq >= base - 5", False),
        ("mcq >= base - 4.9", True),
        ("mcq > base - 5", True),
        ("mcq >= 55", False),
        ("mcq >= 55.1", True),
        ("mcq >= base", True),
    ],
)
def test_gates_are_in_points(tmp_path, gate, fails):
    base = write(tmp_path / "base", [True] * 60 + [False] * 40)
    other = write(tmp_path / "other", [True] * 55 + [False] * 45)
    assert bool(Gate.parse(gate).failure(compare(*read_all([base, other])))) == fails


def test_the_command_exits_with_1_on_a_failed_gate_and_2_on_a_wrong_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, other = planted(tmp_path)
    assert main(["compare", str(base), str(other), "--gate", "mcq >= base"]) == 0
    assert (tmp_path / "compare.html").exists()
    assert main(["compare", str(other), str(base), "--gate", "mcq >= base - 1"]) == 1
    assert "gate failed\nmcq >= base - 1: base has" in capsys.readouterr().err
    assert main(["compare", str(base), str(other), "--gate", "mqc >= base"]) == 2
    assert "did you mean mcq" in capsys.readouterr().err
    assert main(["compare", str(base), str(other), "--gate", "mcq = 3"]) == 2


@pytest.mark.parametrize("relative", [False, True])
def test_the_page_shows_changed_questions_with_pictures_and_escapes_them(tmp_path, relative):
    base, other = write(tmp_path / "base", [True, False]), write(tmp_path / "other", [False, False])
    rows = [
        {"id": f"q{n}", "question": "?", "answer": "A", "mode": "direct", "verifier": "exact"}
        | {"images": [Image.fromarray(np.full((8, 8, 3), 40 * n, np.uint8))]}
        for n in range(2)
    ]
    write_records(tmp_path / "mcq.parquet", rows)
    place = "../mcq.parquet" if relative else str(tmp_path / "mcq.parquet")
    write_json(base / "eval.json", {"scores": {}, "sets": {"mcq": place}})
    answers = read_all([base, other])
    html = page([compare(*answers)], answers[0])
    assert len(re.findall('<div class="card( right)?">', html)) == 1
    assert html.count("data:image/png;base64,") == 1
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 2


def test_a_bench_is_compared_by_task_and_sample(tmp_path):
    for name, score in (("a", 1.0), ("b", 0.5)):
        sample = {
            "id": 0,
            "prompt": "?",
            "completion": "x",
            "gold": "A",
            "score": score,
            "tokens": 3,
            "pictures": [],
        }
        write_json(
            tmp_path / name / "bench.json", {"tasks": {"mathvista": {"samples": [sample]}, "mmmu": {}}}
        )
    found = compare(*read_all([tmp_path / "a", tmp_path / "b"]))
    assert [(one.name, one.difference, one.losses) for one in found.sets] == [("mathvista", -0.5, 1)]


def test_a_run_stands_for_its_last_evaluated_stage(tmp_path):
    for stage in ("longcot_sft", "rlvr"):
        write(tmp_path / "demo" / stage, [True])
    write_json(tmp_path / "demo" / "recipe.json", {})
    assert [one.label for one in read_all([tmp_path / "demo", tmp_path / "demo" / "longcot_sft"])] == [
        "rlvr",
        "longcot_sft",
    ]
    with pytest.raises(ConfigError, match="name a stage's folder"):
        read_all([tmp_path])


def test_figures_beside_the_accuracy_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, other = write(tmp_path / "base", [True, False]), write(tmp_path / "other", [True, True])
    drawn = {"k": 2, "pass_at": {"1": 0.25, "2": 0.5}, "majority_at": {"1": 0.25, "2": 0.25}}
    figures = {
        "format_rate": 1.0,
        "mean_tokens": 12.0,
        "tokens_per_correct": None,
        "blind": {"accuracy": 0.5},
    }
    write_json(base / "eval.json", {"scores": {"mcq": {**figures, "drawn": drawn}}})
    write_json(other / "eval.json", {"scores": {"mcq": {**figures, "mean_tokens": 8.0}}})
    found = compare(*read_all([base, other])).measures["mcq"]
    assert [(one.name, one.base, one.other) for one in found] == [
        ("format", 1.0, 1.0),
        ("tokens", 12.0, 8.0),
        ("blind", 0.5, 0.5),
        ("pass@1", 0.25, None),
        ("pass@2", 0.5, None),
        ("majority@1", 0.25, None),
        ("majority@2", 0.25, None),
    ]
    assert main(["compare", str(base), str(other)]) == 0
    out = capsys.readouterr()
    assert re.search(r"majority@2\s+0.25\s+-", out.out)
    assert "<th>pass@2</th>" in (tmp_path / "compare.html").read_text()


def test_figures_of_a_bench_come_from_its_samples():
    samples = [
        {"score": 1, "tokens": 10, "truncated": False},
        {"score": 0, "tokens": 30, "truncated": True},
        {"score": 1, "tokens": 20, "truncated": False},
    ]
    assert of_samples(samples) == {
        "truncated_rate": pytest.approx(1 / 3),
        "mean_tokens": 20.0,
        "tokens_per_correct": 30.0,
        "length_auc": 1.0,
    }


def test_questions_without_their_pictures_are_counted(tmp_path, caplog):
    base, other = (
        write(tmp_path / "base", [True, False, True]),
        write(tmp_path / "other", [False, True, False]),
    )
    answers = read_all([base, other])
    page([compare(*answers)], answers[0])
    assert "set mcq: 2 questions are shown without pictures; place of their rows: unknown" in caplog.text
