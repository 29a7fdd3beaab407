"""Fingerprints: they show whether a finished folder still matches its recipe.

A fingerprint hashes a resolved config, the chain's seed, the contents of the input sets, the code that the config
names, and the manifest of the parent stage. A manifest contains its run time. So after a stage runs again, every later
stage has a new fingerprint.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from chain.inputs import code_file, is_on_hub
from chain.recipe import CoreConfig, GenerateConfig, sources
from core.files import append_jsonl, hash_tree, sha256_file
from core.manifest import Manifest, hash_config
from rl.config import RLConfig
from rl.eval_config import EvalConfig

log = logging.getLogger(__name__)


class Fingerprints:
    """Hashes of the inputs of a run's steps.

    Args:
        seed: the chain's seed.
        sets: data set name -> Parquet file, folder or address on the hub.
        memory: cache file of content hashes.
        place: the absolute path that a recipe's path means.
        folders: where users' modules are searched, after the installed ones.
    """

    def __init__(
        self,
        seed: int,
        sets: Mapping[str, str],
        memory: Path,
        place: Callable[[str], Path] = Path,
        folders: Sequence[Path] = (),
    ) -> None:
        self.seed, self.sets, self.place, self.folders = seed, sets, place, folders
        self.hashes = Hashes(memory)

    def fingerprint(self, name: str, config: BaseModel, inputs: Mapping[str, str]) -> str:
        """One hash of everything that determines a step's result."""
        dump = config.model_dump(mode="json")
        return hash_config({"name": name, "config": dump, "seed": self.seed, "inputs": inputs})

    def of_sources(self, config: BaseModel, without: Collection[str] = ()) -> dict[str, str]:
        """Content hash of every set that a config reads, except the sets in `without`, which other inputs determine."""
        names = {source.set for _, source in sources(config)} - set(without)
        return {f"set:{name}": self.hashes.of(self.sets[name]) for name in sorted(names)}

    def of_files(self, config: BaseModel) -> dict[str, str]:
        """Hash of the core that a config names by path, and of the source files that it names by import string."""
        names: list[str | None] = []
        if isinstance(config, CoreConfig):
            names.append(config.build)
        if isinstance(config, GenerateConfig):
            names.append(config.by)
        if isinstance(config, RLConfig):
            names += [term.use for term in config.rewards]
        if isinstance(config, EvalConfig):
            names += [one.use for one in config.sets.values()]
        found = {f"code:{name}": self.of_code(name) for name in names if name and ":" in name}
        if isinstance(config, CoreConfig):
            found |= {f"set:{name}": self.hashes.of(self.sets[name]) for name in config.vocabulary}
        if isinstance(config, CoreConfig) and config.path:
            found["core"] = self.hashes.of(str(self.place(config.path)))
        return found

    def of_code(self, import_string: str) -> str:
        """Hash of the source file that an import string names, and of the files beside it that it needs.

        In a package these are all files; else those that it imports, directly or through each other.
        """
        file = code_file(import_string, self.folders)
        if file is None:
            return "missing"
        in_package = (file.parent / "__init__.py").exists()
        files = sorted(file.parent.glob("*.py")) if in_package else with_imported(file)
        return hash_config({one.name: self.hashes.of(str(one)) for one in files})


def with_imported(file: Path) -> list[Path]:
    """The file and the files beside it that it imports, directly or through each other; a file with bad syntax ends
    the search, and fails where it is imported."""
    found, todo = {file}, [file]
    while todo:
        try:
            tree = ast.parse(todo.pop().read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            beside = {file.with_name(f"{name.partition('.')[0]}.py") for name in names if name}
            new = {one for one in beside - found if one.is_file()}
            found |= new
            todo += sorted(new)
    return sorted(found)


def identity(manifest: Manifest) -> str:
    """A hash of one execution of a stage. Another execution has a different hash."""
    return hash_config(manifest.model_dump(mode="json"))


def is_current(folder: Path, fingerprint: str) -> bool:
    """Whether the folder is finished and was made from exactly these inputs."""
    manifest = Manifest.read(folder)
    return manifest is not None and manifest.fingerprint == fingerprint


def read_cache(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL cache. Lines torn by a kill or a full disk are dropped with a warning."""
    if not file.exists():
        return []
    found, torn = [], 0
    for line in file.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            torn += 1
    if torn:
        log.warning("%s: dropped %d torn lines; their contents are computed again", file, torn)
        file.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return found


@dataclass
class Hashes:
    """Content hashes of files and folders, cached in the run's folder by path, size and modification time.

    A run's data may have hundreds of gigabytes, so each file is read once and not at every start.
    """

    memory: Path
    known: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {line["state"]: line["hash"] for line in read_cache(self.memory)}

    def of(self, place: str) -> str:
        """The content hash of `place`. An address on the hub is its own hash; a missing file has `missing`."""
        if is_on_hub(place):
            return f"hub:{place}"
        path = Path(place)
        if not path.exists():
            return "missing"
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        state = json.dumps([str(path), stats])
        if state not in self.known:
            self.known[state] = sha256_file(path) if path.is_file() else hash_tree(path)
            append_jsonl(self.memory, {"state": state, "hash": self.known[state]})
        return self.known[state]
