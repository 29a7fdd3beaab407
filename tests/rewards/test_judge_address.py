"""A password in a judge's URL is refused before anything is written, and no message shows it."""

import json

import pytest

from chain.cli.main import main
from core.strict import ConfigError, parse
from rewards.judge.client import Endpoint
from rewards.judge.judges import VisionJudge
from rl.config import RewardTerm

SECRETS = [
    "http://me:hunter2@judge:8100/v1",
    "https://hunter2@judge/v1",
    "http://me:hunter2/@judge/v1",
    "http://judge/v1?key=hunter2",
    "http://[me:hunter2@judge/v1",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("make", [VisionJudge, Endpoint])
def test_a_url_with_a_secret_is_refused_without_being_shown(url, make):
    with pytest.raises(ValueError, match="api_key_env") as refused:
        make(url, "m")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["", "judge:8100", "ftp://judge/v1", "http://[::1/v1"])
def test_an_invalid_url_is_refused(url):
    with pytest.raises(ValueError, match="write the server's API root"):
        VisionJudge(url, "m")


@pytest.mark.parametrize(
    "params",
    [{"base_url": SECRETS[0]}, {"servers": ["http://judge/v1", SECRETS[1]]}, {"a": {"b": SECRETS[0]}}],
)
def test_a_recipe_with_a_secret_is_refused_without_being_shown(params):
    with pytest.raises(ConfigError, match="holds a user name or a password in a URL") as refused:
        parse(RewardTerm, {"name": "a", "use": "mine:Judge", "weight": 1.0, "params": params}, "recipe")
    assert "hunter2" not in str(refused.value)


def test_the_audit_command_refuses_and_shows_nothing(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "completion": "c", "label": "good"}))
    command = ["judge-audit", str(tmp_path / "rows.jsonl"), "--base-url", SECRETS[0], "--model", "m"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "api_key_env" in shown.err
    assert "hunter2" not in shown.out + shown.err
    assert not (tmp_path / "out").exists()
