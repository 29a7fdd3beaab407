"""Where the paths and modules of a recipe or a curation are searched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import PrivateAttr

from core.strict import Strict


class Placed(Strict):
    """A configuration read from files, whose folders come before the working directory."""

    _own_folders: tuple[Path, ...] = PrivateAttr(())

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where paths and modules are searched: the file's folder, those that it extends, the current one."""
        return (*self._own_folders, Path.cwd())

    def read_from(self, folders: Iterable[Path]) -> None:
        """Set the folders of the configuration's files."""
        self._own_folders = tuple(dict.fromkeys(folder.resolve() for folder in folders))

    def place(self, text: str) -> Path:
        """The absolute path that a path means: the first that exists in `folders`, else that in the last."""
        places = [(folder / Path(text).expanduser()).resolve() for folder in self.folders]
        return next((place for place in places if place.exists()), places[-1])

    def looked(self) -> str:
        """The searched folders, for messages."""
        return f"looked in {', '.join(dict.fromkeys(map(str, self.folders)))}"
