"""Servers of a run that end are started again at the same URL, up to a limit."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from core.processes import free_port
from core.strict import ConfigError, parse
from rl.rollout import access, server
from rl.rollout.config import PoolConfig
from rl.rollout.http import Http
from rl.rollout.server import ServerFailed, starting_pool
from rl.rollout.weights import weights_folder

HEALTHY = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from rl.rollout import access

PORT = int(sys.argv[1])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        token, header = os.environ[access.TOKEN], self.headers.get("Authorization")
        status, reply = access.verdict(path, query, header, PORT, token) or (200, {})
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""


@pytest.fixture
def started(monkeypatch):
    """Processes in the order they were started; the servers answer /health and no more."""
    processes = []
    start = server.RolloutServer.start

    def noted(self):
        start(self)
        processes.append(self.process)

    monkeypatch.setattr(server.RolloutServer, "start", noted)
    monkeypatch.setattr(server, "KEEP_S", 0.05)
    monkeypatch.setattr(
        server, "command", lambda cfg, model, port: [sys.executable, "-P", "-c", HEALTHY, str(port)]
    )
    return processes


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_that_ends_is_started_again_at_its_url_until_it_has_ended_once_too_often(started, tmp_path):
    cfg = PoolConfig(max_model_tokens=64, startup_timeout_s=20, max_restarts=1)
    with starting_pool(cfg, tmp_path, tmp_path) as wait:
        (url,) = wait()
        started[0].kill()
        until(lambda: len(started) == 2 and Http(os.environ[access.TOKEN], 5).healthy(url))
        assert wait() == [url]
        started[1].kill()
        with pytest.raises(ServerFailed, match="was killed by SIGKILL"):
            until(lambda: wait() and False)
    assert len(started) == 2


def test_a_server_that_shares_gpus_is_not_started_again_nor_waited_for(started, tmp_path, caplog):
    shared = PoolConfig(
        max_model_tokens=64, startup_timeout_s=20, device="gpu", share_gpus=True, max_restarts=3
    )
    with starting_pool(shared, tmp_path, tmp_path) as wait:
        wait()
        started[0].kill()
        with pytest.raises(ServerFailed, match="was killed by SIGKILL"):
            until(lambda: wait() and False)
    assert len(started) == 1
    assert "restarted 0 times and stays down (servers.share_gpus)" in caplog.text
    own = PoolConfig(max_model_tokens=64)
    waits = [shared, own, own.model_copy(update={"max_restarts": 0})]
    assert [cfg.patience_s for cfg in waits] == [0, own.startup_timeout_s, 0]
    assert shared.model_copy(update={"urls": ("http://127.0.0.1:8000",)}).patience_s > 0


def test_at_the_end_nothing_is_started_again(started, tmp_path):
    with starting_pool(
        PoolConfig(max_model_tokens=64, startup_timeout_s=20, count=2), tmp_path, tmp_path
    ) as wait:
        assert len(wait()) == 2
    assert [process.poll() is not None for process in started] == [True, True]


def test_ports_are_counted_up_from_the_first(started, tmp_path):
    port = free_port("127.0.0.1")
    cfg = PoolConfig(max_model_tokens=64, startup_timeout_s=20, first_port=port)
    with starting_pool(cfg, tmp_path, tmp_path) as wait:
        assert wait() == [f"http://127.0.0.1:{port}"]


def test_a_server_that_hangs_is_killed_and_started_again(started, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(server, "PROBE_S", 0.05)
    monkeypatch.setattr("rl.rollout.http.BUSY_S", (2.0, 2.0))
    cfg = PoolConfig(max_model_tokens=64, startup_timeout_s=20, hang_timeout_s=0.5)
    with starting_pool(cfg, tmp_path, tmp_path) as wait:
        (url,) = wait()
        time.sleep(1)  # for a first probe; without it, the server may take startup_timeout_s
        started[0].send_signal(signal.SIGSTOP)  # the guard alone: its child goes on
        for below in psutil.Process(started[0].pid).children():
            below.suspend()
        until(lambda: len(started) == 2 and Http(os.environ[access.TOKEN], 5).healthy(url))
    assert "did not answer for 0.5 s and was killed: starting it again" in caplog.text


def test_a_port_in_use_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        cfg = PoolConfig(max_model_tokens=64, startup_timeout_s=20, first_port=port)
        with (
            pytest.raises(
                ConfigError, match=f"first_port={port}: another program listens on 127.0.0.1:{port}"
            ),
            starting_pool(cfg, tmp_path, tmp_path),
        ):
            pass


def test_a_foreign_server_on_our_port_is_not_adopted_and_hears_no_token(started, tmp_path, monkeypatch):
    """It takes the port between our check and our server's start, and reports to be healthy."""
    heard = []
    port = free_port("127.0.0.1")

    class Foreign(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, dict(self.headers)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    foreign = ThreadingHTTPServer(("127.0.0.1", port), Foreign)
    threading.Thread(target=foreign.serve_forever, daemon=True).start()
    monkeypatch.setattr(server.processes, "port_is_free", lambda *_: True)
    pool = starting_pool(
        PoolConfig(max_model_tokens=64, startup_timeout_s=20, first_port=port), tmp_path, tmp_path
    )
    with pool as wait, pytest.raises(ServerFailed, match="Address already in use"):
        wait()
    foreign.shutdown()
    foreign.server_close()
    assert {path.partition("?")[0] for path, _ in heard} <= {access.PROOF}
    assert not [1 for _, headers in heard if "Authorization" in headers]


@pytest.mark.parametrize("url", ["http://gpu-c:8000", "http://10.0.0.3:8000"])
def test_servers_on_other_machines_need_a_folder_that_they_share(url):
    with pytest.raises(
        ConfigError, match=rf"reaches servers on this machine only, but urls has {url}; set weights_dir"
    ):
        parse(PoolConfig, {"max_model_tokens": 64, "urls": ["http://127.0.0.1:8000", url]})
    for remedy in ({"weights_dir": "/shared/weights"}, {"weights": "nccl"}):
        assert parse(PoolConfig, {"max_model_tokens": 64, "urls": [url], **remedy}).urls == (url,)


HOLDER = """
import sys, time
from rl.rollout.weights import weights_folder

with weights_folder(sys.argv[1]) as folder:
    (folder / "policy-1.safetensors").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_weights_that_a_killed_process_left_are_removed_by_the_next_and_those_in_use_are_not(tmp_path):
    command = [sys.executable, "-P", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        held = Path(process.stdout.readline().strip())
        with weights_folder(str(tmp_path)):
            assert (held / "policy-1.safetensors").exists()
        process.kill()
    (tmp_path / "sailvl2-of-something-else").mkdir()
    with weights_folder(str(tmp_path)) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "sailvl2-of-something-else"}


def test_weights_travel_through_the_chosen_folder_and_leave_nothing_there(tmp_path):
    with weights_folder(str(tmp_path / "new")) as folder:
        assert folder.parent == tmp_path / "new"
        (folder / "policy-1.safetensors").touch()
    assert list((tmp_path / "new").iterdir()) == []
