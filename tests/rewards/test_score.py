"""Stored completions are scored in order, with one output line per input line for any content."""

import json
import sys
import threading

import pytest

from chain.cli.main import main
from core.strict import ConfigError
from rewards.answer import AnswerReward
from rewards.offline import rows as jsonl_rows
from rewards.offline import score
from rewards.offline.rows import RowError, example_of_row, printable
from rewards.style.format import Format

THINK, DIRECT = r"<think>2 + 2</think> \boxed{4}", "4"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder; the user's modules in it are unloaded afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def scored(work, *lines, rewards="answer,format", options=()):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (work / "rows.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    command = [
        "score",
        "--rewards",
        rewards,
        "--input",
        "rows.jsonl",
        "--output",
        "out/scored.jsonl",
        *options,
    ]
    assert main(command) == 0
    assert [path.name for path in (work / "out").iterdir()] == ["scored.jsonl"]  # no temporary file remains
    return [json.loads(line) for line in (work / "out" / "scored.jsonl").read_text().splitlines()]


def test_each_row_comes_back_with_every_rewards_verdict_in_order(work):
    rows = [{"completion": str(n), "gold": "4", "mine": [n, {"deep": None}]} for n in range(20)]
    out = scored(work, *rows)
    assert [{key: row[key] for key in ("completion", "gold", "mine")} for row in out] == rows
    assert [row["rewards"]["answer"]["score"] for row in out] == [float(n == 4) for n in range(20)]
    assert out[4]["rewards"] == {
        "answer": {"score": 1.0, "status": "correct", "answer": "4", "why": "auto read the gold as math"},
        "format": {"score": 1.0, "status": "correct", "answer": None, "why": ""},
    }
    assert out[5]["rewards"]["answer"] == {
        "score": 0.0,
        "status": "wrong",
        "answer": "5",
        "why": "auto read the gold as math: not the gold answer",
    }


BAD = [
    ("{not json", "not valid JSON"),
    ("", "an empty line"),
    ("   ", "an empty line"),
    ("[1, 2]", "a JSON array, not an object"),
    ('"text"', "a JSON string, not an object"),
    ("4", "a JSON number, not an object"),
    ("null", "a JSON null, not an object"),
    ('{"completion": "4"}', 'no "gold"'),
    ('{"gold": "4"}', 'no "completion"'),
    ('{"completion": null, "gold": "4"}', 'no "completion"'),
    ('{"completion": 4, "gold": "4"}', '"completion" is a JSON number: write text'),
    ('{"completion": "4", "gold": ["4"]}', '"gold" is a JSON array'),
    ('{"completion": "4", "gold": "4", "prompt": {}}', '"prompt" is a JSON object'),
    ('{"completion": "4", "gold": "4", "kind": "maths"}', "did you mean math"),
    ('{"completion": "4", "gold": "4", "mode": "thinking"}', "did you mean think"),
    ('{"completion": "4", "gold": "4", "meta": [1]}', '"meta" is a JSON array'),
    ('{"completion": "4", "gold": "4", "images": "a.png"}', '"images" is not a list of paths'),
    ('{"completion": "4", "gold": "4", "id": {}}', '"id" is a JSON object'),
    ('{"completion": "4", "gold": "4", "n": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"completion": "4", "gold": "4", "n": ' + "[" * 10_000 + "]" * 10_000 + "}", "nested too deeply"),
    ('{"completion": "4", "gold": "4", "n": NaN}', "NaN is not a JSON number"),
    ('{"completion": "4", "gold": "4", "n": -Infinity}', "-Infinity is not a JSON number"),
    ('{"completion": "4", "gold": "4", "n": 1e999}', "too large"),
    ('{"completion": "\udcff", "gold": "4"}', "not UTF-8"),
]


def test_an_invalid_line_becomes_an_error_with_its_number_and_stops_nothing(work, capsys):
    good = {"completion": DIRECT, "gold": "4"}
    out = scored(work, good, *(line for line, _ in BAD), good)
    assert len(out) == len(BAD) + 2
    assert [row["rewards"]["answer"]["score"] for row in (out[0], out[-1])] == [1, 1]
    for number, (row, (_, says)) in enumerate(zip(out[1:], BAD, strict=False), start=2):
        assert (row["line"], "rewards" in row) == (number, False)
        assert says in row["error"]
    assert f"{len(BAD) + 2} rows, {len(BAD)} of them not rows" in capsys.readouterr().out


def test_half_a_surrogate_pair_is_scored_and_written(work):
    out = scored(
        work, r'{"completion": "\ud800 4", "gold": "4", "id": "\udfff"}', {"completion": "四", "gold": "四"}
    )
    assert (out[0]["completion"], out[0]["id"]) == ("\ud800 4", "\udfff")
    assert out[0]["rewards"]["answer"]["score"] == 0
    assert out[1]["completion"] == "四"


def test_the_last_line_needs_no_end_and_a_byte_order_mark_is_no_text(work):
    out = scored(work, "\ufeff" + json.dumps({"completion": "4", "gold": "4"}))
    assert [row["rewards"]["answer"]["score"] for row in out] == [1]


def test_an_overlong_line_is_an_error_and_the_next_one_is_read(work, monkeypatch):
    monkeypatch.setattr(jsonl_rows, "MAX_LINE_BYTES", 1 << 20)
    long = json.dumps({"completion": "x" * (3 << 20), "gold": "4"})
    just = {"completion": "4", "gold": "4", "pad": "x" * ((1 << 20) - 100)}
    out = scored(work, long, just, {"completion": "4", "gold": "4"})
    assert out[0] == {"line": 1, "error": "longer than 1 MiB"}
    assert [row["rewards"]["answer"]["score"] for row in out[1:]] == [1, 1]


def test_many_chunks_keep_their_order(work, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ROWS", 7)
    out = scored(work, *({"completion": str(n % 5), "gold": "4", "n": n} for n in range(100)))
    assert [row["n"] for row in out] == list(range(100))
    assert [row["rewards"]["answer"]["answer"] for row in out] == [str(n % 5) for n in range(100)]


def test_no_more_than_two_chunks_are_held(work, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ROWS", 5)
    (work / "rows.jsonl").write_text('{"completion": "4", "gold": "4"}\n' * 50)
    read, most, read_lines = 0, 0, score.read_lines

    def counted(path):
        nonlocal read
        for line in read_lines(path):
            read += 1
            yield line

    def written(size):
        nonlocal most, done
        most, done = max(most, read - done), done + 5

    done = 0
    monkeypatch.setattr(score, "read_lines", counted)
    score.score(work / "rows.jsonl", work / "out.jsonl", {"format": Format()}, 2, on_bytes=written)
    assert most == 10
    assert done == 50


@pytest.mark.parametrize(
    ("row", "mode"),
    [
        ({"completion": DIRECT}, "direct"),
        ({"completion": THINK}, "think"),
        ({"completion": r"2 + 2</think> \boxed{4}"}, "think"),
        ({"completion": DIRECT, "prompt": "Think within <think> </think> tags."}, "think"),
        ({"completion": THINK, "mode": "direct"}, "direct"),
        ({"completion": DIRECT, "mode": "think"}, "think"),
    ],
)
def test_the_mode_is_the_rows_own_or_read_off_its_tags(work, row, mode):
    assert example_of_row({"gold": "4", **row}, 1, work).mode == mode


def test_the_mode_may_be_given_for_rows_that_do_not_say(work):
    rows = ({"completion": r"\boxed{4}", "gold": "4"}, {"completion": "4", "gold": "4", "mode": "direct"})
    out = scored(work, *rows, options=("--mode", "think"))
    assert [row["rewards"]["format"]["why"] for row in out] == ["no thought", ""]


def test_a_prompt_that_opened_the_thought_lends_its_tag(work):
    row = {"completion": r"2 + 2</think> \boxed{4}", "gold": "4"}
    out = scored(work, {**row, "prompt": "2 + 2?\n<think>\n"}, row)
    assert [one["rewards"]["format"]["score"] for one in out] == [1, 0]
    assert out[0]["completion"] == row["completion"]


def test_the_record_of_an_rl_stage_is_read_as_it_is(work):
    row = {"batch": 3, "id": "a1", "mode": "think", "question": "2 + 2?", "answer": "4", "completion": THINK}
    out = scored(work, {**row, "verifier": "number", "meta": '{"level": 2}'})
    assert out[0]["rewards"]["answer"]["status"] == "correct"
    example = example_of_row({**row, "meta": '{"level": 2}'}, 1, work)
    assert (example.id, example.question, example.answer, example.meta) == ("a1", "2 + 2?", "4", {"level": 2})


def test_the_row_reaches_the_reward_whole(work):
    from PIL import Image

    Image.new("RGB", (3, 2)).save(work / "a.png")
    (work / "looks.py").write_text(
        "def looks(completion, example):\n"
        "    assert (example.meta['m'], example.chain, example.source) == (1, 'c', 's')\n"
        "    return sum(image.size == (3, 2) for image in example.images) / 2\n"
    )
    row = {
        "completion": "4",
        "gold": "4",
        "images": ["a.png", "a.png"],
        "meta": {"m": 1},
        "chain": "c",
        "source": "s",
    }
    out = scored(work, row, {**row, "images": ["gone.png"]}, rewards="answer,looks.py:looks")
    assert out[0]["rewards"]["looks.py:looks"]["score"] == 1
    assert "FileNotFoundError" in out[1]["rewards"]["looks.py:looks"]["why"]
    assert out[1]["rewards"]["answer"]["score"] == 1  # a reward that does not use pictures is not affected


def test_a_reward_that_raises_leaves_its_own_verdict_unscorable(work, capsys):
    (work / "mine.py").write_text("def fails(completion, example):\n    return 1 / len(completion)\n")
    out = scored(
        work, *({"completion": c, "gold": "4"} for c in ("4", "", "44")), rewards="fails=mine.py:fails,answer"
    )
    assert [row["rewards"]["fails"]["score"] for row in out] == [1, None, 0.5]
    assert out[1]["rewards"]["fails"]["status"] == "unscorable"
    assert out[1]["rewards"]["fails"]["why"] == "ZeroDivisionError: division by zero"
    assert "fails raised 1 times; the first: reward 'fails' failed on row 'line-2'" in capsys.readouterr().out


def test_parameters_reach_their_reward(work):
    row = {"completion": "4.2", "gold": "4", "kind": "number"}
    options = ("--param", "near.tolerance=0.5", "--workers", "2")
    out = scored(work, row, rewards="answer,near=answer", options=options)
    assert [out[0]["rewards"][name]["score"] for name in ("answer", "near")] == [0, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rewards", "anser"), "did you mean answer"),
        (("--rewards", ","), "--rewards is empty"),
        (("--rewards", "answer,answer"), "'answer' twice"),
        (("--rewards", "answer", "--param", "tolerance=1"), "name the reward"),
        (("--rewards", "answer", "--param", "format.x=1"), "'format', which --rewards does not name"),
        (("--rewards", "answer", "--param", "answer.tolerence=1"), "did you mean tolerance"),
        (("--rewards", "answer", "--param", "answer.tolerance"), "write KEY=VALUE"),
        (("--rewards", "answer", "--input", "gone.jsonl"), "gone.jsonl: there is no such file"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_writes_nothing(work, capsys, options, says):
    (work / "rows.jsonl").write_text("{}")
    assert main(["score", "--input", "rows.jsonl", "--output", "out.jsonl", *options]) == 2
    assert says in capsys.readouterr().err
    assert not (work / "out.jsonl").exists()


def test_an_interrupted_scoring_keeps_the_old_output(work):
    (work / "rows.jsonl").write_text('{"completion": "4", "gold": "4"}\n' * 10)
    (work / "out.jsonl").write_text("before")

    def interrupt(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.score(
            work / "rows.jsonl", work / "out.jsonl", {"answer": AnswerReward()}, 2, on_bytes=interrupt
        )
    assert (work / "out.jsonl").read_text() == "before"
    assert sorted(path.name for path in work.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_an_interrupt_drops_calls_that_have_not_begun(work, monkeypatch):
    monkeypatch.setattr(score, "CHUNK_ROWS", 5)
    (work / "rows.jsonl").write_text('{"completion": "4", "gold": "4"}\n' * 15)
    go_on, calls, before = threading.Event(), [], set(threading.enumerate())

    def reward(completion, example):
        calls.append(example.id)
        assert len(calls) <= 5 or go_on.wait(30)
        return 1.0

    def interrupt(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.score(work / "rows.jsonl", work / "out.jsonl", {"mine": reward}, 1, on_bytes=interrupt)
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert len(calls) <= 6  # the first chunk, and possibly the completion that was being graded


def test_a_file_may_be_scored_into_itself(work):
    (work / "rows.jsonl").write_text('{"completion": "4", "gold": "4"}\n' * 3)
    command = ["score", "--rewards", "answer", "--input", "rows.jsonl", "--output", "rows.jsonl"]
    assert main(command) == 0
    assert main(command) == 0
    lines = (work / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["rewards"]["answer"]["score"] for line in lines] == [1, 1, 1]


def test_an_unreadable_row_says_why(work):
    with pytest.raises(RowError, match="write text"):
        example_of_row({"gold": True}, 1, work)
    with pytest.raises(ConfigError, match="is empty"):
        score.rewards_of("", {}, [])


def test_printed_text_cannot_control_the_terminal():
    assert printable("a\x1b[31m\nb\ud800四") == r"a\x1b[31m\nb\ud800四"
    assert printable("x" * 100, 10) == "x" * 9 + "…"


def test_completions_of_a_group_share_the_meta_of_the_first(tmp_path):
    from rewards.offline.rows import read_lines

    lines = [
        '{"batch": 0, "id": "a", "meta": {"answers": ["7"]}}',
        '{"batch": 0, "id": "a"}',
        '{"batch": 0, "id": "b"}',
        '{"id": "a"}',
    ]
    (tmp_path / "completions.jsonl").write_text("\n".join(lines) + "\n")
    found = [line.row.get("meta") for line in read_lines(tmp_path / "completions.jsonl")]
    assert found == [{"answers": ["7"]}, {"answers": ["7"]}, None, None]


def test_each_line_says_which_contract_was_applied_and_the_summary_where_it_came_from(work, capsys):
    rows = (
        {"completion": THINK, "gold": "4"},
        {"completion": DIRECT, "gold": "4"},
        {"completion": DIRECT, "gold": "4", "mode": "think"},
    )
    out = scored(work, *rows)
    assert [row["contract"] for row in out] == ["think", "direct", "think"]
    assert [row["rewards"]["format"]["score"] for row in out] == [1, 1, 0]
    assert "1 direct (its tags), 1 think (its own), 1 think (its tags)" in capsys.readouterr().out
    out = scored(work, *rows, options=("--mode", "direct"))
    assert [row["contract"] for row in out] == ["direct", "direct", "think"]
    assert "2 direct (--mode), 1 think (its own)" in capsys.readouterr().out


def test_a_file_of_which_nothing_can_be_scored_ends_with_code_1_and_the_causes(work, capsys):
    rows = [{"completion": "4", "gold": "", "kind": "math"}] * 3 + [{"completion": "4"}]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", "--rewards", "answer", "--input", "rows.jsonl", "--output", "scored.jsonl"]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "none of the 4 rows could be scored" in shown.err
    assert "answer, without a score: 3 x unscorable: " in shown.out
    assert 'lines that are not rows, without a score: 1 x no "gold"' in shown.out
    assert main([*command, "--allow-unscorable"]) == 0
    assert len((work / "scored.jsonl").read_text().splitlines()) == 4
