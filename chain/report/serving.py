"""`posttrain report --serve`: the report of a run, written again for every look, on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from chain.report.data import build
from chain.report.page import page

REFRESH_S = 10
"""Seconds after which a browser asks again."""
_HOSTS = ("127.0.0.1", "localhost")


@contextmanager
def serving(run_dir: Path, port: int = 0) -> Iterator[str]:
    """Serve the report of `run_dir` while the block runs; yields the URL. Raises ConfigError for another folder.

    Only this machine can reach it. A request with another Host is refused: a web page must not read it by a name that
    it has pointed at 127.0.0.1.
    """
    build(run_dir)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in _HOSTS or self.path != "/":
                self.send_error(404)
                return
            with lock:
                data = page(build(run_dir), run_dir).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Refresh", str(REFRESH_S))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="report", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
