"""The processes that compare mathematical answers; rewards.mathpool starts this file as a script.

The keeper imports the algebra once, never computes, and forks a worker whenever it is asked to. A fork takes
milliseconds because the imports, and what parsing has learnt, are inherited; it is safe because the keeper has
one thread. From then on the worker and the keeper's parent talk to each other alone, so that neither a
stopped keeper nor a dead one delays an answer or the killing of a worker.

Messages are packets on Unix sockets. Keeper, on standard input: out "ready" or "error <text>"; in any packet,
a request for a worker; out "worker <pid>" with two file descriptors (the worker's socket and its pidfd), "lost
<text>" or "error <text>". Worker: in a JSON list [gold, prediction], prediction null asking only whether the gold is
readable; out an ANSWER. When the parent ends, the kernel kills the keeper; when the keeper ends, the workers.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rewards.equality import Outcome

MEMORY_BYTES = 2 << 30
"""A worker's address space; honest comparisons need a tenth of it."""
WORN_OUT_KB = 512 << 10
"""A worker that has once held so much makes room for a fresh one: caches must not eat a later job's share."""
ANSWER = struct.Struct("<B?d")
"""Place of the outcome in Outcome, whether the worker leaves after it, CPU seconds it has used in all."""
_PR_SET_PDEATHSIG = 1

WARM_UP = (
    ("x+1", "1+x"),
    (r"\frac{x^2-1}{2x}", r"\frac{(x-1)(x+1)}{x\cdot 2}"),
    (r"2\sqrt{3}+\sqrt[3]{5}\pi", r"\sqrt{12}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&x\end{bmatrix}"),
    (r"[1,\infty)", r"(-\infty,1)\cup(2,3]"),
    (r"\{1,x\}", r"\{x,1\}"),
    (r"(1,\frac{1}{2})", "(x,y)"),
    (r"x\le 2", r"2\ge x"),
    (r"1<x<2", "(1,2)"),
    ("y=2x+1", "y=1+2x"),
    (r"\sin^2 x+\cos(2x)", r"e^{x}\ln x+\log_2 8"),
    (r"3\frac{1}{2}x", r"-0.5x!"),
    (r"|x|+a_1", r"\binom{5}{2}x"),
    (r"\int_0^1 x\,dx", r"\sum_{k=1}^{3}k"),
    (r"x=1\text{ or }x=2", r"\pm 2x"),
    (r"15\pi\text{ cm}^2", r"60^\circ"),
    (r"4x^{\frac{3}{2}}", "4x^{3/2}"),
    (r"3\ln(5)-2e^{-3x}", r"\ln(5) \cdot 3x"),
    (r"(-3,\frac{9}{2})", "(4.5,y/2)"),
    (r"\{3,-5,x\}", "-5,x,3"),
    (r"\frac{2+4\sqrt{7}}{2}x", r"\frac{4\sqrt{7}}{2}x+1"),
)
"""Pairs that a keeper compares before it forks: its workers inherit the grammar's tables and sympy's caches."""


def main() -> None:
    """Import the algebra, say so, and fork workers until standard input ends."""
    _die_with_parent()
    control = socket.socket(fileno=0)
    # First on the path: a folder of the user's named `rewards` must not stand in for this package.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # Whatever is installed beside sympy: numbers of gmpy2 and flint abort the process where Python's raise.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
    try:
        from rewards.equality import compare_expressions

        for pair in WARM_UP:
            compare_expressions(*pair)
    except Exception as error:
        control.send(f"error {type(error).__name__}: {error}"[:1000].encode())
        raise SystemExit(1) from error
    gc.collect()
    gc.freeze()  # collections in the workers leave these pages alone, and so shared
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # the kernel buries the dead, even while the keeper is stopped
    control.send(b"ready")
    while control.recv(16):
        _fork_worker(control)


def _fork_worker(control: socket.socket) -> None:
    """Fork a worker and hand it to the parent."""
    keeper = os.getpid()
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        try:
            pid = os.fork()
            if pid == 0:
                _work(ours, keeper)
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            control.send(b"lost it was killed at birth")
            return
        except OSError as error:
            control.send(f"error no worker can be forked: {error}".encode())
            return
        socket.send_fds(control, [f"worker {pid}".encode()], [theirs.fileno(), pidfd])
        os.close(pidfd)


def _work(jobs: socket.socket, keeper: int) -> NoReturn:
    """Answer jobs until there are no more."""
    _die_with_parent()
    if os.getppid() != keeper:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Hold nothing of the keeper's: its sockets must end when it does.
    os.dup2(jobs.fileno(), 0)
    os.closerange(3, 256)
    jobs = socket.socket(fileno=0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if the machine runs out of memory, a worker goes before a trainer
        Path("/proc/self/oom_score_adj").write_text("1000")

    from rewards.equality import Outcome

    places = {outcome: place for place, outcome in enumerate(Outcome)}
    while packet := jobs.recv(1 << 20):
        outcome = _answer(*json.loads(packet))
        leaving = outcome == Outcome.OVER_MEMORY
        leaving = leaving or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > WORN_OUT_KB
        jobs.send(ANSWER.pack(places[outcome], leaving, time.process_time()))
        if leaving:
            break
    os._exit(0)


def _answer(gold: str, prediction: str | None) -> "Outcome":
    from rewards.equality import Outcome, compare, readable

    try:
        if prediction is None:
            return Outcome.EQUAL if readable(gold) else Outcome.BAD_GOLD
        return compare(gold, prediction)
    except MemoryError:
        return Outcome.OVER_MEMORY
    except Exception:  # sympy stumbles over it; a validated gold was read before, so it is the prediction
        return Outcome.BAD_GOLD if prediction is None else Outcome.UNPARSEABLE


def _die_with_parent() -> None:
    """Have the kernel kill this process, even a stopped one, when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
