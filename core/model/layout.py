"""Names and shapes of a native checkpoint's tensors on disk, as transformers reads and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.model.names import EXPERTS

if TYPE_CHECKING:
    import torch

    from core.model.configuration import SailVL2Config

Shape = tuple[int, ...]


def empty_model(config: SailVL2Config) -> Any:
    """The model of a configuration on the meta device: names, shapes and types, no memory."""
    import torch

    from core.model.modeling import SailVL2ForConditionalGeneration

    with torch.device("meta"):
        model = SailVL2ForConditionalGeneration(config)
    model.tie_weights()
    dtype: Any = config.dtype or "float32"  # a name, or torch's own
    return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def native_shapes(config: SailVL2Config) -> dict[str, Shape]:
    """Name and shape of every tensor of a native checkpoint."""
    model = empty_model(config)
    return {
        name: tuple(tensor.shape) for name, tensor in stored(model.state_dict(), model.all_tied_weights_keys)
    }


def stored(state: dict[str, torch.Tensor], tied: Any = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors in memory as a checkpoint stores them, one after another, on the CPU.

    Tied tensors are omitted. transformers stacks a layer's experts in memory, [gate; up] (experts, 2 x inner, hidden)
    and down (experts, hidden, inner), and stores each expert separately.
    """
    for name, tensor in state.items():
        if name not in tied:
            yield from on_disk(name, tensor.detach() if tensor.is_meta else tensor.detach().cpu())


def on_disk(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor, split into the tensors that files hold, with their names."""
    if EXPERTS not in name:
        yield name, tensor
        return
    stem, part = name.rsplit(".", 1)
    for number, expert in enumerate(tensor):
        if part == "gate_up_proj":
            gate, up = expert.chunk(2)
            yield f"{stem}.{number}.gate_proj.weight", gate.clone()
            yield f"{stem}.{number}.up_proj.weight", up.clone()
        else:
            yield f"{stem}.{number}.{part}.weight", expert.clone()
