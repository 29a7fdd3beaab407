"""Starts the models of a curation that do not run yet."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from chain.curation.config import Curation, Server
from chain.job import Task, load
from chain.launch import run_job
from chain.recipe import CoreConfig
from core.files import atomic_dir
from core.manifest import hash_config
from core.training.job import Job


class Servers:
    """Starts servers at their first use and stops them at the end of the block.

    Args:
        curation: its folders are searched for cores and functions, and its seed builds cores.
        work: the curation's work folder, for cores that are built and for logs.
    """

    def __init__(self, curation: Curation, work: Path) -> None:
        self.curation, self.work, self._stack = curation, work, ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, name: str, server: Server) -> Server:
        """The server, running, with its base_url."""
        if server.start:
            url = self._stack.enter_context(load(server.start, self.curation.folders)())
            return server.model_copy(update={"base_url": url})
        assert server.core
        checkpoint = core_of(server.core, self.curation, self.work)
        url = self._served(name, server, checkpoint)
        from rl.rollout.access import TOKEN
        from rl.rollout.config import MODEL_NAME

        update = {"base_url": f"{url}/v1", "model": MODEL_NAME, "api_key_env": TOKEN}
        return server.model_copy(update=update)

    def _served(self, name: str, server: Server, checkpoint: Path) -> str:
        """The URL of a vLLM server that this process starts, with the token of this process."""
        from rl.rollout.access import TOKEN, new_token
        from rl.rollout.config import PoolConfig
        from rl.rollout.server import rollout_pool

        if TOKEN not in os.environ:
            os.environ[TOKEN] = new_token()
            self._stack.callback(os.environ.pop, TOKEN)
        pool = PoolConfig(
            device=server.device,
            dtype="bfloat16" if server.device == "gpu" else "float32",
            max_model_tokens=server.max_model_tokens,
        )
        return self._stack.enter_context(rollout_pool(pool, checkpoint, self.work / "logs" / name))[0]


def core_of(core: CoreConfig, curation: Curation, work: Path) -> Path:
    """The checkpoint folder of a core, which is built below the work folder unless that has been done."""
    if core.path is not None:
        return curation.place(core.path)
    same = hash_config({"core": core, "seed": curation.seed})
    folder = work / "cores" / same[:12]
    if not folder.exists():
        with atomic_dir(folder, same=same) as out:
            job = Job(stage="core", out=out, seed=curation.seed, folders=curation.folders)
            run_job(Task.of("chain.make:core", core, job, vllm=True), out, threads=core.threads)
    return folder / "checkpoint"
