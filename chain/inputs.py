"""Locates the inputs that a recipe names: data sets, and the source files of import strings."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chain.places import Placed
from chain.recipe import STAGE_NAMES, ForeignSet, Recipe, made_between, split_import
from corpus.hub import hub_set
from rewards.registry import split_adapter
from sft.config import Phase


def data_folder(run: Path) -> Path:
    """The folder of the sets that a run generates."""
    return run / "data"


def prepared_folder(run: Path, stage: str) -> Path:
    """The folder of the sets that a run makes before a stage with the stage's initial policy."""
    return run / "prepared" / stage


def imported_folder(run: Path, name: str) -> Path:
    """The folder of a set that a run imports from another format."""
    return run / "imported" / name


def locate_sets(recipe: Recipe, run: Path) -> dict[str, str]:
    """Set name -> Parquet file, folder or address on the hub, for every set of the recipe, existing or not."""
    generated = recipe.data.generate.sets if recipe.data.generate else ()
    located = {name: str(data_folder(run) / f"{name}.parquet") for name in generated}
    for name, given in recipe.data.sets.items():
        made = imported_folder(run, name) / f"{name}.parquet"
        located[name] = str(made) if isinstance(given, ForeignSet) else set_place(recipe, given)
    for stage in STAGE_NAMES:
        config = recipe.stage(stage)
        for name in made_between(config) if config else ():
            located[name] = str(prepared_folder(run, stage) / f"{name}.parquet")
    return located


def rows_of(place: str) -> int | None:
    """Rows of a local set, from the footers of its Parquet files; None if it does not exist or is not Parquet."""
    path = Path(place)
    if not path.exists():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    try:
        return sum(pq.read_metadata(file).num_rows for file in files)
    except pa.ArrowInvalid:  # chain.checks refuses the set
        return None


def phase_rows(phase: Phase, rows: Callable[[str], int | None]) -> int | None:
    """Total rows of an SFT phase's sets; None if a set does not exist yet. `rows` maps a set's name to its rows."""
    counts = [source.rows if source.rows is not None else rows(source.set) for source in phase.data]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def phase_updates(phase: Phase, rows: Callable[[str], int | None]) -> int | None:
    """Optimizer updates of an SFT phase; None if updates are counted by tokens or a set does not exist yet."""
    optim, count = phase.optim, phase_rows(phase, rows)
    if optim.max_steps:
        return optim.max_steps
    if count is None or not optim.epochs or not optim.global_batch_size:
        return None
    return round(math.ceil(count / optim.global_batch_size) * optim.epochs)


def set_place(config: Placed, text: str) -> str:
    """The absolute path of a set that a recipe or a curation names, or its address on the hub."""
    return text if is_on_hub(text) else str(config.place(text))


def foreign_set(config: Placed, given: ForeignSet) -> ForeignSet:
    """A set of another format with absolute paths."""
    images = {"images": set_place(config, given.images)} if given.images else {}
    return given.model_copy(update={"path": set_place(config, given.path), **images})


def is_on_hub(text: str) -> bool:
    """Whether a set's place is an address on the hub (corpus.hub)."""
    return hub_set(text) is not None


def code_file(import_string: str, folders: Sequence[Path] = ()) -> Path | None:
    """The source file of `package.module:name` or `file.py:name`, located without importing the module; else None.

    Installed modules come first; then `folders` are searched in order, as `rewards.registry.load_reward` does.
    """
    return next(code_files(import_string, folders), None)


def code_files(import_string: str, folders: Sequence[Path] = ()) -> Iterator[Path]:
    """Every file that the import string could mean, in the order of the search."""
    module, _ = split_import(split_adapter(import_string)[1])
    if module.endswith(".py"):
        yield from filter(Path.is_file, [(folder / Path(module).expanduser()) for folder in folders])
        return
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec and spec.origin:
        yield Path(spec.origin)
    inner = Path(*module.split("."))
    for folder in folders:
        yield from filter(Path.is_file, (folder / inner / "__init__.py", folder / inner.with_suffix(".py")))
