"""`posttrain report --serve`: the report of a run on loopback; an open page asks for what has changed."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chain.report.data import build
from chain.report.page import content
from chain.report.pictures import Thumbnails
from chain.report.render import interactive, script_json

REFRESH_S = 10
"""Seconds after which an open page asks again."""
_HOSTS = ("127.0.0.1", "localhost")
CONTENT = "content.json"
"""What the page asks for, beside itself."""


@contextmanager
def serving(run_dir: Path, port: int = 0) -> Iterator[str]:
    """Serve the report of `run_dir` while the block runs; yields the URL. Raises ConfigError for another folder.

    Only this machine can reach it, and only who knows the URL can read it: its path is a random token, because other
    accounts of the machine reach the port as well. A request with another Host is refused: a web page must not read the
    report by a name that it has pointed at 127.0.0.1.
    """
    build(run_dir)
    lock, thumbnails = threading.Lock(), Thumbnails()
    home = f"/{secrets.token_urlsafe(18)}/"

    def newest() -> dict[str, Any]:
        with lock:
            found = content(build(run_dir), run_dir, thumbnails)
        found["head"]["facts"].pop()  # the time at which this was made; the page has a clock of its own
        return {**found, "live": REFRESH_S}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            known = secrets.compare_digest(self.path[: len(home)].encode(), home.encode())
            name = self.path[len(home) :]
            if host not in _HOSTS or not known or name not in ("", CONTENT):
                self.send_error(404)
                return
            found = newest()
            if not name:
                self._send("text/html", interactive(found["head"]["title"], found, live=True))
            else:
                self._send("application/json", script_json(found))

        def _send(self, kind: str, text: str) -> None:
            data = text.encode()
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            known = self.headers.get("If-None-Match") == tag
            self.send_response(304 if known else 200)
            self.send_header("ETag", tag)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", "0" if known else str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(b"" if known else data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="report", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{home}"
    finally:
        server.shutdown()
        server.server_close()
