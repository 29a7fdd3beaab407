"""The inputs of a stage's process beside its configuration. Imports no torch."""

from pathlib import Path

from pydantic import Field

from core.strict import Strict


class Job(Strict):
    """One stage of one run. Every kind of stage has the signature `train(cfg, job) -> checkpoint folder`."""

    stage: str
    """The stage's name."""
    model: Path | None = None
    """Checkpoint folder that the stage starts from; None for jobs that make the core or data."""
    out: Path
    """Output folder of the stage: checkpoint/, metrics.jsonl, ..."""
    seed: int = 0
    """The chain's seed."""
    sets: dict[str, Path] = Field(default_factory=dict)
    """Data set name -> Parquet file, folder or address on the hub."""

    folders: tuple[Path, ...] = ()
    """Folders that are searched for users' modules, after the installed packages."""

    @property
    def start(self) -> Path:
        """The checkpoint folder that the stage starts from. Raises ValueError if there is none."""
        if self.model is None:
            raise ValueError(f"{self.stage}: model is missing: this stage starts from a checkpoint folder")
        return self.model
