"""Data sets on the Hugging Face hub: their addresses, and their files, downloaded one by one as they are read."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, overload

from core.strict import ConfigError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
"""Endings of data files."""
_SCHEME = "hf://datasets/"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(
    rf"{_SCHEME}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>.+?))?/?"
)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_OTHER_SPLITS = ("test", "val", "dev")
"""Beginnings of the names of files that belong to other splits than train."""


log = logging.getLogger(__name__)


class NoConnection(ConfigError):
    """The hub does not answer."""


class HubSet(NamedTuple):
    """A data set on the hub."""

    repo: str
    """owner/name"""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    folder: str = ""
    """Folder in the repository that holds the files, or a file; "" for all of it."""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return "/".join([f"{_SCHEME}{self.repo}{at}", *([self.folder] if self.folder else [])])


def hub_set(text: str) -> HubSet | None:
    """The data set that an address names, `hf://datasets/owner/name[@revision][/folder]`; None for a path.

    A bare `owner/name` is a path: a folder that is missing must not become a download.

    >>> hub_set("hf://datasets/org/set@main/data")
    HubSet(repo='org/set', revision='main', folder='data')
    >>> hub_set("org/set") is hub_set("data/rows.jsonl") is None
    True

    Raises ConfigError for a malformed address.
    """
    text = re.sub(r"^hf:/+", "hf://", text)  # a Path has one slash left
    if not text.startswith("hf://"):
        return None
    found = _ADDRESS.fullmatch(text)
    if not found or ".." in text:
        raise ConfigError(f"{text}: write {_SCHEME}owner/name or {_SCHEME}owner/name@revision/folder")
    return HubSet(found["repo"], found["revision"], found["folder"] or "")


def address_hint(text: str) -> str:
    """The end of a message about a missing path, if the path could be meant as a data set on the hub; else ""."""
    meant = _ID.fullmatch(text) and not text.startswith(".") and not text.endswith(SUFFIXES)
    return f"; a data set on the hub is written {_SCHEME}{text}" if meant else ""


class HubFiles(Sequence[Path]):
    """The data files of one split, sorted by name. A file is downloaded when it is indexed; the hub's client caches it.

    A file belongs to the split if its name or its folder's name begins with the split's. If no file does, the split
    "train" is the files whose names do not begin with another split's. An address may also name one file.

    Raises ConfigError if the data set cannot be listed, has no such file, or has files of several kinds.
    """

    def __init__(self, address: HubSet, split: str = "train") -> None:
        self.address, self._listed = address, frozenset(_listed(address))
        inside = sorted(
            name for name in self._listed if name.endswith(SUFFIXES) and _is_in(name, address.folder)
        )
        self.names = inside if inside == [address.folder] else _of_split(inside, split)
        if not self.names:
            there = ", ".join(inside[:10]) or f"no file that ends in {', '.join(SUFFIXES)}"
            raise ConfigError(f"{address}: there is no file of the split {split!r}; it has {there}")
        firsts = {PurePosixPath(name).suffix: name for name in reversed(self.names)}
        if len(firsts) > 1:
            raise ConfigError(
                f"{address}: holds files of several kinds ({', '.join(sorted(firsts.values()))}); name a folder or a "
                f"file: {address._replace(folder=self.names[0])}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _downloaded(self.address, self.names[index])

    def each(self) -> Iterator[HubSet]:
        """The address of each file."""
        return (self.address._replace(folder=name) for name in self.names)

    def folder(self) -> HubFolder:
        """The folder of the first file."""
        first = PurePosixPath(self.names[0]).parent.as_posix()
        return HubFolder(self.address._replace(folder="" if first == "." else first), self._listed)


class HubFolder:
    """The pictures and videos of a data set on the hub. A file is downloaded when it is asked for.

    Args:
        address: with the folder that is searched first.
        listed: the names of all files in the repository; None: they are asked for.
    """

    def __init__(self, address: HubSet, listed: frozenset[str] | None = None) -> None:
        self.address = address
        self._listed = frozenset(_listed(address)) if listed is None else listed

    def __str__(self) -> str:
        return str(self.address)

    def file(self, name: str) -> Path | None:
        """The file with this name in the folder, or else in the whole repository; None if neither has it."""
        places = (posixpath.normpath(posixpath.join(folder, name)) for folder in (self.address.folder, ""))
        found = next((place for place in places if place in self._listed), None)
        return _downloaded(self.address, found) if found else None

    def archives(self) -> list[str]:
        """The names of the repository's archives, which may hold missing files."""
        return sorted(name for name in self._listed if name.endswith(_ARCHIVES))


def _downloaded(address: HubSet, name: str) -> Path:
    return _asked(address, lambda hub: hub.hf_hub_download(filename=name, **_where(address)))


def _is_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder and f"{folder}/")


def _of_split(names: Sequence[str], split: str) -> list[str]:
    def are(splits: Sequence[str]) -> list[str]:
        return [
            name for name in names if any(part.startswith(tuple(splits)) for part in Path(name).parts[-2:])
        ]

    found = are((split,))
    return sorted(set(names) - set(are(_OTHER_SPLITS))) if not found and split == "train" else found


def _where(address: HubSet) -> dict[str, Any]:
    return {"repo_id": address.repo, "repo_type": "dataset", "revision": address.revision}


def _listed(address: HubSet) -> list[str]:
    """The files of the data set; without a connection, those in the cache."""
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        try:
            return _asked(address, lambda hub: hub.HfApi().list_repo_files(**_where(address)), str)
        except NoConnection:
            log.warning("%s: the hub does not answer; looking in its cache", address)
    found = _asked(address, lambda hub: hub.snapshot_download(local_files_only=True, **_where(address)))
    return [file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file()]


def _asked(address: HubSet, ask: Any, kind: type = Path) -> Any:
    """The hub's reply, a path or a list of names. Raises ConfigError if there is none."""
    import httpx
    import huggingface_hub

    try:
        reply = ask(huggingface_hub)
    except httpx.TransportError as error:
        raise NoConnection(
            f"{address}: no connection to the hub ({error}); download it and give its path"
        ) from None
    except (httpx.HTTPError, OSError, ValueError) as error:  # the hub's own errors are of these types
        cause = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(
            f"{address}: the hub does not serve it ({type(error).__name__}: {cause}); check the name, log in with "
            "`hf auth login` if it is gated, or download it and give its path"
        ) from None
    return Path(reply) if kind is Path else list(reply)
