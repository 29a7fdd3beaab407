"""LoRA adapters in PEFT's format: reading one, matching it to its core, and checking that vLLM can serve it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.checkpoint.check import check_checkpoint, check_finite
from core.checkpoint.shards import LayoutError, Tensors, listed, own_file, read_object, weights_hash
from core.deadline import TooSlow, deadline
from core.files import write_json
from core.model.names import EXPERTS, MODULES, Module

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
"""File beside the adapter, written by our stages: path and weights' hash of the core that it was trained on."""
MERGE = "posttrain core merge"
_PREFIX = "base_model.model."
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank. Source: vllm.config.lora (0.31)."""
_MAX_ALPHA = 1_000_000
_SHOWN = 12
"""Most problems that an error lists; an adapter of another core may have one per layer."""


class AdapterError(LayoutError):
    """An adapter cannot be used; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: configuration and tensor names, opened but not read."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Tensors
    pairs: Mapping[str, tuple[str, str]]
    """Module -> names of its A (rank, in) and B (out, rank)."""
    whole: Mapping[str, str]
    """Parameter of the core -> name of the tensor that replaces it (`modules_to_save`)."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """`base.json`; empty for adapters from elsewhere."""

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((self.tensors.entries[a].shape[0] for a, _ in self.pairs.values()), default=0)

    def scaling(self, module: str) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) if the configuration sets use_rslora."""
        from peft.utils.other import get_pattern_key

        # As peft chooses a module's alpha: the first pattern that matches, else the adapter's.
        alphas: dict[str, float] = self.config.get("alpha_pattern") or {}
        with _patterns(self.folder):
            alpha: float = alphas.get(get_pattern_key(list(alphas), module), self.config["lora_alpha"])
        rank = self.tensors.entries[self.pairs[module][0]].shape[0]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. Raises AdapterError for a folder without an adapter, for weights that are not
    safetensors, for any adapter but plain LoRA on linear layers, and for tensors that do not belong to it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        inside = folder / "adapter"
        hint = f"; did you mean {inside}?" if (inside / CONFIG).is_file() else ""
        raise AdapterError(f"{folder}: no adapter: {CONFIG} is missing{hint}")
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder}: no {WEIGHTS}; adapters are read from safetensors only (a .bin file runs code when read): "
            "save it again with peft's save_pretrained"
        )
    config, tensors = read_object(folder / CONFIG), Tensors(folder)
    base = read_object(folder / BASE) if (folder / BASE).is_file() else {}
    problems = _kind_problems(config)
    problems += [
        f"{BASE}: {key}={base.get(key)!r}: a text is needed" for key in base if not isinstance(base[key], str)
    ]
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in tensors.entries:
        module, found, half = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not name.startswith(_PREFIX):
            problems.append(f"{name}: not an adapter's tensor; their names begin with {_PREFIX}")
        elif found and half in ("A.weight", "B.weight"):
            halves.setdefault(module, {})[half[0]] = name
        elif "lora_" in name:
            problems.append(f"{name}: not a tensor of plain LoRA on a linear layer")
        else:
            whole[name.removeprefix(_PREFIX)] = name
    for module, pair in halves.items():
        shapes = {half: tensors.entries[name].shape for half, name in pair.items()}
        if len(pair) < 2:
            problems.append(f"{module}: has only lora_{next(iter(pair))}; the other half is missing")
        elif (
            any(len(shape) != 2 or 0 in shape for shape in shapes.values())
            or shapes["A"][0] != shapes["B"][1]
        ):
            problems.append(f"{module}: lora_A {shapes['A']} and lora_B {shapes['B']} do not multiply")
    if not halves and not whole:
        problems.append(f"{WEIGHTS} does not contain tensors")
    if problems:
        raise AdapterError(listed(f"{folder}: cannot use this adapter", problems))
    pairs = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
    return Adapter(folder, config, tensors, pairs, whole, base)


def _kind_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type={config.get('peft_type')!r}: only LORA is supported")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        problems.append(f"alpha_pattern={alphas!r:.80}: a mapping from patterns to numbers is needed")
        alphas = {}
    named = {"lora_alpha": config.get("lora_alpha")} | {
        f"alpha_pattern.{key}": alpha for key, alpha in alphas.items()
    }
    for key, alpha in named.items():
        if not isinstance(alpha, int | float) or not abs(alpha) <= _MAX_ALPHA:  # NaN is not below it
            problems.append(f"{key}={_short(alpha)}: a number of at most {_MAX_ALPHA:,} is needed")
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        words = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            problems.append(f"{key}={_short(value)}: a text or a list of texts is needed")
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}: trained biases are not supported; use none")
    problems += [
        f"{key}={config[key]!r}: this variant of LoRA is not supported"
        for key in (
            *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "trainable_token_indices"),
            *("target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config"),
            *("use_bdlora", "velora_config", "monteclora_config", "kasa_config", "mica"),
        )
        if config.get(key)
    ]
    return problems


def _short(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"


@contextmanager
def _patterns(folder: Path) -> Iterator[None]:
    """Bounds the untrusted regular expressions of an adapter's configuration; raises AdapterError."""
    try:
        with deadline(f"{folder / CONFIG}: matching its patterns to the core's layers"):
            yield
    except (TooSlow, re.error) as error:
        raise AdapterError(f"{error}; list the layers by name in {CONFIG}") from None


def check_fits(adapter: Adapter, base: Tensors, core: Path) -> None:
    """Raise AdapterError, with a line per problem, unless the adapter's tensors fit the core's and cover every layer
    that its configuration targets.
    """
    problems = []
    for module, (a, b) in adapter.pairs.items():
        shape = (adapter.tensors.entries[b].shape[0], adapter.tensors.entries[a].shape[1])
        there = base.entries.get(f"{module}.weight")
        if there is None:
            problems.append(f"{module}: no such layer in the core")
        elif there.shape != shape:
            problems.append(
                f"{module}: made for a layer of shape {shape}; the core's layer has {there.shape}"
            )
    for name, tensor in adapter.whole.items():
        there = base.entries.get(name)
        if there is None and name == "lm_head.weight":
            problems.append(
                f"{name}: the core ties its output layer to the embeddings and stores no weight for it"
            )
        elif there is None:
            problems.append(f"{name}: no such parameter in the core")
        elif there.shape != adapter.tensors.entries[tensor].shape:
            problems.append(
                f"{name}: has shape {adapter.tensors.entries[tensor].shape}; the core's has {there.shape}"
            )
    with _patterns(adapter.folder):
        targets = list(_targets(adapter, base))
    problems += [
        f"{module}: target_modules of the adapter match it, but the adapter has no tensors for it"
        for module in targets
        if module not in adapter.pairs
    ]
    if problems:
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        shown = [f"  {problem}" for problem in problems[:_SHOWN]]
        raise AdapterError(
            "\n".join([f"{adapter.folder} does not fit {core}; {len(problems)} problems:", *shown, *more])
            + "\nname the core it was trained on (`core merge --core`)"
        )


def check_base(adapter: Adapter, core: Path, weights: str) -> bool:
    """Whether the adapter records the weights that it was trained on. Raises AdapterError if the recorded hash
    differs from `weights`, the `core.checkpoint.shards.weights_hash` of `core`.
    """
    expected = adapter.base.get("weights")
    if expected and expected != weights:
        raise AdapterError(
            f"{adapter.folder}: was trained on the weights {expected[:12]} of {adapter.base.get('path')}, and {core} "
            f"holds {weights[:12]}; name the core it was trained on"
        )
    return bool(expected)


def write_base(folder: Path, core: Path, weights: str) -> None:
    """Record in an adapter's folder the core that it was trained on: the core's path and its `weights_hash`."""
    write_json(folder / BASE, {"path": str(Path(core).resolve()), "weights": weights})
    config = read_object(folder / CONFIG)
    write_json(folder / CONFIG, config | {"base_model_name_or_path": str(Path(core).resolve())})


def check_servable(folder: Path, core: Path, device: Literal["cpu", "gpu"] = "cpu") -> Adapter:
    """The adapter, if it belongs to `core` and a vLLM server of that core on `device` applies the whole adapter.

    Raises AdapterError otherwise, with each reason and the remedy. Call it before a server starts: vLLM 0.31 accepts
    an adapter with tower tensors without a warning, and applies only the language model's part.
    """
    adapter = read_adapter(folder)
    check_finite(folder)
    check_checkpoint(core)
    text = read_object(own_file(core / "config.json")).get("text_config") or {}
    check_fits(adapter, Tensors(core), core)
    if adapter.base:
        check_base(adapter, core, weights_hash(core))
    problems = []
    sides: dict[Module, str] = {
        "tower": "vision tower",
        "adapter": "adapter between tower and language model",
    }
    for part, words in sides.items():
        count = sum(module.startswith(MODULES[part]) for module in adapter.pairs)
        if count:
            problems.append(
                f"{count} LoRA pairs on the {words}: vLLM applies LoRA to the language model only and would leave "
                "them out without an error"
            )
    if adapter.whole:
        names = ", ".join(sorted(adapter.whole))
        problems.append(f"whole weights ({names}): vLLM accepts low-rank pairs only")
    if adapter.rank > _VLLM_RANKS[-1]:
        problems.append(f"rank {adapter.rank}: vLLM takes ranks up to {_VLLM_RANKS[-1]}")
    if device == "cpu" and text.get("model_type") == "qwen3_moe":
        problems.append(
            "the core is a mixture of experts: with LoRA enabled vLLM runs the experts by a Triton kernel, "
            "which its CPU build lacks"
        )
    if problems:
        raise AdapterError(
            listed(f"{folder}: vLLM cannot serve this adapter as it is", problems)
            + f"\nmerge it and serve the result: {MERGE} {folder} DST"
        )
    return adapter


def vllm_arguments(adapter: Adapter, name: str) -> list[str]:
    """Arguments of vLLM's API server that serve the adapter beside the core, under the model name `name`."""
    rank = next(rank for rank in _VLLM_RANKS if rank >= adapter.rank)
    return [
        *("--enable-lora", "--max-lora-rank", str(rank)),
        *("--lora-modules", f"{name}={adapter.folder.resolve()}"),
    ]


def _targets(adapter: Adapter, base: Tensors) -> Iterator[str]:
    """Linear layers of the core that the adapter's `target_modules` match, as peft matches them."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        config: Any = LoraConfig.from_pretrained(str(adapter.folder))
    except Exception as error:  # peft's checks of the values raise many types
        raise AdapterError(f"{adapter.folder / CONFIG}: peft cannot read it ({error})") from None
    if not config.target_modules:
        return
    for name, entry in base.entries.items():
        # peft sees a layer's experts as one stacked parameter; plain LoRA does not touch it.
        if name.endswith(".weight") and len(entry.shape) == 2 and EXPERTS not in name:
            module = name.removesuffix(".weight")
            if check_target_module_exists(config, module):
                yield module
