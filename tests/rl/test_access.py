"""Who may ask a rollout server, and whom a client trusts."""

import asyncio
import json
import os
import socket
import threading

import pytest

from core.strict import ConfigError
from rl.rollout import access
from rl.rollout.http import Http, ServerLost

TOKEN, PORT = "the token", 8000


def ask(path, header=None, kind="http", query=""):
    """The status with which the guard answers, None if it lets the request through; and the JSON."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "query_string": query.encode(), "server": ("127.0.0.1", PORT)}
    scope["headers"] = [(b"authorization", header.encode())] if header else []
    asyncio.run(access.Guard(app)(scope, None, send))
    assert bool(reached) != bool(sent)
    if not sent:
        return None, None
    if kind == "websocket":
        return sent[0]["code"], None
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv(access.TOKEN, TOKEN)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"bearer {TOKEN}", TOKEN, "Bearer", "Bearer t\u00fc"]
)
@pytest.mark.parametrize("path", ["/health", "/update_weights", "/v1/models", "/collective_rpc", "/nothing"])
def test_every_path_wants_the_token(path, header):
    assert ask(path, header)[0] == 401


def test_the_token_opens_what_the_client_needs_and_nothing_else():
    assert [ask(path, f"Bearer {TOKEN}")[0] for path in sorted(access.PATHS)] == [None] * len(access.PATHS)
    for path in (
        "/collective_rpc",
        "/pause",
        "/abort_requests",
        "/v1/load_lora_adapter",
        "/health/",
        "//health",
    ):
        assert ask(path, f"Bearer {TOKEN}")[0] == 404
    assert ask("/v1/realtime", kind="websocket")[0] == 1008
    assert ask("", kind="lifespan") == (None, None)


def test_a_server_proves_that_it_knows_the_token_without_showing_it():
    status, reply = ask(access.PROOF, query="challenge=abc")
    assert (status, reply) == (200, {"proof": access.proof(TOKEN, PORT, "abc")})
    assert TOKEN not in json.dumps(reply)
    assert access.proof(TOKEN, PORT, "abc") != access.proof(TOKEN, PORT + 1, "abc")


@pytest.mark.parametrize("knows", ["another token", "the token of another port"])
def test_a_client_shows_its_token_to_nobody_who_does_not_know_it(knows):
    """A foreign program on the port, and one that passes the challenge on to another server of the run."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]

        def answer():
            line, _ = foreign.accept()
            with line:
                heard.append(line.recv(4096))
                challenge = heard[0].decode().partition("challenge=")[2].split()[0]
                token, at = ("another", port) if knows == "another token" else (TOKEN, port + 1)
                body = json.dumps({"proof": access.proof(token, at, challenge)}).encode()
                line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                heard.append(line.recv(4096))

        thread = threading.Thread(target=answer)
        thread.start()
        http = Http(TOKEN, 10)
        with pytest.raises(ServerLost, match="does not know the run's token"):
            http.tell(f"http://127.0.0.1:{port}", "update_weights", {})
        http.close()
        thread.join()
    assert heard[1:] == [b""]
    assert TOKEN.encode() not in heard[0]


def test_servers_of_one_file_share_its_token(tmp_path, monkeypatch):
    monkeypatch.delenv(access.TOKEN)
    file = tmp_path / "new" / "token"
    first = access.pool_token(str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    assert first == access.pool_token(str(file)) == access.known_token(str(file))
    assert [path.name for path in file.parent.iterdir()] == ["token"]
    assert access.pool_token(None) != access.pool_token(None)
    assert access.known_token(None) is None
    os.chmod(file, 0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
        access.known_token(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        access.known_token(str(tmp_path / "missing"))
