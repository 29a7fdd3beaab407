"""vLLM side of the shared-memory weight transfer: a backend that reads safetensors files in place.

Runs inside vLLM's worker processes (entry point `vllm.general_plugins`). The learner, or the runner with a
finished checkpoint, names a file; nothing but the name crosses HTTP. vLLM's own backends need CUDA.
Source of the interface: vllm/distributed/weight_transfer/base.py (vLLM 0.31).
"""

from __future__ import annotations

BACKEND = "sailvl2_shm"


def register() -> None:
    """Entry point: register the backend with vLLM. Cheap and repeatable, as vLLM calls plug-ins in each process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rl.rollout.shm_worker", "SharedMemoryEngine")
