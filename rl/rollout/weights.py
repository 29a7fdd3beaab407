"""Learner side of a weight update: sends every parameter, under its checkpoint name, to every rollout server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.checkpoint.stream import write_stream
from core.processes import held_folder, remove_leftovers
from rl.rollout import access
from rl.rollout.client import RolloutClient
from rl.rollout.config import on_this_machine
from rl.rollout.served import Served

if TYPE_CHECKING:
    import torch

FILE_BYTES = 500_000_000
"""Largest weight file in bytes; a single tensor may exceed it."""


class WeightSync(Protocol):
    """Pushes the policy's weights. Called on every rank (gathering is collective); rank 0 talks to the servers."""

    served: Served
    """The record of the weights that the servers hold. Every rank has one; on rank 0 it is the client's."""

    def push(self, model: torch.nn.Module, what: Hashable | None = None) -> None:
        """Send the weights and record them in `served` under the name `what`."""


class NoRoomForWeights(RuntimeError):
    """The folder for the weights' files has too little space. The message has the remedy."""


class FileSync:
    """Sends weights as safetensors files, in shared memory or in a folder that the servers' machines share.

    The files take the weights' size once; writing them needs memory for one file.

    Args:
        client: the pool's client on rank 0, None on the other ranks.
        folder: folder for the files, which stay until the next update, because a returned server loads them.
        file_bytes: largest file in bytes; a single tensor may exceed it.
    """

    def __init__(self, client: RolloutClient | None, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self.client, self.folder, self.file_bytes, self.updates = client, folder, file_bytes, 0
        self.served = client.served if client else Served()

    def push(self, model: torch.nn.Module, what: Hashable | None = None) -> None:
        """Write the files and let every server load them. Raises NoRoomForWeights before writing if they do not fit."""
        if self.client is None:
            with self.served.update(what):
                _take_part(model)
            return
        # Remove the old files first: shared memory may not have room for two policies, and no server reads them now.
        shutil.rmtree(self._path, ignore_errors=True)
        self._check_room(model)
        # A name is never reused: a network file system may show another machine the old file of that name.
        self.updates += 1
        self._path.mkdir()
        # Copy: a tensor is valid only until the next one, but must wait until its file is full.
        tensors = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in policy_tensors(model))
        write_stream(tensors, self._path, total_bytes=0, max_shard_bytes=self.file_bytes)
        self.client.load_checkpoint(self._path, what)

    @property
    def _path(self) -> Path:
        return self.folder / f"policy-{self.updates}"

    def _check_room(self, model: torch.nn.Module) -> None:
        """Raise NoRoomForWeights if the weights do not fit."""
        need = sum(
            getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            for parameter in model.parameters()
        )
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise NoRoomForWeights(
                f"{self.folder}: {need / 1e9:.2f} GB of weights have to pass through it and {free / 1e9:.2f} GB are "
                "free; set servers.weights_dir to a folder on a disk (in a container, --shm-size makes shared memory "
                "larger)"
            )


class NcclSync:
    """Sends weights over NCCL, GPU to GPU, through TRL's client of vLLM's weight-transfer API.

    A lost server is left out for the rest of the stage, because it would need a new NCCL group.

    Args:
        client: the pool's client on rank 0, None on the other ranks.
        servers: number of servers in the pool; every rank passes over the parameters once per server.
        device: the learner's CUDA device.
        first_port: one rendezvous port per server, counted up from here.
    """

    def __init__(
        self, client: RolloutClient | None, servers: int, device: Any, first_port: int = 51216
    ) -> None:
        self.client, self.servers = client, servers
        self.served = client.served if client else Served()
        self.metadata: list[tuple[str, str, list[int]]] = []
        self.senders: list[Any] = []
        if client is not None:
            if all(on_this_machine(url) for url in client.urls):
                os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # the address of the group's store
            for index, url in enumerate(client.urls):
                sender = _sender(url, first_port + index)
                sender.init_communicator(device=device)
                self.senders.append(sender)

    def push(self, model: torch.nn.Module, what: Hashable | None = None) -> None:
        """Broadcast every tensor to every serving server; ranks without a client only take part in gathering."""
        if not self.metadata:  # the servers must know every tensor before the first one is broadcast
            self.metadata = [
                (name, _dtype_name(tensor), list(tensor.shape)) for name, tensor in self._named(model)
            ]
        if self.client is None:
            with self.served.update(what):
                for _ in range(self.servers):
                    _take_part(model)
            return
        self.client.find_lost()
        for url, sender in zip(self.client.urls, self.senders, strict=True):
            if url in self.client.fleet.serving:
                sender.update_named_params(self.metadata, self._named(model))
            else:
                _take_part(model)
        self.client.reset_caches()
        self.client.weights_sent(what)

    def _named(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        twins = {} if self.client is None else {twin: name for name, twin in self.client.core.tied.items()}
        for name, tensor in policy_tensors(model):
            yield name, tensor
            if name in twins:
                yield twins[name], tensor


def _take_part(model: torch.nn.Module) -> None:
    """Gather every tensor with the other ranks."""
    for _ in policy_tensors(model):
        pass


def _sender(url: str, group_port: int) -> Any:
    """TRL's client of one server, with the run's token in its requests."""
    from trl.generation.vllm_client import VLLMClient

    class Sender(VLLMClient):
        def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
            # The constructor calls this once before the first request; the servers are healthy already.
            self.session.headers.update(access.headers(access.known_token(None)))

    return Sender(base_url=url, group_port=group_port)


@contextmanager
def weights_folder(chosen: str | None) -> Iterator[Path]:
    """A new folder for the policy's files, removed at the end: in `chosen`, else in shared memory, else among the
    temporary files. Folders of killed processes are removed first, as each holds a whole model's weights."""
    root = Path(chosen or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()))
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    with held_folder(root) as folder:
        yield folder


def policy_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(checkpoint name, full tensor)` for every parameter; tied parameters come once.

    LoRA adapters are added to copies of the weights: adding them in place and subtracting them again would change
    bfloat16 weights. ZeRO-3 shards are gathered one layer at a time. A tensor is valid until the next one is requested.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                yield name, parameter.data
        return
    layers: dict[str, Any] = {
        name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)
    }
    for name, parameter in model.named_parameters():
        if model.prefix in name or "original_module" in name:
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        name = name.replace("modules_to_save.default.", "")
        with gathered(list(layer.parameters()) if layer else [parameter]):
            yield name, _with_adapters(layer, parameter.data) if layer else parameter.data


def _with_adapters(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with its LoRA adapters added in float32, in its own data type."""
    import torch

    with torch.no_grad():
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in layer.active_adapters:
            total = total + layer.get_delta_weight(adapter)
        return total.to(weight.dtype)


@contextmanager
def gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters are whole, whether or not DeepSpeed ZeRO-3 shards them."""
    with ExitStack() as stack:
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        yield


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
