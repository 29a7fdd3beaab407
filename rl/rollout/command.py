"""How one rollout server is started: its command line and its environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from core.processes import LOOPBACK, inherited_environment
from rl.rollout import access
from rl.rollout.config import MODEL_NAME, PoolConfig
from rl.rollout.shm_engine import BACKEND

NO_DOMAIN = "images-come-in-requests.invalid"
"""The only domain that images may be fetched from. By default vLLM fetches any URL of a request, also of services that
only this machine can reach."""


def command(cfg: PoolConfig, model: Path, port: int) -> list[str]:
    """Command line of one server: a stock vLLM API server, or ours over transformers' generate."""
    python = [sys.executable, "-P", "-m"]
    address = ["--host", cfg.host, "--port", str(port)]
    if cfg.engine == "hf":
        return [*python, "rl.rollout.hf", str(model), *address, *cfg.extra_args]
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
        # Log-probabilities of the distribution that was sampled from: after temperature and the token ban.
        "--logprobs-mode": "processed_logprobs",
        # Each request says how to sample; defaults of the checkpoint's generation_config would hide in it.
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
        "--middleware": access.GUARD,
    }
    words = [str(word) for pair in args.items() for word in pair]
    flags = ["--no-trust-remote-code", *(_on_cpu(cfg) if cfg.device == "cpu" else _on_gpu(cfg))]
    return [*python, "vllm.entrypoints.openai.api_server", *address, *words, *flags, *cfg.extra_args]


def _on_cpu(cfg: PoolConfig) -> list[str]:
    return [
        *("--block-size", "32"),  # CPU attention takes multiples of 32
        # One worker needs no process of its own: passing it every step's batch costs a core half of what a step does.
        *("--distributed-executor-backend", "uni"),
        *("--max-num-batched-tokens", str(max(4096, cfg.max_model_tokens))),
        "--enforce-eager",  # compilation takes a minute and gains nothing for short runs
        # vLLM rewinds a seeded request's generator after a part of a prompt, which CPU generators cannot do, and its
        # engine dies.
        "--no-enable-chunked-prefill",
        "--disable-log-stats",  # a seventh of what the API server does, on one of few cores
    ]


def _on_gpu(cfg: PoolConfig) -> list[str]:
    return [
        *("--tensor-parallel-size", str(cfg.gpus_per_server)),
        *("--gpu-memory-utilization", str(cfg.gpu_memory_utilization)),
        *(["--enable-sleep-mode"] if cfg.share_gpus else []),
    ]


def environment(cfg: PoolConfig, index: int = 0) -> dict[str, str]:
    """Environment of the server process number `index`; without the run's token and the folder for temporary files."""
    env = inherited_environment() | {
        "VLLM_SERVER_DEV_MODE": "1",  # weight updates and cache resets
        "VLLM_NO_USAGE_STATS": "1",
        # A connection that the server closes after its default of 5 idle seconds may be the client's next one.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if cfg.sends_files or cfg.is_local:
        # Its own processes are all on this machine; weights over NCCL may come from another one.
        env |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK) if LOOPBACK else {}
        env["VLLM_HOST_IP"] = "127.0.0.1"
    if cfg.device == "cpu":
        return env | {
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(cfg.threads),
            # Part of the sampler compiles even under --enforce-eager: 2 to 19 s at the first request.
            "TORCH_COMPILE_DISABLE": "1",
            # Unless it is told this, vLLM gives a CPU engine's only worker a process of its own, to set its threads
            # there. We have set them; passing every step's batch between two processes costs half of what a step does.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    first = cfg.first_gpu + index * cfg.gpus_per_server
    env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(first, first + cfg.gpus_per_server))
    if cfg.share_gpus:  # vLLM's sleeping allocator refuses expandable segments, which a learner may well want
        env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        env.pop("PYTORCH_ALLOC_CONF", None)
    return env
