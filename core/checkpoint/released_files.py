"""The files of a release beside its weights: carried inside a native core as data, so that an export is complete.

Nothing here is executed. They lie in the folder `released/` of a core and of every checkpoint trained from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.released_names import RELEASED_HEAD
from core.checkpoint.shards import INDEX, LayoutError, Tensors, copy_own, own_file, read_object
from core.files import write_json
from core.manifest import MANIFEST

FOLDER = "released"
RECORD = "import.json"
"""File in that folder with facts that an export needs and the other files do not contain."""
_SUFFIXES = {".py", ".json", ".jinja", ".txt", ".md", ".model", ".tiktoken"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Release:
    """A release's files, found in the release itself or in a core that carries them."""

    folder: Path
    head_stored: bool
    """Whether the release stores its output layer, even if it equals the embedding."""

    @classmethod
    def of(cls, folder: Path) -> Release | None:
        """The release in the folder, or the release that a native checkpoint there carries; None if neither.

        Raises LayoutError if the folder does not exist.
        """
        if not folder.is_dir():
            raise LayoutError(f"{folder}: the folder does not exist")
        if (folder / FOLDER / RECORD).exists():
            own_file(folder / FOLDER / RECORD, home=folder)
            return cls(folder / FOLDER, read_object(folder / FOLDER / RECORD).get("head_stored") is True)
        if (folder / "config.json").exists() and "llm_config" in read_object(folder / "config.json"):
            return cls(folder, RELEASED_HEAD in Tensors(folder))
        return None

    def config(self) -> dict[str, Any]:
        """The release's config.json."""
        return read_object(self.folder / "config.json")


def carried(folder: Path) -> list[str]:
    """Names of a release's files that a native core carries, sorted. Raises LayoutError for links outside."""
    return sorted(
        own_file(path).name
        for path in folder.iterdir()
        if path.is_file()
        and (path.suffix in _SUFFIXES or legal(path.name))
        and path.name not in (INDEX, MANIFEST, RECORD)
        and not path.name.startswith(".")
        and path.stat().st_size <= _MAX_BYTES
    )


def left_behind(folder: Path) -> list[str]:
    """Names in a release that are neither weights nor carried, sorted; hidden files are ignored."""
    known = {*carried(folder), INDEX, MANIFEST, RECORD}
    return sorted(
        path.name + ("/" if path.is_dir() else "")
        for path in folder.iterdir()
        if path.name not in known and path.suffix != ".safetensors" and not path.name.startswith(".")
    )


def legal(name: str) -> bool:
    """Whether a file with this name holds a licence or notice."""
    return name.upper().startswith(_LEGAL)


def store(source: Path, names: list[str], out: Path, *, head_stored: bool) -> None:
    """Copy the files of a release into the native core `out`; licences are also copied to its top folder."""
    (out / FOLDER).mkdir()
    for name in names:
        copy_own(source / name, out / FOLDER / name)
        if legal(name):
            copy_own(source / name, out / name)
    write_json(out / FOLDER / RECORD, {"head_stored": head_stored})


def hand_on(start: Path, out: Path) -> None:
    """Copy the release's files and licences from the checkpoint `start` to `out`, which was trained from it.

    Raises LayoutError for links that leave `start`.
    """
    if not start.is_dir():  # a hub id
        return
    for path in sorted((start / FOLDER).rglob("*")):
        if path.is_file():
            copy_own(path, out / path.relative_to(start), home=start)
    for path in legal_files(start):
        copy_own(path, out / path.name)


def legal_files(folder: Path) -> list[Path]:
    """The licences and notices directly in a folder."""
    return sorted(path for path in folder.iterdir() if path.is_file() and legal(path.name))
