"""The two kinds of operators, and the tools that they are given.

A row operator maps a batch of rows to outcomes, one by one. A set operator looks at the whole set: `sign` maps a batch
to small arrays, and `decide` maps the arrays of all rows to drops. Only the arrays of `sign` are in memory together.

A working row is a record (corpus.schema) with its pictures, and `hashes`: a perceptual hash of each picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from core.strict import Name, Strict
from corpus.schema import Record

if TYPE_CHECKING:
    import numpy as np

Signs = Mapping[str, "np.ndarray"]
"""Name -> one value or row of values for each row of a batch."""


class Dropped(NamedTuple):
    """The reason why a row is dropped. Drops are counted by `reason`; `detail` belongs to the row."""

    reason: str
    detail: str = ""


Outcome = Record | Dropped


class Request(NamedTuple):
    """One question to a model about one row."""

    row: Record
    """The row; its pictures are shown to the model."""
    system: str
    material: Mapping[str, str]
    """Untrusted texts by name; they are quoted so that they cannot pose as instructions."""
    asked: str
    choices: tuple[str, ...] = ()
    """The reply is one of these; (): any text."""
    max_tokens: int = 16
    temperature: float = 0.0
    sample: int = 0
    """Number of the sample. Equal requests with different numbers get separate replies."""


class NoReply(NamedTuple):
    """A request without a usable reply."""

    cause: str


class Unanswered(RuntimeError):
    """The model's server did not answer, or a budget is spent. Finished batches are kept for the next run."""


class Tools(Protocol):
    """The access to models and graders that the chain gives to operators."""

    def ask(self, model: str, requests: Sequence[Request]) -> list[str | NoReply]:
        """A reply to each request, in order. Raises Unanswered if the server is down or a budget is spent."""

    def sample(
        self, model: str, rows: Sequence[Record], samples: int, max_tokens: int, temperature: float
    ) -> list[list[float | None]]:
        """For each row, the scores (0 or 1; None: not gradable) of `samples` completions of its prompt."""

    def check_judge(self, score: Any) -> None:
        """Raise an error if the judge of a `score` step credits rows that address it. Asks once per judge."""

    def right(self, row: Record, text: str) -> bool | None:
        """Whether the completion's answer is the row's gold answer; None if it cannot be graded."""

    def embed(self, embedder: str, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of unit length, (texts, dimensions), float32."""


class Decision(NamedTuple):
    """The result of a set operator."""

    drops: Sequence[Dropped | None]
    """For each row of the set, in order."""
    facts: Mapping[str, Any] = {}
    """Figures for the report."""


class Parts(Sequence[Signs]):
    """The arrays that `sign` returned, batch by batch. An item is read from disk when it is indexed."""

    own: int
    """Number of the set's own rows; held-out rows follow them."""

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def column(self, name: str) -> np.ndarray:
        """One array over all batches."""
        raise NotImplementedError

    def rows(self) -> int:
        """Number of rows of all batches."""
        raise NotImplementedError

    def ids(self, rows: Sequence[int]) -> Mapping[int, str]:
        """The ids of some rows, by number."""
        raise NotImplementedError


class Operator(Strict):
    """The configuration of one step, and the step itself."""

    op: str

    def models(self) -> tuple[Name, ...]:
        """Names of the models that the operator asks. Such steps run in threads of one process: one budget holds."""
        model = getattr(self, "model", None)
        return (model,) if model else ()


class RowOperator(Operator):
    """An operator that looks at one row at a time."""

    sources: tuple[str, ...] = ()
    """Values of `source` of the rows that the step looks at; other rows pass. (): all rows. A row without a source has
    the name of its set."""

    def run(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        """The outcome of each row; rows of other sources pass."""
        if not self.sources:
            return self(rows, tools)
        mine = [row for row in rows if row["source"] in self.sources]
        outcomes = iter(self(mine, tools) if mine else ())
        return [next(outcomes) if row["source"] in self.sources else row for row in rows]

    def __call__(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        """The outcome of each row: the row, perhaps changed, or the reason why it is dropped."""
        raise NotImplementedError


class SetOperator(Operator):
    """An operator whose decision about a row depends on the other rows."""

    def sign(self, rows: Sequence[Record], tools: Tools) -> Signs:
        """Arrays with one entry for each row."""
        raise NotImplementedError

    def decide(self, parts: Parts, seed: int) -> Decision:
        """The drops, from the arrays of all rows."""
        raise NotImplementedError

    def reads_held_out(self) -> bool:
        """Whether `sign` is also applied to the held-out rows, which come after the set's rows in `parts`."""
        return False


def answers(replies: Sequence[str | NoReply]) -> Iterator[str | Dropped]:
    """Replies, with a drop in place of a missing one."""
    return (
        Dropped("no usable reply", reply.cause) if isinstance(reply, NoReply) else reply for reply in replies
    )
