"""The command line and the environment of a rollout server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from core.processes import LOOPBACK, inherited_environment
from rl.rollout import access
from rl.rollout.config import MODEL_NAME, PoolConfig
from rl.rollout.shm_engine import BACKEND

NO_DOMAIN = "images-come-in-requests.invalid"
"""The only domain from which vLLM may fetch images. By default vLLM fetches any URL in a request, including URLs of
services that only this machine can reach."""


def command(cfg: PoolConfig, model: Path, port: int) -> list[str]:
    """Command line of one server: a stock vLLM API server, or ours over transformers' generate."""
    python = [sys.executable, "-P", "-m"]
    address = ["--host", cfg.host, "--port", str(port)]
    if cfg.engine == "hf":
        own = ["--dtype", cfg.dtype, *(["--routing-replay"] if cfg.routing_replay else [])]
        return [*python, "rl.rollout.hf", str(model), *address, *own, *cfg.extra_args]
    args = {
        "--model": model,
        "--served-model-name": MODEL_NAME,
        "--model-impl": "transformers",
        "--dtype": cfg.dtype,
        "--max-model-len": cfg.max_model_tokens,
        "--max-num-seqs": cfg.max_sequences,
        "--limit-mm-per-prompt": json.dumps({"image": cfg.max_images}),
        "--allowed-media-domains": NO_DOMAIN,
        "--weight-transfer-config": json.dumps({"backend": BACKEND if cfg.sends_files else "nccl"}),
        # Return log-probabilities of the sampling distribution, after temperature and the token ban.
        "--logprobs-mode": "processed_logprobs",
        # Each request sets its sampling parameters; defaults from the checkpoint's generation_config would be hidden.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
        "--middleware": access.GUARD,
    }
    words = [str(word) for pair in args.items() for word in pair]
    # A teacher (rl.distill) renders prompts and scores given tokens by the endpoints that this option adds.
    flags = [
        "--no-trust-remote-code",
        "--enable-scale-out",
        *(_on_cpu(cfg) if cfg.device == "cpu" else _on_gpu(cfg)),
    ]
    return [*python, "rl.rollout.api_server", *address, *words, *flags, *cfg.extra_args]


def _on_cpu(cfg: PoolConfig) -> list[str]:
    return [
        *("--block-size", "32"),  # CPU attention takes multiples of 32
        # A single worker runs in the engine's process: passing every step's batch between processes costs half a step.
        *("--distributed-executor-backend", "uni"),
        *("--max-num-batched-tokens", str(max(4096, cfg.max_model_tokens))),
        "--enforce-eager",  # compilation takes a minute and gains nothing for short runs
        # vLLM rewinds a seeded request's generator after a part of a prompt, which CPU generators cannot do, and its
        # engine dies.
        "--no-enable-chunked-prefill",
        "--disable-log-stats",  # statistics take a seventh of the API server's CPU time
    ]


def _on_gpu(cfg: PoolConfig) -> list[str]:
    return [
        *("--tensor-parallel-size", str(cfg.gpus_per_server)),
        *("--gpu-memory-utilization", str(cfg.gpu_memory_utilization)),
        *(["--enable-sleep-mode"] if cfg.share_gpus else []),
        *(["--enable-return-routed-experts"] if cfg.routing_replay else []),
    ]


def environment(cfg: PoolConfig, index: int = 0) -> dict[str, str]:
    """Environment of the server process number `index`; without the run's token and the folder for temporary files."""
    env = inherited_environment() | {
        "VLLM_SERVER_DEV_MODE": "1",  # weight updates and cache resets
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # rl.rollout.api_server needs it
        # By default the server closes connections after 5 idle seconds, perhaps just when the client reuses one.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if cfg.sends_files or cfg.is_local:
        # The server's processes are all on this machine; weights over NCCL may come from another machine.
        env |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK) if LOOPBACK else {}
        env["VLLM_HOST_IP"] = "127.0.0.1"
    if cfg.device == "cpu":
        return env | {
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(cfg.threads),
            # Part of the sampler compiles even under --enforce-eager: 2 to 19 s at the first request.
            "TORCH_COMPILE_DISABLE": "1",
            # By default vLLM starts a separate process for a CPU engine's only worker, to set its threads there. The
            # threads are set here already, and passing every step's batch between two processes costs half a step.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    first = cfg.first_gpu + index * cfg.gpus_per_server
    # Count among the GPUs that this process may use, as a learner's ranks do.
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = own.split(",") if own else [str(gpu) for gpu in range(first + cfg.gpus_per_server)]
    env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + cfg.gpus_per_server])
    if (
        cfg.share_gpus
    ):  # vLLM's sleep mode refuses expandable segments, which the learner's environment may set
        env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        env.pop("PYTORCH_ALLOC_CONF", None)
    return env
