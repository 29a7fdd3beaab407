"""The names of this project's packages, and the import rule that keeps them apart from a user's modules.

The packages have common names. A file `core.py` beside a user's script would be imported in place of ours, because
Python searches the script's folder first. After `claim()`, these names mean this project's packages in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
"""The folder that contains this project's packages."""
PACKAGES = ("chain", "core", "corpus", "recipes", "rewards", "rl", "sft")


class Finder(MetaPathFinder):
    """Finds this project's packages in ROOT; everything else is left to Python's own finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of PACKAGES; None for any other module."""
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in PACKAGES else None


_FINDER = Finder()


def claim() -> None:
    """Make the names in PACKAGES mean this project's packages from now on; safe to call again.

    A user's module of such a name that is already imported is taken out of `sys.modules`. Code that has imported it
    keeps it; a later import of the name gets this project's package.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is None:
            continue
        if ROOT / name not in [Path(place).resolve() for place in getattr(module, "__path__", ())]:
            for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
                del sys.modules[known]
