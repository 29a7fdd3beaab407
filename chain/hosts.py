"""Several hosts of one run: the leader runs the loop, and the followers start their share of a stage's ranks.

Every host runs `posttrain run`. The leader writes a secret, its address and its port into the run's folder, which all
hosts share. The followers read that file and connect. Both sides prove that they know the secret. Then the followers
obey the leader's messages: "start" starts ranks, "stop" ends them, "end" leaves the run. A host is lost when its
connection closes or stays silent for a minute.

The secret itself is never sent (multiprocessing.connection's challenge). Messages are JSON; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from chain.display import Display
from chain.placement import Placement
from chain.ranks import Meeting, Ranks
from core.files import read_json
from core.processes import GRACE_S, free_port
from core.strict import ConfigError

TICKET = ".hosts.json"
"""File in the run's folder during the run: the leader's address, port and secret."""
JOIN_S = 600.0
"""Seconds that hosts wait for each other at the start."""
PROVES_S = 10.0
"""Seconds within which a connection must prove that it knows the secret. A port scanner, or a program that now uses the
port of an old ticket, may stay silent."""
BEAT_S = 5.0
SILENCE_S = 60.0
"""A host that stays silent for this long is lost."""
SHOWS_S = 30.0
"""Network file systems show a file to the other hosts within this time."""
WAKE_S = 0.2
LARGEST = 2**20
"""Largest message, bytes."""


_UNPROVEN = (multiprocessing.AuthenticationError, AssertionError, EOFError, OSError, ValueError)
"""Errors of a connection to a program that is not a host of this run. AssertionError: it did not send a challenge."""


class HostLost(RuntimeError):
    """A host of the run has disconnected, or was interrupted."""


class LeaderEnded(RuntimeError):
    """The leader has ended before the run was finished."""


class Link:
    """Messages and liveness of one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._heard = self._spoke = time.monotonic()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises OSError if the peer has disconnected."""
        with self._lock:
            self._spoke = time.monotonic()
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """The next message; None after `wait_s` of silence. Raises EOFError or OSError if the peer has disconnected."""
        if time.monotonic() - self._spoke > BEAT_S:
            self.send({"do": "beat"})
        if not self.connection.poll(wait_s):
            if time.monotonic() - self._heard > SILENCE_S:
                raise EOFError(f"nothing heard for {SILENCE_S:g} s")
            return None
        message = json.loads(self.connection.recv_bytes(LARGEST))
        self._heard = time.monotonic()
        return None if message["do"] == "beat" else message

    def close(self) -> None:
        self.connection.close()


@dataclass
class Follower:
    """The leader's record of one following host."""

    node: int
    host: str
    link: Link
    running: bool = False
    """Whether the leader has requested ranks whose end the host has not yet reported."""
    failure: str | None = None
    """How the latest ranks failed."""
    lost: str = ""
    """Why the host is lost; "" if it is connected."""

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


class Cluster:
    """The leader's side: the other hosts of the run, once all have joined. A context manager.

    Args:
        place: the leader's.
        run_dir: the run's folder, under the same path on every host.
        facts: what must be equal on every host; names and values.
        display: shows which hosts have joined.
    """

    def __init__(self, place: Placement, run_dir: Path, facts: Mapping[str, Any], display: Display) -> None:
        self.place, self.run_dir, self.facts, self.display = place, run_dir, facts, display
        self.nodes = place.nodes
        self.followers: dict[int, Follower] = {}
        self._refused: list[str] = []
        self._listening: list[threading.Thread] = []
        self._over = threading.Event()
        self._changed = threading.Condition()

    def __enter__(self) -> Cluster:
        token = secrets.token_hex(32)
        self._address = own_address(self.place.address)
        try:
            self._listener = Listener((self._address, self.place.port or 0), backlog=self.nodes)
        except OSError as error:
            raise ConfigError(
                f"--master: cannot listen at {self._address}, port {self.place.port or 'any'}: {error}"
            ) from None
        self._port = self._listener.address[1]
        ticket = {"address": self._address, "port": self._port, "token": token}
        _write_private(self.run_dir / TICKET, ticket)
        self._accepting = threading.Thread(
            target=self._accept, args=(token.encode(),), name="hosts-joining", daemon=True
        )
        self._accepting.start()
        try:
            self._wait_for_all()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(error)

    def start(self, job_file: Path, ranks: int, threads: int) -> Meeting:
        """Tell every follower to start `ranks` ranks of the job; return the rendezvous of all ranks.

        Raises HostLost if a host is lost.
        """
        self.check()
        port = free_port(self._address)
        meeting = Meeting(f"tcp://{self._address}:{port}", self.nodes)
        for follower in self.followers.values():
            follower.running, follower.failure = True, None
            self._tell(
                follower,
                {
                    "do": "start",
                    "job": str(job_file),
                    "ranks": ranks,
                    "threads": threads,
                    "place": meeting.place,
                },
            )
        self.check()
        return meeting

    def check(self) -> None:
        """Raise HostLost if a host is lost."""
        for follower in self.followers.values():
            if follower.lost:
                raise HostLost(
                    f"{follower} is lost: {follower.lost}. Run again to continue from the last finished stage"
                )

    def failed(self) -> bool:
        """Whether the ranks of another host have failed."""
        return any(follower.failure for follower in self.followers.values())

    def wait(self, patience_s: float | None) -> None:
        """Wait until every follower's ranks have ended or the follower is lost, but at most `patience_s` seconds."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        with self._changed:
            while any(follower.running and not follower.lost for follower in self.followers.values()):
                if deadline is not None and time.monotonic() > deadline:
                    return
                self._changed.wait(WAKE_S)

    def stop(self) -> None:
        """Tell every host to end its ranks; return when all have ended or after a time limit."""
        for follower in self.followers.values():
            if follower.running:
                self._tell(follower, {"do": "stop"})
        self.wait(2 * GRACE_S)

    def failures(self) -> list[str]:
        """One message per host whose ranks have failed."""
        return [
            f"on {follower}: {follower.failure}" for follower in self.followers.values() if follower.failure
        ]

    def _wait_for_all(self) -> None:
        others = set(range(1, self.nodes))
        self.display.line(
            f"node 0 of {self.nodes} leads: waiting for the other nodes at {self._address}:{self._port}"
        )
        deadline = time.monotonic() + JOIN_S
        with self._changed:
            while missing := sorted(others - set(self.followers)):
                if self._refused:
                    raise ConfigError(self._refused[0])
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"node {', '.join(map(str, missing))} did not join within {JOIN_S:g} s: start `posttrain run` "
                        f"there, and check that it sees {self.run_dir}. The run's folder must be on a file system "
                        "that all hosts share, under the same path (--runs-dir)"
                    )
                self._changed.wait(WAKE_S)
        self.display.line("hosts: " + ", ".join(str(self.followers[node]) for node in sorted(self.followers)))

    def _accept(self, token: bytes) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                # Each connection has its own thread, so that a silent connection does not block the others.
                threading.Thread(
                    target=self._admit, args=(self._listener.accept(), token), daemon=True
                ).start()

    def _admit(self, connection: Connection, token: bytes) -> None:
        try:
            with _at_most(PROVES_S, connection):
                deliver_challenge(connection, token)
                answer_challenge(connection, token)
                hello = json.loads(connection.recv_bytes(LARGEST))
            self._welcome(Link(connection), hello)
        except _UNPROVEN:
            connection.close()  # a port scanner, or a host with an old secret, which will read the ticket again

    def _welcome(self, link: Link, hello: Mapping[str, Any]) -> None:
        follower = Follower(hello["node"], hello["host"], link)
        with self._changed:
            problem = self._problem(follower, hello)
            link.send({"do": "end", "ok": False, "text": problem} if problem else {"do": "welcome"})
            if problem:
                self._refused.append(problem)
            else:
                self.followers[follower.node] = follower
            self._changed.notify_all()
        if problem:
            link.close()
            return
        thread = threading.Thread(
            target=self._listen, args=(follower,), name=f"node-{follower.node}", daemon=True
        )
        thread.start()
        self._listening.append(thread)

    def _problem(self, follower: Follower, hello: Mapping[str, Any]) -> str | None:
        """The reason why this host may not join; None if it may."""
        node = follower.node
        if not 0 < node < self.nodes or node in self.followers:
            known = (
                f"{self.followers[node]} has that number"
                if node in self.followers
                else f"there are {self.nodes} hosts"
            )
            return f"{follower} joins a run where {known}: number the hosts 0 to {self.nodes - 1}, each once"
        for name, ours in self.facts.items():
            if hello["facts"].get(name) != ours:
                theirs = hello["facts"].get(name)
                return f"{follower}: {name}: {theirs!r} there, {ours!r} on the leader; it must be the same everywhere"
        return None

    def _listen(self, follower: Follower) -> None:
        """Process a host's messages until the connection or the run ends."""
        try:
            while not self._over.is_set():
                message = follower.link.receive(WAKE_S)
                if message is None:
                    continue
                with self._changed:
                    if message["do"] == "ended":
                        follower.running, follower.failure = False, message["failure"]
                    elif message["do"] == "leave":
                        follower.lost = message["text"]
                    self._changed.notify_all()
        except (EOFError, OSError) as error:
            with self._changed:
                follower.lost = follower.lost or f"its connection ended ({error or 'closed'})"
                self._changed.notify_all()

    def _tell(self, follower: Follower, message: Mapping[str, Any]) -> None:
        try:
            follower.link.send(message)
        except OSError as error:
            follower.lost = follower.lost or f"it cannot be reached ({error})"

    def _end(self, error: BaseException | None) -> None:
        """Tell all followers that the run has ended, and stop listening."""
        self._over.set()
        (self.run_dir / TICKET).unlink(missing_ok=True)
        text = ""
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            text = "it was interrupted" if interrupted else f"{type(error).__name__}: {error}"
        for follower in self.followers.values():
            self._tell(follower, {"do": "end", "ok": error is None, "text": text})
        with contextlib.suppress(OSError):  # wakes the thread that waits for further hosts
            socket.create_connection((self._address, self._port), timeout=1).close()
        for thread in (self._accepting, *self._listening):
            thread.join(BEAT_S)
        self._listener.close()
        for follower in self.followers.values():
            follower.link.close()


def follow(place: Placement, run_dir: Path, facts: Mapping[str, Any], display: Display) -> None:
    """Follow the leader: start and end ranks on its request until the run ends.

    Raises ConfigError if the leader cannot be found or refuses this host, and LeaderEnded if the leader fails, is
    interrupted or disconnects.
    The ranks of this host never outlive this function.
    """
    display.line(f"node {place.node} of {place.nodes}: waiting for the leader, in {run_dir}")
    link = Link(_join(place, run_dir))
    ranks: Ranks | None = None
    try:
        link.send({"do": "join", "node": place.node, "host": socket.gethostname(), "facts": facts})
        while True:
            if ranks is not None and ranks.ended(0):
                failure, ranks = ranks.failure(), None
                link.send({"do": "ended", "failure": failure})
                display.line("the ranks on this host have " + ("failed" if failure else "ended"))
            message = link.receive(WAKE_S)
            if message is None:
                continue
            if message["do"] == "welcome":
                display.line("joined; the leader shows the progress")
            elif message["do"] == "start":
                ranks = _start(message, place)
                stage = Path(message["job"]).parent.name.removesuffix(".partial")
                display.line(f"{stage}: ranks on this host: {message['ranks']}")
            elif message["do"] == "stop" and ranks is not None:
                ranks.stop()
            elif message["do"] == "end":
                if not message["ok"]:
                    raise LeaderEnded(f"the leader has ended: {message['text']}")
                display.line("the leader has finished")
                return
    except (EOFError, OSError) as error:
        raise LeaderEnded(f"the leader is lost: its connection ended ({error or 'closed'})") from None
    except (KeyboardInterrupt, ConfigError) as error:
        text = "posttrain was interrupted there" if isinstance(error, KeyboardInterrupt) else str(error)
        with contextlib.suppress(OSError):
            link.send({"do": "leave", "text": text})
        raise
    finally:
        if ranks is not None:
            ranks.stop()
        link.close()


def own_address(name: str) -> str:
    """The IPv4 address of the local interface that `name` (a host name or address) refers to.

    A host may resolve its own name to loopback. Then the result is the address of the only other interface. Raises
    ConfigError if the interface does not exist or is ambiguous.
    """
    import psutil

    found = {
        one.address
        for addresses in psutil.net_if_addrs().values()
        for one in addresses
        if one.family == socket.AF_INET
    }
    try:
        named = socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(f"--master {name}: {error}; give an address of this host") from None
    loopback = named.startswith("127.")
    if loopback and name not in ("localhost", named):
        others = sorted(address for address in found if not address.startswith("127."))
        if len(others) == 1:
            return others[0]
    elif loopback or named in found:
        return named
    raise ConfigError(
        f"--master {name}: it resolves to {named} here, "
        f"{'which other hosts cannot reach' if loopback else 'which is not an address of this host'}; "
        f"give the address where the leader listens, one of {', '.join(sorted(found))}"
    )


def _start(message: Mapping[str, Any], place: Placement) -> Ranks:
    """Start this host's ranks. Raises ConfigError if the job file does not appear or the ranks cannot start."""
    job_file, deadline = Path(message["job"]), time.monotonic() + SHOWS_S
    while not job_file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{job_file}: the leader has written this file, but it did not appear here within {SHOWS_S:g} s"
            )
        time.sleep(WAKE_S)
    meeting = Meeting(message["place"], place.nodes, place.node)
    try:
        return Ranks(job_file, message["ranks"], message["threads"], meeting)
    except OSError as error:
        raise ConfigError(f"cannot start ranks: {error}") from None


def _join(place: Placement, run_dir: Path) -> Connection:
    """A mutually authenticated connection to the leader."""
    deadline, tried = time.monotonic() + JOIN_S, "no attempt was made"
    while time.monotonic() < deadline:
        try:
            ticket = read_json(run_dir / TICKET)
            connection = Client((ticket["address"], ticket["port"]))
        except FileNotFoundError:
            tried = f"{run_dir / TICKET} does not exist"
        except OSError as error:
            tried = f"the leader does not answer at {ticket['address']}:{ticket['port']} ({error})"
        else:
            try:
                with _at_most(PROVES_S, connection):
                    answer_challenge(connection, ticket["token"].encode())
                    deliver_challenge(connection, ticket["token"].encode())
                return connection
            except _UNPROVEN:
                connection.close()
                tried = (
                    f"the program at {ticket['address']}:{ticket['port']} does not know the secret in "
                    f"{run_dir / TICKET}: the file may be left from an earlier run"
                )
        time.sleep(WAKE_S)
    raise ConfigError(
        f"found no leader within {JOIN_S:g} s: {tried}. Node 0 writes {TICKET} when it starts: start `posttrain run` "
        f"there with the same recipe and name. {run_dir} must be on a file system that all hosts share, under the same "
        "path (--runs-dir)"
    )


@contextlib.contextmanager
def _at_most(seconds: float, connection: Connection) -> Iterator[None]:
    """Shut the connection down unless the block ends within `seconds`. Reading from it then raises EOFError."""

    def shut() -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _write_private(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, readable by its owner alone."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    partial.write_text(json.dumps(values))
    partial.replace(path)
