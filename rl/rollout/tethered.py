"""`python -P -m rl.rollout.tethered PID COMMAND...`: becomes COMMAND, which Linux ends when process PID does.

A runner that is killed can stop nothing; its servers would go on holding memory and ports. The kernel's signal comes
when the thread that started the command ends, so it is started from one that lives as long as it is needed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Replace this process by the command."""
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(f"process {parent}, which was to use this server, has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
