"""Saves the trainer's policy as a native checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.checkpoint import released_files
from core.checkpoint.adapters import check_fits, read_adapter, write_base
from core.checkpoint.merge import merge_weights
from core.checkpoint.shards import Tensors, read_object, weights_hash
from core.checkpoint.stream import write_stream
from core.files import atomic_dir, require_room, write_json
from core.model.layout import stored


def save_checkpoint(trainer: Any, processor: Any, out: Path) -> Path:
    """Write the trainer's policy as a complete native checkpoint, whole or not at all; returns `out`.

    Raises NonFinite, and leaves no checkpoint, if a weight is NaN or infinity.

    Every rank calls it (ZeRO-3 gathers the weights); rank 0 writes. After LoRA training the checkpoint holds the merged
    weights. `out/adapter` then holds the adapter in PEFT's format, with path and weights' hash of the checkpoint it was
    trained on. peft and vLLM load the adapter from there; `core.checkpoint.merge` merges it.

    The configuration is the one that the policy was loaded with. Trainers edit theirs (no key/value cache, other
    end-of-text tokens), and a server of the checkpoint would follow those edits.
    """
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model_wrapped)
    state = _gathered(accelerator, trainer.model_wrapped, model)
    if accelerator.is_main_process:
        start = Path(model.config.name_or_path)
        with atomic_dir(Path(out)) as folder:
            require_room(folder, weight_bytes(model), "the checkpoint")
            if hasattr(model, "peft_config"):
                _save_adapter_and_merged(model, state, folder)
            else:
                write_stream(stored(state or model.state_dict(), model.all_tied_weights_keys), folder)
            _write_config(start, folder, next(model.parameters()).dtype)
            processor.save_pretrained(folder)
            released_files.hand_on(start, folder)
    accelerator.wait_for_everyone()
    return out


def weight_bytes(model: Any) -> int:
    """Bytes of a model's whole weights, although under ZeRO-3 this rank holds only a part of them."""
    return sum(getattr(one, "ds_numel", one.numel()) * one.element_size() for one in model.parameters())


def _gathered(accelerator: Any, wrapped: Any, model: Any) -> dict[str, Any] | None:
    """Under ZeRO-3, all weights, gathered on rank 0 from the ranks' parts; None if each rank holds them whole."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage < 3:
        return None
    return accelerator.get_state_dict(wrapped) or {}  # the other ranks get None


def _save_adapter_and_merged(model: Any, state: dict[str, Any] | None, folder: Path) -> None:
    """Write the trained adapter to `folder/adapter`, and the core with that adapter merged in to `folder`.

    The merge reads the files of both. Merging in memory would need every shard of ZeRO-3 on every rank, and in any
    case a second copy of the model.
    """
    start = Path(model.peft_config[model.active_adapter].base_model_name_or_path)
    model.save_pretrained(folder / "adapter", state_dict=state)
    write_base(folder / "adapter", start, weights_hash(start))
    adapter, base = read_adapter(folder / "adapter"), Tensors(start)
    check_fits(adapter, base, start)
    merge_weights(adapter, base, folder, dtype=next(model.parameters()).dtype)


def _write_config(start: Path, folder: Path, dtype: Any) -> None:
    """Write the configuration files of the checkpoint at `start` to `folder`, with the saved data type."""
    for name in ("config.json", "generation_config.json"):
        if not (start / name).exists():
            continue
        values = read_object(start / name)
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            if "dtype" in part:
                part["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / name, values)
