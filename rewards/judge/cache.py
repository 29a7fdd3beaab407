"""Judges' replies on disk, so that a resumed run does not repeat requests. Processes share one SQLite file.

Only replies are stored, never failures. If the cache cannot be read or written, judging continues without it and no row
is lost: the first error is logged, and all errors are counted.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.forks import PerProcess

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, reply TEXT NOT NULL, tokens INTEGER NOT NULL, made REAL NOT NULL
) WITHOUT ROWID
"""
_BUSY_S = 10.0
"""Longest wait for another process's write."""
_ASK_AT_ONCE = 500


class ReplyCache:
    """Replies by key. Safe from many threads and processes, and after a fork.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = ReplyCache(Path(folder, "judge.sqlite3"))
    ...     cache.put("key", "judge-7b", "yes", 12)
    ...     cache.get(["key", "other"])
    ...     cache.close()
    {'key': 'yes'}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors = 0
        """Reads and writes that failed."""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def get(self, keys: Sequence[str]) -> Mapping[str, str]:
        """Key -> reply, for the keys in the file."""
        found: dict[str, str] = {}
        for start in range(0, len(keys), _ASK_AT_ONCE):
            some = list(keys[start : start + _ASK_AT_ONCE])
            places = ",".join("?" * len(some))
            rows = self._do(f"SELECT key, reply FROM replies WHERE key IN ({places})", some)
            found.update((str(key), str(reply)) for key, reply in rows)
        return found

    def put(self, key: str, model: str, reply: str, tokens: int) -> None:
        """Store a reply. An earlier reply under the same key is kept."""
        row = (key, model, reply, tokens, time.time())
        self._do("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        """Close the file. The next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _do(self, statement: str, values: Sequence[object]) -> list[tuple]:
        try:
            with self._lock:
                if self._connection is None:
                    self._connection = self._open()
                return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self.errors += 1
            if self.errors == 1:
                log.warning(
                    "judge cache %s: %s: %s; judging continues without it. It needs a local disk with space, "
                    "and a file of its own",
                    self.path,
                    type(error).__name__,
                    error,
                )
            return []

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Each statement commits by itself, so that a killed run keeps all received replies.
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection


_caches: PerProcess[dict[str, ReplyCache]] = PerProcess(dict)


def cache_at(path: str | os.PathLike[str]) -> ReplyCache:
    """This process's single cache of a file."""
    whole = os.path.abspath(os.path.expanduser(path))
    return _caches().setdefault(whole, ReplyCache(Path(whole)))
