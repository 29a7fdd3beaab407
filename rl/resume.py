"""The state of an RL stage beside its trainer's: prompts drawn, pass rates, carried groups, the watcher's history."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from rl.data import Record

FILE = "stage.pickle"
"""File in a checkpoint, beside the optimizer's states; both are pickles that this project's processes wrote."""


class Stateful(Protocol):
    """A part of a stage whose state can be saved and restored in a later run of the same stage."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class StageState:
    """The states of a stage's parts, noted in memory and written later.

    Args:
        parts: the parts by name.
        records: the stage's rows; stored states refer to rows by their ids.
    """

    def __init__(self, parts: Mapping[str, Stateful], records: Sequence[Record]) -> None:
        self.parts = parts
        self._records = {record["id"]: record for record in records}
        self._ids = {id(record): record["id"] for record in records}
        self._noted = b""

    def note(self) -> None:
        """Keep the current state in memory."""
        buffer, ids = BytesIO(), self._ids

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing: Any) -> str | None:
                return ids.get(id(thing))

        Pickler(buffer).dump({name: part.state() for name, part in self.parts.items()})
        self._noted = buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Write the last noted state into a checkpoint's folder."""
        (folder / FILE).write_bytes(self._noted)

    def read(self, folder: Path) -> None:
        """Restore the parts from a checkpoint."""
        records = self._records

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, name: Any) -> Record:
                return records[name]

        with (folder / FILE).open("rb") as file:
            states = Unpickler(file).load()
        for name, part in self.parts.items():
            part.restore(states[name])
