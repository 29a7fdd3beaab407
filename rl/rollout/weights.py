"""Learner side of a weight update: every parameter, under its checkpoint name, to every rollout server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rl.rollout.client import RolloutClient, shared_memory_file

if TYPE_CHECKING:
    import torch


class WeightSync(Protocol):
    """Pushes the policy's weights. Called on every rank (gathering is collective); rank 0 talks to the servers."""

    def push(self, model: torch.nn.Module) -> None: ...


class SharedMemorySync:
    """Weights as one safetensors file in shared memory, read by servers on the same machine.

    Args:
        client: the pool's client on rank 0, None on the other ranks.
    """

    def __init__(self, client: RolloutClient | None) -> None:
        self.client = client

    def push(self, model: torch.nn.Module) -> None:
        from safetensors.torch import save_file

        tensors = {}
        for name, tensor in policy_tensors(model):
            if self.client is not None:
                # A copy: on a CPU the tensor is the weight itself, and merged adapters come out of it again.
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self.client is None:
            return
        with shared_memory_file("policy.safetensors") as path:
            save_file(tensors, path)
            self.client.load_files([path])


class NcclSync:
    """Weights over NCCL, GPU to GPU, through TRL's client of vLLM's weight-transfer API.

    Args:
        client: the pool's client on rank 0, None on the other ranks.
        servers: servers in the pool; one pass over the parameters each, on every rank.
        device: the learner's CUDA device.
        first_port: one rendezvous port per server, counted up from here.
    """

    def __init__(
        self, client: RolloutClient | None, servers: int, device: Any, first_port: int = 51216
    ) -> None:
        self.client, self.servers = client, servers
        self.metadata: list[tuple[str, str, list[int]]] = []
        self.senders: list[Any] = []
        if client is not None:
            from trl.generation.vllm_client import VLLMClient

            for index, url in enumerate(client.urls):
                sender = VLLMClient(base_url=url, group_port=first_port + index)
                sender.init_communicator(device=device)
                self.senders.append(sender)

    def push(self, model: torch.nn.Module) -> None:
        if not self.metadata:  # the servers must know every tensor before the first one is broadcast
            self.metadata = [
                (name, _dtype_name(tensor), list(tensor.shape)) for name, tensor in self._named(model)
            ]
        for index in range(self.servers):
            if self.client is not None:
                self.senders[index].update_named_params(self.metadata, self._named(model))
            else:
                for _ in self._named(model):  # take part in the gathering
                    pass
        if self.client is not None:
            self.client.reset_caches()

    def _named(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        twins = {} if self.client is None else {twin: name for name, twin in self.client.core.tied.items()}
        for name, tensor in policy_tensors(model):
            yield name, tensor
            if name in twins:
                yield twins[name], tensor


def policy_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give `(checkpoint name, full tensor)` for every parameter, tied ones once.

    LoRA adapters are merged for the time of the iteration and taken out again afterwards; ZeRO-3 shards are
    gathered, one parameter at a time where nothing is merged. A tensor is valid until the next one is asked for.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                yield name, parameter.data
        return
    with gathered(list(model.parameters())):
        model.merge_adapter()
        try:
            for name, parameter in model.named_parameters():
                name = name.removeprefix("base_model.model.").replace(".base_layer", "")
                if model.prefix in name or "original_module" in name:
                    continue
                yield name.replace("modules_to_save.default.", ""), parameter.data
        finally:
            model.unmerge_adapter()


@contextmanager
def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Full parameters inside, whether DeepSpeed ZeRO-3 shards them or not."""
    with ExitStack() as stack:
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        yield


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
