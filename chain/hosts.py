"""Several hosts of one run: the leader decides what runs, the others start their share of a stage's ranks.

Every host runs `posttrain run`. The leader writes a secret, its address and its port into the run's folder, which all
hosts share; the others find them there, connect, and prove that they know the secret, as the leader does. Then they
wait: "start" has them start ranks, "stop" end them, "end" leave the run. A host whose connection closes, or is silent
for a minute, is lost.

The secret travels in no message (multiprocessing.connection's challenge); messages are JSON, nothing is unpickled.
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
"""In the run's folder while it runs: the leader's address and the secret."""
JOIN_S = 600.0
"""How long the hosts wait for one another at the start."""
PROVES_S = 10.0
"""A connection has this time to prove that it knows the secret: a port scanner, or a program that took over the port
in an old ticket, may stay silent."""
BEAT_S = 5.0
SILENCE_S = 60.0
"""A host that is silent for this long is lost."""
SHOWS_S = 30.0
"""Network file systems show a file to the other hosts within this time."""
WAKE_S = 0.2
LARGEST = 2**20
"""Of a message, bytes."""


_UNPROVEN = (multiprocessing.AuthenticationError, AssertionError, EOFError, OSError, ValueError)
"""Errors of a connection to a program that is not a host of this run; AssertionError: it sent no challenge."""


class HostLost(RuntimeError):
    """A host of the run is gone, or was told to stop."""


class LeaderEnded(RuntimeError):
    """The leader has ended without finishing, and with it the run."""


class Link:
    """Messages over one connection, and whether the other side still lives."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._heard = self._spoke = time.monotonic()

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError if the other side is gone."""
        with self._lock:
            self._spoke = time.monotonic()
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self, wait_s: float) -> dict[str, Any] | None:
        """The next message; None if none came in time. Raises EOFError or OSError if the other side is gone."""
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
    """A host that follows, as the leader knows it."""

    node: int
    host: str
    link: Link
    running: bool = False
    """It has been told to start ranks and has not yet said that they ended."""
    failure: str | None = None
    """How the last ones failed."""
    lost: str = ""
    """Why it is gone."""

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


class Cluster:
    """The leader's side: the other hosts of the run, once all have joined. A context manager.

    Args:
        place: the leader's.
        run_dir: the run's folder, under the same path on every host.
        facts: what must be equal on every host; names and values.
        display: tells who has joined.
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
        """Have every other host start `ranks` ranks on the job; return where they and the leader's meet.

        Raises HostLost if a host is gone.
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
        """Raise HostLost if a host is gone."""
        for follower in self.followers.values():
            if follower.lost:
                raise HostLost(
                    f"{follower} is lost: {follower.lost}. Run again to continue from the last finished stage"
                )

    def failed(self) -> bool:
        """Whether the ranks of another host have failed."""
        return any(follower.failure for follower in self.followers.values())

    def wait(self, patience_s: float | None) -> None:
        """Return when the ranks of every host have ended or the host is lost; at the latest after `patience_s`."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        with self._changed:
            while any(follower.running and not follower.lost for follower in self.followers.values()):
                if deadline is not None and time.monotonic() > deadline:
                    return
                self._changed.wait(WAKE_S)

    def stop(self) -> None:
        """Have every host end its ranks; return when they have, or when a host has taken too long."""
        for follower in self.followers.values():
            if follower.running:
                self._tell(follower, {"do": "stop"})
        self.wait(2 * GRACE_S)

    def failures(self) -> list[str]:
        """A text per host whose ranks have failed: its name, and how they failed."""
        return [
            f"on {follower}: {follower.failure}" for follower in self.followers.values() if follower.failure
        ]

    def _wait_for_all(self) -> None:
        others = set(range(1, self.nodes))
        self.display.line(
            f"node 0 of {self.nodes} leads: waiting for the others at {self._address}:{self._port}"
        )
        deadline = time.monotonic() + JOIN_S
        with self._changed:
            while missing := sorted(others - set(self.followers)):
                if self._refused:
                    raise ConfigError(self._refused[0])
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"node {', '.join(map(str, missing))} did not join within {JOIN_S:g} s: was `posttrain run` "
                        f"started there, and does it see {self.run_dir}? The run's folder must be on a file system "
                        "that all hosts share, under the same path (--runs-dir)"
                    )
                self._changed.wait(WAKE_S)
        self.display.line("hosts: " + ", ".join(str(self.followers[node]) for node in sorted(self.followers)))

    def _accept(self, token: bytes) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                # A thread each: a silent connection keeps no other out.
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
            connection.close()  # a port scanner, or a host with the secret of an earlier run, which will read again

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
        """Why this host cannot take part."""
        node = follower.node
        if not 0 < node < self.nodes or node in self.followers:
            known = f"it is {self.followers[node]}" if node in self.followers else f"there are {self.nodes}"
            return f"{follower} joins a run where {known}: number the hosts 0 to {self.nodes - 1}, each once"
        for name, ours in self.facts.items():
            if hello["facts"].get(name) != ours:
                theirs = hello["facts"].get(name)
                return f"{follower}: {name}: {theirs!r} there, {ours!r} on the leader; it must be the same everywhere"
        return None

    def _listen(self, follower: Follower) -> None:
        """Take what a host says until it or the run ends."""
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
        """Send everybody home and stop listening."""
        self._over.set()
        (self.run_dir / TICKET).unlink(missing_ok=True)
        text = ""
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            text = "it was interrupted" if interrupted else f"{type(error).__name__}: {error}"
        for follower in self.followers.values():
            self._tell(follower, {"do": "end", "ok": error is None, "text": text})
        with contextlib.suppress(OSError):  # wakes the thread that waits for one more host
            socket.create_connection((self._address, self._port), timeout=1).close()
        for thread in (self._accepting, *self._listening):
            thread.join(BEAT_S)
        self._listener.close()
        for follower in self.followers.values():
            follower.link.close()


def follow(place: Placement, run_dir: Path, facts: Mapping[str, Any], display: Display) -> None:
    """Be one of the other hosts: start and end ranks as the leader says, until it has finished.

    Raises ConfigError if the leader cannot be found or refuses, LeaderEnded if it fails, is interrupted or is gone.
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
                display.line("the ranks here have " + ("failed" if failure else "ended"))
            message = link.receive(WAKE_S)
            if message is None:
                continue
            if message["do"] == "welcome":
                display.line("joined; what runs is shown on the leader")
            elif message["do"] == "start":
                ranks = _start(message, place)
                stage = Path(message["job"]).parent.name.removesuffix(".partial")
                display.line(f"{stage}: ranks here: {message['ranks']}")
            elif message["do"] == "stop" and ranks is not None:
                ranks.stop()
            elif message["do"] == "end":
                if not message["ok"]:
                    raise LeaderEnded(f"the leader has ended: {message['text']}")
                display.line("the leader has finished")
                return
    except (EOFError, OSError) as error:
        raise LeaderEnded(f"the leader is gone: its connection ended ({error or 'closed'})") from None
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
    """The IPv4 address of this host's interface that a name or an address names, to listen there and nowhere else.

    A host's own name may resolve to loopback on itself; then it is the address of the only other interface.
    Raises ConfigError where there is no such interface or more than one.
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
        f"--master {name}: it is {named} here, which {'no other host reaches' if loopback else 'no interface has'}; "
        f"give the address where the leader listens, one of {', '.join(sorted(found))}"
    )


def _start(message: Mapping[str, Any], place: Placement) -> Ranks:
    """This host's ranks. Raises ConfigError if the leader's job does not appear here, or they cannot be started."""
    job_file, deadline = Path(message["job"]), time.monotonic() + SHOWS_S
    while not job_file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{job_file}, which the leader has written, has not appeared here within {SHOWS_S:g} s"
            )
        time.sleep(WAKE_S)
    meeting = Meeting(message["place"], place.nodes, place.node)
    try:
        return Ranks(job_file, message["ranks"], message["threads"], meeting)
    except OSError as error:
        raise ConfigError(f"cannot start ranks: {error}") from None


def _join(place: Placement, run_dir: Path) -> Connection:
    """A connection to the leader, both sides sure of each other."""
    deadline, tried = time.monotonic() + JOIN_S, "it has not been there yet"
    while time.monotonic() < deadline:
        try:
            ticket = read_json(run_dir / TICKET)
            connection = Client((ticket["address"], ticket["port"]))
        except FileNotFoundError:
            tried = f"there is no {run_dir / TICKET}"
        except OSError as error:
            tried = f"it does not answer at {ticket['address']}:{ticket['port']} ({error})"
        else:
            try:
                with _at_most(PROVES_S, connection):
                    answer_challenge(connection, ticket["token"].encode())
                    deliver_challenge(connection, ticket["token"].encode())
                return connection
            except _UNPROVEN:
                connection.close()
                tried = (
                    f"who answers at {ticket['address']}:{ticket['port']} does not know the secret in "
                    f"{run_dir / TICKET}: it may be an earlier run's"
                )
        time.sleep(WAKE_S)
    raise ConfigError(
        f"no leader within {JOIN_S:g} s: {tried}. Node 0 writes this file as it starts: is `posttrain run` with the "
        f"same recipe and name started there, and is {run_dir} on a file system that all hosts share, "
        "under the same path? --runs-dir names another place"
    )


@contextlib.contextmanager
def _at_most(seconds: float, connection: Connection) -> Iterator[None]:
    """A connection that is not done with the block by then is shut down: reading from it raises EOFError."""

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
    """A JSON file that only its owner can read, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    partial.write_text(json.dumps(values))
    partial.replace(path)
