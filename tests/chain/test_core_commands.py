"""`posttrain core import` and `core export`, called as a user calls them."""

import pytest

from chain.cli.main import main
from core.checkpoint.released_files import FOLDER

from ..core.released_reference import write_released


def test_import_says_what_it_read_and_assumed_and_export_gives_it_back(tmp_path, capsys):
    there = write_released(tmp_path / "released", qwen2_label=True)
    assert main(["core", "import", str(there), str(tmp_path / "native")]) == 0
    printed = capsys.readouterr().out
    assert "SAIL-VL2 core, 225,312 parameters, F32" in printed
    assert "tower:              67,104" in printed
    assert "config.json says Qwen2ForCausalLM, the weights are those of a Qwen3ForCausalLM" in printed
    assert f"written to {tmp_path / 'native'}" in printed
    assert main(["core", "import", str(there), str(tmp_path / "native")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (
        main(["core", "export", str(tmp_path / "native"), str(tmp_path / "back"), "--like", str(there)]) == 0
    )
    assert "files of the release: LICENSE, README.md, chat_template.jinja" in capsys.readouterr().out
    assert (tmp_path / "back" / "modeling_sailvl.py").read_bytes() == (
        there / "modeling_sailvl.py"
    ).read_bytes()
    assert (tmp_path / "native" / FOLDER / "config.json").read_bytes() == (there / "config.json").read_bytes()


def test_a_faulty_checkpoint_ends_with_code_1_and_no_traceback(tmp_path, capsys):
    assert main(["core", "import", str(tmp_path / "nowhere"), str(tmp_path / "native")]) == 1
    assert capsys.readouterr().err == f"posttrain: {tmp_path / 'nowhere'}: no such folder\n"


@pytest.mark.parametrize("size", ["0", "-1", "many", "nan", "inf"])
def test_an_invalid_file_size_is_a_wrong_command_line(size, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["core", "import", "a", "b", "--shard-gb", size])
    assert end.value.code == 2
    assert "write a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-24", "nan"])
def test_a_gpu_without_memory_is_a_wrong_command_line(size, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "recipes/demo", "--gpu-gib", size])
    assert end.value.code == 2
    assert "write a number above 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_ends_with_code_1_and_no_traceback(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["core", "new", "--size", "tiny", str(tmp_path / "file" / "core")]) == 1
    assert capsys.readouterr().err == f"posttrain: {tmp_path}/file/core.partial: Not a directory\n"


def test_a_release_is_neither_served_nor_scored(tmp_path, capsys):
    there = write_released(tmp_path / "released")
    assert main(["rollout-server", str(there)]) == 2
    assert (
        "model_type='sailvl', but a core has sailvl2; convert it with `posttrain core import`"
        in capsys.readouterr().err
    )


def test_a_bar_shows_bytes_on_a_terminal_and_nothing_in_a_file():
    from io import StringIO

    from rich.console import Console

    from chain.cli.core import _progress

    shown = []
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=100)
        with _progress(console) as progress:
            progress("weights", 0, 2_000_000)
            progress("weights", 1_000_000, 2_000_000)
        shown.append(console.file.getvalue())
    assert "1.0/2.0 MB" in shown[0]
    assert shown[1] == ""
