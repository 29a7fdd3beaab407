"""Differences between two scored files."""

import json

import pytest

from chain.cli.main import main
from core.strict import ConfigError
from rewards.offline.diff import compare


def verdict(score, status=None, answer=None):
    status = status or {None: "unscorable", 1: "correct"}.get(score, "wrong")
    return {"score": score, "status": status, "answer": answer, "why": f"because of {answer}"}


def row(identity, **scores):
    return {"id": identity, "rewards": {name: verdict(score) for name, score in scores.items()}}


def write(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def difference(tmp_path, before, after):
    changes = []
    totals = compare(
        write(tmp_path / "a.jsonl", *before), write(tmp_path / "b.jsonl", *after), changes.append
    )
    return totals, changes


def test_changes_are_counted_by_reward_and_direction(tmp_path):
    before = [
        row("a", answer=1, format=1),
        row("b", answer=0, format=1),
        row("c", answer=None),
        row("d", answer=0.5),
    ]
    after = [
        row("a", answer=0, format=1),
        row("b", answer=1, format=1),
        row("c", answer=0),
        row("d", answer=None),
    ]
    totals, changes = difference(tmp_path, before, after)
    assert totals["lines"] == 4
    assert totals["rewards"]["answer"] == {
        **{"compared": 4, "changed": 4, "up": 1, "down": 1},
        **{"scored": 1, "unscored": 1, "other": 0},
    }
    assert totals["rewards"]["format"]["changed"] == 0
    assert [(change["line"], change["id"], change["before"]["score"]) for change in changes] == [
        *((1, "a", 1), (2, "b", 0)),
        *((3, "c", None), (4, "d", 0.5)),
    ]


def test_another_status_is_a_change_another_reason_is_none(tmp_path):
    before = [{"rewards": {"a": verdict(0, "wrong", "3")}}, {"rewards": {"a": verdict(0, "wrong", "3")}}]
    after = [{"rewards": {"a": verdict(0, "unparseable", "3")}}, {"rewards": {"a": verdict(0, "wrong", "4")}}]
    totals, changes = difference(tmp_path, before, after)
    assert totals["rewards"]["a"]["other"] == 1
    assert [change["line"] for change in changes] == [1]


def test_a_reward_that_only_one_file_has(tmp_path):
    totals, changes = difference(tmp_path, [row("a", answer=1)], [row("a", answer=1, mine=0)])
    assert totals["rewards"]["mine"]["scored"] == 1
    assert (changes[0]["before"], changes[0]["after"]["score"]) == (None, 0)


def test_other_ids_and_missing_lines_are_not_compared(tmp_path):
    before = [row("a", answer=1), row("b", answer=1), row(None, answer=1), row("d", answer=1)]
    after = [row("a", answer=1), row("x", answer=0), row("c", answer=0)]
    totals, changes = difference(tmp_path, before, after)
    assert (totals["lines"], totals["unmatched"]) == (4, 2)
    assert [change["line"] for change in changes] == [3]


def test_a_line_that_became_an_error(tmp_path):
    error = {"line": 2, "error": "not valid JSON"}
    totals, _ = difference(tmp_path, [row("a", answer=1), error], [error, error])
    assert totals["rewards"]["row"]["changed"] == 1


@pytest.mark.parametrize(
    "strange", ["{", "[]", '{"rewards": 3}', '{"rewards": {"answer": 1}}', '{"rewards": {"answer": {}}}']
)
def test_files_that_were_never_scored_are_survived(tmp_path, strange, capsys):
    (tmp_path / "a.jsonl").write_text(strange + "\n")
    write(tmp_path / "b.jsonl", row("a", answer=1))
    for one, other in (("a", "b"), ("b", "a"), ("a", "a")):
        assert main(["diff", str(tmp_path / f"{one}.jsonl"), str(tmp_path / f"{other}.jsonl")]) == 0
    assert "verdicts changed" in capsys.readouterr().out


def test_the_table_shows_the_first_changes_and_says_so(tmp_path, capsys):
    before = [row(f"row-{n}", answer=0) for n in range(30)]
    after = [row(f"row-{n}\x1b[31m" if n == 99 else f"row-{n}", answer=1) for n in range(30)]
    a, b = write(tmp_path / "a.jsonl", *before), write(tmp_path / "b.jsonl", *after)
    assert main(["diff", str(a), str(b), "--limit", "3"]) == 0
    shown = capsys.readouterr().out
    assert "30 lines, 30 verdicts changed; the first 3 are shown" in shown
    assert "row-2" in shown
    assert "row-3" not in shown
    assert "0 wrong" in shown
    assert "1 correct" in shown


def test_json_has_every_change(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", *(row(n, answer=0) for n in range(30)))
    b = write(tmp_path / "b.jsonl", *(row(n, answer=1) for n in range(30)))
    assert main(["diff", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["changes"]) == found["rewards"]["answer"]["up"] == 30


def test_control_characters_and_markup_are_shown_as_text(tmp_path, capsys):
    a = write(
        tmp_path / "a.jsonl", {"id": "\x1b[31m[bold]", "rewards": {"[red]": verdict(0, answer="\ud800")}}
    )
    b = write(
        tmp_path / "b.jsonl", {"id": "\x1b[31m[bold]", "rewards": {"[red]": verdict(1, answer="\ud800")}}
    )
    assert main(["diff", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert r"\x1b[31m[bold]" in shown
    assert "[red]" in shown


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.jsonl: there is no such file"):
        compare(tmp_path / "gone.jsonl", tmp_path / "gone.jsonl")
