"""The engine class behind `shm_engine.BACKEND`. Imports vLLM: only vLLM's workers import this module."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """Where one update lies."""

    paths: list[str]
    """safetensors files, names as in a checkpoint."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tensors that the files leave out because they are tied: name -> name of its twin."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads checkpoint-format tensors through vLLM's layer-wise reload.

    On CPU `load_weights` alone keeps packed weights: the reload is what re-packs them.
    """

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict) -> None:
        # The base class synchronizes an accelerator afterwards, which a CPU build of torch does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if accelerator.is_available():
            accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        load: Any = self.model.load_weights  # vLLM gives it to every model class
        load(_tensors(update_info.paths, update_info.aliases))

    def shutdown(self) -> None:
        pass


def _tensors(paths: list[str], aliases: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    twins = {twin: name for name, twin in aliases.items()}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                yield name, tensor
                if name in twins:
                    yield twins[name], tensor
