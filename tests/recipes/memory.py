"""How much memory this process and everything it started takes together, as measured while steps run."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
PERIOD_S = 0.5


class MemoryWatch:
    """The largest memory of the process tree in each step, in bytes.

    A page that several processes map counts once (Linux' proportional set size). Mapped files count although the
    system could drop them, and so do files in shared memory that nobody maps.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._what: dict[str, str] = {}
        self._shared_before = _shared_files()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure while the block runs; print its peak, what it was made of, and the time."""
        done = threading.Event()
        thread = threading.Thread(target=self._measure, args=(name, done), daemon=True)
        started = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            seconds = time.monotonic() - started
            print(
                f"{name}: at most {self.peaks[name] / 2**30:.1f} GiB ({self._what[name]}), {seconds:.0f} s",
                flush=True,
            )

    def _measure(self, name: str, done: threading.Event) -> None:
        while True:
            total, words = self._now()
            if total >= self.peaks.get(name, 0):
                self.peaks[name], self._what[name] = total, words
            if done.wait(PERIOD_S):
                return

    def _now(self) -> tuple[int, str]:
        """Bytes at this moment, and in words how many are of which kind and of the two largest processes."""
        kinds = dict.fromkeys(("Pss_Anon", "Pss_File", "Pss_Shmem"), 0)
        largest: list[tuple[int, str]] = []
        me = psutil.Process(os.getpid())
        for process in [me, *me.children(recursive=True)]:
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                command = " ".join(process.cmdline()[3:6])
            except (OSError, psutil.Error):
                continue  # it has ended
            if not lines:
                continue
            own = {key: 1024 * int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
            for kind in kinds:
                kinds[kind] += own[kind]
            largest.append((own["Pss"], command[:40]))
        unmapped = max(0, _shared_files() - self._shared_before - kinds["Pss_Shmem"])
        words = ", ".join(f"{name[4:].lower()} {size / 2**30:.1f}" for name, size in kinds.items())
        two = "; ".join(f"{size / 2**30:.1f} {command}" for size, command in sorted(largest)[:-3:-1])
        return sum(kinds.values()) + unmapped, f"{words}, unmapped {unmapped / 2**30:.1f}; {two}"


def _shared_files() -> int:
    usage = os.statvfs(SHARED_MEMORY)
    return (usage.f_blocks - usage.f_bfree) * usage.f_frsize
