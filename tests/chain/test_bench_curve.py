"""A recipe's `eval.every`: what a look returns, and what `plan` and `run` refuse."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from chain.bench import curve
from chain.bench.harness import Harness
from chain.cli.main import main
from rl.job import Look
from rl.rollout.config import PoolConfig
from rl.train import _look

from .benching import FakeClient
from .test_bench import harness, say  # noqa: F401 - fixture

ROOT = Path(__file__).parents[2]
ONE = {"metric": "acc", "score": "acc", "source": "ours: a test"}
calls = []


def write_suite(folder: Path, **benchmarks) -> str:
    file = folder / "mine.yaml"
    rows = {name: {"task": name, **ONE, **more} for name, more in benchmarks.items()}
    file.write_text(yaml.safe_dump({"about": "x", "benchmarks": rows}))
    return str(file)


def test_a_look_returns_scores_and_names_what_failed(tmp_path, harness, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Harness, "at", lambda python: harness)
    suite = write_suite(tmp_path, sums={"tiles": 12}, gone={})
    params = {"every": {"batches": 2, "suite": suite}, "max_completion_tokens": 8, "seed": 0}
    client = FakeClient(say)
    assert curve.look(client, tmp_path / "looks", params) == {"bench/sums": 50.0, "bench_failed/gone": 1.0}
    assert {body["max_tokens"] for _, body in client.asked} == {8}
    assert all("mm_processor_kwargs" not in body for _, body in client.asked)
    assert sorted(path.name for path in (tmp_path / "looks").iterdir()) == ["gone"]


def note(client, out, params):
    calls.append(out.name)
    return {"bench/x": params["value"]}


def test_a_stage_looks_at_its_first_batch_and_every_so_many(tmp_path):
    job = SimpleNamespace(out=tmp_path, look=Look(call=f"{__name__}:note", params={"value": 3.0}, batches=2))
    sys.modules.setdefault(__name__, sys.modules[note.__module__])
    look = _look(job, None)
    assert [look(batch) for batch in range(4)] == [{"bench/x": 3.0}, {}, {"bench/x": 3.0}, {}]
    assert calls == ["0", "2"]
    assert _look(SimpleNamespace(look=None), None)(0) == {}


def recipe(**every):
    from rl.config import RLConfig
    from rl.eval_config import BenchEvery

    return SimpleNamespace(
        eval=SimpleNamespace(every=BenchEvery(batches=1, **every), max_completion_tokens=8),
        servers=PoolConfig(max_model_tokens=64),
        rlvr=RLConfig.model_construct(),
        mixed_rl=None,
        place=Path,
        seed=0,
    )


def test_problems_name_the_remedy(tmp_path, harness, monkeypatch):  # noqa: F811
    (problem,) = curve.problems(recipe(suite="general", only=("mmmu",), harness=str(tmp_path / "none")))
    assert problem.startswith("eval.every.harness: ")
    assert "make bench-setup" in problem
    monkeypatch.setattr(Harness, "at", lambda python: harness)
    assert [*curve.problems(recipe(suite="general", only=("mmmu",)))] == []
    (problem,) = curve.problems(recipe(suite="general", only=("mmu",)))
    assert "did you mean mmmu" in problem
    (problem,) = curve.problems(recipe(suite="reasoning", only=("mathverse",)))
    assert problem == (
        "eval.every.judge: mathverse asks a judge; name one, or leave mathverse out with `only`"
    )
    (problem,) = curve.problems(recipe(suite="video", only=("videomme",)))
    assert problem == "servers.max_images = 8: videomme has 16 frames; raise it"
    away = {"suite": "general", "only": ("mmmu",), "data": {"mmmu": "gone"}, "judge_key_env": "NO_SUCH_KEY"}
    assert [*curve.problems(recipe(**away))] == [
        "eval.every.data: gone: no such folder",
        "eval.every.judge_key_env: the variable NO_SUCH_KEY is not set",
    ]
    alone = recipe(suite="general", only=("mmmu",))
    alone.rlvr = None
    assert "no RL stage" in next(curve.problems(alone))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_plan_and_run_refuse_a_missing_harness(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    every = "eval.every={batches: 1, suite: general, only: [mmmu]}"
    assert main([command, str(ROOT / "recipes/smoke"), "--set", every]) == 2
    assert "make bench-setup" in capsys.readouterr().err
