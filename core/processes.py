"""Child processes: started, stopped, and never left behind.

`start` puts a guard between this process and its child: `python processes.py PARENT COMMAND...`. The guard ends the
child when this process ends, for whatever reason, and kills the child's remaining descendants after a grace period.
It exits with the child's exit code or by the child's signal, so `Popen.returncode` is that of the child.

The guard runs this file directly, so the file imports only the standard library at its top.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

GRACE_S = 15.0
"""Seconds until a child that was asked to end is killed."""
LOOK_S = 1.0
"""Seconds between two checks of the guard whether its parent is alive. Signals wake it at once."""
LAST_LINES = 40
SETTLED_S = 60.0
"""Seconds. A younger file in shared memory may have been created but not yet mapped by its user."""
SHARED_MEMORY = Path("/dev/shm")
LOOPBACK = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
"""The loopback interface's name, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""

_ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ASKED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_WATCHED = {*_ASKED, signal.SIGCHLD, signal.SIGUSR1}
_LAUNCHER_NAMES = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    )
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
_PREFIX, _LOCK = "sailvl2-", "in-use"
_LEFTOVERS = re.compile(
    r"(?:sem\.loky-|torch_|__KMP_REGISTERED_LIB_)(?P<pid>\d+)[-_].*|(?:psm_|sem\.|nccl-|deepspeed_|shm_name_).*"
)
"""Names that Python, joblib, torch, OpenMP, NCCL and DeepSpeed give their files in shared memory; some contain the
process id."""


def extensions_folder() -> Path:
    """The folder in which DeepSpeed builds its operators, one per virtual environment. Two environments with one folder
    would rebuild each other's operators in turns, behind one lock."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions"))


def inherited_environment() -> dict[str, str]:
    """This process's environment without the variables by which torchrun and accelerate turn children into ranks."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    } | {
        # Our packages have common names. `-P` for every descendant, and our folder before a PYTHONPATH of the user's.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves a trace in the log
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin while they wait take CPU time from other processes: on two busy cores the tiny core's
        # pre-training took 60 CPU-seconds with spinning and 15 without.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def start(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    grace_s: float = GRACE_S,
    folder: Path | None = None,
) -> subprocess.Popen:
    """Start a command whose output is appended to `log`; it ends with this process at the latest.

    `folder` is its working directory; None: this process's.

    The command has its own session, so that Ctrl-C reaches only this process, which then stops the child in order.
    Signals must go to the guard, which forwards them: use `stop` and `kill` of this module.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", __file__, str(os.getpid()), str(grace_s), *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )


def stop(*processes: subprocess.Popen, grace_s: float = GRACE_S) -> None:
    """End children and all their descendants; return when all have ended. Safe to call twice."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + grace_s + LOOK_S  # the guard itself kills after the grace period
    for process in processes:
        if not ended(process, deadline - time.monotonic()):
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a child and all its descendants at once."""
    below = _descendants(process.pid) if process.poll() is None else []
    process.kill()
    _kill_all(below)
    process.wait()


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends.

    `parent` is the process id of that thread's process, which may have ended before this call.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def ask_for_trace(process: subprocess.Popen) -> None:
    """Make a child that registered SIGUSR1 with faulthandler write the stacks of its threads to its log."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)


def ended(process: subprocess.Popen, patience_s: float) -> bool:
    """Whether the process ends within `patience_s` seconds."""
    try:
        process.wait(max(0.0, patience_s))
    except subprocess.TimeoutExpired:
        return False
    return True


def how_it_ended(code: int) -> str:
    """A return code in words: `ended with exit code 3`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The last lines of a text file, with undecodable bytes replaced; if it cannot be read, the reason."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except OSError as error:
        return f"({log} cannot be read: {error.strerror})"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def held_folder(root: Path) -> Iterator[Path]:
    """A new folder of mode 0700 in `root`, removed at the end of the block, or by `remove_leftovers` if this process
    is killed first."""
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as folder,
        Path(folder, "new").open("wb") as lock,
    ):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(Path(folder, _LOCK))
        yield Path(folder).resolve()


def remove_leftovers(*roots: Path) -> list[str]:
    """Remove leftovers of this user's killed processes; return their paths.

    Leftovers are folders of `held_folder` that no process holds, and semaphores and segments in shared memory. A file
    in shared memory with a process id in its name is removed if that process has ended; any other one if no process
    has it mapped. Processes of another container with the same shared memory are invisible here. So a file without an
    id stays for a minute, the time in which its user maps it.

    Args:
        roots: folders to search; default: shared memory and the folder of temporary files.
    """
    mapped: set[int] | None = None
    removed = []
    for root in roots or (SHARED_MEMORY, Path(tempfile.gettempdir())):
        for path in sorted(root.glob("*")) if root.is_dir() else []:
            if path.name.startswith(_PREFIX):
                removed += [str(path)] if _remove_if_left(path) else []
            elif found := _LEFTOVERS.fullmatch(path.name):
                mapped = _mapped_inodes() if mapped is None and not found["pid"] else mapped
                removed += [str(path)] if _unlink_if_left(path, found["pid"], mapped or set()) else []
    return removed


def _remove_if_left(folder: Path) -> bool:
    """Remove a held folder that no process holds any more; a folder that cannot be read stays."""
    with contextlib.suppress(OSError):
        if folder.lstat().st_uid == os.getuid() and not (folder / _LOCK).is_symlink():
            with (folder / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                return True
    return False


def _unlink_if_left(file: Path, pid: str | None, mapped: set[int]) -> bool:
    with contextlib.suppress(OSError):
        status = file.lstat()
        used = (
            _alive(int(pid)) if pid else time.time() - status.st_mtime < SETTLED_S or status.st_ino in mapped
        )
        if status.st_uid == os.getuid() and not used:
            file.unlink()
            return True
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _mapped_inodes() -> set[int]:
    """Inodes of the files in shared memory that processes have mapped.

    Names do not serve: a semaphore's mapping has a different name from its file.
    """
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            for line in maps.read_text(errors="replace").splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    found.add(int(line.split()[4]))
    return found


def _descendants(pid: int) -> list:
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill_all(found: list) -> None:
    import psutil

    for one in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(found, timeout=5)


def _guard(parent: int, grace_s: float, command: Sequence[str]) -> int:
    """Run the command until it ends, a signal asks this process to end, or the parent ends; return the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become children of the guard
    if os.getppid() != parent:
        print(f"process {parent}, which started this command, has ended", file=sys.stderr)
        return 1
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=_prepare_child)
    asked: float | None = None
    while child.poll() is None:
        number = signal.sigtimedwait(_WATCHED, LOOK_S)
        if number and number.si_signo == signal.SIGUSR1:
            child.send_signal(signal.SIGUSR1)
        if asked is None and ((number and number.si_signo in _ASKED) or os.getppid() != parent):
            asked = time.monotonic()
            _signal_group(child.pid, signal.SIGTERM)
        if asked is not None and time.monotonic() - asked > grace_s:
            _signal_group(child.pid, signal.SIGKILL)
    _kill_all(_descendants(os.getpid()))
    remove_leftovers()
    return child.returncode


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the command must also end if the guard is killed


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def main(arguments: Sequence[str]) -> int:
    """The guard's process. Ends by the signal that ended the command."""
    code = _guard(int(arguments[0]), float(arguments[1]), arguments[2:])
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL cannot have a handler
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
