"""Mutual authentication of rollout servers and clients by the run's token.

The token is random and new for each pool of servers. Servers and learners get it in their environment, which other
users cannot read. Command lines, logs and files never contain it, except for a file that the user names
(servers.token_file). A server refuses every request without the token, and every path that the client does not need:
vLLM's `--api-key` guards only /v1, and vLLM's development endpoints write files and change weights.

Before a client sends the token over a new connection, the server must prove that it knows the token. So a foreign
program on a server's port gets neither token nor prompts. The proof includes the port, so that it cannot be relayed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from core.strict import ConfigError

TOKEN = "POSTTRAIN_SERVER_TOKEN"
"""Environment variable that holds the token."""
PROOF = "/proof"
GUARD = "rl.rollout.access.Guard"
"""Import path of the guard for vLLM's --middleware."""
PATHS = frozenset(
    (
        *("/health", "/version", "/weight_info", "/update_weight_version", "/get_world_size", "/server_info"),
        *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
        *("/reset_mm_cache", "/reset_encoder_cache", "/reset_prefix_cache", "/sleep", "/wake_up"),
        *("/v1/models", "/v1/chat/completions", "/v1/completions"),
        *("/v1/chat/completions/render", "/inference/v1/generate"),  # a teacher scores given tokens
    )
)
"""Paths that a server answers. Every other path is 404, above all /collective_rpc, which calls any engine method."""


def new_token() -> str:
    """A fresh random token."""
    return secrets.token_urlsafe(32)


def known_token(file: str | None) -> str | None:
    """The token that a client sends: from the environment, or else from the file; None if neither is given.

    Raises ConfigError if the file is missing or other users may read it.
    """
    return os.environ.get(TOKEN) or (read_token(Path(file)) if file else None)


def pool_token(file: str | None) -> str:
    """The token for servers that are about to start: the clients' token, or else a new one, stored in a named file."""
    if (token := os.environ.get(TOKEN)) or file is None:
        return token or new_token()
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # of mode 0600
    with os.fdopen(descriptor, "w") as out:
        out.write(new_token() + "\n")
    try:
        os.link(partial, path)  # atomic, and never replaces another server's token
    except FileExistsError:
        pass
    finally:
        os.unlink(partial)
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError if the file is missing or empty, or other users may read it."""
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"servers.token_file: {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"servers.token_file: {path}: other users may read it; chmod 600 {path}")
    if not token:
        raise ConfigError(f"servers.token_file: {path} is empty")
    return token


def headers(token: str | None) -> dict[str, str]:
    """The header that a request carries."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def may_ask(header: str | None, token: str) -> bool:
    """Whether a request's Authorization header holds the token; the comparison takes constant time."""
    return hmac.compare_digest((header or "").encode(), headers(token)["Authorization"].encode())


def proof(token: str, port: int, challenge: str) -> str:
    """The answer to a client's random challenge, which needs the token to compute."""
    return hmac.new(token.encode(), f"proof {port} {challenge}".encode(), hashlib.sha256).hexdigest()


def demand_proof(connection: Any, host: str, port: int, token: str) -> None:
    """Ask the server at the other end of a new socket for its proof. Raises PermissionError if the proof is wrong."""
    challenge = secrets.token_hex(16)
    request = f"GET {PROOF}?challenge={challenge} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
    connection.sendall(request.encode())
    with closing(HTTPResponse(connection, method="GET")) as reply:
        reply.begin()
        given = reply.read(4096) if reply.status == 200 else b""
    if not hmac.compare_digest(given, json.dumps({"proof": proof(token, port, challenge)}).encode()):
        raise PermissionError(
            "the program that answers there does not know the run's token: it is not a server of this run"
        )


def verdict(path: str, query: str, header: str | None, port: int, token: str) -> tuple[int, dict] | None:
    """The reply (status, JSON) to a request that the server refuses; None for a request that it serves."""
    if path == PROOF:
        challenge = parse_qs(query).get("challenge", [""])[0]
        return 200, {"proof": proof(token, port, challenge)}
    if not may_ask(header, token):
        return 401, {
            "error": f"the run's token is missing or wrong; clients read it from {TOKEN} or servers.token_file"
        }
    if path not in PATHS:
        return 404, {"error": f"no such path: {path}"}
    return None


Scope = Mapping[str, Any]
Channel = Callable[..., Awaitable[Any]]


class Guard:
    """The check in front of every path of an ASGI application, websockets included; the token is in the environment."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app, self.token = app, os.environ[TOKEN]

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        """Pass a request on to the application, or refuse it."""
        if scope["type"] not in ("http", "websocket"):  # the application's own start and end
            await self.app(scope, receive, send)
            return
        header = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None
        )
        refused = verdict(
            scope["path"], scope["query_string"].decode("latin-1"), header, scope["server"][1], self.token
        )
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            data = json.dumps(refused[1]).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
            await send({"type": "http.response.start", "status": refused[0], "headers": kind})
            await send({"type": "http.response.body", "body": data})
