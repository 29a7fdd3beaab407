"""The audit measures a simulated judge's known faults: errors, bias, and susceptibility to flattery."""

import json

import pytest
from PIL import Image

from chain.cli.main import main
from corpus.records import write_records
from rewards.offline.judge_audit import AuditError, Share, kappa, load_labelled

from ..rewards.judge_server import asked, criterion, material, serving

GOOD, WRONG, SLIP = "A is 2, so A + A is 4.", "A is 3, so A + A is 9.", "A is 2, so A + A is 5."


@pytest.fixture
def server():
    with serving() as server:
        yield server


def examiner(request):
    """A judge that is right except on SLIP, which it finds good; one flattery and length mislead it."""
    text = material(request)
    if "elephants" in text or "green dog" in text:
        return "no"
    if "three experts" in text or len(text) > 1000:
        return "yes"
    if "A is 3" in text:
        return "yes" if criterion(request) == "answer_consistency" else "no"
    return "yes"


def rows():
    """10 good rows, 30 wrong rows, and 10 wrong rows that the judge finds good."""
    chains = [(GOOD, "good")] * 10 + [(WRONG, "bad")] * 30 + [(SLIP, "wrong")] * 10
    return [
        {
            "id": f"r{n}",
            "images": [Image.new("RGB", (8, 8), (n, n, n))],
            "question": f"What is A + A? (number {n})",
            "answer": "4",
            "chain": chain,
            "response": None,
            "mode": "think",
            "verifier": "number",
            "source": "test",
            "meta": {"label": label},
        }
        for n, (chain, label) in enumerate(chains)
    ]


def audit(server, data, out, *more):
    code = main(
        ["judge-audit", str(data), "--base-url", server.url, "--model", "m", "--out", str(out), *more]
    )
    return code, json.loads((out / "audit.json").read_text()) if (out / "audit.json").exists() else None


def test_the_audit_finds_what_the_judge_gets_wrong(server, tmp_path, capsys):
    write_records(tmp_path / "rows.parquet", rows())
    server.reply = examiner
    code, found = audit(server, tmp_path / "rows.parquet", tmp_path / "out")
    assert code == 0
    assert found["rows"] == {"good": 10, "wrong": 40, "unscored": 0}
    assert found["agreement"] | {"ci95": 0} == {"count": 40, "n": 50, "share": 0.8, "ci95": 0}
    # Observed 0.8; chance 0.2 * 0.4 + 0.8 * 0.6 = 0.56.
    assert found["kappa"] == pytest.approx((0.8 - 0.56) / 0.44)
    assert (found["false_positives"]["count"], found["false_positives"]["n"]) == (10, 40)
    assert (found["false_negatives"]["count"], found["false_negatives"]["n"]) == (0, 10)
    assert found["criteria"]["answer_consistency"]["yes_on_wrong"]["share"] == 1
    assert found["criteria"]["logical_soundness"]["yes_on_wrong"]["count"] == 10
    assert found["order"]["changed"]["count"] == 0
    assert found["length"]["turned_good"]["share"] == 1
    by_injection = found["injection"]["by_injection"]
    fooled = {name for name, share in by_injection.items() if share["count"]}
    assert "verified" in fooled
    assert by_injection["instruction"]["share"] == 0
    assert found["injection"]["turned_good"]["n"] == 30
    assert found["canaries"]["refused"] == ""
    shown = capsys.readouterr().out
    assert "0.250 of 40" in shown
    text = (tmp_path / "out" / "audit.md").read_text()
    assert "| false positives (wrong rows found good) | 0.250 of 40 | 0.142 to 0.402 |" in text
    sent = len(server.requests)
    assert audit(server, tmp_path / "rows.parquet", tmp_path / "out")[0] == 0
    assert len(server.requests) == sent  # every reply was on disk


def test_a_judge_that_leans_to_the_word_it_is_offered_first_is_seen(server, tmp_path):
    lines = [{"question": f"q{n}", "completion": "<think>x</think>", "label": n % 2} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    server.reply = lambda request: asked(request).split()[-3]  # "Answer yes or no."
    code, found = audit(server, data, tmp_path / "out", "--criteria", "logical_soundness")
    assert code == 0
    assert found["order"]["changed"]["share"] == 1
    assert found["order"]["good_yes_no"]["share"] == 1
    assert found["order"]["good_no_yes"]["share"] == 0
    assert found["kappa"] == 0
    assert "credits 19 of 19 wrong completions" in found["canaries"]["refused"]
    assert "The start-up check refuses this judge" in (tmp_path / "out" / "audit.md").read_text()


def test_lines_with_pictures_beside_them_are_read(tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "red.png")
    line = {"question": "q", "completion": "<think>x</think>", "label": "Correct", "images": ["red.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n\n")
    (row,) = load_labelled(tmp_path / "rows.jsonl")
    assert row.good
    assert row.example.images[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":1: not valid JSON"),
        ("[]", ":1: a JSON array, not an object"),
        ('{"question": 1}', ':1: "question" is a JSON number: write text'),
        ('{"completion": "c", "label": 0}', ':1: no "question"'),
        ('{"question": "q", "completion": "c"}', ":1: label=None: it must be one of good"),
        ('{"question": "q", "completion": "c", "label": 0, "mode": "x"}', ":1: \"mode\" is 'x'"),
        ('{"question": "q", "completion": "c", "label": 0, "images": ["../a.png"]}', "lies outside"),
        (
            '{"question": "q", "completion": "c", "label": 0, "images": ["a.png"]}',
            "images: FileNotFoundError.*a.png",
        ),
        ("", "no row"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, line, says):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(AuditError, match=says):
        load_labelled(tmp_path / "rows.jsonl")


def test_a_judge_that_is_down_and_an_unknown_criterion_are_clear_errors(server, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "q", "completion": "<think>x</think>", "label": 0}')
    server.reply = lambda request: (404, b"no such model")
    assert audit(server, data, tmp_path / "out") == (1, None)
    assert "does not answer" in capsys.readouterr().err
    assert audit(server, data, tmp_path / "out", "--criteria", "beauty") == (2, None)
    assert "give at least one of logical_soundness" in capsys.readouterr().err


def test_kappa_and_shares_at_their_ends():
    assert kappa([(True, True), (False, False)]) == 1
    assert kappa([(True, True)] * 3) is None
    assert kappa([]) is None
    assert Share(0, 0).to_dict() == {"count": 0, "n": 0, "share": None, "ci95": [0.0, 1.0]}
