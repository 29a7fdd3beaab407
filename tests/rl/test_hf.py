"""The rollout engine for machines without vLLM: same client, same guard."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from chain.voices import Server
from rl.config import Parity
from rl.rollout.client import RolloutClient
from rl.rollout.config import PoolConfig
from rl.rollout.messages import CoreFacts, Prompt, Sampling
from rl.rollout.parity import ParityGuard
from rl.rollout.server import ServerFailed, rollout_pool

from .test_vllm import fresh_learner, learner, logprobs, move, push  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def hf_client(tiny_core, tmp_path_factory):
    with rollout_pool(
        PoolConfig(engine="hf", max_model_tokens=256), tiny_core, tmp_path_factory.mktemp("hf")
    ) as urls:
        client = RolloutClient(urls, CoreFacts.of(tiny_core))
        yield client
        client.close()


def test_the_engine_samples_with_the_learners_probabilities_before_and_after_an_update(
    hf_client,
    fresh_learner,  # noqa: F811
    records,
):
    from rl.data import prompt_messages

    rows = records[:4]  # with and without an image
    prompts = [Prompt(prompt_messages(row), seed=at) for at, row in enumerate(rows)]
    guard = ParityGuard(Parity(bound=1e-4), prompts, temperature=0.7)

    def check():
        answers = guard.sample(hf_client)
        return guard.check(answers, lambda at, answer: logprobs(fresh_learner, rows[at], answer), servers=1)

    assert check() < 1e-5
    move(fresh_learner[0], "")
    push(hf_client, fresh_learner[0])
    assert check() < 1e-5
    groups = hf_client.generate(prompts, Sampling(max_tokens=6, n=3, temperature=0.7))
    assert [len(group.completions) for group in groups] == [3] * 4
    again = hf_client.generate(prompts, Sampling(max_tokens=6, n=3, temperature=0.7))
    assert [c.token_ids for g in groups for c in g.completions] == [
        c.token_ids for g in again for c in g.completions
    ]


def test_the_engine_answers_plain_clients_of_the_openai_api(hf_client):
    question = {"messages": [{"role": "user", "content": "compute A"}], "temperature": 0, "max_tokens": 4}
    asked = Server(hf_client.urls[0], 0.0, 4, None, None)
    assert asked.model == "policy"
    pieces = []
    said = asked([{"role": "user", "content": [{"type": "text", "text": "compute A"}]}], pieces.append)
    whole = asked.http.ask(hf_client.urls[0], "v1/chat/completions", question)["choices"][0]
    assert said == whole["message"]["content"] == "".join(pieces)
    assert said


def test_a_server_that_does_not_start_fails_with_the_end_of_its_log(tmp_path):
    pool = rollout_pool(PoolConfig(engine="hf", max_model_tokens=256), tmp_path / "nothing", tmp_path)
    with pytest.raises(ServerFailed, match=r"rollout server \S+ ended with exit code 1\n(?s:.*)nothing"):
        pool.__enter__()


KILLED = """
import os, signal, sys
from pathlib import Path
from rl.rollout.config import PoolConfig
from rl.rollout import server

server.command = lambda *args: [sys.executable, "-P", "-c", "import time; time.sleep(600)"]
folder = Path(sys.argv[1]).parent
started = server.RolloutServer(PoolConfig(max_model_tokens=64), Path("model"), Path(sys.argv[1]), 0, "token", folder)
print(started.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_ends_with_a_runner_that_is_killed(tmp_path):
    command = [sys.executable, "-P", "-c", KILLED, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    server, end = int(done.stdout), time.monotonic() + 30
    while psutil.pid_exists(server) and psutil.Process(server).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the server outlives the process that started it"
        time.sleep(0.05)


def test_an_rl_stage_that_shares_gpus_lets_the_servers_sleep_through_every_update(
    tiny_core, records, tmp_path, monkeypatch
):
    from core.strict import parse
    from corpus.records import write_records
    from rl.config import RLConfig
    from rl.job import ServedJob
    from rl.train import train

    stage = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {"prompts_per_batch": 2, "group_size": 2, "max_completion_tokens": 4, "temperature": 0.7},
        "dynamic_sampling": {"max_rounds": 0},
        "batches": 2,
        "mini_batch": 4,
        "optim": {"learning_rate": 1e-3, "micro_batch_size": 4},
        "learner": {"deepspeed": None},
        "parity": {"bound": 1e-3, "sequences": 1, "tokens": 2},
        "self_test_rows": 0,
    }
    write_records(tmp_path / "rl.parquet", records[:4])
    pool = PoolConfig(engine="hf", max_model_tokens=256, share_gpus=True)
    calls = []

    def noted(name, word):
        real = getattr(RolloutClient, name)
        monkeypatch.setattr(
            RolloutClient, name, lambda self, *a: calls.append(word or a[0]) or real(self, *a)
        )

    for name, word in (("ask_each", "probe"), ("generate", "sample"), ("on_every_server", None)):
        noted(name, word)
    with rollout_pool(pool, tiny_core, tmp_path) as urls:
        train(
            parse(RLConfig, stage, "test"),
            ServedJob(
                stage="rlvr",
                model=tiny_core,
                out=tmp_path / "out",
                sets={"rl": tmp_path / "rl.parquet"},
                pool=pool,
                urls=urls,
                weights=tmp_path,
            ),
        )
    calls = [call for call in calls if "reset" not in call and "_weight" not in call.replace("update_w", "")]
    # Per batch: new weights, the parity probe, the rollouts, and sleep before the update; the last one stays asleep.
    batch = ["wake_up?tags=weights", "update_weights", "wake_up?tags=kv_cache", "probe", "sample"]
    assert calls == [*batch, "sleep?level=2"] * 2
