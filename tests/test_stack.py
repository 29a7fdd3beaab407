"""The versions that work together are the ones installed, and they import together."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
PINNED = [line for line in PROJECT["dependencies"] if "==" in line]


@pytest.mark.parametrize("requirement", PINNED)
def test_pinned_versions_are_installed(requirement):
    name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\d.]+)", requirement).groups()
    assert metadata.version(name).split("+")[0] == version


def test_one_vllm_is_installed_and_it_is_the_pinned_one():
    extras = PROJECT["optional-dependencies"]
    wanted = {re.split("==", extras[kind][0])[0]: extras[kind][0].split("==")[1] for kind in ("cpu", "gpu")}
    found = {}
    for name in wanted:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    assert len(found) == 1, f"the two distributions of vllm share one module: {found}"
    name = next(iter(found))
    assert found[name] == wanted[name]
