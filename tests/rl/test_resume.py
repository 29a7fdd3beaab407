"""An interrupted RL stage that is started again equals an uninterrupted one, batch for batch."""

import pytest

from core.checkpoint.shards import weights_hash
from core.files import read_jsonl
from core.strict import parse
from core.training.resume import FOLDER, Unfinished
from rl.config import RLConfig
from rl.rollout.config import PoolConfig
from rl.rollout.server import rollout_pool

REWARD = """
def even(completion, example):
    return float(len(completion) % 2 == 0)
"""
BATCHES, UPDATES = 4, 2
POOL = PoolConfig(engine="hf", max_model_tokens=256)
TIMES = ("seconds", "elapsed", "runtime", "_time", "per_second", "/requests")


class Interrupted(Exception):
    pass


def stage(**fields):
    """Four batches of two updates each; groups without spread are replaced, and surplus ones carried."""
    values = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "even", "use": "reward.py:even", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {"prompts_per_batch": 2, "group_size": 4, "max_completion_tokens": 4, "temperature": 1.0},
        "dynamic_sampling": {"max_rounds": 2, "oversample": 3, "rest_epochs": 1},
        "batches": BATCHES,
        "mini_batch": 4,
        "optim": {"learning_rate": 1e-3, "micro_batch_size": 4, "schedule": "linear"},
        "learner": {"deepspeed": None},
        "parity": {"bound": 1e-3, "sequences": 1, "tokens": 2},
        "self_test_rows": 0,
        "save_every": 1,
    }
    return parse(RLConfig, values | fields, "test")


@pytest.fixture(scope="module")
def urls(tiny_core, tmp_path_factory):
    with rollout_pool(POOL, tiny_core, tmp_path_factory.mktemp("hf")) as urls:
        yield urls


@pytest.fixture
def run(tiny_core, records, urls, tmp_path, tmp_path_factory, monkeypatch):
    """`run(cfg, name, stop=n)` trains in the folder `name`, and breaks off after update n if told so."""
    from corpus.records import write_records
    from rl import trainer as module
    from rl.job import ServedJob
    from rl.train import train

    write_records(tmp_path / "rl.parquet", records)
    (tmp_path / "reward.py").write_text(REWARD)

    def run(cfg, name="out", stop=0, seed=0):
        done = 0

        class Stopping(module.RolloutTrainer):
            def training_step(self, *args, **kwargs):
                nonlocal done
                loss = super().training_step(*args, **kwargs)
                done += 1
                if done == stop:
                    raise Interrupted
                return loss

        with monkeypatch.context() as patch:
            patch.setattr(module, "RolloutTrainer", Stopping)
            checkpoint = train(
                cfg,
                ServedJob(
                    stage="rlvr",
                    model=tiny_core,
                    out=tmp_path / name,
                    seed=seed,
                    sets={"rl": tmp_path / "rl.parquet"},
                    pool=POOL,
                    urls=urls,
                    weights=tmp_path_factory.mktemp("weights"),
                    folders=[tmp_path],
                ),
            )
        return checkpoint, done

    return run


def logged(folder, name):
    """The lines of a stage's file, without what is measured in seconds."""
    return [
        {key: value for key, value in line.items() if not any(word in key for word in TIMES)}
        for line in read_jsonl(folder / name)
    ]


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({}, 5),  # in the third batch
        pytest.param(
            {"save_every": 2}, 6, marks=pytest.mark.slow
        ),  # in the third too, saved after the second
        pytest.param({"learner": {"deepspeed": {"zero_stage": 2}}}, 4, marks=pytest.mark.slow),
        pytest.param(
            {
                "learner": {"deepspeed": None, "lora": {"r": 4}},
                "algorithm": {"clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.1},
            },
            5,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["every batch", "every other batch", "zero-2", "lora and reference"],
)
def test_an_interrupted_stage_continues_to_the_same_weights_and_record(run, tmp_path, fields, stop):
    cfg = stage(**fields)
    unbroken, updates = run(cfg, "unbroken")
    assert updates == BATCHES * UPDATES
    with pytest.raises(Interrupted):
        run(cfg, stop=stop)
    checkpoint, updates = run(cfg)
    every = cfg.save_every * UPDATES
    assert updates == BATCHES * UPDATES - (stop - 1) // every * every
    assert weights_hash(checkpoint) == weights_hash(unbroken)
    for name in ("metrics.jsonl", "record.jsonl", "completions.jsonl"):
        lines = logged(tmp_path / "out", name)
        assert lines
        assert lines == logged(tmp_path / "unbroken", name), name
    assert any(line.get("rollout/groups_carried") for line in logged(tmp_path / "out", "metrics.jsonl"))
    assert not (tmp_path / "out" / FOLDER).exists()


def test_with_overlap_a_stage_continues_from_the_batch_that_was_trained_on(run, tmp_path):
    cfg = stage(rollout={**stage().rollout.model_dump(), "overlap": True})
    with pytest.raises(Interrupted):
        run(cfg, stop=5)
    _, updates = run(cfg)
    assert updates == UPDATES * 2
    lines = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, BATCHES * UPDATES + 1)]
    assert [line["rollout/staleness"] for line in lines if "rollout/staleness" in line][:2] == [0, 1]


def test_interrupted_before_the_first_checkpoint_it_starts_from_its_beginning(run, tmp_path):
    with pytest.raises(Interrupted):
        run(stage(), stop=1)
    assert not any(
        Unfinished(folder, "batches").checkpoint for folder in (tmp_path / "out" / FOLDER).iterdir()
    )
    _, updates = run(stage())
    assert updates == BATCHES * UPDATES
    assert [line["step"] for line in read_jsonl(tmp_path / "out/metrics.jsonl")] == [*range(1, updates + 1)]


def test_interrupted_after_the_last_update_it_only_writes_what_it_trained(run, monkeypatch):
    from rl import train as module

    def full(*_):
        raise OSError("disk full")

    cfg = stage(save_every=BATCHES + 1)  # the trainer saves at its end all the same
    unbroken, _ = run(cfg, "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", full)
        with pytest.raises(OSError, match="disk full"):
            run(cfg)
    checkpoint, updates = run(cfg)
    assert updates == 0
    assert weights_hash(checkpoint) == weights_hash(unbroken)


def test_another_seed_starts_from_the_beginning(run):
    with pytest.raises(Interrupted):
        run(stage(), stop=5)
    with pytest.raises(Interrupted):
        run(stage(), seed=1, stop=8)  # the last of all, none of which was there
