"""The client against a small HTTP server: its requests, its reading of replies, and its errors."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rl.rollout import access
from rl.rollout.client import RolloutClient
from rl.rollout.http import RolloutError
from rl.rollout.messages import CoreFacts, Prompt, Sampling

IMAGE_TOKEN = 5
CORE = CoreFacts(banned_ids=(IMAGE_TOKEN,), tied={"lm_head.weight": "embed"})


class FakeServer:
    """Answers like a rollout server; `requests` holds (path, body) in the order they came."""

    def __init__(self):
        self.requests, self.replies = [], {}
        self.hang_ups = 0
        """Number of next requests that are dropped without a reply."""
        self.healthy, self.version = True, "default"
        self.answering = threading.Event()
        """While it is not set, requests get no reply and keep their connections."""
        self.answering.set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/health":
                    self.send_error(200 if fake.healthy else 503)
                else:
                    self.reply(200, {"weight_version": fake.version})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.lstrip("/")
                fake.requests.append((path, body))
                fake.answering.wait(30)
                if fake.hang_ups:
                    fake.hang_ups -= 1
                    return
                fake.version = body.get("weight_version") or body.get("new_version") or fake.version
                status, reply = fake.replies.get(path, (200, {}))
                self.reply(status, reply(body) if callable(reply) else reply)

            def reply(self, status, reply):
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def fakes(monkeypatch):
    """Two fake servers. They cannot prove a token, so clients get none, also beside the session's real server."""
    monkeypatch.delenv(access.TOKEN, raising=False)
    servers = [FakeServer(), FakeServer()]
    yield servers
    for fake in servers:
        fake.server.shutdown()
        fake.server.server_close()


@pytest.fixture
def client(fakes):
    client = RolloutClient([fake.url for fake in fakes], CORE, concurrency=4, warn=lambda text: None)
    yield client
    client.close()


def reply(token_ids, finish="stop"):
    choice = {
        "token_ids": token_ids,
        "logprobs": {"content": [{"logprob": -0.5}] * len(token_ids)},
        "finish_reason": finish,
        "message": {"content": "text"},
    }
    return lambda body: {"prompt_token_ids": [1, body["seed"]], "choices": [choice] * body["n"]}


def ask(client, count=3, **sampling):
    prompts = [Prompt([{"role": "user", "content": "hello"}], seed=seed) for seed in range(count)]
    return client.generate(prompts, Sampling(max_tokens=8, **sampling))


def test_answers_come_in_the_prompts_order_from_all_servers(client, fakes):
    for fake in fakes:
        fake.replies["v1/chat/completions"] = (200, reply([7, 8]))
    answers = ask(client, count=5, n=2)
    assert [answer.prompt_ids for answer in answers] == [[1, seed] for seed in range(5)]
    assert all(len(answer.completions) == 2 for answer in answers)
    assert [len(fake.requests) for fake in fakes] == [3, 2]


def test_the_image_token_is_banned_in_every_request(client, fakes):
    for fake in fakes:
        fake.replies["v1/chat/completions"] = (200, reply([7]))
    ask(client)
    assert all(body["logit_bias"] == {"5": -100.0} for fake in fakes for _, body in fake.requests)


def test_a_completion_is_cut_before_a_banned_token_and_counts_as_unfinished(client, fakes):
    for fake in fakes:
        fake.replies["v1/chat/completions"] = (200, reply([7, IMAGE_TOKEN, 9]))
    completion = ask(client, count=1)[0].completions[0]
    assert (completion.token_ids, completion.logprobs, completion.finished) == ([7], [-0.5], False)


def test_an_update_goes_to_every_server_and_resets_all_three_caches_after_it(client, fakes, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.touch()
    client.load_checkpoint(tmp_path)
    steps = ["start_weight_update", "update_weights", "finish_weight_update"]
    caches = ["reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"]
    for fake in fakes:
        assert [path for path, _ in fake.requests] == [*steps, *caches]
        sent = fake.requests[1][1]["update_info"]
        assert sent == {"paths": [str(weights)], "aliases": {"lm_head.weight": "embed"}}


def test_servers_that_share_gpus_get_weights_first_and_room_for_the_cache_last(fakes, tmp_path):
    (tmp_path / "model.safetensors").touch()
    client = RolloutClient([fake.url for fake in fakes], CORE, concurrency=4, share_gpus=True)
    client.sleep()
    client.load_checkpoint(tmp_path)
    client.close()
    for fake in fakes:
        assert [path for path, _ in fake.requests] == [
            "sleep?level=2",
            "wake_up?tags=weights",
            *("start_weight_update", "update_weights", "finish_weight_update"),
            *("reset_mm_cache", "reset_encoder_cache", "reset_prefix_cache"),
            "wake_up?tags=kv_cache",
        ]


def test_a_server_without_sleep_mode_is_named(client, fakes):
    fakes[1].replies["sleep?level=2"] = (404, {"error": "no such path"})
    with pytest.raises(RolloutError, match=rf"{fakes[1].url}/sleep.*HTTP 404"):
        client.sleep()


def test_a_cache_that_was_not_reset_is_an_error(client, fakes):
    fakes[1].replies["reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(RolloutError, match="reset_prefix_cache: the server could not reset it"):
        client.reset_caches()


def test_a_refusing_server_is_named_with_its_words(client, fakes):
    fakes[0].replies["v1/chat/completions"] = (400, {"error": "max_tokens is too large"})
    fakes[1].replies["v1/chat/completions"] = (200, reply([7]))
    with pytest.raises(RolloutError, match=rf"{fakes[0].url}.*HTTP 400.*max_tokens is too large"):
        ask(client)


def test_a_lost_connection_costs_a_request_for_completions_nothing(client, fakes):
    fakes[0].replies["v1/chat/completions"] = (200, reply([7]))
    fakes[0].hang_ups = 2
    assert ask(client, count=1)[0].completions[0].token_ids == [7]
    assert [body for _, body in fakes[0].requests] == [fakes[0].requests[0][1]] * 3


def test_a_dead_server_is_named():
    client = RolloutClient(["http://127.0.0.1:9"], CORE)
    with pytest.raises(RolloutError, match=r"127.0.0.1:9/v1/chat/completions: no answer"):
        ask(client)
    client.close()


def test_an_empty_folder_is_refused(client, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors file"):
        client.load_checkpoint(tmp_path)


def test_tied_weights_are_read_from_the_checkpoints_config(tmp_path):
    config = {
        "image_token_id": 5,
        "text_config": {"tie_word_embeddings": True},
        "vision_config": {"image_size": 56},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CoreFacts.of(tmp_path).tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CoreFacts.of(tmp_path).tied == {}
