"""The runner: stages run or are skipped, and a crash leaves a consistent folder."""

import json
import shutil
import sys
import threading
import time

import psutil
import pytest

from chain import errors, ranks
from chain import run as runner
from chain.fingerprints import Fingerprints
from chain.folder import RunFolder
from chain.job import DONE, Task
from chain.launch import StageFailed, run_job
from chain.pool import Pool
from chain.ranks import command, environment
from chain.recipe import load_recipe
from core.files import read_json
from core.manifest import Manifest
from core.processes import last_lines
from core.strict import ConfigError, Strict
from core.training.group import TIMEOUT
from core.training.job import Job
from rl.rollout.http import RolloutError

EVERYTHING = ["data", "core", "basic_sft", "rlvr"]


def test_a_chain_leaves_a_checkpoint_config_manifest_and_scores_per_stage(toy):
    toy.run()
    assert toy.calls() == EVERYTHING
    for stage in ("core", "basic_sft", "rlvr"):
        folder = toy.run_dir / stage
        assert (folder / "checkpoint" / "config.json").exists()
        assert read_json(folder / "config.json")
        found = read_json(folder / "eval.json")
        assert found["scores"]["direct"]["accuracy"] == 0.5
        assert found["sets"] == dict.fromkeys(("thinking", "direct"), "../data/held.parquet")
    manifest = Manifest.read(toy.run_dir / "rlvr")
    assert (manifest.parent, manifest.seed) == ("basic_sft", 0)
    assert set(manifest.inputs) == {"set:extra", "stage:basic_sft", "code:toy_stages:train"}
    report = read_json(toy.run_dir / "report.json")
    assert [stage["name"] for stage in report["stages"]] == ["core", "basic_sft", "rlvr"]
    assert (toy.run_dir / "report.html").exists()
    assert not list(toy.run_dir.glob("*.partial"))


def test_a_second_run_skips_finished_stages_and_says_so(toy):
    toy.run()
    toy.calls()
    toy.evaluated.clear()
    toy.run()
    assert toy.calls() == []
    assert toy.evaluated == []
    assert "rlvr: finished, inputs and config unchanged — skipped" in toy.printed


def test_a_changed_stage_and_everything_after_it_runs_again(toy):
    toy.run()
    toy.calls()
    toy.run("basic_sft.phases.0.optim.learning_rate=0.002")
    assert toy.calls() == ["basic_sft", "rlvr"]


def test_a_stage_run_again_by_force_makes_the_next_one_run_again_later(toy):
    toy.run()
    toy.calls()
    toy.run(from_="basic_sft", until="basic_sft", force=True)
    assert toy.calls() == ["basic_sft"]
    toy.run()
    assert toy.calls() == ["rlvr"]


def test_changed_data_reruns_only_the_stages_that_read_it(toy):
    toy.run()
    toy.calls()
    toy.run("data.generate.params={flavour: sweet}")  # changes the set `extra`, which rlvr filters
    assert toy.calls() == ["data", "rlvr"]


def test_changed_generator_code_makes_the_data_again(toy):
    toy.run(until="core")
    toy.calls()
    code = toy.root / "code" / "toy_stages.py"
    code.write_text(code.read_text() + "\n# another generator\n")
    toy.run(until="core")
    assert toy.calls() == ["data", "core"]


def test_code_counts_with_the_files_beside_it_that_it_imports(tmp_path):
    (tmp_path / "my_data.py").write_text("from my_shapes import SIDE\n")
    (tmp_path / "my_shapes.py").write_text("import my_colours\nSIDE = 3\n")
    for name in ("my_colours", "my_reward"):
        (tmp_path / f"{name}.py").write_text("import my_data\n")
    prints = Fingerprints(0, {}, tmp_path / "hashes.jsonl", folders=[tmp_path])
    hashes = [prints.of_code("my_data:make")]
    for name in ("my_reward", "my_colours"):
        (tmp_path / f"{name}.py").write_text("import json, my_data\n")
        hashes.append(prints.of_code("my_data:make"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_half_written_stage_is_not_taken_for_a_finished_one(toy):
    toy.run()
    toy.calls()
    # Killed between training and the rename: all files exist, under the partial name.
    (toy.run_dir / "rlvr").rename(toy.run_dir / "rlvr.partial")
    toy.run()
    assert toy.calls() == ["rlvr"]
    assert not (toy.run_dir / "rlvr.partial").exists()


def test_a_folder_without_a_manifest_is_not_a_finished_stage(toy):
    toy.run()
    toy.calls()
    (toy.run_dir / "rlvr" / "manifest.json").unlink()
    toy.run()
    assert toy.calls() == ["rlvr"]


def test_a_failed_stage_shows_its_last_lines_and_the_next_run_continues_there(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAIL", "rlvr")
    with pytest.raises(
        StageFailed, match=r"(?s)rlvr: .*exit code 3.*rlvr\.partial/log\.txt.*the reason is here"
    ):
        toy.run()
    assert toy.pools[-1] == "stop"
    assert not (toy.run_dir / "rlvr").exists()
    toy.calls()
    monkeypatch.delenv("TOY_FAIL")
    toy.run()
    assert toy.calls() == ["rlvr"]


def test_a_failed_stage_is_in_the_report(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAIL", "rlvr")
    with pytest.raises(StageFailed):
        toy.run()
    failed = json.loads((toy.run_dir / "report.json").read_text())["failed"]
    assert failed["stage"] == "rlvr"
    assert "the reason is here" in failed["error"]
    monkeypatch.delenv("TOY_FAIL")
    toy.run()
    assert json.loads((toy.run_dir / "report.json").read_text())["failed"] is None


def test_a_refused_row_stops_the_stage_that_trains_after_a_built_core(toy, monkeypatch):
    """The rows are checked with the built core's tokenizer while the next stage trains. A refusal ends that stage."""

    def refuse(recipe, sets, model, *_):
        raise ConfigError(f"row 7 does not fit {model.parent.name}")

    monkeypatch.setattr("chain.run.check_rows", refuse)
    monkeypatch.setenv("TOY_WAIT", "basic_sft")
    with pytest.raises(ConfigError, match="row 7 does not fit core"):
        toy.run()
    assert not (toy.run_dir / "basic_sft").exists()
    assert toy.evaluated == []


def test_a_report_that_cannot_be_written_does_not_hide_the_error_of_the_stage(toy, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setenv("TOY_FAIL", "rlvr")
    monkeypatch.setattr("chain.report.data.note_failure", full)
    with pytest.raises(StageFailed, match="the reason is here"):
        toy.run()
    assert "the report was not written: OSError: no space left" in toy.printed


def test_a_failed_stage_that_saves_continues_in_its_folder_unless_it_changed(toy, monkeypatch):
    saving = "basic_sft.save_every=1"
    left = toy.run_dir / "basic_sft.partial" / "left"
    for overrides, stays in (([saving], True), ([saving, "basic_sft.max_tokens=65"], False), ([], False)):
        monkeypatch.setenv("TOY_FAIL", "basic_sft")
        with pytest.raises(StageFailed):
            toy.run(saving, until="basic_sft")
        left.write_text("half of it")
        (left.parent / "unfinished" / "update-1").mkdir(parents=True)
        monkeypatch.delenv("TOY_FAIL")
        (left.parent / "checkpoint").rmdir()
        toy.run(*overrides, until="basic_sft")
        assert (toy.run_dir / "basic_sft" / "left").exists() == stays
        assert ("basic_sft: resumes where an interrupted run stopped" in toy.printed) == stays
        shutil.rmtree(toy.run_dir / "basic_sft")


def test_data_made_for_a_stage_survives_its_failure_and_a_change_of_its_training(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAIL", "rlvr")
    with pytest.raises(StageFailed):
        toy.run()
    monkeypatch.delenv("TOY_FAIL")
    toy.run("rlvr.optim.learning_rate=0.1")
    assert toy.prepared == ["rlvr"]
    assert "rlvr: pass_at_k kept 3, dropped 2 (never solved 2)" in toy.printed
    assert read_json(toy.run_dir / "rlvr" / "prepare.json")["pass_at_k"]["kept"] == 3


def test_from_needs_the_stages_before_it(toy):
    with pytest.raises(ConfigError, match=r"--from rlvr: not finished: core, basic_sft .*start from core"):
        toy.run(from_="rlvr")
    assert toy.calls() == []


def test_from_takes_earlier_stages_as_they_are_and_warns(toy):
    toy.run()
    toy.calls()
    toy.run("basic_sft.max_tokens=65", "rlvr.batches=3", from_="rlvr")
    assert toy.calls() == ["rlvr"]
    assert "basic_sft: its config or inputs have changed since it ran" in toy.printed


def test_until_stops_there_and_an_unknown_stage_names_the_nearest(toy):
    toy.run(until="basic_sft")
    assert toy.calls() == ["data", "core", "basic_sft"]
    with pytest.raises(ConfigError, match="did you mean rlvr"):
        toy.run(until="rlvrr")
    with pytest.raises(ConfigError, match="comes after --until"):
        toy.run(from_="rlvr", until="core")


def test_one_pool_serves_the_chain_and_starts_only_when_needed(toy):
    toy.run(until="basic_sft")
    assert toy.pools == ["start with core", "stop"]
    toy.run(until="basic_sft")
    assert len(toy.pools) == 2
    toy.run()
    assert toy.pools[2:] == ["start with basic_sft", "stop"]
    assert json.loads((toy.run_dir / "rlvr" / "metrics.jsonl").read_text().splitlines()[0])["urls"] == 1


def test_a_stage_is_evaluated_while_the_next_one_trains_unless_that_one_samples(toy, monkeypatch):
    begun = []
    real = runner.run_job

    def run_job_of(task, *args, **options):
        begun.append((task.stage, list(toy.evaluated)))
        if task.stage == "basic_sft":
            trained.set()
        real(task, *args, **options)

    trained = threading.Event()
    monkeypatch.setattr(runner, "run_job", run_job_of)
    toy.before_scores = lambda stage: trained.wait(60) if stage == "core" else None
    toy.run()
    assert begun[2:] == [("basic_sft", []), ("rlvr", ["core", "basic_sft"])]


def test_servers_that_share_gpus_sleep_before_every_learner_and_nothing_is_evaluated_beside_it(
    toy, monkeypatch
):
    happened = []

    class Client:
        def sleep(self):
            happened.append("sleep")

    real = runner.run_job

    def run_job_of(task, *args, **options):
        happened.append(task.stage)
        real(task, *args, **options)

    monkeypatch.setattr(runner, "run_job", run_job_of)
    monkeypatch.setattr(Pool, "_connected", lambda pool, model: Client())
    toy.before_scores = lambda stage: happened.append(f"evaluate {stage}")
    toy.run("servers.share_gpus=true", "servers.device=gpu")
    assert happened == [
        *("data", "core", "evaluate core"),
        *("sleep", "basic_sft", "evaluate basic_sft"),
        *("sleep", "rlvr", "evaluate rlvr"),
    ]


def test_an_evaluation_that_fails_stops_the_chain_and_is_done_again_later(toy, monkeypatch):
    def fail(stage):
        raise RolloutError("the server is gone")

    toy.before_scores = fail
    with pytest.raises(RolloutError, match="the server is gone"):
        toy.run()
    assert toy.calls() == ["data", "core", "basic_sft"]
    assert toy.pools[-1] == "stop"
    toy.before_scores = lambda stage: None
    toy.run()
    assert toy.calls() == ["rlvr"]
    assert toy.evaluated == ["core", "basic_sft", "rlvr"]


def test_another_evaluation_scores_again_without_training(toy):
    toy.run()
    toy.calls()
    toy.evaluated.clear()
    toy.run("eval.max_completion_tokens=16")
    assert toy.calls() == []
    assert toy.evaluated == ["core", "basic_sft", "rlvr"]


def test_two_chains_cannot_share_a_folder(toy):
    recipe = load_recipe(toy.recipe_dir)
    folder = RunFolder(recipe, toy.root / "runs", (), print)
    with folder.locked(), pytest.raises(ConfigError, match="in use by another posttrain"):
        toy.run()


def test_missing_data_stops_the_chain_before_it_starts(toy):
    with pytest.raises(ConfigError, match=r"data\.sets\.more = 'nowhere\.parquet': there is no such file"):
        toy.run("data.sets.more=nowhere.parquet", "sft.phases.0.data.0.set=more")
    assert toy.calls() == []


def test_folders_named_like_ours_in_the_working_directory_are_not_imported(toy, monkeypatch):
    for name in ("core", "rl", "recipes"):
        (toy.root / "here" / name).mkdir(parents=True)
        (toy.root / "here" / name / "__init__.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(toy.root / "here")
    toy.run(until="core")
    assert toy.calls() == ["data", "core"]


def test_an_interrupt_stops_the_child_and_what_it_started(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, subprocess, time\n"
        "def work(cfg, job):\n"
        "    grandchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    pathlib.Path(job.out, 'pids').write_text(f'{os.getpid()} {grandchild.pid}')\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pids = tmp_path / "pids"

    def interrupt_when_running():
        if pids.exists() and pids.read_text():
            raise KeyboardInterrupt

    task = Task.of("slow:work", Strict(), Job(stage="slow", out=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_job(task, tmp_path, on_poll=interrupt_when_running)
    time.sleep(0.1)
    for pid in map(int, pids.read_text().split()):
        # A zombie has ended; its new parent has not yet waited for it.
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


RANK = """
import os, pathlib, sys, time

import torch

from core.training.group import form_group


def meet(cfg, job):
    form_group()
    number = torch.ones(1)
    torch.distributed.all_reduce(number)
    rank = os.environ["RANK"]
    print("rank", rank, "of", int(number), flush=True)
    if rank == "1":
        exec(os.environ["DOES"])
    torch.distributed.barrier()
"""


def run_ranks(tmp_path, monkeypatch, does="pass"):
    (tmp_path / "meeting.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ranks, "GRACE_S", 1.0)
    monkeypatch.setenv("DOES", does)
    run_job(Task.of("meeting:meet", Strict(), Job(stage="rlvr", out=tmp_path)), tmp_path, processes=2)


def test_ranks_meet_without_a_port_and_each_has_a_log(tmp_path, monkeypatch):
    run_ranks(tmp_path, monkeypatch)
    assert [last_lines(tmp_path / name) for name in ("log.txt", "log-rank1.txt")] == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", r"rank 1 was killed by SIGSEGV.*in meet\b"),
        (
            "raise RuntimeError('rank one broke')",
            "rank 1 ended with exit code 1.*RuntimeError: rank one broke",
        ),
        ("time.sleep(600)", "rank 1 had not ended 1 s later and was stopped: it hung.*in meet"),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named_with_the_reason(tmp_path, monkeypatch, does, words):
    monkeypatch.setenv(TIMEOUT, "3")
    with pytest.raises(StageFailed, match=rf"(?s)^rlvr: .*{words}"):
        run_ranks(tmp_path, monkeypatch, does)


def test_no_rank_searches_the_working_directory(tmp_path):
    assert command(tmp_path / "job.json") == [
        sys.executable,
        "-P",
        "-m",
        "chain.worker",
        str(tmp_path / "job.json"),
    ]
    env = environment(threads=3)
    assert (env["OMP_NUM_THREADS"], env["PYTHONSAFEPATH"]) == ("3", "1")


def test_a_finished_stage_without_its_final_name_is_not_trained_again(toy):
    toy.run()
    toy.calls()
    fingerprint = Manifest.read(toy.run_dir / "rlvr").fingerprint
    (toy.run_dir / "rlvr" / "manifest.json").unlink()
    (toy.run_dir / "rlvr" / ".same").write_text(fingerprint)
    (toy.run_dir / "rlvr" / DONE).touch()
    (toy.run_dir / "rlvr").rename(toy.run_dir / "rlvr.partial")
    toy.run()
    assert toy.calls() == []
    assert "rlvr: the interrupted run had finished its work" in toy.printed
    assert Manifest.read(toy.run_dir / "rlvr").fingerprint == fingerprint
    assert not [path for path in (toy.run_dir / "rlvr").iterdir() if path.name in (DONE, ".same")]


def test_a_stage_that_was_done_with_another_config_is_trained_again(toy):
    toy.run()
    toy.calls()
    (toy.run_dir / "rlvr" / ".same").write_text("another")
    (toy.run_dir / "rlvr" / DONE).touch()
    (toy.run_dir / "rlvr").rename(toy.run_dir / "rlvr.partial")
    toy.run()
    assert toy.calls() == ["rlvr"]


@pytest.mark.parametrize(
    ("kind", "first"), [("ours", "rlvr: the judge refused"), ("bug", "rlvr: KeyError: 'colour'")]
)
def test_an_error_inside_a_child_is_shown_as_one_line(toy, monkeypatch, kind, first):
    monkeypatch.setenv("TOY_RAISE", "rlvr")
    monkeypatch.setenv("TOY_AS", kind)
    with pytest.raises(StageFailed) as caught:
        toy.run()
    lines = str(caught.value).splitlines()
    assert lines[0] == first
    assert ("Traceback" in str(caught.value)) == (kind == "bug")
    assert "rlvr.partial/log.txt" in str(caught.value)
    monkeypatch.delenv("TOY_RAISE")
    toy.run()  # the files of the failure are removed
    assert not (toy.run_dir / "rlvr" / "error.json").exists()


def test_torn_lines_of_the_hashes_are_dropped_with_a_warning(toy, caplog):
    toy.run()
    toy.calls()
    with (toy.run_dir / ".hashes.jsonl").open("a") as file:
        file.write('{"state": "[\\"half')
    toy.run()
    assert toy.calls() == []
    assert "dropped 1 torn lines" in caplog.text
    assert [json.loads(line) for line in (toy.run_dir / ".hashes.jsonl").read_text().splitlines()]


def test_a_full_disk_is_named_before_the_errors_that_it_causes(toy, monkeypatch):
    monkeypatch.setenv("TOY_FAIL", "rlvr")
    monkeypatch.setattr(errors, "FULL_BYTES", 2**60)
    with pytest.raises(
        StageFailed, match=r"^rlvr: .*rlvr\.partial: the disk is full \(\d+ MiB are free\); make room"
    ):
        toy.run()
