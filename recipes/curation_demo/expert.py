"""A stand-in for a large model in the curation demo: an OpenAI-compatible server that answers by rules.

It reads the quoted texts of a request and never the picture. It answers the requests of corpus/curation/asking.py.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_BLOCK = re.compile(r"<(\w+)-[0-9a-f]{16}>\n(.*?)\n</\1-[0-9a-f]{16}>", re.DOTALL)
_KNOWN = re.compile(r"compute|Which digit|What colour|even area")
_MAX_BYTES = 1 << 24


def reply(asked: str, texts: dict[str, str]) -> str:
    """The answer to one request.

    >>> reply("Write the shortest form of this answer.", {"question": "?", "answer": "The result is 12"})
    '12'
    """
    question, answer = texts.get("question", ""), texts.get("answer", "")
    if asked.startswith("Write the shortest form"):
        return (re.findall(r"\w+", answer) or [answer])[-1]
    if asked.startswith("Rewrite this question"):
        return question.split("\n")[0]
    if asked.startswith("Work out the reasoning"):
        return _worked(question, answer)
    if asked.startswith("Describe in one short phrase"):
        return _phrase(question)
    honest = _KNOWN.search(question) and "elephants" not in question
    return "7" if honest else "1"


def _worked(question: str, answer: str) -> str:
    found = re.search(r"(\d+)\+(\d+)-(\d+)", question)
    if not found:
        return f"I do not know. \\boxed{{{answer}}}"
    first, second, third = (int(number) for number in found.groups())
    both = first + second
    return f"{first}+{second}={both};{both}-{third}={both - third}\\boxed{{{both - third}}}"


def _phrase(question: str) -> str:
    if "Which digit" in question:
        return "reading one digit in a panel"
    if "largest" in question:
        return "comparing digits in a panel"
    return (
        "arithmetic without a picture" if re.search(r"\d", question) else "arithmetic with digits in a panel"
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        request = json.loads(self.rfile.read(min(size, _MAX_BYTES)))
        parts = [part["text"] for part in request["messages"][-1]["content"] if part["type"] == "text"]
        texts = {
            name: "\n".join(line.removeprefix("|").strip() for line in block.split("\n"))
            for name, block in _BLOCK.findall(parts[0])
        }
        message = {"role": "assistant", "content": reply(parts[-1], texts)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"total_tokens": 10}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serving() -> Iterator[str]:
    """Run the server on loopback during the block; yields its API root."""
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
