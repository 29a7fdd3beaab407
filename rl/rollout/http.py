"""Requests to rollout servers: persistent connections, retries, the run's token, and errors with remedies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from rl.rollout import access

TRIES = 3
"""Number of retries of a request for completions after a lost connection."""
RETRY_PAUSE_S = 0.2
CONNECT_S = 10.0
"""Seconds to connect to a server; a machine that is down does not refuse a connection."""
BUSY_S = (2.0, 10.0)
"""Seconds to connect to a serving server and to get its health; a CPU engine answers only after its current step."""
IDLE_S = (2.0, 2.0)
"""The same for a lost server, which is idle and answers at once."""


class RolloutError(RuntimeError):
    """A rollout server refused a request or did not answer. The message has the URL and the server's reply."""


class ServerLost(RolloutError):
    """The server has ended or is ending; another server can take the request."""


class Http:
    """JSON to and from rollout servers. Safe to use from many threads.

    Args:
        token: the run's token; None for servers without a token, which are then trusted without proof.
        timeout_s: seconds after which a server without an answer is lost.
        connections: most persistent connections to each server.
        key: the key of a server that is not ours, which proves nothing; given instead of a token.
    """

    def __init__(
        self, token: str | None, timeout_s: float, connections: int = 1, key: str | None = None
    ) -> None:
        self.timeout = (CONNECT_S, timeout_s)
        retries = _LostConnections(total=TRIES - 1, allowed_methods=None, backoff_factor=RETRY_PAUSE_S)
        self._kept = _session(token, timeout_s, retries, connections)
        # Requests that must not be repeated use a new connection: the server may be closing a persistent one.
        self._single = _session(token, timeout_s)
        self._single.headers.update(access.headers(key))
        self._busy, self._idle = _session(token, BUSY_S[1]), _session(token, IDLE_S[1])

    def close(self) -> None:
        """Close the kept connections."""
        self._kept.close()

    def ask(self, url: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST a request that may be repeated; it is sent again after a lost connection."""
        return self._send(self._kept, "POST", url, path, body)

    def tell(self, url: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST once."""
        return self._send(self._single, "POST", url, path, body)

    def get(self, url: str, path: str) -> dict[str, Any]:
        """GET once."""
        return self._send(self._single, "GET", url, path, None)

    def lines(self, url: str, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        """POST once; the lines of a streamed reply as they arrive. Raises as `tell`."""
        try:
            with self._single.post(f"{url}/{path}", json=body, timeout=self.timeout, stream=True) as response:
                if not response.ok:
                    raise RolloutError(f"{url}/{path}: HTTP {response.status_code}: {response.text[:2000]}")
                response.encoding = "utf-8"
                yield from response.iter_lines(decode_unicode=True)
        except requests.RequestException as error:
            raise ServerLost(f"{url}/{path}: no answer ({type(error).__name__}: {error})") from error

    def gone(self, url: str) -> bool:
        """Whether a server refuses connections or reports to be unhealthy; a busy server may answer slowly."""
        try:
            return not self._busy.get(f"{url}/health", timeout=BUSY_S).ok
        except requests.ConnectionError:
            return True
        except requests.RequestException:
            return False

    def healthy(self, url: str, busy: bool = False) -> bool:
        """Whether a server reports to be healthy: at once, or if it may be `busy`, after its current step."""
        session, timeout = (self._busy, BUSY_S) if busy else (self._idle, IDLE_S)
        try:
            return session.get(f"{url}/health", timeout=timeout).ok
        except requests.RequestException:
            return False

    def _send(self, session: Any, method: str, url: str, path: str, body: Mapping[str, Any] | None) -> dict:
        """The reply's JSON. Raises ServerLost if there is none or the server is dying, RolloutError for a refusal."""
        try:
            response = session.request(method, f"{url}/{path}", json=body, timeout=self.timeout)
        except requests.RequestException as error:
            raise ServerLost(
                f"{url}/{path}: no answer ({type(error).__name__}: {error}). Is the rollout server up? See its log. "
                "If it only takes longer, raise servers.request_timeout_s."
            ) from error
        if response.ok:
            return response.json() if response.content else {}
        dying = response.status_code >= 500 and self.gone(url)
        kind = ServerLost if dying else RolloutError
        raise kind(f"{url}/{path}: HTTP {response.status_code}: {response.text[:2000]}")


class _LostConnections(urllib3.Retry):
    """Retries requests after a lost connection, but not after a timeout."""

    def increment(self, method=None, url=None, response=None, error=None, _pool=None, _stacktrace=None):
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _session(
    token: str | None, proof_s: float, retries: urllib3.Retry | None = None, connections: int = 0
) -> requests.Session:
    """A session with `connections` persistent connections to each server; 0: a new connection per request."""
    session = requests.Session()
    session.trust_env = False  # no proxy, and no credentials of ~/.netrc instead of the token
    session.headers.update(access.headers(token))
    if not connections:
        session.headers["Connection"] = "close"
    limits = {"max_retries": retries or urllib3.Retry(0), "pool_maxsize": connections or 1}
    adapter = _Adapter(token, proof_s, bool(connections), **limits)
    session.mount("http://", adapter)
    return session


class _Adapter(HTTPAdapter):
    """Opens only connections to servers that prove within `proof_s` seconds that they know the token.

    Without `keeps`, no request uses the connection of an earlier one.
    """

    def __init__(self, token: str | None, proof_s: float, keeps: bool, **options: Any) -> None:
        self.token, self.proof_s, self.keeps = token, proof_s, keeps
        super().__init__(**options)

    def send(self, *arguments: Any, **named: Any) -> requests.Response:
        """As the base class."""
        if not self.keeps:
            self.poolmanager.clear()  # urllib3 ignores the request's own `Connection: close`
        return super().send(*arguments, **named)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        token, proof_s = self.token, self.proof_s
        if not token:
            return

        class Proven(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                try:
                    self.sock.settimeout(proof_s)  # a busy server answers after its current step
                    access.demand_proof(self.sock, self.host, self.port, str(token))
                except TimeoutError as error:
                    self.close()
                    raise ReadTimeoutError(None, self.host, "no proof in time") from error  # type: ignore[arg-type]
                except Exception as error:
                    self.close()
                    raise NewConnectionError(self, str(error)) from error

        class Pool(urllib3.HTTPConnectionPool):
            ConnectionCls = Proven

        self.poolmanager.pool_classes_by_scheme = {"http": Pool}
