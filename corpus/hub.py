"""Data sets on the Hugging Face hub: their addresses, and their data files, downloaded one by one as they are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from core.strict import ConfigError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
"""Endings of data files."""
_SCHEME = "hf://datasets/"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ADDRESS = re.compile(
    rf"{_SCHEME}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<folder>.+?))?/?"
)
_OTHER_SPLITS = ("test", "val", "dev")
"""What the names of files of other splits than train begin with."""


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
    """Folder in the repository that holds the files; "" for all of it."""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return "/".join([f"{_SCHEME}{self.repo}{at}", *([self.folder] if self.folder else [])])


def hub_set(text: str) -> HubSet | None:
    """The data set that a text names: `owner/name`, or `hf://datasets/owner/name[@revision][/folder]`.

    None for anything else, for an existing path, and for a name that ends as a data file does.

    >>> hub_set("hf://datasets/org/set@main/data")
    HubSet(repo='org/set', revision='main', folder='data')
    >>> hub_set("org/set"), hub_set("data/rows.jsonl"), hub_set("./org/set")
    (HubSet(repo='org/set', revision=None, folder=''), None, None)

    Raises ConfigError for a malformed address.
    """
    text = re.sub(r"^hf:/+", "hf://", text)  # a Path has one slash left
    if text.startswith("hf://"):
        found = _ADDRESS.fullmatch(text)
        if not found or ".." in text:
            raise ConfigError(
                f"{text}: write {_SCHEME}owner/name, {_SCHEME}owner/name@revision/folder, or owner/name"
            )
        return HubSet(found["repo"], found["revision"], found["folder"] or "")
    local = text.startswith(".") or text.endswith(SUFFIXES) or Path(text).exists()
    return HubSet(text) if not local and _ID.fullmatch(text) else None


class HubFiles(Sequence[Path]):
    """The data files of one split, sorted by name. A file is downloaded when it is indexed; the hub's client caches it.

    A file belongs to the split if its name or its folder's name begins with the split's. If no file does, the split
    "train" is the files whose names do not begin with another split's.

    Raises ConfigError if the data set cannot be listed, or has no such file.
    """

    def __init__(self, address: HubSet, split: str = "train") -> None:
        self.address = address
        names = sorted(
            name
            for name in _listed(address)
            if name.endswith(SUFFIXES) and name.startswith(address.folder and f"{address.folder}/")
        )
        self.names = [name for name in names if _is_of(name, (split,))]
        if not self.names and split == "train":
            self.names = [name for name in names if not _is_of(name, _OTHER_SPLITS)]
        if not self.names:
            there = ", ".join(names[:10]) or f"no file that ends in {', '.join(SUFFIXES)}"
            raise ConfigError(f"{address}: there is no file of the split {split!r}; it has {there}")

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return _asked(
            self.address, lambda hub: hub.hf_hub_download(filename=self.names[index], **_where(self.address))
        )


def _is_of(name: str, splits: Sequence[str]) -> bool:
    parts = Path(name).parts[-2:]
    return any(part.startswith(tuple(splits)) for part in parts)


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
