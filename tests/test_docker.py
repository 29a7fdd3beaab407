"""The Dockerfile without a daemon: each of its commands is one that `make setup` and CI run, on files that exist."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [
    tuple(line.split(maxsplit=1))
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def of(word: str) -> list[str]:
    return [rest for first, rest in LINES if first == word]


def test_only_known_instructions_stand_in_it_and_arguments_are_declared():
    assert {first for first, _ in LINES} <= {
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "ENTRYPOINT",
        "CMD",
    }
    declared = {rest.partition("=")[0] for rest in of("ARG")} | {"PATH"}
    used = {name for _, rest in LINES for name in re.findall(r"\$\{?(\w+)", rest)}
    assert used <= declared


def test_the_base_image_has_the_python_that_the_project_wants():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    version = re.search(r"BASE=python:(\d\.\d+)-", "\n".join(of("ARG"))).group(1)
    assert wanted.startswith(f">={version}")
    assert f"PYTHON=python{version}" in of("RUN")[0]


def test_every_command_is_a_target_that_ci_runs():
    made = re.findall(r"^make (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    rules = re.findall(r"^([a-z-]+): ([a-z -]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    first = {word for target, needs in rules if target in made for word in needs.split()}
    for command in of("RUN"):
        program, target, *assignments = command.split()
        assert program == "make"
        assert target in {*made, *first}
        assert all(re.fullmatch(r"[A-Z]+=\S*", word) for word in assignments)


@pytest.mark.parametrize(("gpu", "extra"), [("", "cpu"), ("yes", "gpu")])
def test_set_up_installs_the_build_that_the_argument_names(gpu, extra, tmp_path):
    command = of("RUN")[0].replace("${GPU}", gpu).split()
    shown = subprocess.run(
        [*command, "-n", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f'".[{extra},dev]"' in shown.stdout


def test_the_entry_point_is_our_command_and_is_on_the_path():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (entry,) = json.loads(of("ENTRYPOINT")[0])
    assert entry in scripts
    assert of("ENV") == [f"PATH={of('WORKDIR')[0]}/.venv/bin:$PATH"]


def test_no_tracked_file_is_left_out_of_the_image():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {name.split("/")[0] for name in tracked}
    assert not tops & set(ignored)
