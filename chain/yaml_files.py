"""Recipe folders as one mapping that remembers which file each key came from.

The YAML here is the core schema of YAML 1.2, not PyYAML's 1.1: `1e-6` is a number, `off` and `no` are words,
and a key written twice is an error instead of the last one winning.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core.strict import ConfigError, KeyPath, key_path

PIPELINE = "pipeline.yaml"
OVERRIDE = "SET"
MAX_CHARACTERS = 1_000_000
"""Of one recipe file."""
MAX_VALUES, MAX_DEPTH, MAX_DIGITS = 100_000, 50, 40
"""Of one recipe file with its aliases written out: keys and values, levels, characters of a number."""
_SOURCE = re.compile(r"#\s*(?:report\b[^:]*:\s*\S|differs:\s*\S|ours(?::\s*\S|\s*$))")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's booleans and numbers, and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word, not a list or a mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is there twice", key.start_mark
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
    """One YAML value, bounded in size, depth and digits. Raises ValueError in one line."""
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
    """The text of a recipe's file. Raises ValueError unless it is a regular file of UTF-8."""
    if not file.is_file():
        raise ValueError("this is not a regular file; a recipe is made of YAML files")
    if file.stat().st_size > 4 * MAX_CHARACTERS:
        raise ValueError(f"{file.stat().st_size} bytes, at most {4 * MAX_CHARACTERS} are read")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _check_bounds(root: yaml.Node | None) -> None:
    """Refuse a tree that is too deep or too large once its aliases are written out, before anything is built of it.

    Anchors may multiply: nine levels of nine aliases are 400 million values. Sizes are added up node by node,
    so a shared node is visited once. Raises ValueError.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int, above: frozenset[int]) -> int:
        if id(node) in above:
            raise ValueError(f"line {node.start_mark.line + 1}: an anchor that contains itself")
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
                f"line {node.start_mark.line + 1}: more than {MAX_VALUES} values once its aliases are written out"
            )
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root, 1, frozenset())


@dataclass
class Folder:
    """A recipe as merged from its files: the values, and the file every key came from."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The file that wrote the key, or the nearest key above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return str(self.path)

    def merge(self, values: Mapping[str, Any], file: str) -> None:
        """Lay `values` over these: mappings key by key, everything else replaced whole."""
        _merge(self.values, values, (), file, self.origins)

    def override(self, assignment: str, aliases: Mapping[str, str]) -> None:
        """Apply one `a.b.0.c=value`; the value is YAML, a number indexes a list.

        `aliases` are short names for the first key (`fusion` for `think_fusion`). Raises ConfigError when
        the text is not an assignment or the path runs through a value. Validation finds unknown keys later.
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
    """The merged files of a recipe folder, over the folder its pipeline.yaml `extends`, if any.

    Two files of one folder never hold the same top-level key. The name is the folder's unless pipeline.yaml
    gives one; it is not inherited. Raises ConfigError naming the file.
    """
    path = Path(path)
    if not (path / PIPELINE).is_file():
        raise ConfigError(f"{path}: no recipe here: {PIPELINE} is missing")
    resolved = path.resolve()
    if resolved in _below:
        raise ConfigError(f"{path / PIPELINE}: extends: recipes extend each other in a circle")
    own = _own_files(path)
    pipeline = own[path / PIPELINE]
    base = pipeline.pop("extends", None)
    folder = Folder(path)
    if base is not None:
        below = read_folder(path / str(base), (*_below, resolved))
        folder.values, folder.origins = below.values, below.origins
    pipeline.setdefault("name", resolved.name)
    for file, values in own.items():
        folder.merge(values, str(file))
    return folder


def check_sources(recipe_dir: Path) -> list[str]:
    """The numbers of a recipe's files that do not say where they come from, each as `file:line: key = value`.

    A number's source is a comment `# report...: its words`, `# differs: why` or `# ours[: why]` at the end of
    its line, or of the line of the key that encloses it (for a block of numbers with one source).
    """
    problems: dict[str, None] = {}  # in order, and once: an alias repeats the numbers of its anchor
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
                f"{file}: a recipe file holds keys and values, this one a {type(values).__name__}"
            )
        own[file] = values or {}
        for key in own[file]:
            if key in owner:
                raise ConfigError(f"{file}: {key} is also in {owner[key]}; one file holds it")
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
    """A copy that shares nothing: a YAML alias must not make one override change two places."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _record(path: KeyPath, file: str, origins: dict[KeyPath, str]) -> None:
    """Note where a whole sub-tree came from, forgetting what was there before."""
    for old in [known for known in origins if known[: len(path)] == path]:
        del origins[old]
    origins[path] = file


def _assign(values: dict[str, Any], path: list[str], value: Any, assignment: str) -> KeyPath:
    """Set the value at `path`, making missing mappings on the way; its path with list indices as numbers."""
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
                f"{OVERRIDE}: {assignment}: {key_path(tuple(keys))} is the value {at!r}, no mapping"
            )
    return tuple(keys)


def _index(items: list, part: str, assignment: str, keys: list[str | int]) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(
            f"{OVERRIDE}: {assignment}: {key_path(tuple(keys))} is a list of {len(items)}; "
            f"{part!r} is not an index of it (they count from 0)"
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
