"""The engine class behind `shm_engine.BACKEND`. Imports vLLM: only vLLM's workers import this module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import accelerator
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Initial settings of the transfer; there are none."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """The files of one weight update."""

    paths: list[str]
    """Paths of safetensors files, whose tensors have the names of a checkpoint."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tensors that the files omit because they are tied: name -> name of the stored tensor."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads checkpoint-format tensors through vLLM's layer-wise reload.

    On a CPU `load_weights` alone does not change packed weights; the reload packs them again.
    """

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate
    _old_kernels: Sequence[tuple[Any, Any]] = ()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._old_kernels = _take_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._old_kernels:
            method.moe_kernel = method.moe_kernel or kernel  # for a layer that the update does not contain
        self._old_kernels = ()

    def update_weights(self, update_info: dict) -> None:
        # The base class then synchronizes an accelerator, which a CPU build of torch does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if accelerator.is_available():
            accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        load: Any = self.model.load_weights  # vLLM gives it to every model class
        load(_tensors(update_info.paths, update_info.aliases))

    def shutdown(self) -> None:
        pass


def _take_expert_kernels(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Make a CPU engine set up the experts' kernels again; returns pairs (method, previous kernel).

    vLLM 0.31 packs experts for its CPU kernels only when a kernel is set up. If weights come later, the kernel reads
    plain weights as packed ones, and every completion is noise. GPU kernels accept later weights, and captured graphs
    refer to them, so they stay.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    methods: list[Any] = [getattr(layer, "quant_method", None) for layer in model.modules()]
    taken = [(method, method.moe_kernel) for method in methods if getattr(method, "moe_kernel", None)]
    for method, _ in taken:
        method.moe_kernel = None
    return taken


def _tensors(paths: list[str], aliases: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    twins = {twin: name for name, twin in aliases.items()}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_tensor(name)
                yield name, tensor
                if name in twins:
                    yield twins[name], tensor
