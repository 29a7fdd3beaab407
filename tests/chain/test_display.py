"""The display shows progress: complete lines of a growing file, and fewer lines without a terminal."""

from io import StringIO

import pytest
from rich.console import Console

from chain import display as progress
from chain.display import Display, Tail, duration


def test_a_tail_gives_each_line_once_and_only_when_it_is_whole(tmp_path):
    tail = Tail(tmp_path / "metrics.jsonl")
    assert tail.new() == []
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert tail.new() == [{"step": 1}]
        assert tail.new() == []
        file.write('ep": 2}\n')
    assert tail.new() == [{"step": 2}]


def write(path, *steps, longer=""):
    path.write_text("".join(f'{{"step": {step}{longer}}}\n' for step in steps))


def test_a_file_that_a_resumed_stage_rewrote_is_read_from_the_first_difference(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write(path, 1, 2, 3, 4)
    assert len(tail.new()) == 4
    write(path, 1, 2)  # the lines after the last checkpoint are dropped
    assert tail.new() == []
    with path.open("a") as file:
        file.write('{"step": 3, "elapsed": 1234567.25}\n{"step": 4, "elapsed": 1234568.5}\n{"step": 5}\n')
    assert [record["step"] for record in tail.new()] == [3, 4, 5]


def test_a_file_that_was_rewritten_longer_between_two_looks_is_seen(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write(path, 1, 2, 3)
    tail.new()
    write(path, *range(1, 9), longer=', "elapsed": 0.123456')
    assert [record["step"] for record in tail.new()] == list(range(1, 9))
    assert tail.new() == []


@pytest.mark.parametrize("bad", ['{"step": 2', "[2]", "\x00\x00", "nonsense"])
def test_a_bad_line_is_left_out_with_a_warning(tmp_path, caplog, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    assert [record["step"] for record in Tail(tmp_path / "metrics.jsonl").new()] == [1, 3]
    assert "metrics.jsonl:2" in caplog.text


def test_without_a_terminal_progress_is_printed_at_intervals(monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    display = Display(Console(file=StringIO(), width=80))
    with display.step("rlvr"):  # at 0 s; then one call every 6 s
        for text in ("step 1", "step 2", "step 3", "step 3", "step 3", "step 4"):
            display.passing(text)
    printed = display.console.file.getvalue().splitlines()
    assert printed == ["rlvr · step 2 · 12s", "rlvr · step 3 · 24s", "rlvr · step 4 · 36s"]


def test_text_from_outside_is_not_read_as_markup():
    display = Display(Console(file=StringIO(), width=80, force_terminal=True, highlight=False))
    with display.step("[red]x[/red]"):
        display.passing("[/nonsense]")
    display.line("[bold]kept[/bold]")
    assert "[bold]kept[/bold]" in display.console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations(seconds, text):
    assert duration(seconds) == text
