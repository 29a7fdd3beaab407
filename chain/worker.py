"""The child process of one stage: `python -P -m chain.worker job.json`, the file being a chain.job.Task."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path

from chain.errors import leave
from chain.job import DONE, Task
from core.files import read_json, sync_tree, write_text
from core.strict import parse

THREADS_END_S = 30.0
"""What threads have to end when the work is done."""


def main(arguments: list[str]) -> int:
    """Do the task in the file that the only argument names; returns 0."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # chain.ranks asks a hung rank where it is
    task = parse(Task, read_json(Path(arguments[0])), arguments[0])
    if not task.vllm:
        keep_engine_out()
    # One cache of the judges' replies for the whole run: a stage that starts again pays for nothing twice.
    out = Path(task.job.values["out"])
    os.environ.setdefault("POSTTRAIN_JUDGE_CACHE", str(out.parent / "judge.sqlite3"))
    try:
        task.run()
    except Exception as error:
        leave(error, out)
        raise
    if os.environ.get("RANK", "0") == "0":
        sync_tree(out)
        write_text(out / DONE, "")
    _end_in_time()
    return 0


def _end_in_time() -> None:
    """End this process although threads go on, such as one that a user's reward has started: the work is done."""

    def end() -> None:
        left = [
            one.name for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon
        ]
        print(f"ended with threads that did not end: {', '.join(left)}", file=sys.stderr, flush=True)
        os._exit(0)

    timer = threading.Timer(THREADS_END_S, end)
    timer.daemon = True
    timer.start()


def keep_engine_out() -> None:
    """Make `import vllm` fail in this process.

    TRL imports it wherever it is installed: three CPU-seconds, and vLLM changes classes of transformers that we are
    about to train with.
    """
    sys.modules.setdefault("vllm", None)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
