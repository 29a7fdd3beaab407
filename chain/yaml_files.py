"""Merges a recipe folder into one mapping and records the source file of each key.

The files use the core schema of YAML 1.2, while PyYAML implements YAML 1.1. Here `1e-6` is a number, `off` and `no` are
strings, and a repeated key is an error; PyYAML would keep the last value.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core.strict import ConfigError, KeyPath, key_path
from sailvl2_posttrain.names import ROOT

PIPELINE = "pipeline.yaml"
OVERRIDE = "SET"
MAX_CHARACTERS = 1_000_000
"""Most characters in one recipe file."""
MAX_VALUES, MAX_DEPTH, MAX_DIGITS = 100_000, 50, 40
"""Limits of one recipe file after its aliases are expanded: keys and values, levels, characters of a number."""
_SOURCE = re.compile(r"#\s*(?:report\b[^:]*:\s*\S|differs:\s*\S|ours(?::\s*\S|\s*$))")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's booleans and numbers, and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a string, not a list or a mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is repeated", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_Loader.yaml_implicit_resolvers = {}
_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))  # `key:` with nothing after it
)
_resolve("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789")
_resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789")
_resolve("float", r"^[-+]?[0-9]+[eE][-+]?[0-9]+$", "-+0123456789")
_resolve("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")


def read_value(text: str) -> Any:
    """Parse one YAML value within limits on size, depth and digits. Raises ValueError with a one-line message."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    try:
        root = yaml.compose(text, _Loader)
        _check_bounds(root)
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from None


def read_file(file: Path) -> str:
    """The text of a recipe's file. Raises ValueError unless the file is a regular UTF-8 file."""
    if not file.is_file():
        raise ValueError("this is not a regular file; a recipe consists of YAML files")
    if file.stat().st_size > 4 * MAX_CHARACTERS:
        raise ValueError(f"{file.stat().st_size} bytes, at most {4 * MAX_CHARACTERS} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _check_bounds(root: yaml.Node | None) -> None:
    """Raise ValueError for a tree that is too deep or too large after alias expansion, before any value is constructed.

    Aliases multiply: nine levels of nine aliases expand to 400 million values. The sum over nodes visits a shared node
    once.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ValueError(f"line {node.start_mark.line + 1}: an anchor contains itself")
        if depth > MAX_DEPTH:
            raise ValueError(f"line {node.start_mark.line + 1}: nested more than {MAX_DEPTH} levels deep")
        if id(node) in sizes:
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode):
            total = 1 + len(node.value) // 100
            if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
                raise ValueError(
                    f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters, at most "
                    f"{MAX_DIGITS} are read"
                )
        else:
            inside = above | {id(node)}
            children = (
                [part for pair in node.value for part in pair]
                if isinstance(node, yaml.MappingNode)
                else node.value
            )
            total = 1 + sum(size(child, depth + 1, inside) for child in children)
        if total > MAX_VALUES:
            raise ValueError(
                f"line {node.start_mark.line + 1}: more than {MAX_VALUES} values after its aliases are expanded"
            )
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root, 1, frozenset())


@dataclass
class Folder:
    """The merged values of a recipe, and the source file of every key."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    extended: tuple[Path, ...] = ()
    """The folders of the recipes that it extends, the nearest first."""

    def where(self, path: KeyPath) -> str:
        """The file that set this key, or else the nearest enclosing key."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return str(self.path)

    def merge(self, values: Mapping[str, Any], file: str) -> None:
        """Merge `values` into this recipe. Mappings are merged key by key; every other value is replaced."""
        _merge(self.values, values, (), file, self.origins)

    def override(self, assignment: str, aliases: Mapping[str, str]) -> None:
        """Apply one assignment `a.b.0.c=value`. The value is YAML; a number in the path indexes a list.

        `aliases` are short names for the first key (`fusion` for `think_fusion`). Raises ConfigError if the text is not
        an assignment, or if the path passes through a scalar value. Validation finds unknown keys later.
        """
        path_text, equals, value_text = assignment.partition("=")
        path = path_text.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"{OVERRIDE}: {assignment!r} is not an assignment; write a.b.c=value")
        path[0] = aliases.get(path[0], path[0])
        try:
            value = read_value(value_text)
        except ValueError as error:
            raise ConfigError(f"{OVERRIDE}: {assignment:.200}: the value is not YAML: {error}") from None
        keys = _assign(self.values, path, value, assignment)
        _record(keys, f"{OVERRIDE} {assignment}", self.origins)


def read_folder(path: Path, _below: tuple[Path, ...] = ()) -> Folder:
    """Merge the files of a recipe folder over the recipe that its pipeline.yaml `extends`, if any.

    Two files of one folder may not share a top-level key. The recipe's name is the folder's name unless pipeline.yaml
    gives a name. A name is not inherited. Raises ConfigError naming the file.
    """
    path = Path(path)
    if not (path / PIPELINE).is_file():
        raise ConfigError(f"{path}: this is not a recipe folder: {PIPELINE} is missing")
    resolved = path.resolve()
    if resolved in _below:
        raise ConfigError(f"{path / PIPELINE}: extends: recipes extend each other in a circle")
    own = _own_files(path)
    pipeline = own[path / PIPELINE]
    base = pipeline.pop("extends", None)
    folder = Folder(path)
    if base is not None:
        below = read_folder(_extended(path, str(base)), (*_below, resolved))
        folder.values, folder.origins = below.values, below.origins
        folder.extended = (below.path, *below.extended)
    pipeline.setdefault("name", resolved.name)
    for file, values in own.items():
        folder.merge(values, str(file))
    return folder


def _extended(path: Path, base: str) -> Path:
    """The folder that `extends: base` names: relative to the recipe's folder, else a recipe that this project ships."""
    shipped = ROOT / "recipes" / base
    here = path / base
    return shipped if not here.exists() and (shipped / PIPELINE).is_file() else here


def check_sources(recipe_dir: Path) -> list[str]:
    """List the numbers in a recipe's files that lack a source, each as `file:line: key = value`.

    A source is a comment `# report...: quotation`, `# differs: reason` or `# ours[: reason]`. It stands at the end of
    the number's line, or at the end of the enclosing key's line for a block of numbers with one source.
    """
    problems: dict[str, None] = {}  # ordered and unique: an alias repeats the numbers of its anchor
    for file in sorted(Path(recipe_dir).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        root = yaml.compose(text, _Loader)
        for keys, node, line_above in _numbers(root, (), None):
            line = node.start_mark.line
            candidates = [lines[line][node.end_mark.column :]]
            candidates += [lines[line_above]] if line_above is not None else []
            if not any(_SOURCE.search(candidate) for candidate in candidates):
                named = max(place for place, key in enumerate(keys) if isinstance(key, str))
                problems.setdefault(f"{file}:{line + 1}: {key_path(keys[named:])} = {node.value}")
    return list(problems)


def _own_files(path: Path) -> dict[Path, dict[str, Any]]:
    files = sorted(path.glob("*.yaml"), key=lambda file: (file.name != PIPELINE, file.name))
    own: dict[Path, dict[str, Any]] = {}
    owner: dict[str, Path] = {}
    for file in files:
        try:
            values = read_value(read_file(file))
        except ValueError as error:
            raise ConfigError(f"{file}: not YAML: {error}") from None
        if not isinstance(values, dict | None):
            raise ConfigError(
                f"{file}: a recipe file must hold a mapping; this file holds a {type(values).__name__}"
            )
        own[file] = values or {}
        for key in own[file]:
            if key in owner:
                raise ConfigError(
                    f"{file}: {key} is also in {owner[key]}; remove it from one of the two files"
                )
            owner[key] = file
    return own


def _merge(target: dict, values: Mapping, path: KeyPath, file: str, origins: dict[KeyPath, str]) -> None:
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            origins[here] = file
            _merge(target[key], value, here, file, origins)
        else:
            target[key] = _copy(value)
            _record(here, file, origins)


def _copy(value: Any) -> Any:
    """A deep copy. Values shared through a YAML alias would let one override change two places."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _record(path: KeyPath, file: str, origins: dict[KeyPath, str]) -> None:
    """Record the origin of a whole subtree, and drop the earlier records below it."""
    for old in [known for known in origins if known[: len(path)] == path]:
        del origins[old]
    origins[path] = file


def _assign(values: dict[str, Any], path: list[str], value: Any, assignment: str) -> KeyPath:
    """Set the value at `path` and create missing mappings. Returns the path with list indices as integers."""
    at: Any = values
    keys: list[str | int] = []
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        key = _index(at, part, assignment, keys) if isinstance(at, list) else part
        keys.append(key)
        if last:
            at[key] = value
        elif isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
        at = at[key]
        if not last and not isinstance(at, dict | list):
            raise ConfigError(
                f"{OVERRIDE}: {assignment}: {key_path(tuple(keys))} is the value {at!r}, not a mapping"
            )
    return tuple(keys)


def _index(items: list, part: str, assignment: str, keys: list[str | int]) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(
            f"{OVERRIDE}: {assignment}: {key_path(tuple(keys))} is a list of {len(items)} items; "
            f"{part!r} is not a valid index (indices start at 0)"
        )
    return int(part)


def _numbers(
    node: yaml.Node | None, path: KeyPath, line_above: int | None
) -> Iterator[tuple[KeyPath, yaml.ScalarNode, int | None]]:
    """Every number below a node: its key path, its node, and the line of the key that encloses it."""
    children: Iterable[tuple[str | int, yaml.Node, int | None]] = ()
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, value, key.start_mark.line) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, line_above) for index, value in enumerate(node.value)]
    for key, value, line in children:
        if isinstance(value, yaml.ScalarNode):
            if value.tag in _NUMBERS:
                yield (*path, key), value, line_above
        else:
            yield from _numbers(value, (*path, key), line)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
