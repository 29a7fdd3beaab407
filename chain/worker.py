"""The child process of one stage: `python -P -m chain.worker job.json`. The file holds a chain.job.Task."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path

from chain.errors import leave
from chain.job import DONE, Task, load
from core.files import read_json, sync_tree, write_text
from core.startup import ending, importing
from core.strict import parse

THREADS_END_S = 30.0
"""Time that other threads have to end after the work is done."""


def main(arguments: list[str]) -> int:
    """Run the task in the file that the only argument names; returns 0."""
    # chain.ranks requests a stack trace of a hung rank.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    task = parse(Task, read_json(Path(arguments[0])), arguments[0])
    if not task.vllm:
        keep_engine_out()
    # The whole run shares one cache of judge replies, so that a restarted stage does not repeat requests.
    out = Path(task.job.values["out"])
    os.environ.setdefault("POSTTRAIN_JUDGE_CACHE", str(out.parent / "judge.sqlite3"))
    try:
        with importing():
            load(task.train)
        task.run()
    except Exception as error:
        leave(error, out)
        raise
    if os.environ.get("RANK", "0") == "0":
        sync_tree(out)
        write_text(out / DONE, "")
    _end_in_time()
    ending()
    return 0


def _end_in_time() -> None:
    """End this process even if other threads are still running, such as a thread that a user's reward has started."""

    def end() -> None:
        left = [
            one.name for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon
        ]
        print(f"exited although these threads were running: {', '.join(left)}", file=sys.stderr, flush=True)
        os._exit(0)

    timer = threading.Timer(THREADS_END_S, end)
    timer.daemon = True
    timer.start()


def keep_engine_out() -> None:
    """Make `import vllm` fail in this process.

    TRL imports vLLM if it is installed. The import takes three CPU-seconds, and vLLM patches transformers classes that
    training uses.
    """
    sys.modules.setdefault("vllm", None)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
