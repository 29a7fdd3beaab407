"""`make gpu-check` on tiny cores on the CPU: every check runs; the driver reports what failed and what did not run."""

import os
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Line, Lines, _in_child, main
from core.files import read_json

ROOT = Path(__file__).parents[1]


def lines_of(check: str) -> dict[str, Line]:
    from benchmarks import gpu_claims

    lines = Lines(check, compares=False)
    getattr(gpu_claims, check)(lines, True)
    assert not [line for line in lines.lines if line.verdict == "FAIL"]
    return {line.claim: line for line in lines.lines}


def test_attention_and_its_gradients_are_those_of_a_dense_mask():
    found = lines_of("kernels")
    assert found["merged, two groups, float32: output and gradients"].measured < 1e-6
    assert found["concatenated, long prompt, bfloat16: output and gradients"].verdict == "pass"
    assert "needs a GPU" in found["flex attention"].verdict


def test_the_learners_step_runs_and_compares_no_speed_on_a_cpu():
    found = lines_of("learner")
    assert found["8x: losses differ"].verdict == "pass"
    assert found["8x: times stock TRL's speed"].verdict == "not run: the bound is a GPU's"
    assert found["8x: completion tokens/s, ours"].measured > 0
    assert found["peak by realsize, bytes"].measured > 0


def test_a_lora_step_runs():
    assert lines_of("lora")["an update with the optimizer's step, seconds"].measured > 0


def test_bfloat16_is_compared_with_float32():
    found = lines_of("rounding")
    ours, stock = (
        found[f"distance of gradients from float32, {side}"].measured for side in ("shared", "stock")
    )
    assert 1e-4 < ours < 0.1
    assert found["our distance over stock's"].measured == pytest.approx(ours / stock)


def test_checks_that_a_machine_cannot_run_are_named():
    assert "CUDA graphs" in "".join(lines_of("engine"))
    assert "no GPU" in gpu_check._machine_problem("cuda")


def test_the_command_writes_lines_and_counts_failures(tmp_path, monkeypatch, capsys):
    given = {
        "kernels": [Line("kernels", "a", 1.0, "<= 2", "pass"), Line("kernels", "b", "", "", "not run: why")],
        "lora": [Line("lora", "the check", "words", "", "crashed with status 1")],
    }
    monkeypatch.setattr(gpu_check, "_in_child", lambda check, device, limit: given[check])
    out = tmp_path / "found.json"
    words = ["--device", "cpu", "--out", str(out)]
    assert main([*words, "--only", "kernels"]) == 0
    assert main([*words, "--only", "kernels", "lora"]) == 1
    assert "3 lines, 1 failed, 1 not run" in capsys.readouterr().out
    assert [line["claim"] for line in read_json(out)["lines"]] == ["a", "b", "the check"]


def test_a_check_that_takes_too_long_is_not_run():
    (line,) = _in_child("kernels", "cpu", 0.1)
    assert line.verdict == "not run: 600 s are used up"


def test_a_bound_is_kept_by_a_number_only():
    lines = Lines("x", compares=True)
    lines.at_most("nan", float("nan"), 1.0)
    lines.at_least("enough", 2.0, 1.0, on_gpu=True)
    assert [line.verdict for line in lines.lines] == ["FAIL", "pass"]


@pytest.mark.slow
@pytest.mark.parametrize("check", ["kernels", "packing", "chain"])
def test_a_check_runs_in_its_own_process(check):
    found = _in_child(check, "cpu", 900.0)
    assert all(line.verdict.startswith(("pass", "not run", "measured")) for line in found), found


WITHOUT = """
from importlib.machinery import PathFinder

stock = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in ("vllm", "deepspeed") else stock(name, path, target)


PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.mark.slow
def test_the_chain_runs_where_vllm_and_deepspeed_are_missing(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)  # read by every child of this process
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    (engine,) = _in_child("engine", "cpu", 900.0)
    assert engine.verdict == "not run: vLLM is not installed"
    found = {line.claim: line.verdict for line in _in_child("chain", "cpu", 900.0)}
    assert found == {
        "engine hf: under DeepSpeed": "not run: DeepSpeed is not installed; plain PyTorch",
        "engine hf: largest difference of log-probabilities": "pass",
        "engine hf: updates": "pass",
    }
