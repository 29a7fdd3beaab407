"""Loads rewards by name: built-in rewards, and users' own as `package.module:Name` or `file.py:Name`.

A new built-in reward needs a class, a line in REWARDS and a test. A user's own reward does not need a line. A reward
function written for TRL or verl runs unchanged: `trl:package.module:fn`, `verl:file.py:compute_score`.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.calls import Reward, form_of
from rewards.names import nearest

REWARDS = {
    "answer": "rewards.answer:AnswerReward",
    "literal_answer": "rewards.style.literal:LiteralAnswer",
    "think_tags": "rewards.style.format:ThinkTags",
    "think_format": "rewards.style.format:ThinkFormat",
    "direct_format": "rewards.style.format:DirectFormat",
    "format": "rewards.style.format:Format",
    "repetition": "rewards.style.repetition:Repetition",
    "language": "rewards.style.language:Language",
    "vision_judge": "rewards.judge.judges:VisionJudge",
    "answer_judge": "rewards.judge.judges:AnswerJudge",
    "judging": "rewards.judge.judges:JudgingReward",
}
"""Built-in name -> import path. A reward is imported at its first use."""
FOREIGN = {"trl": "rewards.adapters:from_trl", "verl": "rewards.adapters:from_verl"}
"""Prefix of another library's reward functions -> adapter."""


_OURS = str(Path(__file__).resolve().parents[1])
"""The folder that contains this package and its sibling packages."""


class UnknownReward(LookupError, ValueError):
    """There is no reward of this name. The message suggests the nearest names."""


def load_reward(
    name: str, params: Mapping[str, Any] | None = None, folders: Sequence[str | os.PathLike[str]] = ()
) -> Reward:
    """The reward of this name, in one of the forms of rewards.calls.

    Args:
        name: a built-in name, `package.module:Name`, or `path/to/file.py:Name`; the prefix `trl:` or `verl:` marks a
            reward function of that library (rewards.adapters).
        params: fields of the class, or keyword arguments of the function.
        folders: searched for users' modules and files, after all installed packages.

    >>> load_reward("answer", {"tolerance": 0.5}).tolerance
    0.5

    Raises UnknownReward for an unknown name, ValueError for unknown, missing or invalid parameters, and TypeError if
    the reward cannot be called with a completion and an example.
    """
    adapter, place = split_adapter(name)
    found = _find(REWARDS.get(place, place), name, folders)
    if adapter:
        return _find(FOREIGN[adapter], name, ())(found, dict(params or {}), name)
    reward = with_params(found, dict(params or {}), name)
    problem = _call_problem(reward)
    if problem:
        raise TypeError(
            f"reward {name!r}: {problem}; a reward is called as reward(completion, example); "
            "give all further arguments in params"
        )
    return reward


def is_builtin(name: str) -> bool:
    """Whether the name is a built-in reward."""
    return name in REWARDS


def split_adapter(name: str) -> tuple[str, str]:
    """Split a name into the prefix of another library, or "", and the rest.

    >>> split_adapter("trl:trl.rewards:accuracy_reward"), split_adapter("mine:Short")
    (('trl', 'trl.rewards:accuracy_reward'), ('', 'mine:Short'))
    """
    prefix, _, rest = name.partition(":")
    return (prefix, rest) if prefix in FOREIGN and ":" in rest else ("", name)


def _find(place: str, name: str, folders: Sequence[str | os.PathLike[str]]) -> Any:
    where, colon, attribute = place.rpartition(":")
    if not colon or not where or not attribute:
        raise UnknownReward(
            f"unknown reward {name!r}; {nearest(name, REWARDS)}, or package.module:Name, or file.py:Name"
        )
    places = _search(folders)
    module = _from_file(where, places, name) if where.endswith(".py") else _from_path(where, name)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        own = next((place / f"{where}.py" for place in places if (place / f"{where}.py").is_file()), None)
        known = [word for word in vars(module) if not word.startswith("_")]
        hidden = own and str(own) != module.__file__
        hint = f"it hides {own}, so name {where}.py:{attribute}" if hidden else nearest(attribute, known)
        raise UnknownReward(f"reward {name!r}: {module.__file__} has no {attribute!r}; {hint}") from None


def _search(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Append the folders to the module search path, where they cannot shadow an installed module."""
    places = [Path(folder).resolve() for folder in folders]
    for place in places:
        if not place.is_dir():
            raise NotADirectoryError(
                f"{place}: there is no such folder, but the search for rewards includes it"
            )
        for folder in (_OURS, str(place)):  # an editable install alone would be searched only after sys.path
            if folder not in sys.path:
                sys.path.append(folder)
    return places


def _from_path(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if not where.startswith(f"{error.name}.") and where != error.name:
            raise _missing_import(name, where, error) from error
        raise UnknownReward(
            f"reward {name!r}: no module {error.name!r}; install its package, put it on PYTHONPATH, "
            "or name a file: file.py:Name"
        ) from None


def _from_file(where: str, places: Iterable[Path], name: str) -> ModuleType:
    candidates = [Path(where).expanduser(), *(place / where for place in places)]
    file = next((path.resolve() for path in candidates if path.is_file()), None)
    if file is None:
        tried = ", ".join(str(path.absolute()) for path in candidates)
        raise UnknownReward(f"reward {name!r}: there is no such file; looked at {tried}")
    # Two files of the same name are two modules. A file is loaded only once, so that its classes stay identical.
    module_name = f"_reward_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, ModuleNotFoundError):
            raise _missing_import(name, str(file), error) from error
        raise
    return module


def _missing_import(name: str, where: str, error: ModuleNotFoundError) -> UnknownReward:
    return UnknownReward(f"reward {name!r}: {where} imports {error.name!r}, which is not installed")


def with_params(
    found: Any, params: Mapping[str, Any], name: str, taken: int = 2, also: Sequence[str] = ()
) -> Any:
    """An instance of a class, or a function with its parameters bound.

    Args:
        taken: number of a function's first parameters that are not for `params`.
        also: further names that a function's `**kwargs` do not take; with such names, `**kwargs` take no parameter.

    Raises TypeError for an object that is neither, and ValueError for unknown or missing parameters.
    """
    is_class = inspect.isclass(found)
    if not callable(found):
        raise TypeError(f"reward {name!r} is a {type(found).__name__}, not a class or function")
    if not is_class and not params:
        return found
    parameters = list(inspect.signature(found).parameters.values())[0 if is_class else taken :]
    usable = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [*also, *(parameter.name for parameter in parameters if parameter.kind in usable)]
    any_name = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    for key in params:
        if key not in known and not (any_name and (is_class or not also)):
            raise ValueError(f"reward {name!r}: unknown parameter {key!r}; {nearest(key, known)}")
    if not is_class:
        return functools.partial(found, **params)
    try:
        inspect.signature(found).bind(**params)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: {error}; parameters: {', '.join(known)}") from None
    return found(**params)


_ANSWERS = frozenset(("ground_truth", "solution", "answer", "reference", "gold", "label", "target"))
"""Names of a column with the gold answer in other libraries."""


def _call_problem(reward: Any) -> str:
    form = form_of(reward)
    if not callable(form.call):
        return f"its instances ({type(reward).__name__}) do not have a method __call__"
    signature = inspect.signature(form.call)
    try:
        signature.bind("completion", "example")
    except TypeError as error:
        hint = "; if this is verl's compute_score, write verl: before its name"
        return f"{error}{hint if 'solution_str' in signature.parameters else ''}"
    first = next(iter(signature.parameters), "")
    if not form.batched and first in ("completions", "prompts"):
        return (
            f"its first parameter is {first!r}; if this is a TRL reward function, write trl: before its name"
        )
    second = next(itertools.islice(signature.parameters, 1, None), "")
    if not form.batched and second in _ANSWERS:
        return (
            f"its second parameter is {second!r}, but it gets the row: name it `example` and read example.answer; "
            "a TRL reward function takes columns by name, with trl: before its own name"
        )
    return ""
