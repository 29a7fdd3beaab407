"""What an RL stage knows beside its trainer: prompts drawn, pass rates, carried groups, what the watcher saw."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from rl.data import Record

FILE = "stage.pickle"
"""In a checkpoint, beside the optimizer's states, which are pickles of this project's own processes too."""


class Stateful(Protocol):
    """Something that can go on where another one of the same stage was."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class StageState:
    """The state of several parts of a stage, noted in memory and written later.

    Args:
        parts: by name.
        records: the stage's rows, which a state may hold and which are kept by their id.
    """

    def __init__(self, parts: Mapping[str, Stateful], records: Sequence[Record]) -> None:
        self.parts = parts
        self._records = {record["id"]: record for record in records}
        self._ids = {id(record): record["id"] for record in records}
        self._noted = b""

    def note(self) -> None:
        """Keep the state of now."""
        buffer, ids = BytesIO(), self._ids

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing: Any) -> str | None:
                return ids.get(id(thing))

        Pickler(buffer).dump({name: part.state() for name, part in self.parts.items()})
        self._noted = buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Put what was noted last into a checkpoint's folder."""
        (folder / FILE).write_bytes(self._noted)

    def read(self, folder: Path) -> None:
        """Let the parts go on from a checkpoint."""
        records = self._records

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, name: Any) -> Record:
                return records[name]

        with (folder / FILE).open("rb") as file:
            states = Unpickler(file).load()
        for name, part in self.parts.items():
            part.restore(states[name])
