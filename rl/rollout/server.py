"""Rollout workers as processes of their own: started, health-checked, started again when they die, and stopped.

After vLLM is imported in a process, transformers classes there are patched; a learner therefore never shares a
process with an engine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.processes import launcher_variables
from rl.config import PoolConfig
from rl.rollout.shm_engine import BACKEND

log = logging.getLogger(__name__)

KEEP_S = 1.0
"""Between two looks at whether the servers still run."""
MODEL_NAME = "policy"
TETHERED = (sys.executable, "-P", "-m", "rl.rollout.tethered")
"""What makes a server end with this process, however this process ends."""
NO_DOMAIN = "images-come-in-requests.invalid"
"""The only one that images may be fetched from. By default vLLM fetches any URL of a request, also of services that
only this machine can reach."""


class ServerFailed(RuntimeError):
    """A rollout server did not start, or ended while it was needed. The message holds the end of its log."""


class RolloutServer:
    """One rollout server process.

    Args:
        cfg: the pool's configuration.
        model: checkpoint folder whose architecture, tokenizer and template the server loads.
        log: file that takes its output.
        index: position in the pool, which picks the GPUs.
    """

    def __init__(self, cfg: PoolConfig, model: Path, log: Path, index: int = 0) -> None:
        self.cfg, self.model, self.log, self.index = cfg, model, log, index
        self.port = free_port(cfg.host) if cfg.first_port is None else cfg.first_port + index
        self.url = f"http://{cfg.host}:{self.port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.start()
        atexit.register(self.stop)

    def start(self) -> None:
        """Start the process, the first one or one in place of one that has ended; it has the same URL."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*TETHERED, str(os.getpid()), *command(self.cfg, self.model, self.port)],
                env=environment(self.cfg, self.index),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: its engine processes end with it
            )

    def wait_until_healthy(self) -> None:
        """Return once the server answers; raise ServerFailed if it ends or takes too long."""
        import requests

        deadline = time.monotonic() + self.cfg.startup_timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.25)
        self.stop()
        raise ServerFailed(
            f"rollout server not healthy after startup_timeout_s={self.cfg.startup_timeout_s:g}\n{self._log_end()}"
        )

    def check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise ServerFailed(f"rollout server ended with code {code}\n{self._log_end()}")

    def stop(self) -> None:
        """End the server and its children; safe to call twice."""
        atexit.unregister(self.stop)
        for sig, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, sig)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(10)

    def _log_end(self, lines: int = 30) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"last lines of {self.log}:", *text])


@contextmanager
def rollout_pool(cfg: PoolConfig, model: Path, log_dir: Path) -> Iterator[list[str]]:
    """Give the URLs of healthy rollout servers for `model`'s architecture; stop the ones we started at the end."""
    with starting_pool(cfg, model, log_dir) as wait:
        yield wait()


@contextmanager
def starting_pool(cfg: PoolConfig, model: Path, log_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Start the servers, and give a function that waits until they are healthy and returns their URLs.

    Servers that end after that are started again, each `max_restarts` times; the function raises ServerFailed once
    none is left. They come back with the weights of `model`: whoever asks them has to know (RolloutClient does).
    At the end of the block they are stopped; a thread that still waits for them then gets ServerFailed.
    """
    servers: list[RolloutServer] = []
    # A server that started by itself would take the GPU from under a learner whose turn it is.
    keeper = Keeper(servers, 0, "servers.share_gpus") if cfg.share_gpus else Keeper(servers, cfg.max_restarts)

    def wait() -> list[str]:
        if not servers:
            return [url.rstrip("/") for url in cfg.urls]
        if keeper.ident is None:  # it has not been started
            for server in servers:
                server.wait_until_healthy()
            keeper.start()
        if len(keeper.given_up) == len(servers):
            servers[-1].check_alive()
        return [server.url for server in servers]

    try:
        for index in range(0 if cfg.urls else cfg.count):
            # One by one: should the second fail to start, the first must be known to be stopped.
            servers.append(RolloutServer(cfg, model, log_dir / f"rollout-server-{index}.log", index))  # noqa: PERF401
        yield wait
    finally:
        keeper.end()
        for server in servers:
            server.stop()


class Keeper(threading.Thread):
    """Starts servers that have ended again. Lives as long as they are needed: they end with the thread that started
    them.

    Args:
        servers: to look after; all have been healthy.
        max_restarts: of each.
        limited_by: the setting that says so.
    """

    def __init__(
        self, servers: list[RolloutServer], max_restarts: int, limited_by: str = "servers.max_restarts"
    ) -> None:
        super().__init__(name="rollout-server-keeper", daemon=True)
        self.servers, self.max_restarts, self.limited_by = servers, max_restarts, limited_by
        self.given_up: set[str] = set()
        """URLs of servers that ended once too often."""
        self._restarts: dict[str, int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(KEEP_S):
            for server in self.servers:
                if server.url not in self.given_up and server.process.poll() is not None:
                    self._restart(server)

    def end(self) -> None:
        """Start nothing any more."""
        self._over.set()
        if self.is_alive():
            self.join()

    def _restart(self, server: RolloutServer) -> None:
        code, done = server.process.returncode, self._restarts.get(server.url, 0)
        if done == self.max_restarts:
            self.given_up.add(server.url)
            log.warning(
                "rollout server %s ended with code %s; it was restarted %d times and stays down (%s). See %s",
                *(server.url, code, done, self.limited_by, server.log),
            )
            return
        log.warning(
            "rollout server %s ended with code %s: starting it again. See %s", server.url, code, server.log
        )
        self._restarts[server.url] = done + 1
        with contextlib.suppress(ProcessLookupError):  # engine processes that it left would keep their GPU
            os.killpg(server.process.pid, signal.SIGKILL)
        server.start()


def command(cfg: PoolConfig, model: Path, port: int) -> list[str]:
    """Command line of one server: a stock vLLM API server, or ours over transformers' generate."""
    python = [sys.executable, "-P", "-m"]
    if cfg.engine == "hf":
        return [
            *python,
            "rl.rollout.hf",
            str(model),
            "--host",
            cfg.host,
            "--port",
            str(port),
            *cfg.extra_args,
        ]
    backend = BACKEND if cfg.sends_files else "nccl"
    args = {
        "--model": model,
        "--served-model-name": MODEL_NAME,
        "--model-impl": "transformers",
        "--host": cfg.host,
        "--port": port,
        "--dtype": cfg.dtype,
        "--max-model-len": cfg.max_model_tokens,
        "--max-num-seqs": cfg.max_sequences,
        "--limit-mm-per-prompt": json.dumps({"image": cfg.max_images}),
        "--allowed-media-domains": NO_DOMAIN,
        "--weight-transfer-config": json.dumps({"backend": backend}),
        # Log-probabilities of the distribution that was sampled from: after temperature and the token ban.
        "--logprobs-mode": "processed_logprobs",
        # Sampling is ours to say; defaults of the checkpoint's generation_config would hide in every request.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    if cfg.device == "cpu":
        args["--block-size"] = 32  # CPU attention takes multiples of 32
        # One worker needs no process of its own: passing it every step's batch costs a core half of what a step does.
        args["--distributed-executor-backend"] = "uni"
        args["--max-num-batched-tokens"] = max(4096, cfg.max_model_tokens)
    else:
        args["--tensor-parallel-size"] = cfg.gpus_per_server
        args["--gpu-memory-utilization"] = cfg.gpu_memory_utilization
    sleeps = ["--enable-sleep-mode"] if cfg.share_gpus else []
    words = [str(word) for pair in args.items() for word in pair]
    # Eager on CPU: compilation takes a minute there and gains nothing for short runs. No chunked prefill: vLLM rewinds
    # a seeded request's generator after a part of a prompt, which CPU generators cannot do, and its engine dies. No
    # statistics: they are a seventh of what the API server does, on one of few cores.
    on_cpu = ["--enforce-eager", "--no-enable-chunked-prefill", "--disable-log-stats"]
    return [
        *python,
        "vllm.entrypoints.openai.api_server",
        *words,
        *(on_cpu if cfg.device == "cpu" else []),
        *sleeps,
        *cfg.extra_args,
    ]


def environment(cfg: PoolConfig, index: int = 0) -> dict[str, str]:
    """Environment of one server process."""
    env = dict(os.environ)
    # The learner's ranks and rendezvous are not the server's.
    for name in launcher_variables(env):
        del env[name]
    env |= {
        "PYTHONSAFEPATH": "1",  # also for the processes that vLLM starts: our packages have common names
        "VLLM_SERVER_DEV_MODE": "1",  # weight updates and cache resets
        "VLLM_NO_USAGE_STATS": "1",
        # A connection that the server closes after its default of 5 idle seconds may be the client's next one.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the learner's core
    }
    if cfg.device == "cpu":
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(cfg.threads),
            # Part of the sampler compiles even under --enforce-eager: 2 to 19 s at the first request.
            "TORCH_COMPILE_DISABLE": "1",
            # Unless it is told this, vLLM gives a CPU engine's only worker a process of its own, to set its threads
            # there. We have set them; passing every step's batch between two processes costs half of what a step does.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    else:
        first = cfg.first_gpu + index * cfg.gpus_per_server
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(first, first + cfg.gpus_per_server))
        if (
            cfg.share_gpus
        ):  # vLLM's sleeping allocator refuses expandable segments, which a learner may well want
            env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
            env.pop("PYTORCH_ALLOC_CONF", None)
    return env


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]
