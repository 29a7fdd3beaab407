"""Runs one function over many shards: in this process, in threads, in processes, or on Ray Data."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from core.processes import end_with_parent
from core.strict import ConfigError

EngineName = Literal["local", "ray"]
Do = Callable[[Any], Any]
_THREADS = 2
"""Batches of a model's step that run at once, so that the server has work while one batch ends."""


class WorkerLost(RuntimeError):
    """A worker process was killed."""


class Engine:
    """Runs functions over tasks during a `with` block; results come in any order.

    Args:
        name: local (processes of this machine) or ray (Ray Data; files must be on storage that all nodes share).
        workers: processes, or concurrent Ray tasks.
        address: of a Ray cluster; None starts one on this machine.
    """

    def __init__(self, name: EngineName, workers: int, address: str | None = None) -> None:
        self.name, self.workers, self.address = name, workers, address
        self._stack = ExitStack()
        self._processes: Any = None
        self._ray: Any = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._processes = self._ray = None
        self._stack.close()

    def each(self, do: Do, tasks: Sequence[Any], asks: bool = False) -> Iterator[Any]:
        """The results of `do(task)`. Tasks that ask a model run in threads of this process.

        Raises WorkerLost if a process was killed, and what `do` raises.
        """
        if asks:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(_THREADS) as threads:
                yield from _submitted(threads, do, tasks)
        elif self.name == "ray" and tasks:
            yield from self._on_ray(do, tasks)
        elif self.workers == 1 or len(tasks) <= 1:
            yield from map(do, tasks)
        else:
            yield from self._in_processes(do, tasks)

    def _in_processes(self, do: Do, tasks: Sequence[Any]) -> Iterator[Any]:
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool
        from multiprocessing import get_context

        if self._processes is None:
            self._stack.enter_context(_safe_path())
            pool = ProcessPoolExecutor(self.workers, get_context("spawn"), end_with_parent, (os.getpid(),))
            self._processes = self._stack.enter_context(pool)
        try:
            yield from _submitted(self._processes, do, tasks)
        except BrokenProcessPool:
            raise WorkerLost(
                "a worker process ended, most likely because the memory is full; finished shards are kept: run again, "
                "with fewer workers or a smaller shard_rows"
            ) from None

    def _on_ray(self, do: Do, tasks: Sequence[Any]) -> Iterator[Any]:
        if self._ray is None:
            self._stack.enter_context(_safe_path())
            self._ray = self._stack.enter_context(_ray(self.workers, self.address))
        # Tasks travel pickled: Ray Data would try to convert them to Arrow columns.
        items = [{"task": pickle.dumps(task)} for task in tasks]
        made = self._ray.data.from_items(items, override_num_blocks=len(tasks)).map(
            lambda row: {"done": pickle.dumps(_outcome(do, pickle.loads(row["task"])))},
            compute=self._ray.data.TaskPoolStrategy(size=self.workers),
        )
        for row in made.iter_rows():
            result, error = pickle.loads(row["done"])
            if error is not None:
                raise error
            yield result


def _outcome(do: Do, task: Any) -> tuple[Any, Exception | None]:
    """The result or the error; Ray would wrap an error in its own, and its message would be lost."""
    try:
        return do(task), None
    except Exception as error:
        return None, error


def _submitted(pool: Any, do: Do, tasks: Sequence[Any]) -> Iterator[Any]:
    """The results as they come. After an error, tasks that have not begun are cancelled."""
    from concurrent.futures import as_completed

    futures = [pool.submit(do, task) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Child processes do not search the working directory for modules (`python -P`)."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _ray(workers: int, address: str | None) -> Iterator[Any]:
    """Ray, connected; a cluster that was started here is stopped at the end. Raises ConfigError if it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("engine: ray needs Ray Data: pip install 'sailvl2-posttrain[ray]'") from None
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {
            "num_cpus": workers,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, **({} if address else local)
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
