"""Runs a trainer's passes at real shapes without their memory, and counts FLOPs and bytes as a GPU would need them.

Floating-point tensors are fake (torch's FakeTensorMode): operations on them compute shapes only. Integers such as token
ids stay real, because rows are packed by their values. Where a GPU runs other code than a CPU, the GPU's is counted:
shared-prefix attention by concatenated keys, a Triton kernel that works on tiles of logits in place, and an output
layer that sees scored positions only.

torch.distributed._tools.MemTracker finds the same peak (tests/test_realsize.py), but takes 17 times as long.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


class Shapes(TorchDispatchMode):
    """Makes every floating-point tensor fake, and keeps integers and booleans real where they do not depend on one."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads = 0
        """Number of fake values that the host read; each read is answered by 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given and not any(isinstance(one, FakeTensor) or one.is_floating_point() for one in given):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.reads += 1
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
        if func is aten.bincount.default:  # the router's load; a fake tensor's largest value is unknown
            least = kwargs.get("minlength") or args[2]
            return self.fake.from_tensor(torch.zeros(least, dtype=torch.long))
        if func is aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        with self.fake:
            made = func(*args, **kwargs)
        if not given and isinstance(made, torch.Tensor) and not made.is_floating_point():
            return func(*args, **kwargs)
        return made


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A real mask as the indices of its true values, since a fake tensor cannot be indexed by a mask."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return list(index.nonzero().unbind(1))
    return [index]


class Memory(TorchDispatchMode):
    """Bytes of the tensors that exist, by kind, and their peak since `restart`.

    A tensor belongs to the kind that was current when it was made, unless `label` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._held: dict[int, tuple[int, str]] = {}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = Counter(self.now)

    def label(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor as `kind` from now on."""
        storage = tensor.untyped_storage()
        if id(storage) in self._held:
            self._gone(id(storage))
            self._enter(id(storage), storage.nbytes(), kind)
        else:
            self._note(storage, kind)

    @contextmanager
    def counted_as(self, kind: str) -> Iterator[None]:
        """Inside, new tensors belong to `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._held:
                self._note(tensor.untyped_storage(), self.kind)
        return made

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        self._enter(id(storage), storage.nbytes(), kind)
        weakref.finalize(storage, self._gone, id(storage))
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def _enter(self, key: int, size: int, kind: str) -> None:
        self._held[key] = size, kind
        self.now[kind] += size

    def _gone(self, key: int) -> None:
        size, kind = self._held.pop(key)
        self.now[kind] -= size


def _pairs(queries: int, keys: int, causal: bool) -> float:
    """Share of the pairs of a query and a key that attention computes; causal from the lower right."""
    return (keys - (queries - 1) / 2) / keys if causal else 1.0


def _flash(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return round(sdpa_flop_count(query, key, value) * _pairs(query[2], key[2], causal))


def _flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return round(sdpa_backward_flop_count(grad, query, key, value) * _pairs(query[2], key[2], causal))


def _grouped(one: Any, other: Any, *_: Any, **__: Any) -> int:
    """The experts' product: (tokens, in) by (experts, in, out); for a gradient (in, tokens) by (tokens, out)."""
    return 2 * one[-2] * one[-1] * other[-1]


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, with the causal half of attention and with grouped products.

    Norms, rotations and softmax are left out, as in torch's.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _flash,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
            aten._grouped_mm: _grouped,
        },
    )
    # torch's tracker of modules keeps activations alive, and fails in recomputed layers.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules(nullcontext):
    """Counts everything for the whole model."""

    parents = frozenset({"Global"})


def _lower_right(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
    """sdpa, which on a GPU gives a causal mask from the lower right to flash attention without building it."""
    if attn_mask == "causal":
        attn_mask, options["is_causal"] = None, True
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)


def _added(acc: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """`acc += one @ other` with the operations of a GPU's kernel, which makes no copies in float32."""
    acc.addmm_(*(acc.new_empty(1).expand(each.shape) for each in (one, other)))


@contextmanager
def as_on_a_gpu(memory: Memory | None = None) -> Iterator[Shapes]:
    """Inside, tensors have shapes only, and passes make the tensors that they would make on a GPU."""
    import trl.kernels.chunked_logprob as logits
    import trl.trainer.utils as trl_utils

    from rl.shared_prefix import attention

    layer = logits.ChunkedLogProbFunction
    counted = memory or SimpleNamespace(counted_as=lambda _: ExitStack())

    def forward(*given: Any) -> Any:
        with counted.counted_as("logits"):
            return plain_forward(*given)

    def backward(*given: Any) -> Any:
        with counted.counted_as("logits"):
            return plain_backward(*given)

    plain_forward, plain_backward = layer.forward, layer.backward
    with ExitStack() as stack:
        for owner, name, value in (
            (logits, "_forward_tile", lambda *_, **__: None),
            (logits, "_backward_tile", lambda *_, **__: None),
            (logits, "_addmm_fp32", _added),
            (layer, "forward", staticmethod(forward)),
            (layer, "backward", staticmethod(backward)),
            (trl_utils, "_use_triton", lambda device: True),  # the output layer sees scored positions only
            (attention, "_Merged", SimpleNamespace(apply=attention._concatenated)),
            (attention, "causal_lower_right", lambda queries, keys: "causal"),
            (attention, "scaled_dot_product_attention", _lower_right),
        ):
            stack.enter_context(patch.object(owner, name, value))
        shapes = stack.enter_context(Shapes())
        if memory is not None:
            stack.enter_context(memory)
        yield shapes
