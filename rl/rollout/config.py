"""Configuration of the rollout servers and of the client that asks them. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from core.strict import Strict

MODEL_NAME = "policy"
"""The name under which every server serves its model."""


BENDS_SERVING = (
    "--generation-config",
    "--override-generation-config",
    "--logits-processors",
    "--logits-processor-pattern",
    "--logprobs-mode",
)
"""Arguments of vLLM's server that change sampling for every request, or the reported probabilities."""


class PoolConfig(Strict):
    """Rollout servers of a whole chain, evaluation included: `servers:` of a recipe."""

    renamed: ClassVar[dict[str, str]] = {"servers": "count"}

    engine: Literal["vllm", "hf"] = "vllm"
    """vllm, or hf: a server over transformers' generate, for machines without vLLM."""
    count: int = Field(default=1, ge=1, le=4096)
    """Number of server processes that a run starts on this machine."""
    urls: tuple[str, ...] = ()
    """URLs (http://host:port) of servers that run already, on this machine or others; a run then starts none."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of the servers that a run starts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the served weights."""
    max_model_tokens: int = Field(ge=8, le=16_777_216)
    """Most tokens of a prompt and its completion together."""
    max_sequences: int = Field(default=256, ge=1, le=1_000_000)
    """Most sequences that a server decodes together."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """CPU only: memory for keys and values of one server, GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """GPU only: share of the GPU's memory that vLLM uses."""
    gpus_per_server: int = Field(default=1, ge=1)
    """GPU only: tensor parallel size."""
    first_gpu: int = Field(default=0, ge=0)
    """GPU only: index of the first GPU that the servers take; the learners use the ones before it."""
    share_gpus: bool = False
    """GPU only: servers and learners take turns on the same GPUs. The servers sleep while a learner trains (vLLM's
    sleep mode, level 2: they keep neither weights nor key/value cache) and wake with the next weights. While they
    are awake the learner's weights and optimizer states stay on the GPU: gpu_memory_utilization must leave room."""
    max_images: int = Field(default=8, ge=1)
    """Most images in one prompt."""
    routing_replay: bool = False
    """Mixtures of experts: servers return the experts that they chose, and the learners of RL stages use them (R3,
    arXiv:2510.11370). Takes engine hf, or vLLM on GPUs."""
    weights: Literal["shm", "nccl"] = "shm"
    """How weights reach the servers: shm (files that they read) or nccl (GPU to GPU)."""
    weights_dir: str | None = None
    """Folder for these files; learner and servers must see it under the same path. For servers on other machines it
    lies on a shared file system. None: shared memory, which only servers on the learner's machine can read. The files
    stay until the next update: in shared memory they take as much memory as the weights, on a disk almost none."""
    host: str = "127.0.0.1"
    """Address on which the started servers listen. They answer only clients with the run's token (docs/security.md)."""
    first_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the first started server; the others get the next ports. None: free ports are chosen."""
    token_file: str | None = None
    """File of mode 0600 with the token of the servers at `urls`, which `posttrain rollout-server` with the same recipe
    makes. The environment variable POSTTRAIN_SERVER_TOKEN takes precedence. None: servers that a run starts have a
    token of that run."""
    startup_timeout_s: float = Field(default=300, gt=0)
    """Seconds in which a server must become healthy. If every server is lost, a stage waits this long for one to come
    back."""
    hang_timeout_s: float = Field(default=300, gt=0)
    """A started server that does not report to be healthy for this many seconds is killed and started again."""
    request_timeout_s: float = Field(default=1800, gt=0)
    """A server that does not answer a request within this many seconds, including its time in the queue, is lost."""
    max_restarts: int = Field(default=3, ge=0)
    """How often a lost server may come back. Servers that the run started are restarted as often, unless they share
    GPUs with a learner, which may be using them."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU only: OpenMP threads of one server."""
    concurrency: int = Field(default=64, ge=1, le=65536)
    """Requests in flight per server."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for vLLM's API server, as on its command line."""

    @property
    def sends_files(self) -> bool:
        """Whether weights reach the servers as files."""
        return self.weights == "shm"

    @property
    def starts_on_gpus(self) -> bool:
        """Whether servers are started on this machine's GPUs."""
        return not self.urls and self.device == "gpu"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one served weight."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def is_local(self) -> bool:
        """Whether all servers are on this machine, and reached over loopback."""
        return all(on_this_machine(url) for url in self.urls or (f"http://{self.host}",))

    @property
    def patience_s(self) -> float:
        """Seconds to wait for a server if all are lost. Servers that share GPUs are not restarted."""
        restarted = self.urls or (self.max_restarts and not self.share_gpus)
        return self.startup_timeout_s if restarted else 0.0

    @model_validator(mode="after")
    def _opens_no_door(self) -> PoolConfig:
        for word in (word.replace("_", "-") for word in self.extra_args):
            if word.startswith("--trust-remote"):
                raise ValueError(
                    f"extra_args has {word}: a checkpoint's code is never run; `posttrain core import` converts it"
                )
            if word.startswith(("--host", "--port", "--uds")):
                raise ValueError(
                    f"extra_args has {word}: servers.host and servers.first_port say where it listens"
                )
        return self

    @model_validator(mode="after")
    def _whole_distribution(self) -> PoolConfig:
        bent = [word for word in self.extra_args if word.split("=")[0].replace("_", "-") in BENDS_SERVING]
        if bent:
            raise ValueError(
                f"extra_args has {bent[0]}: servers must sample from the whole distribution and report its "
                "log-probabilities, or every importance ratio is biased; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _returns_experts(self) -> PoolConfig:
        if self.routing_replay and self.engine == "vllm" and self.device == "cpu" and not self.urls:
            raise ValueError(
                "routing_replay with engine=vllm on device=cpu: vLLM 0.31 returns experts from its model runner V2 "
                "only, which needs Triton, and its CPU wheel has none; use engine: hf, or device: gpu"
            )
        return self

    @model_validator(mode="after")
    def _can_share(self) -> PoolConfig:
        if not self.share_gpus:
            return self
        if not self.sends_files:
            raise ValueError(
                "share_gpus with weights=nccl: NCCL connects no two processes on one GPU; use weights: shm"
            )
        if self.engine == "vllm" and self.device == "cpu":
            raise ValueError(
                "share_gpus with device=cpu: vLLM sleeps on GPUs only; use device: gpu, or leave share_gpus out"
            )
        return self

    @model_validator(mode="after")
    def _files_reach_the_servers(self) -> PoolConfig:
        if not self.sends_files or self.weights_dir is not None:
            return self
        away = [url for url in self.urls if not on_this_machine(url)]
        if away:
            raise ValueError(
                f"weights=shm reaches servers on this machine only, but urls has {', '.join(away)}; set weights_dir to "
                "a folder on a file system that all machines share (or weights: nccl between GPUs). If they are on "
                "this machine, write 127.0.0.1"
            )
        return self


def on_this_machine(url: str) -> bool:
    """Whether a URL's host is the loopback interface."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
