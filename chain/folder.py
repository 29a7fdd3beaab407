"""A run's folder: the lock, and for every step the folder that is either finished or not there.

A step writes to `<name>.partial`, which takes its name when everything is on disk. Its manifest has a fingerprint of
all that determines the result (chain/fingerprints.py); a finished folder whose fingerprint is still right is current.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from chain.display import duration
from chain.errors import ERROR
from chain.fingerprints import Fingerprints, identity
from chain.inputs import data_folder, imported_folder, locate_sets, prepared_folder
from chain.job import DONE
from chain.recipe import ForeignSet, Recipe, made_between
from core.files import PARTIAL, atomic_dir, read_json, write_json
from core.manifest import Began, Manifest, git_commit, hash_config, now, versions
from core.strict import ConfigError, Strict
from core.training.resume import FOLDER as UNFINISHED

DATA = "data"


@dataclass(frozen=True)
class Step:
    """One thing that a run makes, in a folder of its own: data, a stage's sets, or a stage's checkpoint."""

    name: str
    folder: Path
    config: BaseModel
    inputs: Mapping[str, str]
    """Content hash of each input, by name."""
    fingerprint: str
    parent: str | None = None
    """The stage whose checkpoint it starts from."""
    saves: bool = False
    """Whether an interrupted attempt can be continued."""

    @property
    def manifest(self) -> Manifest | None:
        """What made the finished folder; None if it is not finished."""
        return Manifest.read(self.folder)

    @property
    def current(self) -> bool:
        """Whether the folder is finished and was made from just these inputs."""
        manifest = self.manifest
        return manifest is not None and manifest.fingerprint == self.fingerprint

    @property
    def partial(self) -> Path:
        """The folder while it is being filled."""
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
        self.prints = Fingerprints(recipe.seed, self.sets, self.path / ".hashes.jsonl")

    @property
    def id(self) -> str:
        """The id under which W&B groups this run's stages, made once."""
        file = self.path / "chain.json"
        if not file.exists():
            write_json(file, {"id": f"{self.recipe.name}-{uuid4().hex[:8]}", "started": now()})
        return read_json(file)["id"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: two chains in one folder would take each other's stages for their own."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is in use by another posttrain; wait for it, or choose --name"
                ) from None
            yield

    # Stages

    def stage(self, name: str) -> Path:
        """Where a stage's results are, once it is finished."""
        return self.path / name

    def before(self, name: str) -> dict[str, Path]:
        """Folders of the stages before this one."""
        return {one: self.stage(one) for one in self.stages[: self.stages.index(name)]}

    def parent(self, name: str) -> str | None:
        """The stage whose checkpoint this one starts from."""
        place = self.stages.index(name)
        return self.stages[place - 1] if place else None

    def start(self, name: str) -> Path | None:
        """The checkpoint folder that the stage starts from; None for the first one."""
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
            raise ConfigError(f"{name} is not finished: no manifest in {self.stage(name)}")
        return manifest

    def require_finished(self, before: tuple[str, ...], first: str) -> None:
        """Refuse to start at a stage whose predecessors are not finished; say which of them are out of date."""
        missing = [name for name in before if Manifest.read(self.stage(name)) is None]
        if missing:
            raise ConfigError(
                f"--from {first}: not finished: {', '.join(missing)} (in {self.path}); "
                f"start from {missing[0]}, or leave --from out to run the missing stages"
            )
        for name in before:
            if not self.training(name).current:
                self.say(
                    f"{name}: its config or inputs have changed since it ran; --from {first} takes it as it is"
                )

    # Steps

    def data(self) -> Step | None:
        """The recipe's own data sets; None if it generates none."""
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
                inputs = {"path": self.prints.hashes.of(str(Path(given.path).expanduser().resolve()))}
                fingerprint = self.prints.fingerprint(f"import {name}", given, inputs)
                steps.append(Step(name, imported_folder(self.path, name), given, inputs, fingerprint))
        return steps

    def preparation(self, name: str) -> Step | None:
        """The sets that a stage makes with the policy it starts from; None if it makes none."""
        config = self.config(name)
        if self.parent(name) is None or not made_between(config):
            return None
        part = config.prepare  # type: ignore[attr-defined]
        inputs = self._inputs(name, part)
        fingerprint = self.prints.fingerprint(f"prepare {name}", part, inputs)
        return Step(name, prepared_folder(self.path, name), part, inputs, fingerprint, self.parent(name))

    def training(self, name: str, saves: bool = False) -> Step:
        """A stage's training."""
        config = self.config(name)
        inputs = self._inputs(name, config)
        fingerprint = self.prints.fingerprint(name, config, inputs)
        return Step(name, self.stage(name), config, inputs, fingerprint, self.parent(name), saves)

    def evaluation(self, name: str) -> str:
        """Hash of everything that determines a finished stage's held-out scores; "" without `eval`."""
        cfg = self.recipe.eval
        if cfg is None:
            return ""
        inputs = {**self.prints.of_sources(cfg), "stage": identity(self.manifest(name))}
        return self.prints.fingerprint("eval", cfg, inputs)

    @contextmanager
    def making(self, step: Step, seconds_before: float = 0.0) -> Iterator[Path]:
        """The folder to fill, with the step's config and, at the end, its manifest; then it takes its final name.

        Files of an interrupted attempt stay if the fingerprint is the same and the step either saves on its way or
        had done all its work. `seconds_before` is added to the manifest's wall time.
        """
        began, dump = Began(), step.config.model_dump(mode="json")
        if not step.saves and not (step.partial / DONE).exists():
            shutil.rmtree(step.partial, ignore_errors=True)
        with atomic_dir(step.folder, same=step.fingerprint) as partial:
            if (partial / DONE).exists():
                self.say(f"{step.name}: its work was done before the interruption")
            elif (partial / "config.json").exists():
                self.say(f"{step.name}: continues where an interrupted run stopped")
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

    def _inputs(self, name: str, config: BaseModel) -> dict[str, str]:
        """Hash of everything that a stage, or one part of its config, reads, by name."""
        found = self.prints.of_sources(config, without=made_between(self.config(name)))
        if parent := self.parent(name):
            found[f"stage:{parent}"] = identity(self.manifest(parent))
        return found | self.prints.of_files(config)


def facts(recipe: Recipe, run_dir: Path, nodes: int) -> dict[str, Any]:
    """Facts that all hosts of one run must share before they take part."""
    return {
        "--nnodes": nodes,
        "the run's folder": str(run_dir),
        "the recipe (hash, with its overrides)": hash_config(recipe.model_dump(mode="json")),
        "the code's commit": git_commit(),
        "the installed packages": versions(),
    }
