"""The whole package: it is cheap to import, and its doctests pass."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import rewards

MODULES = [
    module.name
    for module in pkgutil.walk_packages(rewards.__path__, "rewards.")
    if not module.name.startswith("rewards.offline")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_grading_needs_no_trainer_and_imports_nothing_heavy():
    heavy = (
        "torch",
        "trl",
        "transformers",
        "datasets",
        "vllm",
        "numpy",
        "PIL",
        "sympy",
        "math_verify",
        "aiohttp",
    )
    ours = ("chain", "core", "corpus", "recipes", "rl", "sft")
    code = f"""
import importlib, sys
for name in {MODULES!r}:
    importlib.import_module(name)
from rewards import Example
from rewards.registry import load_reward
row = Example("r", "q", "4", "think")
assert load_reward("answer")("<think>x</think>\\\\boxed{{4}}", row).score == 1
assert load_reward("think_format")("<think>x</think>\\\\boxed{{4}}", row).score == 1
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & set({heavy + ours!r})))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
