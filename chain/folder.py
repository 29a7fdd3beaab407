"""A run's folder: the lock, and one folder per finished step.

A step writes to `<name>.partial`. That folder is renamed to `<name>` when all files are on disk. The step's manifest
has a fingerprint of everything that determines the result (chain/fingerprints.py). A finished folder is current if its
manifest's fingerprint equals the step's fingerprint.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel

from chain.display import duration
from chain.errors import ERROR
from chain.fingerprints import Fingerprints, identity
from chain.inputs import data_folder, foreign_set, imported_folder, locate_sets, prepared_folder
from chain.job import DONE
from chain.recipe import ForeignSet, Recipe, made_between
from core.files import PARTIAL, SAME, atomic_dir, read_json, write_json
from core.manifest import Began, Manifest, hash_config, now
from core.strict import ConfigError, Strict
from core.training.resume import FOLDER as UNFINISHED

DATA = "data"


@dataclass(frozen=True)
class Step:
    """One product of a run in its own folder: data, a stage's sets, or a stage's checkpoint."""

    name: str
    folder: Path
    config: BaseModel
    inputs: Mapping[str, str]
    """Content hash of each input, by name."""
    fingerprint: str
    parent: str | None = None
    """The stage whose checkpoint this step starts from."""
    saves: bool = False
    """Whether an interrupted attempt can be resumed."""

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the finished folder; None if the step is not finished."""
        return Manifest.read(self.folder)

    @property
    def current(self) -> bool:
        """Whether the folder is finished and was made from exactly these inputs."""
        manifest = self.manifest
        return manifest is not None and manifest.fingerprint == self.fingerprint

    @property
    def partial(self) -> Path:
        """The folder that the step writes to until it is finished."""
        return self.folder.with_name(self.folder.name + PARTIAL)


class RunFolder:
    """One recipe's run on disk.

    Args:
        recipe: the recipe of the run.
        runs_dir: folder of all runs.
        stages: names of the recipe's stages, in order.
        say: takes a line for the user.
    """

    def __init__(
        self, recipe: Recipe, runs_dir: Path, stages: tuple[str, ...], say: Callable[[str], None]
    ) -> None:
        self.recipe, self.stages, self.say = recipe, stages, say
        self.path = (runs_dir / recipe.name).resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        self.sets = locate_sets(recipe, self.path)
        self.prints = Fingerprints(
            recipe.seed, self.sets, self.path / ".hashes.jsonl", recipe.place, recipe.folders
        )

    @property
    def id(self) -> str:
        """The id under which W&B groups this run's stages. It is created once."""
        file = self.path / "chain.json"
        if not file.exists():
            write_json(file, {"id": f"{self.recipe.name}-{uuid4().hex[:8]}", "started": now()})
        return read_json(file)["id"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder. Two chains in one folder would mistake each other's stages for their own."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is in use by another posttrain process; wait for it to end, or choose --name"
                ) from None
            yield

    # Stages

    def stage(self, name: str) -> Path:
        """The folder of a stage's results after the stage is finished."""
        return self.path / name

    def before(self, name: str) -> dict[str, Path]:
        """Folders of the stages before this one."""
        return {one: self.stage(one) for one in self.stages[: self.stages.index(name)]}

    def parent(self, name: str) -> str | None:
        """The stage whose checkpoint this stage starts from."""
        place = self.stages.index(name)
        return self.stages[place - 1] if place else None

    def start(self, name: str) -> Path | None:
        """The checkpoint folder that the stage starts from; None for the first stage."""
        parent = self.parent(name)
        return self.stage(parent) / "checkpoint" if parent else None

    def config(self, name: str) -> Strict:
        """The stage's part of the recipe."""
        config = self.recipe.stage(name)
        assert config is not None, f"{name} is not in this chain"
        return config

    def manifest(self, name: str) -> Manifest:
        """The manifest of a finished stage. Raises ConfigError if it is not finished."""
        manifest = Manifest.read(self.stage(name))
        if manifest is None:
            raise ConfigError(f"{name} is not finished: {self.stage(name)} has no manifest")
        return manifest

    def require_finished(self, before: tuple[str, ...], first: str) -> None:
        """Raise ConfigError if a stage before `first` is not finished; report the stages that are out of date."""
        missing = [name for name in before if Manifest.read(self.stage(name)) is None]
        if missing:
            raise ConfigError(
                f"--from {first}: not finished: {', '.join(missing)} (in {self.path}); "
                f"start from {missing[0]}, or leave --from out to run the missing stages"
            )
        for name in before:
            if not self.training(name).current:
                self.say(
                    f"{name}: its config or inputs have changed since it ran; --from {first} uses it unchanged"
                )

    # Steps

    def data(self) -> Step | None:
        """The step that generates the recipe's data sets; None without `data.generate`."""
        config = self.recipe.data.generate
        if config is None:
            return None
        inputs = self.prints.of_files(config)
        return Step(
            DATA, data_folder(self.path), config, inputs, self.prints.fingerprint(DATA, config, inputs)
        )

    def imports(self) -> list[Step]:
        """The sets that the recipe imports from other formats."""
        steps = []
        for name, given in self.recipe.data.sets.items():
            if isinstance(given, ForeignSet):
                inputs = {"path": self.prints.hashes.of(foreign_set(self.recipe, given).path)}
                fingerprint = self.prints.fingerprint(f"import {name}", given, inputs)
                steps.append(Step(name, imported_folder(self.path, name), given, inputs, fingerprint))
        return steps

    def preparation(self, name: str) -> Step | None:
        """The step that makes a stage's sets with its initial policy; None if the stage has no such sets."""
        config = self.config(name)
        if self.parent(name) is None or not made_between(config):
            return None
        part = config.prepare  # type: ignore[attr-defined]
        inputs = self._inputs(name, part)
        fingerprint = self.prints.fingerprint(f"prepare {name}", part, inputs)
        return Step(name, prepared_folder(self.path, name), part, inputs, fingerprint, self.parent(name))

    def training(self, name: str, saves: bool = False) -> Step:
        """The step that trains a stage."""
        config = self.config(name)
        inputs = self._inputs(name, config)
        fingerprint = self.prints.fingerprint(name, config, inputs)
        return Step(name, self.stage(name), config, inputs, fingerprint, self.parent(name), saves)

    def evaluation(self, name: str) -> str:
        """Hash of everything that determines a finished stage's held-out scores; "" without `eval`."""
        cfg = self.recipe.eval
        if cfg is None:
            return ""
        inputs = {
            **self.prints.of_sources(cfg),
            **self.prints.of_files(cfg),
            "stage": identity(self.manifest(name)),
        }
        return self.prints.fingerprint("eval", cfg.model_copy(update={"every": None}), inputs)

    @contextmanager
    def making(self, step: Step, seconds_before: float = 0.0) -> Iterator[Path]:
        """Yield the partial folder to fill; afterwards write the manifest and rename the folder to its final name.

        Files of an interrupted attempt stay if the fingerprint is equal and the step either saves intermediate
        checkpoints or had finished its work. `seconds_before` is added to the manifest's wall time.
        """
        began, dump = Began(), step.config.model_dump(mode="json")
        if not step.saves and not (step.partial / DONE).exists():
            shutil.rmtree(step.partial, ignore_errors=True)
        with atomic_dir(step.folder, same=step.fingerprint) as partial:
            if (partial / DONE).exists():
                self.say(f"{step.name}: the interrupted run had finished its work")
            elif any((partial / UNFINISHED).glob("*")):
                self.say(f"{step.name}: resumes where an interrupted run stopped")
            elif (partial / "config.json").exists():
                self.say(f"{step.name}: starts again; the interrupted run had saved nothing")
            write_json(partial / "config.json", dump)
            yield partial
            (partial / ERROR).unlink(missing_ok=True)
            shutil.rmtree(partial / UNFINISHED, ignore_errors=True)
            made = began.manifest(
                stage=step.name,
                fingerprint=step.fingerprint,
                config_hash=hash_config(dump),
                inputs=step.inputs,
                seed=self.recipe.seed,
                parent=step.parent,
            )
            made.model_copy(update={"seconds": made.seconds + seconds_before}).write(partial)
        (step.folder / DONE).unlink(missing_ok=True)
        self.say(f"{step.folder.relative_to(self.path)}: done in {duration(made.seconds)}")

    def empty(self, step: Step) -> None:
        """Remove what an attempt at a step has written, within `making`; its configuration and its data stay."""
        for path in step.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (SAME, "config.json", "prepare.json"):
                path.unlink()

    def _inputs(self, name: str, config: BaseModel) -> dict[str, str]:
        """Name -> hash of each input that a stage, or one part of its config, reads."""
        found = self.prints.of_sources(config, without=made_between(self.config(name)))
        if parent := self.parent(name):
            found[f"stage:{parent}"] = identity(self.manifest(parent))
        return found | self.prints.of_files(config)
