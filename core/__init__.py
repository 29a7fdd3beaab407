"""The SAIL-VL2 core: model, configuration, processor, tiny cores, and the vLLM plug-in.

Importing this package is cheap: torch and transformers load when a name that needs them is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.model.configuration import SailVL2Config
    from core.model.image_tiles import SailVL2ImageProcessor
    from core.model.modeling import SailVL2ForConditionalGeneration, SailVL2Model
    from core.model.processing import SailVL2Processor
    from core.model.tiny import TinySize, build_tiny

__all__ = [
    "SailVL2Config",
    "SailVL2ForConditionalGeneration",
    "SailVL2ImageProcessor",
    "SailVL2Model",
    "SailVL2Processor",
    "TinySize",
    "build_tiny",
    "register",
]

_HOMES = {
    "SailVL2Config": "core.model.configuration",
    "SailVL2ForConditionalGeneration": "core.model.modeling",
    "SailVL2ImageProcessor": "core.model.image_tiles",
    "SailVL2Model": "core.model.modeling",
    "SailVL2Processor": "core.model.processing",
    "TinySize": "core.model.tiny",
    "build_tiny": "core.model.tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def register() -> None:
    """Register the native core with transformers' Auto classes, TRL and vLLM; safe to call again.

    The Auto classes find it by its model_type "sailvl2". TRL (`create_model_from_path`) and vLLM's
    transformers backend look for the architecture in the module `transformers`, so the classes go there too.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    # Not from `transformers`: without torchvision that name is a placeholder which raises.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from core.model.configuration import SailVL2Config
    from core.model.image_tiles import SailVL2ImageProcessor
    from core.model.modeling import SailVL2ForConditionalGeneration, SailVL2Model
    from core.model.processing import SailVL2Processor

    AutoConfig.register(SailVL2Config.model_type, SailVL2Config, exist_ok=True)
    AutoModel.register(SailVL2Config, SailVL2Model, exist_ok=True)
    AutoModelForImageTextToText.register(SailVL2Config, SailVL2ForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SailVL2Config, SailVL2Processor, exist_ok=True)
    # Under both names: transformers prefers "torchvision" where it is installed.
    AutoImageProcessor.register(
        SailVL2Config,
        image_processor_classes={"pil": SailVL2ImageProcessor, "torchvision": SailVL2ImageProcessor},
        exist_ok=True,
    )
    for module in _transformers_modules():
        for cls in (SailVL2Config, SailVL2ForConditionalGeneration, SailVL2Model, SailVL2Processor):
            setattr(module, cls.__name__, cls)


def _transformers_modules() -> list[ModuleType]:
    """Every loaded module object with the name `transformers`.

    There are two: `transformers.processing_utils` executes the package a second time and puts the result
    into `sys.modules` (transformers 5.17, `direct_transformers_import`), while earlier importers keep
    the first module. The order of imports decides which of the two TRL and vLLM hold.
    """
    holders = [
        vars(module).get("transformers")
        for module in list(sys.modules.values())
        if hasattr(module, "__dict__")
    ]
    found = [sys.modules["transformers"], *(held for held in holders if isinstance(held, ModuleType))]
    return list({id(module): module for module in found if module.__name__ == "transformers"}.values())
