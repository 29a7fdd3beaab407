"""Post-training for SAIL-VL2: the public interface. Everything else in this project may change without notice.

    from sailvl2_posttrain import Example, Verdict, load_recipe, run, write_records

Importing it is cheap: a name loads the module that defines it at its first use. The project's packages have common
names (`core`, `rewards`, ...). After this import those names mean this project's packages, so a file `core.py` of your
own beside your script does no harm; import such a file of yours before this package, or rename it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sailvl2_posttrain.names import claim

if TYPE_CHECKING:
    from chain.recipe import Recipe, load_recipe
    from chain.run import run
    from chain.serve import evaluate_checkpoint as evaluate
    from core import TinySize, build_tiny, register
    from core.model.prompts import messages, user_text
    from core.strict import ConfigError
    from corpus.records import RecordError, load_records, write_records
    from rewards import Example, Status, Verdict
    from rewards.adapters import as_trl
    from rewards.extract import parse
    from rewards.registry import load_reward

claim()

__all__ = [
    "ConfigError",
    "Example",
    "Recipe",
    "RecordError",
    "Status",
    "TinySize",
    "Verdict",
    "as_trl",
    "build_tiny",
    "evaluate",
    "load_recipe",
    "load_records",
    "load_reward",
    "messages",
    "parse",
    "register",
    "run",
    "user_text",
    "write_records",
]

_HOMES = {
    "ConfigError": "core.strict:ConfigError",
    "Example": "rewards:Example",
    "Recipe": "chain.recipe:Recipe",
    "RecordError": "corpus.records:RecordError",
    "Status": "rewards:Status",
    "TinySize": "core:TinySize",
    "Verdict": "rewards:Verdict",
    "as_trl": "rewards.adapters:as_trl",
    "build_tiny": "core:build_tiny",
    "evaluate": "chain.serve:evaluate_checkpoint",
    "load_recipe": "chain.recipe:load_recipe",
    "load_records": "corpus.records:load_records",
    "load_reward": "rewards.registry:load_reward",
    "messages": "core.model.prompts:messages",
    "parse": "rewards.extract:parse",
    "register": "core:register",
    "run": "chain.run:run",
    "user_text": "core.model.prompts:user_text",
    "write_records": "corpus.records:write_records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    module, _, attribute = _HOMES[name].partition(":")
    found = globals()[name] = getattr(importlib.import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
