"""vLLM's API server, with every engine process tied to the process that started it.

A server's guard (core.processes) ends the server's engine processes. If guard and server are both killed while an
engine starts, nothing is left to end it: it waits up to five minutes for a handshake with the dead server.
multiprocessing imports the main module first in each process that it spawns (not in one that it forks, see
rl.rollout.command). So this module ties an engine to its parent before any of vLLM's code runs.
"""

import os

from core.processes import end_with_parent
from core.startup import importing

PARENT = "POSTTRAIN_SERVER_PROCESS"
"""Environment variable that holds the id of the process that starts this one's children."""

if __name__ == "__mp_main__":
    end_with_parent(int(os.environ[PARENT]))
os.environ[PARENT] = str(os.getpid())

if __name__ == "__main__":
    with importing():
        from vllm.entrypoints.launchers.api_server.entry import main

    main()
