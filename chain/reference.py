"""Every key of a recipe, from the pydantic models, for `posttrain explain`, the docs' reference page and editors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chain.curation.config import Curation
from chain.recipe import ALIASES, STAGE_NAMES, Recipe
from chain.yaml_files import PIPELINE
from core.strict import ConfigError, nearest

UNITS = {
    "_s": "seconds",
    "_gib": "GiB",
    "_tokens": "tokens",
    "_px": "pixels",
    "_share": "share, 0 to 1",
    "_ratio": "share, 0 to 1",
    "_rows": "rows",
}
"""Suffix of a key's name -> unit."""
CURATION = "curation"
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key of one mapping in a recipe."""

    name: str
    kind: str
    default: str
    """The default as YAML, or `required`."""
    unit: str
    """"" if the name has no suffix of a unit."""
    text: str
    """The docstring under the field, on one line."""
    models: tuple[type[BaseModel], ...]
    """Models of the mapping, or of the list's mappings, under this key."""
    named: bool
    """Whether the key holds a mapping from free names to such models."""


@dataclass(frozen=True)
class Section:
    """The keys of one model, which is one kind of mapping."""

    model: type[BaseModel]
    places: tuple[str, ...]
    """Key paths of this mapping in a recipe. `[]` is any item of a list, `NAME` any name, and "" the recipe itself."""
    keys: tuple[Key, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages that have this mapping, in the chain's order."""
        return tuple(
            name for name in STAGE_NAMES if any(place.split(".")[0] == name for place in self.places)
        )

    @property
    def source(self) -> str:
        """File and class that define the keys."""
        return f"{self.model.__module__.replace('.', '/')}.py: {self.model.__name__}"

    @property
    def text(self) -> str:
        """The model's docstring."""
        return inspect.cleandoc(self.model.__doc__ or "")


def sections() -> list[Section]:
    """All mappings of a recipe, outermost first, then those of a curation, whose places begin with `curation`."""
    places: dict[type[BaseModel], list[str]] = {}
    for place, model in (*_walk(Recipe, ""), *_walk(Curation, CURATION)):
        places.setdefault(model, []).append(place)
    return [Section(model, tuple(found), keys_of(model)) for model, found in places.items()]


def keys_of(model: type[BaseModel]) -> tuple[Key, ...]:
    """The keys of one model, in order of definition."""
    return tuple(_key(name, field) for name, field in model.model_fields.items())


def explain(path: str | None = None) -> str:
    """The text of `posttrain explain`: of all sections, of one section, or of one key.

    `path` is a key path (`rlvr.rollout.group_size`) or the last part of a key path. Short names of stages are accepted,
    list indices are ignored. Raises ConfigError naming the nearest keys.
    """
    known = sections()
    if path is None:
        return "\n".join(_summary(section) for section in known) + (
            "\n\nposttrain explain KEY shows one section or key, e.g. rlvr.rollout or group_size"
        )
    wanted = re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "", path)
    first, dot, rest = wanted.partition(".")
    wanted = ALIASES.get(first, first) + dot + rest
    if found := [section for section in known if wanted in _plain(section.places)]:
        return _section_text(found[0])
    keys = _keys_by_path(known)
    matches = [full for full in keys if full == wanted] or [
        full for full in keys if full.endswith(f".{wanted}")
    ]
    if not matches:
        names = {name for full in keys for name in (full, full.rpartition(".")[2])}
        raise ConfigError(f"explain {path}: there is no such key; {_hint(path, names)}")
    texts = dict.fromkeys(_key_text(keys[full][1], keys[full][0], matches) for full in matches)
    return "\n\n".join(texts)


def markdown() -> str:
    """The docs' reference page: a heading and a table per section."""
    parts = [
        "# Recipe reference",
        "Made from the configuration models; `posttrain explain [KEY]` prints the same. A recipe is a folder of YAML "
        f"files that are merged; `{PIPELINE}` may name a folder to start from (`extends: ../demo`). Lists are replaced "
        "whole. Every key can be set on the command line: `--set rlvr.rollout.group_size=16`.",
        "Places that begin with `curation` are keys of a curation's file (docs/curation.md).",
        "For completion and checks in an editor with a YAML language server, run "
        "`posttrain explain --schema > recipe.schema.json` once, and put this line at the top of a recipe's file:",
        "```yaml\n# yaml-language-server: $schema=recipe.schema.json\n```",
    ]
    for section in sections():
        parts.append(f"## {section.model.__name__}")
        parts.append(_escaped(section.text))
        parts.append(
            f"Where: {', '.join(f'`{place}`' if place else 'the recipe' for place in section.places)}. "
            f"Defined in `{section.source}`."
        )
        rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
        rows += [
            f"| `{key.name}` | {_escaped(key.kind)} | {_escaped(key.default)} | {key.unit} | {_escaped(key.text)} |"
            for key in section.keys
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def schema() -> dict[str, Any]:
    """JSON schema for one file of a recipe folder. No key is required, because the folder's files are merged."""
    found = Recipe.model_json_schema()
    found["properties"]["extends"] = {
        "type": "string",
        "description": "Recipe folder that this recipe extends.",
    }
    for part in (found, *found.get("$defs", {}).values()):
        part.pop("required", None)
    # The validator takes the word as well, for null.
    packing = found["$defs"]["SFTStage"]["properties"]["packing"]
    packing["anyOf"] = [*packing["anyOf"], {"const": "off"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _walk(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        for inner, below in _models(field.annotation):
            yield from _walk(inner, f"{place}.{name}".lstrip(".") + below)


def _models(annotation: Any, below: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Models inside a type annotation, each with `[]` for a list's item and `.NAME` for a value under a free name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, below
    for inner in get_args(annotation):
        ways = {tuple: "[]", list: "[]", dict: ".NAME"}
        yield from _models(inner, ways.get(get_origin(annotation), below))


def _key(name: str, field: FieldInfo) -> Key:
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    found = list(_models(field.annotation))
    models, named = tuple(model for model, _ in found), any(below == ".NAME" for _, below in found)
    text = " ".join((field.description or "").split())
    return Key(name, _type_text(field), _default_text(field), unit, text, models, named)


def _type_text(field: FieldInfo) -> str:
    text = _annotation_text(field.annotation)
    for bound in field.metadata:
        text += "".join(
            f", {sign} {getattr(bound, name)}" for name, sign in _BOUNDS.items() if hasattr(bound, name)
        )
    return text


def _annotation_text(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_annotation_text(one) for one in inner)
    if origin is Annotated:
        return _annotation_text(inner[0])
    if origin in (tuple, list):
        items = [one for one in inner if one is not Ellipsis]
        if Ellipsis in inner or origin is list:
            return f"list of {_annotation_text(items[0])}"
        return f"[{', '.join(_annotation_text(one) for one in items)}]"
    if origin is dict:
        return f"mapping to {_annotation_text(inner[1])}"
    if origin is Annotated:
        return _annotation_text(inner[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    return names.get(
        annotation, "anything" if annotation is Any else getattr(annotation, "__name__", str(annotation))
    )


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = (
        field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    )
    if isinstance(value, BaseModel):
        return "its own defaults"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words.get(value, str(value)) if value is None or isinstance(value, bool | str) else str(value)


def _plain(places: tuple[str, ...]) -> list[str]:
    return [place.replace("[]", "") for place in places if place]


def _keys_by_path(known: list[Section]) -> dict[str, tuple[Section, Key]]:
    return {
        f"{place}.{key.name}".replace("[]", "").lstrip("."): (section, key)
        for section in known
        for place in section.places
        for key in section.keys
    }


def _hint(path: str, names: set[str]) -> str:
    """A hint that names the nearest key. The whole list has several hundred keys and would not help."""
    return nearest(path, names).partition("Known: ")[0].strip() or "posttrain explain lists the sections"


def _summary(section: Section) -> str:
    place = section.places[0] or "(the recipe)"
    more = f" and {len(section.places) - 1} more" if len(section.places) > 1 else ""
    return f"{place + more:45} {section.text.splitlines()[0]}"


def _section_text(section: Section) -> str:
    lines = [
        section.text,
        "",
        f"where: {', '.join(section.places) or 'the recipe'}",
        f"source: {section.source}",
        "",
    ]
    for key in section.keys:
        unit = f", {key.unit}" if key.unit else ""
        lines.append(f"{key.name}: {key.kind}{unit}; default {key.default}")
        lines += [f"    {key.text}"] if key.text else []
    return "\n".join(lines)


def _key_text(key: Key, section: Section, matches: list[str]) -> str:
    places = [full for full in matches if full in _keys_by_path([section])]
    lines = [
        ", ".join(places),
        f"  type     {key.kind}",
        f"  default  {key.default}",
        *([f"  unit     {key.unit}"] if key.unit else []),
        f"  stages   {', '.join(section.stages) or ('a curation' if _of_curation(places) else 'the whole chain')}",
        f"  source   {section.source}",
        *([f"  {key.text}"] if key.text else []),
    ]
    return "\n".join(
        [*lines, *(_section_text(Section(one, (places[0],), keys_of(one))) for one in key.models)]
    )


def _of_curation(places: Sequence[str]) -> bool:
    return all(place.startswith(CURATION) for place in places)


def _escaped(text: str) -> str:
    """Escape pipes and HTML for a table cell or a paragraph."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
