"""Checks a checkpoint before anything loads it: it contains no code, and its weights are finite.

Stages, the soup, rollout servers, export and merge all call `check_checkpoint`. A folder is untrusted: transformers
prompts on the terminal whether to run the code that a configuration names, and a `y` on standard input runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.shards import LayoutError, Tensors, listed, read_object

if TYPE_CHECKING:
    import numpy as np
    import torch

_CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines", "kernel_config", "transformers_weights")
"""Keys that make transformers load code or unchecked weights, from the checkpoint or from the hub."""
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
"""Suffixes of keys that name an implementation; transformers downloads `owner/name` from the hub and runs it."""
_ADAPTER = "adapter_config.json"
_GENERATE = "custom_generate"
_SHOWN = 20
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0 << 48}
"""The bits of +infinity; larger bit patterns are NaN."""


class ForeignCode(LayoutError):
    """A checkpoint names code that is not this project's; the message names file and key."""


class NonFinite(LayoutError):
    """A checkpoint holds NaN or infinity; the message lists the tensors."""


def check_checkpoint(folder: Path) -> None:
    """Raise ForeignCode or NonFinite unless `folder` may be trained, merged and served.

    Reads every weight once per process and imports no torch. Measured: 4 GB/s of one core's time, 1.1 s
    for the 2B's weights. Raises LayoutError for unreadable weights.
    """
    check_code(folder)
    check_finite(folder)


def check_code(folder: Path) -> None:
    """Raise ForeignCode if loading the folder could run code from it or from the hub."""
    problems = []
    for path in sorted(Path(folder).glob("*config.json")):
        if path.name == _ADAPTER:
            problems.append(
                f"{_ADAPTER}: with this file transformers loads another core; merge it by `posttrain core merge`"
            )
        else:
            problems += [f"{path.name}: {found}" for found in _code_in(read_object(path))]
    if (Path(folder) / _GENERATE).exists():
        problems.append(f"{_GENERATE}/: a custom generation loop")
    if problems:
        raise ForeignCode(
            listed(f"{folder}: the checkpoint brings code, which is never run", problems)
            + "\nremove these keys and files if the weights are those of a native core"
        )


def check_finite(folder: Path) -> None:
    """Raise NonFinite, listing every tensor with NaN or infinity, unless all weights are finite numbers."""
    files = tuple(
        (file.name, file.stat().st_mtime_ns, file.stat().st_size)
        for file in Path(folder).glob("*.safetensors")
    )
    if broken := _nonfinite(Path(folder).resolve(), files):
        raise NonFinite(
            listed(f"{folder}: weights that are not finite", shortened(broken))
            + "\nuse an earlier checkpoint; a diverged training needs a lower learning rate"
        )


def nonfinite_tensors(source: Tensors) -> list[str]:
    """A line `name: NaN, in file` for each tensor that is not finite, in the files' order. Imports no torch."""
    found: dict[str, str] = {}
    for name, bits in source.bits():
        what = nonfinite(source.entries[name].dtype, bits)
        if what and found.get(name) != "NaN":
            found[name] = what
    return [f"{name}: {what}, in {source.entries[name].file}" for name, what in found.items()]


def nonfinite(dtype: str, bits: np.ndarray) -> str:
    """ "NaN", "infinity" or "" for numbers of a safetensors type, given as unsigned integers of their width.

    A float's exponent bits lie above its fraction bits, so the largest bit pattern without the sign decides. One read
    and no temporary: 13 GB/s in memory on one core; torch's `isfinite` reaches 0.4 (bfloat16) and 0.8 (float32).
    """
    if not bits.size:
        return ""
    largest_positive = int(bits.view(f"i{bits.itemsize}").max())
    largest_negative = int(bits.max()) - (1 << (8 * bits.itemsize - 1))
    most, infinity = max(largest_positive, largest_negative), _INFINITY[dtype]
    return "" if most < infinity else "infinity" if most == infinity else "NaN"


def nonfinite_tensor(tensor: torch.Tensor) -> str:
    """As `nonfinite`, for a torch tensor on the CPU; "" for integers."""
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    if tensor.dtype not in names:
        return ""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    bits = tensor.detach().contiguous().flatten().view(whole).numpy()
    return nonfinite(names[tensor.dtype], bits.view(f"u{bits.itemsize}"))


def shortened(problems: list[str]) -> list[str]:
    """At most twenty problems, and a line with the number of further ones."""
    more = len(problems) - _SHOWN
    return [*problems[:_SHOWN], f"... and {more} more"] if more > 0 else problems


@lru_cache(maxsize=8)  # the soup and its starting checkpoint are checked several times
def _nonfinite(folder: Path, files: tuple[tuple[str, int, int, int], ...]) -> list[str]:
    return nonfinite_tensors(Tensors(folder))


def _code_in(value: Any, path: str = "") -> Iterator[str]:
    """Keys that name code, with their values, anywhere in a configuration."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _code_in(item, f"{path}[{number}]")
    if not isinstance(value, dict):
        return
    for key, held in value.items():
        place = f"{path}.{key}" if path else key
        if key in _CODE_KEYS and held:
            yield f"{place}={held!r:.200}"
        elif key.removesuffix("_internal").endswith(_KERNEL_KEYS):
            names = held.values() if isinstance(held, dict) else [held]
            if any(isinstance(name, str) and ("/" in name or ":" in name) for name in names):
                yield f"{place}={held!r:.200}: an attention kernel from the hub"
        else:
            yield from _code_in(held, place)
