"""A stage that is interrupted and started again trains what an unbroken one trains, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.checkpoint.shards import weights_hash
from core.files import read_json, read_jsonl, write_json
from core.training.job import Job
from core.training.resume import FOLDER, MARK, Unfinished, drop_lines_after
from sft import train as module
from sft.config import SFTConfig
from sft.train import train

ROOT = Path(__file__).parents[2]
UPDATES = 5


class Interrupted(Exception):
    pass


def stage(save_every=2, learner=None, **fields):
    """Two phases of five updates."""
    optim = {"learning_rate": 1e-3, "max_steps": UPDATES, "global_batch_size": 8, "micro_batch_size": 4}
    phases = [
        {"name": name, "data": [{"set": "mixed"}], "optim": {**optim, "schedule": "linear"}}
        for name in ("one", "two")
    ]
    learner = {"deepspeed": None, **(learner or {})}
    return SFTConfig.model_validate(
        {
            "phases": phases,
            "max_tokens": 64,
            "log_every": 1,
            "learner": learner,
            "save_every": save_every,
            **fields,
        }
    )


@pytest.fixture
def run(core_path, mixed_set, tmp_path, monkeypatch):
    """`run(cfg, name, stop=n)` trains in the folder `name` and, if told so, breaks off at the end of update n."""
    from transformers import TrainerCallback

    made = []

    class Stop(TrainerCallback):
        def __init__(self, after):
            self.left = after

        def on_step_end(self, *_, **__):
            self.left -= 1
            if not self.left:
                raise Interrupted

    def run(cfg, name="out", stop=None, **changes):
        made.clear()
        original = module.phase_trainer
        left = Stop(stop or -1)

        def watched(*args, **kwargs):
            trainer = original(*args, **kwargs)
            trainer.add_callback(left)
            made.append(trainer)
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(module, "phase_trainer", watched)
            values = {"model": core_path, "seed": 0, "sets": {"mixed": mixed_set}, **changes}
            return train(cfg, Job(stage="sft", out=tmp_path / name, **values))

    run.trainers = made
    return run


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packing": "off"},
        {"learner": {"deepspeed": {"zero_stage": 2}}},
        pytest.param({"packing": {"micro_batch_tokens": 70}}, marks=pytest.mark.slow),
        pytest.param({"learner": {"lora": {"r": 4}}}, marks=pytest.mark.slow),
    ],
    ids=["packed", "padded", "zero-2", "several packs", "lora"],
)
def test_an_interrupted_stage_continues_to_the_same_weights_and_curve(run, tmp_path, fields):
    cfg = stage(**fields)
    unbroken = run(cfg, "unbroken")
    with pytest.raises(Interrupted):
        run(cfg, stop=UPDATES + 3)  # in the second phase, after its checkpoint at update 2
    checkpoint = run(cfg)
    assert [trainer.state.global_step for trainer in run.trainers] == [UPDATES]  # the first phase stands
    assert weights_hash(checkpoint) == weights_hash(unbroken)
    assert read_jsonl(tmp_path / "out/metrics.jsonl") == read_jsonl(tmp_path / "unbroken/metrics.jsonl")
    assert not (tmp_path / "out" / FOLDER).exists()


def test_after_a_resume_the_logged_averages_are_those_of_an_unbroken_run(run, tmp_path):
    cfg = stage(log_every=3)  # the window of updates 1 to 3 would begin at the checkpoint of update 2
    run(cfg, "unbroken")
    with pytest.raises(Interrupted):
        run(cfg, stop=3)
    run(cfg)
    one, other = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "out"))
    assert one == other
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_checkpoint_with_a_nan_weight_is_not_kept(run, tmp_path, monkeypatch):
    from core.checkpoint.check import NonFinite
    from core.training import resume

    check = resume._refuse_nonfinite

    def broken(model, step):
        next(model.parameters()).data.view(-1)[0] = float("inf")
        check(model, step)

    monkeypatch.setattr(resume, "_refuse_nonfinite", broken)
    with pytest.raises(NonFinite, match=r"is not finite after update 2: its checkpoint is not kept"):
        run(stage())
    (folder,) = (tmp_path / "out" / FOLDER).iterdir()
    assert Unfinished(folder, "tokens").checkpoint is None


def test_only_unsaved_updates_are_trained_again(run, tmp_path):
    cfg = stage()
    with pytest.raises(Interrupted):
        run(cfg, stop=4)
    left = Unfinished(next((tmp_path / "out" / FOLDER).iterdir()), "tokens")
    assert (left.checkpoint.name, left.done["updates"]) == ("checkpoint-2", 2)  # before update 4 was saved
    with pytest.raises(Interrupted):
        run(cfg, stop=1)
    assert run.trainers[0].state.global_step == 3


def test_interrupted_after_the_last_update_a_phase_only_writes_what_it_trained(run, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    unbroken = run(stage(), "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", full)
        with pytest.raises(OSError, match="disk full"):
            run(stage())
    with pytest.raises(Interrupted):
        run(stage(), stop=1)  # the second phase's first update, or it would be the first phase's
    assert len(run.trainers) == 2
    assert weights_hash(run(stage())) == weights_hash(unbroken)


def test_a_checkpoint_that_is_not_whole_does_not_count(run, tmp_path):
    cfg = stage()
    unbroken = run(cfg, "unbroken")
    with pytest.raises(Interrupted):
        run(cfg, stop=5)
    (folder,) = (tmp_path / "out" / FOLDER).iterdir()
    (folder / "checkpoint-4" / MARK).unlink()
    assert Unfinished(folder, "tokens").checkpoint is None
    assert weights_hash(run(cfg)) == weights_hash(unbroken)


def test_another_stage_in_the_same_folder_starts_from_its_beginning(run, tmp_path, make_record):
    from corpus.records import write_records

    with pytest.raises(Interrupted):
        run(stage(), stop=UPDATES + 3)
    shorter = tmp_path / "other.parquet"
    write_records(shorter, [make_record(n, question="compute A", mode="think") for n in range(24)])
    for changes in ({"seed": 1}, {"sets": {"mixed": shorter}}):
        with pytest.raises(Interrupted):
            run(stage(), stop=1, **changes)
        assert run.trainers[0].state.global_step == 1
    with pytest.raises(Interrupted):
        run(stage(save_every=3), stop=1)
    assert run.trainers[0].state.global_step == 1


def test_without_save_every_nothing_is_saved_on_the_way(run, tmp_path):
    with pytest.raises(Interrupted):
        run(stage(save_every=None), stop=UPDATES + 3)
    assert not (tmp_path / "out" / FOLDER).exists()
    run(stage(save_every=None), "out")
    assert len(run.trainers) == 2
    assert [line["step"] for line in read_jsonl(tmp_path / "out/metrics.jsonl")] == [*range(1, 11)]


def test_lines_after_the_checkpoint_and_a_part_of_a_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_after(path, "step", 3)  # none there
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step": 6, "lo')
    drop_lines_after(path, "step", 3)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_continue(core_path, mixed_set, tmp_path, zero_stage):
    cfg = stage(learner={"processes": 2, "deepspeed": {"zero_stage": zero_stage} if zero_stage else None})
    job = {"config": cfg.model_dump(mode="json"), "model": str(core_path), "set": str(mixed_set)}

    def ranks(name, stop):
        write_json(tmp_path / "job.json", {**job, "out": str(tmp_path / name), "stop": stop})
        return subprocess.run(
            [
                *(sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *(str(Path(__file__).with_name("resume_worker.py")), str(tmp_path / "job.json")),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    assert ranks("unbroken", 0).returncode == 0
    assert "Interrupted" in ranks("out", UPDATES + 3).stderr
    done = ranks("out", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (read_json(tmp_path / name / "started.json") for name in ("unbroken", "out"))
    assert (one, other) == ([0, 0], [2])  # updates that were there when each phase began
    hashes = [weights_hash(tmp_path / name / "checkpoint") for name in ("unbroken", "out")]
    assert hashes[0] == hashes[1]
