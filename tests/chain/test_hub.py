"""push and pull: the card from the run's files, one commit, nothing private; a core from the hub is checked."""

import shutil
from types import SimpleNamespace

import pytest
import yaml

from chain.cli.main import main
from chain.fingerprints import identity
from chain.hub.card import public
from chain.hub.transfer import HubError, pull, push
from chain.report.data import BENCH
from core.checkpoint.check import ForeignCode
from core.checkpoint.new import new_core, plan_core
from core.files import read_json, write_json
from core.manifest import Manifest
from core.model.tiny import build_tiny
from core.strict import ConfigError


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run of two stages."""
    folder = tmp_path / "runs" / "mine"
    scores = {"accuracy": 0.5, "n": 24, "ci95": [0.314, 0.686], "format_rate": 1.0, "mean_tokens": 12.0}
    inputs: dict[str, str] = {}
    for stage, parent in (("core", None), ("basic_sft", "core")):
        build_tiny(folder / stage / "checkpoint", words=["how"], seed=0)
        write_json(folder / stage / "config.json", {})
        found = {"thinking": scores, **({"direct": scores} if stage == "core" else {})}
        write_json(folder / stage / "eval.json", {"scores": found, "seconds": 1.0})
        times = {
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:00:10+00:00",
            "seconds": 10.0,
        }
        hashes = {"fingerprint": "f", "config_hash": "c", "inputs": inputs}
        manifest = Manifest(stage=stage, parent=parent, seed=0, commit="abc123", **hashes, **times)
        manifest.write(folder / stage)
        inputs = {"set:rows": "ab" * 32, "stage:core": identity(manifest)}
    phase = {"name": "one", "data": [{"set": "rows"}], "optim": {"learning_rate": 1e-3, "epochs": 1}}
    phase["optim"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    recipe = {
        "name": "mine",
        "about": "my own",
        "seed": 0,
        "core": {"path": "/home/me/secret/core"},
        "tracking": [],
    }
    recipe |= {
        "basic_sft": {"max_tokens": 64, "phases": [phase]},
        "data": {"sets": {"rows": "/home/me/rows.parquet"}},
    }
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "chain.json", {"id": "mine-1", "started": "2026-01-01T00:00:00+00:00"})
    bench = {"tasks": {"mathvista": {"score": 68.5}, "broken": {"error": "no rows"}}}
    write_json(folder / "basic_sft" / BENCH, bench)
    write_json(folder / "basic_sft" / "checkpoint" / "start.json", {"weights": "/home/me/secret"})
    return folder


class Hub:
    """A fake of huggingface_hub.HfApi."""

    def __init__(self):
        self.created, self.commits = [], []

    def create_repo(self, repo, **options):
        self.created.append((repo, options))

    def create_commit(self, repo, operations, commit_message):
        self.commits.append(
            (repo, {one.path_in_repo: one.path_or_fileobj for one in operations}, commit_message)
        )
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


def test_a_dry_run_shows_card_and_files_and_sends_nothing(run, hub, capsys):
    words = [
        "push",
        str(run),
        "me/core",
        "--license",
        "apache-2.0",
        "--base-model",
        "theirs/core",
        "--dry-run",
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    meta = yaml.safe_load(shown.split("---")[1])
    assert (meta["license"], meta["base_model"]) == ("apache-2.0", "theirs/core")
    assert "| basic_sft | 0.500 [.314, .686] | - | 24/- | 1.00/- | 12.0/- |" in shown
    assert "| basic_sft | rows | local | abababababab |" in shown
    assert "2. `basic_sft`, from `core`, 2026-01-01, 10 s" in shown
    assert "| mathvista | 68.5 |" in shown
    assert "learning_rate: 0.001" in shown
    assert "model.safetensors" in shown
    assert "nothing was sent" in shown
    assert "/home/me" not in shown
    assert (hub.created, hub.commits) == ([], [])


def test_a_push_is_one_commit_to_a_private_repository(run, hub):
    (run / "basic_sft" / "checkpoint" / "key.txt").symlink_to("/etc/hostname")
    text = push(run, "me/core", licence="mit", say=lambda line: None)
    assert hub.created == [("me/core", {"private": True, "exist_ok": True})]
    ((repo, files, message),) = hub.commits
    assert (repo, message) == ("me/core", "basic_sft of mine, seed 0")
    assert files["README.md"] == text.encode()
    assert {"config.json", "model.safetensors", "chat_template.jinja"} <= {*files}
    assert not {"start.json", "key.txt"} & {*files}


def test_a_stage_can_be_chosen_and_an_unknown_one_is_refused(run, hub):
    assert "after the stage `core`" in push(
        run, "me/core", licence="mit", stage="core", dry_run=True, say=str
    )
    with pytest.raises(ConfigError, match=r"--stage rlvr: not a finished stage .*basic_sft"):
        push(run, "me/core", licence="mit", stage="rlvr")


def test_a_checkpoint_with_code_is_not_pushed(run, hub):
    file = run / "basic_sft" / "checkpoint" / "config.json"
    write_json(file, {**read_json(file), "auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(ForeignCode):
        push(run, "me/core", licence="mit")
    assert hub.commits == []


def test_private_keys_are_hidden_at_any_depth():
    value = {
        "rewards": [{"use": "vision_judge", "params": {"base_url": "http://judge.internal", "model": "m"}}]
    }
    assert public(value) == {
        "rewards": [{"use": "vision_judge", "params": {"base_url": "(not shown)", "model": "m"}}]
    }


def test_an_error_of_the_hub_is_one_line(run, monkeypatch, capsys):
    from huggingface_hub.errors import HFValidationError

    def refuse():
        raise HFValidationError("Repo id must be in the form namespace/name\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", refuse)
    with pytest.raises(HubError, match=r"^a/b/c: Repo id must be in the form namespace/name$"):
        push(run, "a/b/c", licence="mit", say=str)


@pytest.fixture
def fetch(monkeypatch):
    """Make the hub hold a folder; returns the options of the downloads."""
    asked = []

    def hold(folder):
        def snapshot_download(repo, *, local_dir, **options):
            asked.append((repo, options))
            shutil.copytree(folder, local_dir, dirs_exist_ok=True)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return hold


def test_a_native_core_is_pulled_as_it_is(tmp_path, fetch):
    asked = fetch(build_tiny(tmp_path / "hub", words=["how"], seed=0))
    pull("me/core", tmp_path / "core", revision="v1", say=lambda line: None)
    assert (tmp_path / "core" / "model.safetensors").read_bytes() == (
        tmp_path / "hub" / "model.safetensors"
    ).read_bytes()
    ((repo, options),) = asked
    assert (repo, options["revision"]) == ("me/core", "v1")
    assert "*.bin" in options["ignore_patterns"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core", "hub"]
    with pytest.raises(ConfigError, match="core exists already"):
        pull("me/core", tmp_path / "core")


def test_a_released_core_is_imported(tmp_path, fetch, capsys):
    plan = plan_core("tiny", tmp_path / "hub", layout="released")
    new_core(plan, tmp_path / "hub", seed=0)
    fetch(tmp_path / "hub")
    assert main(["pull", "theirs/core", str(tmp_path / "core")]) == 0
    assert read_json(tmp_path / "core" / "config.json")["model_type"] == "sailvl2"
    assert "core: " in capsys.readouterr().out


def test_a_core_with_code_and_a_folder_without_a_model_are_refused(tmp_path, fetch):
    core = build_tiny(tmp_path / "hub", words=["how"], seed=0)
    write_json(
        core / "config.json", {**read_json(core / "config.json"), "auto_map": {"AutoModel": "evil.Model"}}
    )
    fetch(core)
    with pytest.raises(ForeignCode):
        pull("evil/core", tmp_path / "core")
    assert not (tmp_path / "core").exists()
    (core / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"this is not a core: config\.json is missing"):
        pull("me/data", tmp_path / "other")
