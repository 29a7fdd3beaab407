"""Configuration of the SFT stages and of the soup. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from core.model.names import Module
from core.strict import Strict
from core.training.config import LearnerConfig, Optim
from corpus.records import DataSource


class Packing(Strict):
    """Packing: the rows of a micro-batch are concatenated to one row without padding; see sft/packing.py."""

    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """Most tokens in one forward-backward pass of one rank; None: micro_batch_size x max_tokens, the most tokens of a
    padded pass."""
    update_tokens: int | None = Field(default=None, ge=8)
    """Tokens per optimizer update over all ranks, for phases without optim.global_batch_size."""
    buffer: int = Field(default=1024, ge=1)
    """Rows in the buffer from which updates by tokens choose; a larger buffer fills the packs better."""
    max_wait: int = Field(default=4, ge=1)
    """Number of updates that may skip a buffered row before the row takes precedence."""


class Periodic(Strict):
    """How `overlong: periodic` lets in over-long rows; needs packing. An over-long row fills a micro-batch alone."""

    every: int = Field(default=10, ge=1)
    """Updates from one that trains over-long rows to the next; the rows are spread evenly over them."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest row that is let in; longer rows are dropped and counted. None: twice the phase's max_tokens.
    A phase whose own max_tokens is as long has no over-long rows."""


class Phase(Strict):
    """One phase of a curriculum, with its own data and hyper-parameters, from the previous phase's weights."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    data: tuple[DataSource, ...] = Field(min_length=1)
    """Sets that are concatenated and shuffled; the `rows` of each set determine the mixture."""
    optim: Optim
    max_tokens: int | None = Field(default=None, ge=8)
    """Overrides the stage's max_tokens for this phase; None keeps it."""
    freeze: tuple[Module, ...] | None = None
    """Overrides learner.freeze for this phase; None keeps it."""

    @model_validator(mode="after")
    def _length_and_batch(self) -> Phase:
        if self.optim.epochs is None and self.optim.max_steps is None:
            raise ValueError(f"phase {self.name}: optim needs epochs or max_steps, e.g. epochs: 1")
        return self


class SFTConfig(Strict):
    """One SFT stage: basic SFT (a curriculum of phases), LongCoT SFT or think-fusion SFT (one phase)."""

    phases: tuple[Phase, ...] = Field(min_length=1)
    """Run one after another in one process; each starts with a fresh optimizer."""
    max_tokens: int = Field(ge=8)
    """Longest row, prompt with its image tokens and target together (the report's context)."""
    overlong: Literal["refuse", "drop", "periodic"] = "refuse"
    """Refuse or drop a longer row, or let such rows in periodically. Rows are never truncated: a truncated chain
    teaches to stop in mid-thought."""
    periodic: Periodic = Periodic()
    """For overlong: periodic."""
    on_bad: Literal["raise", "drop"] = "raise"
    """Whether to stop at a row that breaks a rule of corpus.records, or to drop the row."""
    learner: LearnerConfig = LearnerConfig()
    packing: Packing | None = Packing()
    """How rows are packed into micro-batches; `off` pads them into batches of micro_batch_size instead. Updates contain
    the same rows either way, so the loss is the same (except for the balancing loss of a mixture of experts, which is a
    mean per micro-batch)."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    save_every: int | None = Field(default=None, ge=1)
    """Updates between two checkpoints with the optimizer's states. An interrupted stage that is started again unchanged
    resumes from the last one and keeps its finished phases. None: the stage starts from its beginning."""

    @field_validator("packing", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value == "off" else value

    @model_validator(mode="after")
    def _phases_fit(self) -> SFTConfig:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases: names must differ, got {names}")
        if self.overlong == "periodic":
            self._check_periodic()
        for phase in self.phases:
            self._check_batch(phase)
            freeze = self.learner.freeze if phase.freeze is None else phase.freeze
            self.learner.check_freeze(freeze)
        return self

    def _check_periodic(self) -> None:
        if not self.packing:
            raise ValueError(
                "overlong: periodic needs packing: a padded batch would pad every row to the longest"
            )
        if all(self.longest_row(phase) == self.row_tokens(phase) for phase in self.phases):
            raise ValueError(
                f"periodic.max_tokens={self.periodic.max_tokens} is not more than max_tokens={self.max_tokens}: no "
                "phase lets in a longer row; raise the former, or set overlong: drop"
            )

    def row_tokens(self, phase: Phase) -> int:
        """max_tokens of the phase: a longer row is over-long."""
        return phase.max_tokens or self.max_tokens

    def longest_row(self, phase: Phase) -> int:
        """Most tokens of a row that the phase trains."""
        if self.overlong != "periodic":
            return self.row_tokens(phase)
        return max(self.row_tokens(phase), self.periodic.max_tokens or 2 * self.row_tokens(phase))

    def micro_batch_tokens(self, phase: Phase) -> int:
        """Most tokens in a packed micro-batch of the phase, unless it holds an over-long row."""
        assert self.packing
        return self.packing.micro_batch_tokens or phase.optim.micro_batch_size * self.row_tokens(phase)

    def pass_tokens(self, phase: Phase) -> int:
        """Most tokens in a forward-backward pass of one rank."""
        if not self.packing:
            return phase.optim.micro_batch_size * self.row_tokens(phase)
        return max(self.micro_batch_tokens(phase), self.longest_row(phase))

    def _check_batch(self, phase: Phase) -> None:
        rows = phase.optim.global_batch_size
        if not self.packing:
            if rows is None:
                raise ValueError(
                    f"phase {phase.name}: optim.global_batch_size is missing: rows per update, e.g. 32"
                )
            phase.optim.gradient_accumulation(self.learner.processes)
            return
        tokens, budget = self.packing.update_tokens, self.micro_batch_tokens(phase)
        if rows is None and tokens is None:
            raise ValueError(
                f"phase {phase.name}: optim.global_batch_size is missing: rows per update, e.g. 32 (or give "
                "packing.update_tokens: tokens per update)"
            )
        if rows is not None and tokens is not None:
            raise ValueError(
                f"phase {phase.name}: optim.global_batch_size={rows} and packing.update_tokens={tokens}: an update "
                "goes by rows or by tokens; give one of them"
            )
        if budget < (longest := self.row_tokens(phase)):
            raise ValueError(
                f"packing.micro_batch_tokens={budget} is less than max_tokens={longest}, and rows are never truncated; "
                f"raise it to {longest} or more"
            )
        whole = self.learner.processes * budget
        if tokens is not None and tokens % whole:
            raise ValueError(
                f"packing.update_tokens={tokens} is not a multiple of processes={self.learner.processes} x "
                f"micro_batch_tokens={budget} = {whole}; nearest multiples: "
                f"{max(whole, tokens // whole * whole)} and {(tokens // whole + 1) * whole}"
            )


class Variant(Strict):
    """A repetition of basic SFT's last phase with other settings, as an ingredient of the soup."""

    seed_offset: int = Field(ge=1)
    """Number that is added to the chain's seed, which changes the order of the rows."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Replaces the phase's learning rate; None keeps it. Very different rates make a heterogeneous, bad soup."""


class SoupConfig(Strict):
    """The soup: several homogeneous fine-tunings of one start, merged into one model."""

    variants: tuple[Variant, ...] = Field(min_length=1)
    """Further fine-tunings from the start of basic SFT's last phase; ingredient 0 is basic SFT's checkpoint."""
    method: Literal["uniform", "greedy"] = "uniform"
    """uniform: the mean of all ingredients (the report); greedy: add an ingredient unless it lowers the validation
    score."""
    validation: DataSource
    """Rows on which the ingredients and the merge are scored; never held-out rows."""
    max_distance: float = Field(default=0.3, gt=0)
    """Largest L2 distance of two ingredients, as a share of the start's norm; above it the soup is refused.
    Fine-tunings of a tiny core that differ only in their seed are about 0.05 apart."""
    on_worse: Literal["warn", "refuse"] = "warn"
    """Whether to warn or refuse if the merge scores below its worst ingredient."""

    @model_validator(mode="after")
    def _variants_differ(self) -> SoupConfig:
        pairs = [(variant.seed_offset, variant.learning_rate) for variant in self.variants]
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"variants: two are the same fine-tuning {pairs}; give each its own seed_offset")
        return self
