"""The input of a curation: sets that are generated, imported, or on disk as records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from chain.curation.config import GENERATED, Curation
from chain.fingerprints import Hashes
from chain.inputs import is_on_hub, set_place
from chain.job import Task
from chain.launch import run_job
from chain.recipe import ForeignSet
from core.files import atomic_dir, read_json, write_json
from core.manifest import hash_config
from core.strict import ConfigError
from core.training.job import Job
from corpus.curation.engine import Engine
from corpus.curation.shards import Shard, shards_of
from corpus.hub import address_hint


class Import(NamedTuple):
    """One file of a set in another format, and where its records go."""

    set: str
    given: ForeignSet
    source: str
    """The file's path or address on the hub."""
    images: str | None
    """Folder of the pictures; None: the file's."""
    out: Path


class Inputs:
    """The files of a curation's sets.

    Args:
        curation: the configuration.
        work: the curation's work folder.
        engine: imports files in parallel.
    """

    def __init__(self, curation: Curation, work: Path, engine: Engine) -> None:
        self.curation, self.work, self.engine = curation, work, engine
        self.places: dict[str, str] = {}
        """Name of a set -> its path or address on the hub."""
        self.hashes: dict[str, str] = {}
        """Name of a set -> hash of its content and of its import options."""
        self._files: dict[str, list[Path]] = {}
        self._imports: list[Import] = []

    def prepare(self) -> None:
        """Generate and import missing and outdated sets. Raises ConfigError for sets that do not exist."""
        self._generate()
        self.places = {name: self._place(name, given) for name, given in self.curation.every().items()}
        memory = Hashes(self.work / "hashes.jsonl")
        for name, place in self.places.items():
            given = self.curation.every()[name]
            options = given.model_dump(mode="json") if isinstance(given, ForeignSet) else None
            self.hashes[name] = hash_config({"content": memory.of(place), "options": options})
            if isinstance(given, ForeignSet):
                self._plan_import(name, given, place)
                continue
            path = Path(place)
            self._files[name] = [path] if path.is_file() else sorted(path.glob("*.parquet"))
            if not self._files[name]:
                raise ConfigError(
                    f"set {name}: {place} does not contain a Parquet file of records; for other files write "
                    f"{name}: {{path: {place}, format: auto}}"
                )
        todo = [one for one in self._imports if not _summary(one).exists()]
        for _ in self.engine.each(import_file, todo):
            pass

    def shards(self, names: Mapping[str, object]) -> list[Shard]:
        """The shards of some sets, in order. Ids get the set's name as a prefix if there are several sets."""
        prefix = "{}/" if len(names) > 1 else ""
        rows = self.curation.shard_rows
        return [
            shard for name in names for shard in shards_of(name, self._files[name], rows, prefix.format(name))
        ]

    def files(self, name: str) -> Path:
        """The set's file, or the folder of its files."""
        files = self._files[name]
        return files[0] if len(files) == 1 else files[0].parent

    def rejected(self) -> list[tuple[str, int, int, Mapping[str, int]]]:
        """For each imported set: its name, rows read, records, and rejected rows by rule."""
        found: dict[str, tuple[int, int, dict[str, int]]] = {}
        for one in self._imports:
            told = read_json(_summary(one))
            read, written, rules = found.get(one.set, (0, 0, {}))
            for rule, count in told["rejected"].items():
                rules[rule] = rules.get(rule, 0) + count
            found[one.set] = read + told["read"], written + told["written"], rules
        return [(name, *counts) for name, counts in found.items()]

    def _generate(self) -> None:
        made = self.curation.generate
        if made is None:
            return
        folder = self.work / "generated"
        same = hash_config({"generate": made, "seed": self.curation.seed})
        if (folder / "generated.json").exists() and read_json(folder / "generated.json")["same"] == same:
            return
        with atomic_dir(folder) as out:
            job = Job(stage="data", out=out, seed=self.curation.seed, folders=self.curation.folders)
            run_job(Task.of("chain.make:generate", made, job), out, threads=made.threads)
            write_json(out / "generated.json", {"same": same})

    def _place(self, name: str, given: str | ForeignSet) -> str:
        """The set's path or address on the hub. Raises ConfigError if it does not exist."""
        text = given.path if isinstance(given, ForeignSet) else given
        if text == GENERATED:
            return str(self.work / "generated" / f"{name}.parquet")
        if text.startswith(f"{GENERATED}/"):
            return str(self.work / text)
        if problem := missing(self.curation, name, given):
            raise ConfigError(problem)
        return set_place(self.curation, text)

    def _plan_import(self, name: str, given: ForeignSet, place: str) -> None:
        from corpus.formats.files import files_of, root_of
        from corpus.hub import HubFiles

        out = self.work / "imported" / f"{name}-{self.hashes[name][:12]}"
        files = files_of(place, given.split)
        images = set_place(self.curation, given.images) if given.images else None
        if isinstance(files, HubFiles):
            sources = [str(address) for address in files.each()]
        else:
            sources, images = [str(file) for file in files], images or str(root_of(place, files))
        mine = [
            Import(name, given, source, images, out / f"{number:05d}-{Path(source).stem}.parquet")
            for number, source in enumerate(sources)
        ]
        self._imports += mine
        self._files[name] = [one.out for one in mine]


def missing(curation: Curation, name: str, given: str | ForeignSet) -> str | None:
    """The problem of a set that does not exist, or cannot be read where it is; None for every other set."""
    text = given.path if isinstance(given, ForeignSet) else given
    if is_on_hub(text):
        remedy = f"records on the hub are imported: write {name}: {{path: {text}, format: records}}"
        return None if isinstance(given, ForeignSet) else f"set {name}: {remedy}"
    if curation.place(text).exists():
        return None
    return f"set {name}: {text!r}: there is no such file or folder; {curation.looked()}{address_hint(text)}"


def import_file(task: Import) -> int:
    """Import one file (corpus.importing), then write its counts; returns the number of records. Runs in workers."""
    from corpus.formats.files import files_of, root_of
    from corpus.formats.table import Options
    from corpus.importing import import_set

    given = task.given
    root = root_of(task.source, files_of(task.source, given.split), task.images)
    options = Options(root=root, columns=given.columns, system=given.system, turns=given.turns)
    found = import_set(task.source, task.out, format_=given.format, options=options, strict=given.strict)
    counts = {"read": found.read, "written": found.written, "rejected": dict(found.rejected)}
    write_json(_summary(task), counts)
    return found.written


def _summary(task: Import) -> Path:
    return task.out.with_suffix(".import.json")
