"""Maps tensor names of a native core to its parts: the only such table."""

from __future__ import annotations

from typing import Literal

Module = Literal["tower", "adapter", "language_model"]

MODULES: dict[Module, tuple[str, ...]] = {
    "tower": ("model.vision_tower.",),
    "adapter": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""Prefixes of a native checkpoint's parameter names, by module; `adapter` is the projector between the other two."""
EXPERTS = ".mlp.experts."
"""Part of the names of a mixture's expert tensors."""
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
"""A tied output layer is not stored: it is this tensor."""
LORA_TARGETS = {
    "language_model": r"model\.language_model\..*_proj",
    "all_linear": r"model\.(language_model|vision_tower|multi_modal_projector)\..*(_proj|linear_\d)",
}
"""peft's target_modules for each value of `lora.targets`."""


def module_of(parameter_name: str) -> Module:
    """The module that a native parameter belongs to. Raises ValueError if the name belongs to none."""
    for module, prefixes in MODULES.items():
        if parameter_name.startswith(prefixes):
            return module
    raise ValueError(f"parameter {parameter_name!r} belongs to none of {MODULES}: this is not a native core")
