"""The judges against a real vLLM server with images: a random core knows nothing, and still says yes or no."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rewards.judge.canaries import JudgeRefused
from rewards.judge.judges import AnswerJudge, JudgingReward, VisionJudge
from rl.data import example_of
from rl.rollout.access import TOKEN
from rl.rollout.config import MODEL_NAME

from .conftest import record

COMPLETION = r"<think>A is yes. no plus 7</think>\boxed{7}"


def judge(server_url, kind, **fields):
    own = {"timeout_s": 120, "canaries": False, "api_key_env": TOKEN}
    return kind(**{"base_url": f"{server_url}/v1", "model": MODEL_NAME, **own, **fields})


@pytest.fixture(scope="module")
def rows():
    return [example_of(record(n, image=bool(n % 4)) | {"verifier": "judge"}) for n in range(8)]


@pytest.mark.parametrize("kind", [VisionJudge, AnswerJudge, JudgingReward])
def test_every_judge_gets_its_word_with_and_without_images(server_url, rows, kind, tmp_path):
    reward = judge(server_url, kind, cache=str(tmp_path / "judge.sqlite3"), max_concurrency=4)
    completions = [COMPLETION.replace("{7}", f"{{{n + 10}}}") for n in range(8)]
    before = reward.statistics()
    verdicts = reward.batch(completions, rows)
    assert [verdict.reason for verdict in verdicts if verdict.score is None] == []
    spent = reward.statistics()
    expected = 8
    if kind is AnswerJudge or kind is JudgingReward:  # questions without a picture are all the same
        assert 1 < spent["calls"] - before["calls"] <= expected
    else:
        assert spent["calls"] - before["calls"] == expected
    assert spent["tokens"] - before["tokens"] > 16 * (spent["calls"] - before["calls"])
    with ThreadPoolExecutor(4) as threads:  # one by one, from threads: the same, and all from the cache
        assert list(threads.map(reward, completions, rows)) == verdicts
    assert reward.statistics()["calls"] == spent["calls"]


def test_a_picture_costs_its_tokens(server_url, rows):
    reward = judge(server_url, VisionJudge, criteria=["factual_grounding"])

    def tokens(row):
        before = reward.statistics()["tokens"]
        assert reward(COMPLETION, row).score is not None
        return reward.statistics()["tokens"] - before

    assert rows[1].images
    assert not rows[4].images
    assert tokens(rows[1]) >= tokens(rows[4]) + 4


def test_a_judge_that_knows_nothing_is_refused(server_url):
    with pytest.raises(JudgeRefused, match="vision_judge"):
        judge(server_url, VisionJudge, canaries=True).check_canaries()


def test_a_model_that_the_server_does_not_have_scores_nothing(server_url, rows):
    verdict = judge(server_url, VisionJudge, model="another")(COMPLETION, rows[0])
    assert verdict.score is None
    assert "http_4xx" in verdict.reason
