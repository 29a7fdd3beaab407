"""Records which weights the servers of a pool hold: code that sends weights updates it, all other code reads it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


class Served:
    """The weights of a pool's servers, as far as this process knows. Ranks that do not talk to servers keep it too.

    Servers report the version of their weights. A server that was restarted unnoticed, or whose weights another
    program changed, reports a different version.
    """

    def __init__(self) -> None:
        self.what: Hashable | None = None
        """The weights: a checkpoint folder or an update of the learner; None if unknown."""
        self.version: str | None = None
        """The version that every server must report; None: no weights were sent, and any version is accepted."""
        self.files: list[Path] = []
        """Files from which a returned server loads the weights; empty with a `version`: it cannot load them again."""
        self.asleep = False
        """Whether the servers sleep, and so lack weights until the next update."""
        self.gate: Callable[[str], None] | None = None
        """Called with the URL of a server that came back and holds these weights; raises RuntimeError to keep it out.
        The next update forgets it."""

    def holds(self, what: Hashable) -> bool:
        """Whether the servers hold these weights and are awake."""
        return self.what == what and not self.asleep

    def forget(self) -> None:
        """Mark the weights as unknown, because another process may have sent some."""
        self.what = None

    def can_be_sent_again(self) -> bool:
        """Whether a server that comes back can be brought to the current weights."""
        return bool(self.files) or self.version is None

    @contextmanager
    def update(self, what: Hashable | None, files: Sequence[Path] = ()) -> Iterator[str]:
        """Yield a new version, under which the block sends the weights. If it fails, the weights are unknown."""
        self.what, self.gate = None, None
        self.version, self.files = uuid4().hex, list(files)
        yield self.version
        self.what, self.asleep = what, False
