"""Which weights the servers of a pool hold: whoever sends some says it here, everybody else asks here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


class Served:
    """The weights of a pool's servers, as one process knows them. On ranks that talk to no server it is kept as well.

    Servers report the version of their weights. A server that was restarted without our noticing, or whose weights
    somebody else changed, reports another one.
    """

    def __init__(self) -> None:
        self.what: Hashable | None = None
        """A checkpoint folder, or an update of the learner; None where nothing is known."""
        self.version: str | None = None
        """The version that every server has to report; None: no weights were sent, and any version is right."""
        self.files: list[Path] = []
        """Where a server that comes back gets the weights; empty: nowhere, if there is a version."""
        self.asleep = False
        """The servers hold no weights until the next update."""
        self.gate: Callable[[str], None] | None = None
        """Called with the URL of a server that came back and holds these weights; raises RuntimeError to keep it out.
        The next update forgets it."""

    def holds(self, what: Hashable) -> bool:
        """Whether the servers hold these weights and are awake."""
        return self.what == what and not self.asleep

    def forget(self) -> None:
        """Another process may have sent weights."""
        self.what = None

    def can_be_sent_again(self) -> bool:
        """Whether a server that comes back can be brought to the current weights."""
        return bool(self.files) or self.version is None

    @contextmanager
    def update(self, what: Hashable | None, files: Sequence[Path] = ()) -> Iterator[str]:
        """Send weights within the block, under the version that it gives; if it fails, nothing is known."""
        self.what, self.gate = None, None
        self.version, self.files = uuid4().hex, list(files)
        yield self.version
        self.what, self.asleep = what, False
