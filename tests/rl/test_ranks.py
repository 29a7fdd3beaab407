"""Two gloo ranks on one vLLM server train the same policy as one rank on the same global batch."""

import tempfile
from contextlib import nullcontext

import pytest

from chain.job import Task
from chain.launch import StageFailed, run_job
from core.files import read_jsonl
from corpus.records import write_records
from rl.config import RLConfig
from rl.job import ServedJob
from rl.rollout.config import PoolConfig

STAGE = {
    "data": [{"set": "rl", "frames": 3}],  # the servers take eight pictures
    "rewards": [{"name": "digits", "use": "tests_digits:count", "weight": 1.0}],
    "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
    "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 12, "temperature": 0.7},
    "batches": 3,
    "mini_batch": 16,  # the whole batch: each rank shuffles its own rows before they are cut into mini-batches
    "optim": {"learning_rate": 1e-3, "micro_batch_size": 4, "schedule": "constant"},
    "parity": {"bound": 1e-3, "sequences": 2, "tokens": 6},
}
REWARD = '''
import pathlib


def count(completion, example):
    """A reward with spread: the share of digits that the completion could hold; it fails where a file says when."""
    here = pathlib.Path(__file__).parent
    if (here / "fails").exists() and (here / "metrics.jsonl").exists():
        raise RuntimeError("interrupted")
    return min(1.0, sum(letter.isdigit() for letter in completion) / 6)
'''


def train(ranks, tmp_path, model, url, records, *, name="", fails=False, save_every=None, **learner):
    """The stage's folder; `fails`: after the first update the training is to."""
    out = tmp_path / (name or f"ranks-{ranks}")
    out.mkdir(exist_ok=True)
    (out / "fails").unlink(missing_ok=True)
    if fails:
        (out / "fails").touch()
    write_records(out / "rl.parquet", records)
    (out / "tests_digits.py").write_text(REWARD)
    stage = {**STAGE, "save_every": save_every, "learner": {"processes": ranks, **learner}}
    job = ServedJob(
        stage="rlvr",
        model=model,
        out=out,
        sets={"rl": out / "rl.parquet"},
        urls=[url],
        pool=PoolConfig(max_model_tokens=256),
        weights=tempfile.mkdtemp(dir=out),
        folders=[out],
    )
    expected = pytest.raises(StageFailed, match="interrupted") if fails else nullcontext()
    with expected:
        run_job(Task.of("rl.train:train", RLConfig(**stage), job), out, processes=ranks)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, {"zero_stage": 2}, {"zero_stage": 3}])
def test_two_ranks_continue_after_an_interruption(
    server_url, client, tiny_core, records, tmp_path, deepspeed
):
    from core.checkpoint.shards import weights_hash
    from core.training.resume import FOLDER, Unfinished

    def run(name, **how):
        client.load_checkpoint(tiny_core)
        return train(
            2, tmp_path, tiny_core, server_url, records, name=name, save_every=1, deepspeed=deepspeed, **how
        )

    unbroken = run("unbroken")
    run("out", fails=True)
    assert Unfinished(next((tmp_path / "out" / FOLDER).iterdir()), "batches").checkpoint
    out = run("out")
    log = [[line["step"] for line in read_jsonl(folder / "metrics.jsonl")] for folder in (unbroken, out)]
    assert log[0] == log[1] == [1, 2, 3]
    assert weights_hash(out / "checkpoint") == weights_hash(unbroken / "checkpoint")


def test_two_ranks_train_what_one_rank_trains(server_url, client, tiny_core, records, tmp_path):
    from safetensors.torch import load_file

    one = train(1, tmp_path, tiny_core, server_url, records)
    client.load_checkpoint(tiny_core)
    two = train(2, tmp_path, tiny_core, server_url, records)
    texts = [[line["completion"] for line in read_jsonl(out / "completions.jsonl")] for out in (one, two)]
    assert texts[0] == texts[1]
    start = load_file(tiny_core / "model.safetensors")
    weights = [load_file(out / "checkpoint" / "model.safetensors") for out in (one, two)]
    moved = max((weights[0][name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3  # three updates at 1e-3: AdamW moves a weight by about the rate each time
    for name in start:
        # Adam divides by the gradient's own size, so sums in another order show up far above float32's epsilon.
        difference = (weights[0][name] - weights[1][name]).abs().max().item()
        assert difference == pytest.approx(0, abs=moved * 0.02), name


@pytest.mark.slow
def test_the_adapters_of_weights_in_shards_reach_the_server(server_url, client, tiny_core, records, tmp_path):
    learner = {"deepspeed": {"zero_stage": 3}, "lora": {"r": 4}}
    out = train(2, tmp_path, tiny_core, server_url, records, **learner)
    metrics = read_jsonl(out / "metrics.jsonl")
    assert len(metrics) == 3  # the parity guard passed after every update
    assert max(line["grad_norm"] for line in metrics) > 0
    differences = [line["parity/max_logprob_difference"] for line in metrics]
    assert max(differences) < 1e-4
