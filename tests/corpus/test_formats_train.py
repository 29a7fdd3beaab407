"""The files of all public formats train: every row one step of SFT, and rows with golds one step of RL."""

import pytest

from core.checkpoint.shards import weights_hash
from core.files import read_json, read_jsonl
from core.model.tiny import TinySize, build_tiny
from core.strict import parse
from core.training.job import Job
from corpus.importing import import_set
from corpus.records import load_records
from rl.config import RLConfig
from rl.job import ServedJob
from rl.rollout.config import PoolConfig
from rl.rollout.server import rollout_pool
from sft.config import SFTConfig

from .test_formats import PUBLIC

OPTIM = {"learning_rate": 1e-3, "schedule": "constant"}
REWARD = '''
def count(completion, example):
    """A reward with spread: completions of random weights are never right."""
    return min(1.0, len(set(completion)) / 20)
'''


@pytest.fixture(scope="module")
def core_path(tmp_path_factory):
    size = TinySize(
        **{"vision_hidden": 32, "vision_layers": 1, "vision_mlp": 32, "text_hidden": 32, "text_layers": 1},
        **{"text_heads": 2, "text_mlp": 32},
    )
    return build_tiny(tmp_path_factory.mktemp("core") / "tiny", words=["Count", "dots"], seed=0, size=size)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Format -> its file of twenty rows, imported."""
    made = {}
    for make in PUBLIC:
        folder = tmp_path_factory.mktemp(make.__name__)
        made[make.__name__] = folder / "out" / f"{make.__name__}.parquet"
        import_set(make(folder)[0], made[make.__name__])
    return made


def test_every_row_of_every_format_trains_one_step_of_sft(core_path, sets, tmp_path):
    from sft.train import train

    rows = 20 * len(sets)
    phase = {
        **{"name": "all", "data": [{"set": name} for name in sets]},
        "optim": {**OPTIM, "max_steps": 1, "global_batch_size": rows, "micro_batch_size": 16},
    }
    stage = {"phases": [phase], "max_tokens": 256, "log_every": 1, "learner": {"deepspeed": None}}
    job = Job(stage="sft", model=core_path, out=tmp_path / "out", sets=sets)
    checkpoint = train(parse(SFTConfig, stage, "test"), job)
    assert len(sets) >= 10
    assert read_json(tmp_path / "out" / "data.json")["all"]["rows"] == rows
    assert weights_hash(checkpoint) != weights_hash(core_path)


def test_rows_with_golds_of_every_format_train_one_step_of_rl(core_path, sets, tmp_path):
    from rl.train import train

    graded = [name for name, place in sets.items() if load_records(place)[0]["verifier"] != "none"]
    assert len(graded) >= 10
    (tmp_path / "tests_spread.py").write_text(REWARD)
    pool = PoolConfig(engine="hf", max_model_tokens=512)
    stage = {
        "data": [{"set": name, "rows": 2} for name in graded],
        "rewards": [
            {"name": "answer", "use": "answer", "weight": 0.5},
            {"name": "spread", "use": "tests_spread:count", "weight": 0.5},
        ],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {"prompts_per_batch": 2 * len(graded), "group_size": 2, "max_completion_tokens": 8},
        "dynamic_sampling": {"max_rounds": 0},
        **{"batches": 1, "mini_batch": 4 * len(graded), "optim": {**OPTIM, "micro_batch_size": 4}},
        **{"parity": {"bound": 1e-3, "sequences": 1, "tokens": 4}, "learner": {"deepspeed": None}},
    }
    with rollout_pool(pool, core_path, tmp_path) as urls:
        job = ServedJob(
            **{"stage": "rlvr", "model": core_path, "out": tmp_path / "out", "sets": sets},
            **{"urls": urls, "pool": pool, "weights": str(tmp_path), "folders": [tmp_path]},
        )
        checkpoint = train(parse(RLConfig, stage, "test"), job)
    trained = {line["id"].rsplit("-", 1)[0] for line in read_jsonl(tmp_path / "out" / "record.jsonl")}
    assert trained == set(graded)
    assert weights_hash(checkpoint) != weights_hash(core_path)
