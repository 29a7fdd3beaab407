"""A judge on loopback with configurable replies: right, slow, broken, verbose, manipulated."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rewards.judge.judges import CRITERIA


class FakeJudge(ThreadingHTTPServer):
    """Answers a request with `reply(request)`: a word or prose, (status, body[, headers]), or None to hang up."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.reply = [], lambda request: "yes"
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # some tests have a client that gives up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            reply = self.server.reply(request)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1
        if reply is None:
            self.close_connection = True
            return
        status, body, headers = (200, chat(reply), {}) if isinstance(reply, str) else (*reply, {})[:3]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def chat(text, tokens=10):
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    return json.dumps({"choices": choices, "usage": {"total_tokens": tokens}}).encode()


def asked(request):
    """The question at the end of a request."""
    return request["messages"][-1]["content"][-1]["text"]


def material(request):
    """The quoted blocks of a request."""
    return request["messages"][-1]["content"][-2]["text"]


def criterion(request):
    return next((name for name, text in CRITERIA.items() if asked(request).startswith(text)), "")


@contextmanager
def serving():
    server = FakeJudge()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
