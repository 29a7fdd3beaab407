"""Servers that die, come back, or come back unnoticed: requests move on, old weights are never sampled from."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from core.files import write_json
from rl.rollout import client as module
from rl.rollout import fleet
from rl.rollout.client import RolloutClient
from rl.rollout.http import RolloutError, ServerLost
from rl.rollout.messages import Prompt, Sampling

from .test_client import CORE, ask, fakes, reply  # noqa: F401 - fixtures

UPDATE = ["start_weight_update", "update_weights", "finish_weight_update"]
CACHES = ["reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"]


@pytest.fixture
def told():
    return []


@pytest.fixture
def client(fakes, told, tmp_path, monkeypatch):  # noqa: F811
    """A client of two servers that hold the weights of a first update; servers wait for each other 0.1 s."""
    monkeypatch.setattr(module, "RETURN_PAUSE_S", 0.01)
    for fake in fakes:
        fake.replies["v1/chat/completions"] = (200, reply([7, 8]))
    urls = [fake.url for fake in fakes]
    client = RolloutClient(urls, CORE, concurrency=4, patience_s=0.1, max_returns=2, warn=told.append)
    (tmp_path / "model.safetensors").touch()
    client.load_checkpoint(tmp_path)
    for fake in fakes:
        fake.requests.clear()
    yield client
    client.close()


def sleep_is(monkeypatch, instead):
    """Replace the client's `time.sleep`, and that of no other thread."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=instead))


def die(fake):
    fake.hang_ups, fake.healthy, fake.version = 10**6, False, "default"


def return_(fake):
    fake.hang_ups, fake.healthy = 0, True


def paths(fake):
    return [path for path, _ in fake.requests]


def test_the_requests_of_a_server_that_dies_go_to_the_others(client, fakes, told):  # noqa: F811
    die(fakes[0])
    assert [answer.prompt_ids for answer in ask(client, count=6)] == [[1, seed] for seed in range(6)]
    assert paths(fakes[1]) == ["v1/chat/completions"] * 6
    assert client.fleet.serving == [fakes[1].url]
    figures = client.fleet.figures()
    assert (figures["rollout/servers"], figures["rollout/servers_lost"]) == (1, 1)
    assert figures["rollout/requests_moved"] == 3
    assert [line.startswith(f"rollout server {fakes[0].url} is lost (1 of 2 left)") for line in told] == [
        True
    ]


@pytest.mark.parametrize("what", ["completions", "probes", "weights"])
def test_a_server_that_is_gone_but_leaves_its_connections_open_is_not_waited_for(
    client,
    fakes,  # noqa: F811
    monkeypatch,
    tmp_path,
    what,
):
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    fakes[0].answering.clear()
    fakes[0].healthy = False
    if what == "completions":
        assert len(ask(client, count=4)) == 4
    elif what == "probes":
        prompt = Prompt([{"role": "user", "content": "hello"}], seed=0)
        assert len(client.ask_each([prompt] * 2, Sampling(max_tokens=4))) == 2
    else:
        client.load_checkpoint(tmp_path)
    assert client.fleet.serving == [fakes[1].url]
    fakes[0].answering.set()


def test_the_only_server_may_leave_every_connection_open_and_be_replaced(fakes, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    left_open = fakes[0].answering
    left_open.clear()
    fakes[0].healthy = False

    def replace(seconds):
        fakes[0].answering = threading.Event()
        fakes[0].answering.set()
        fakes[0].replies["v1/chat/completions"] = (200, reply([7]))
        fakes[0].healthy = True

    sleep_is(monkeypatch, replace)
    client = RolloutClient([fakes[0].url], CORE, concurrency=2, patience_s=60, warn=lambda text: None)
    assert len(ask(client, count=5)) == 5  # more than there are threads
    client.close()
    left_open.set()


def test_a_server_may_leave_so_many_connections_open_that_no_thread_is_free_for_the_others(
    fakes,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    looks, wait = [], module.wait

    def counted(*words):
        looks.append(words)
        assert len(looks) < 200, "it waits for requests that no thread will begin"
        return wait(*words)

    monkeypatch.setattr(module, "wait", counted)
    left_open = fakes[0].answering
    left_open.clear()
    fakes[0].healthy = False
    fakes[1].replies["v1/chat/completions"] = (200, reply([7]))
    client = RolloutClient([fake.url for fake in fakes], CORE, concurrency=1, warn=lambda text: None)
    assert len(ask(client, count=9)) == 9
    assert client.fleet.figures()["rollout/requests_moved"] == 2
    client.close()
    left_open.set()


def test_a_request_that_was_given_up_takes_no_server_away_that_is_back(client, fakes, monkeypatch):  # noqa: F811
    asked = []

    def late(url, prompt, sampling):
        asked.clear()  # as the client does with what nobody waits for any more
        raise ServerLost("no answer within the time limit")

    monkeypatch.setattr(client, "_ask", late)
    prompt = Prompt([{"role": "user", "content": "hello"}], seed=0)
    assert client._ask_one(0, prompt, Sampling(max_tokens=4), asked) is None
    assert client.fleet.serving == [fake.url for fake in fakes]


def test_a_server_that_comes_back_gets_the_current_weights_and_empty_caches_before_it_is_asked(client, fakes):  # noqa: F811
    die(fakes[0])
    ask(client)
    fakes[0].requests.clear()
    return_(fakes[0])
    ask(client, count=2)
    assert paths(fakes[0]) == [*UPDATE, *CACHES, "v1/chat/completions"]
    assert fakes[0].version == fakes[1].version != "default"


def test_a_server_that_comes_back_must_pass_the_gate(client, fakes, told):  # noqa: F811
    def gate(url):
        raise RuntimeError("it thinks otherwise")

    die(fakes[0])
    ask(client)
    fakes[0].requests.clear()
    return_(fakes[0])
    client.served.gate = gate
    for _ in range(4):
        ask(client, count=2)
    assert paths(fakes[0]) == [*UPDATE, *CACHES] * 2  # max_returns
    assert [line for line in told if "it thinks otherwise" in line]


def test_a_server_that_was_restarted_unnoticed_is_synced_and_what_it_said_meanwhile_does_not_count(
    client,
    fakes,  # noqa: F811
):
    fakes[0].version = "default"  # a new process: it answers, with the weights that it started with
    fakes[0].replies["v1/chat/completions"] = (200, reply([6, 6]))
    real = fakes[0].replies

    def start_update(body):
        real["v1/chat/completions"] = (200, reply([7, 8]))
        return {}

    real["start_weight_update"] = (200, start_update)
    answers = ask(client, count=4)
    assert all(answer.completions[0].token_ids == [7, 8] for answer in answers)
    assert client.fleet.figures()["rollout/requests_moved"] == 2


def test_probes_of_a_server_that_was_restarted_unnoticed_do_not_count(client, fakes):  # noqa: F811
    fakes[1].version = "default"
    prompts = [Prompt([{"role": "user", "content": "hello"}], seed=seed) for seed in range(2)]
    assert len(client.ask_each(prompts, Sampling(max_tokens=4))) == 2
    assert len(client.ask_each(prompts, Sampling(max_tokens=4))) == 4  # it is back


def test_an_image_that_is_still_to_be_read_goes_to_every_server_at_once(client, fakes, tmp_path):  # noqa: F811
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    for seed in range(5):
        image = Image.open(tmp_path / "picture.png")
        prompt = Prompt([{"role": "user", "content": [{"type": "image", "image": image}]}], seed=seed)
        assert len(client.ask_each([prompt] * 2, Sampling(max_tokens=4))) == 4


def test_a_server_lost_in_an_update_gets_it_from_the_beginning_when_it_is_back(client, fakes, tmp_path):  # noqa: F811
    fakes[0].hang_ups = 1
    client.load_checkpoint(tmp_path)
    assert paths(fakes[0]) == ["start_weight_update", *UPDATE, *CACHES]
    assert fakes[0].version == fakes[1].version
    assert len(client.fleet.serving) == 2


def test_without_any_server_the_client_waits_for_one_and_asks_again(client, fakes, monkeypatch):  # noqa: F811
    for fake in fakes:
        die(fake)
    client.patience_s = 60
    sleep_is(monkeypatch, lambda seconds: return_(fakes[1]))
    assert len(ask(client, count=3)) == 3
    assert client.fleet.serving == [fakes[1].url]


def test_when_no_server_comes_back_the_error_names_each_with_its_reason(client, fakes):  # noqa: F811
    for fake in fakes:
        die(fake)
    with pytest.raises(RolloutError, match=r"(?s)no rollout server is left.*no answer") as caught:
        ask(client)
    assert all(fake.url in str(caught.value) for fake in fakes)


def test_a_server_that_keeps_dying_stays_out(client, fakes, told):  # noqa: F811
    for _ in range(3):
        die(fakes[0])
        ask(client)
        return_(fakes[0])
        ask(client)
    assert "it was back 2 times and now stays out" in told[-1]
    assert client.fleet.serving == [fakes[1].url]


def test_a_dying_servers_error_is_a_loss_and_a_healthy_ones_is_a_refusal(client, fakes):  # noqa: F811
    fakes[0].replies["v1/chat/completions"] = (500, {"error": "the engine is dead"})
    fakes[0].healthy = False
    assert len(ask(client)) == 3
    fakes[1].replies["v1/chat/completions"] = (500, {"error": "a bug"})
    with pytest.raises(RolloutError, match=r"HTTP 500.*a bug"):
        ask(client)


def test_an_aborted_completion_is_sampled_again(client, fakes):  # noqa: F811
    fakes[0].replies["v1/chat/completions"] = (200, reply([7], finish="abort"))
    assert all(answer.completions[0].finished for answer in ask(client, count=2))
    assert paths(fakes[1]) == ["v1/chat/completions"] * 2


def test_weights_that_came_by_another_way_are_not_asked_of_a_server_that_missed_them(
    client,
    fakes,  # noqa: F811
    monkeypatch,
):
    client.weights_sent()
    die(fakes[0])
    ask(client)
    return_(fakes[0])
    ask(client)
    assert client.fleet.serving == [fakes[1].url]
    die(fakes[1])
    client.patience_s = 3600  # waiting is useless: a server that comes back cannot get these weights
    monkeypatch.setattr(module, "RETURN_PAUSE_S", 7)
    sleep_is(monkeypatch, lambda seconds: seconds == 7 and pytest.fail("it waits"))
    with pytest.raises(RolloutError, match="no rollout server is left"):
        ask(client)


def test_a_lost_server_is_looked_at_less_and_less_while_others_serve(client, fakes, monkeypatch):  # noqa: F811
    looks, now = [], [0.0]
    monkeypatch.setattr(fleet, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(client.http, "healthy", lambda url: looks.append(now[0]))
    die(fakes[0])
    for now[0] in range(20):
        ask(client, count=2)
    assert looks == [1, 2, 4, 8, 16]


def test_a_server_that_was_started_again_elsewhere_gets_the_weights_before_it_is_asked(fakes, told, tmp_path):  # noqa: F811
    for fake in fakes:
        fake.replies["v1/chat/completions"] = (200, reply([7, 8]))
    addresses = tmp_path / "servers.json"
    write_json(addresses, [fakes[0].url])
    client = RolloutClient([fakes[0].url], CORE, patience_s=10, warn=told.append, addresses=addresses)
    (tmp_path / "model.safetensors").touch()
    client.load_checkpoint(tmp_path)
    write_json(addresses, [fakes[1].url])
    assert len(ask(client, count=2)) == 2
    assert paths(fakes[1]) == [*UPDATE, *CACHES, *["v1/chat/completions"] * 2]
    assert client.fleet.serving == [fakes[1].url]
    assert told[0] == (
        f"rollout server {fakes[0].url} is lost (0 of 1 left): it was started again, as {fakes[1].url}"
    )
    client.close()
