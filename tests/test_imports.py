"""Imports flow one way, chain -> (rl, sft) -> (rewards, corpus) -> core, with the public face above, in no circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "sailvl2_posttrain": set(),  # its names load their modules by import strings
    "core": set(),
    "corpus": {"core"},
    "rewards": set(),
    "sft": {"core", "corpus", "rewards"},
    "rl": {"core", "corpus", "rewards"},
    "chain": {"core", "corpus", "rewards", "sft", "rl", "sailvl2_posttrain"},
    "recipes": {"core", "corpus", "rewards"},
}
ALSO = {"rewards.offline": {"core", "corpus"}}
"""Packages that may import more than the one around them."""


def modules() -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    found = {}
    for package in ALLOWED:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(name: str) -> Iterator[tuple[str, int]]:
    """Modules of ours that a module imports, anywhere in its text but for types alone, with the line."""
    tree = ast.parse(MODULES[name].read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: import by the full name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole, node.lineno
                elif node.module in MODULES:
                    yield node.module, node.lineno


GRAPH = {name: {other for other, _ in imported(name) if other != name} for name in MODULES}


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_the_arrows_allow(package):
    wrong = []
    for name in MODULES:
        if name.partition(".")[0] != package:
            continue
        also = next((more for inner, more in ALSO.items() if name.startswith(inner)), set())
        for other, line in imported(name):
            target = other.partition(".")[0]
            if target != package and target not in ALLOWED[package] | also:
                wrong.append(f"{name}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def circles() -> list[list[str]]:
    """Strongly connected modules (Tarjan's algorithm), each circle once."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(GRAPH[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in GRAPH:
        if name not in order:
            visit(name)
    return found


def test_no_modules_import_each_other_in_a_circle_even_inside_functions():
    assert circles() == []


def test_the_walk_sees_imports_inside_functions():
    assert "rl.trainer" in GRAPH["rl.train"]
