"""Runs one function over many shards: in this process, in threads, in processes, or on Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from core.strict import ConfigError

EngineName = Literal["local", "ray"]
Do = Callable[[Any], Any]
_THREADS = 2
"""Batches of a model's step that run at once, so that the server has work while one batch ends."""


class Engine:
    """Runs functions over tasks; results come in any order.

    Args:
        name: local (processes of this machine) or ray (Ray Data; files must be on storage that all nodes share).
        workers: processes, or concurrent Ray tasks.
        address: of a Ray cluster; None starts one on this machine.
    """

    def __init__(self, name: EngineName, workers: int, address: str | None = None) -> None:
        self.name, self.workers, self.address = name, workers, address

    def each(self, do: Do, tasks: Sequence[Any], asks: bool = False) -> Iterator[Any]:
        """The results of `do(task)`. Tasks that ask a model run in threads of this process."""
        if not tasks:
            return
        if asks:
            yield from _in_threads(do, tasks)
        elif self.name == "ray":
            yield from self._on_ray(do, tasks)
        elif self.workers == 1 or len(tasks) == 1:
            yield from map(do, tasks)
        else:
            yield from _in_processes(do, tasks, self.workers)

    def _on_ray(self, do: Do, tasks: Sequence[Any]) -> Iterator[Any]:
        with _safe_path(), on_ray(self.workers, self.address) as ray:
            items = ray.data.from_items(list(tasks), override_num_blocks=len(tasks))
            made = items.map(lambda row: {"item": do(row["item"])}, concurrency=self.workers)
            for row in made.iter_rows():
                yield row["item"]


def _in_threads(do: Do, tasks: Sequence[Any]) -> Iterator[Any]:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(do, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_processes(do: Do, tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with (
        _safe_path(),
        ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _ends_with_parent) as pool,
    ):
        futures = [pool.submit(do, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise WorkerLost(
                "a worker process ended, most likely because the memory is full; finished shards are kept: run again, "
                "with fewer workers or a smaller shard_rows"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class WorkerLost(RuntimeError):
    """A worker process was killed."""


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


def _ends_with_parent() -> None:
    from core.processes import end_with_parent

    end_with_parent()


@contextmanager
def on_ray(workers: int, address: str | None) -> Iterator[Any]:
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
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
