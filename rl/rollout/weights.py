"""Learner side of a weight update: every parameter, under its checkpoint name, to every rollout server."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.checkpoint.stream import write_stream
from rl.rollout.client import RolloutClient

if TYPE_CHECKING:
    import torch

FILE_BYTES = 500_000_000
"""Size of a file of weights, unless a single tensor is larger."""


_PREFIX, _LOCK = "sailvl2-", "in-use"


class WeightSync(Protocol):
    """Pushes the policy's weights. Called on every rank (gathering is collective); rank 0 talks to the servers."""

    def push(self, model: torch.nn.Module) -> None: ...


class NoRoomForWeights(RuntimeError):
    """The folder that weights travel through is smaller than they are. The message has the remedy."""


class FileSync:
    """Weights as safetensors files, in shared memory or in a folder that the servers' machines share.

    They take the room of the weights once, and one file's memory on the way there.

    Args:
        client: the pool's client on rank 0, None on the other ranks.
        folder: takes the files, which stay until the next update: a server that comes back needs them.
        file_bytes: size of a file, unless a single tensor is larger.
    """

    def __init__(self, client: RolloutClient | None, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self.client, self.folder, self.file_bytes, self.updates = client, folder, file_bytes, 0

    def push(self, model: torch.nn.Module) -> None:
        if self.client is None:
            for _ in policy_tensors(model):  # take part in the gathering
                pass
            return
        # First, as shared memory may not have room for two policies: nobody reads them between here and the next ones.
        shutil.rmtree(self._path, ignore_errors=True)
        self._check_room(model)
        # Never one name twice: a network file system may go on showing another machine the file that was there.
        self.updates += 1
        self._path.mkdir()
        # Copies: a tensor is valid until the next one, and waits until a file is full.
        tensors = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in policy_tensors(model))
        write_stream(tensors, self._path, total_bytes=0, max_shard_bytes=self.file_bytes)
        self.client.load_checkpoint(self._path)

    @property
    def _path(self) -> Path:
        return self.folder / f"policy-{self.updates}"

    def _check_room(self, model: torch.nn.Module) -> None:
        """Raise NoRoomForWeights before a part of them is written."""
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
    """Weights over NCCL, GPU to GPU, through TRL's client of vLLM's weight-transfer API.

    A server that is lost between two updates is left out for the rest of the stage, as it would need a new group.

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
        serving: list[str] = []
        if self.client is not None:
            self.client.find_lost()
            serving = self.client.fleet.serving
        for index in range(self.servers):
            if self.client is not None and self.client.urls[index] in serving:
                self.senders[index].update_named_params(self.metadata, self._named(model))
            else:
                for _ in self._named(model):  # take part in the gathering
                    pass
        if self.client is not None:
            self.client.reset_caches()
            self.client.weights_sent()

    def _named(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        twins = {} if self.client is None else {twin: name for name, twin in self.client.core.tied.items()}
        for name, tensor in policy_tensors(model):
            yield name, tensor
            if name in twins:
                yield twins[name], tensor


@contextmanager
def weights_folder(chosen: str | None) -> Iterator[Path]:
    """A new folder for the policy's files, removed afterwards: in `chosen`, else in shared memory, else among the
    temporary files. Folders there whose process was killed are removed first: in shared memory each holds a whole
    model's weight."""
    root = Path(chosen or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()))
    root.mkdir(parents=True, exist_ok=True)
    remove_left(root)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as folder,
        Path(folder, "new").open("wb") as lock,
    ):
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        Path(lock.name).rename(Path(folder, _LOCK))
        yield Path(folder).resolve()


def remove_left(root: Path) -> list[Path]:
    """Remove the folders for weights in `root` whose process was killed; return them."""
    return [folder for folder in root.glob(f"{_PREFIX}*") if _remove_if_left(folder)]


def _remove_if_left(folder: Path) -> bool:
    """Remove a folder of ours that no process holds any more; one that cannot be looked at stays."""
    with suppress(OSError):
        if folder.lstat().st_uid == os.getuid() and not (folder / _LOCK).is_symlink():
            with (folder / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                return True
    return False


def policy_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give `(checkpoint name, full tensor)` for every parameter, tied ones once.

    LoRA adapters are added on the way: the weights below them stay as they are, as bfloat16 ones would not come
    back from adding and subtracting. ZeRO-3 shards are gathered, one layer at a time. A tensor is valid until the
    next one is asked for.
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
    """Full parameters inside, whether DeepSpeed ZeRO-3 shards them or not."""
    with ExitStack() as stack:
        if any(hasattr(parameter, "ds_id") for parameter in parameters):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
        yield


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
