"""A stage's process ends when its work is done, even if other threads are running."""

import os
import subprocess
import sys

from chain.job import Task
from core.files import write_json
from core.strict import Strict
from core.training.job import Job


def test_a_thread_that_a_reward_left_does_not_keep_the_process(tmp_path):
    (tmp_path / "leaves.py").write_text(
        "import threading, time\n"
        "def work(cfg, job):\n"
        "    threading.Thread(target=time.sleep, args=(600,), name='left').start()\n"
        "    print('saved', flush=True)\n"
    )
    task = Task.of("leaves:work", Strict(), Job(stage="leaves", out=tmp_path))
    write_json(tmp_path / "job.json", task)
    code = (
        f"import sys, chain.worker as worker; worker.THREADS_END_S = 0.2; "
        f"sys.exit(worker.main([{str(tmp_path / 'job.json')!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "saved\n")
    assert "exited although these threads were running: left" in done.stderr
