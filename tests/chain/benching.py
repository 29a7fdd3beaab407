"""Stand-ins for the bench: an HTTP server in place of the judge, a client in place of the rollout servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from rl.rollout.messages import CoreFacts


class FakeClient:
    """The part of a RolloutClient that the relay uses. `say(text of the last turn)` is the completion."""

    core = CoreFacts(banned_ids=(7,))

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say, self.asked = say, []
        self.fleet = SimpleNamespace(serving=["http://one", "http://two"])
        self.http = SimpleNamespace(ask=self.ask)

    def ask(self, url: str, path: str, body: dict) -> dict:
        self.asked.append((url, body))
        text = "".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
        tokens = {"content": [{"logprob": 0.0}] * 3}
        choice = {"token_ids": [1, 2, 3], "logprobs": tokens, "finish_reason": "stop"}
        return {"prompt_token_ids": [1], "choices": [{**choice, "message": {"content": self.say(text)}}]}


@contextmanager
def judge_server(say: Callable[[str], str]) -> Iterator[tuple[str, list[dict]]]:
    """The URL of a judge that answers `say(text)`, and the list of its requests."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            content = body["messages"][-1]["content"]
            text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
            data = json.dumps({"choices": [{"message": {"content": say(text)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
