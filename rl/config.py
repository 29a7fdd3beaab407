"""Configuration of the RL stages, their rollout pool, data preparation and evaluation. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from core.strict import Name, Strict
from core.training.config import LearnerConfig, Optim
from corpus.records import DataSource
from rewards.judge.address import refuse_secrets
from rewards.mix import check_terms

Mode = Literal["think", "direct"]
_BENT = (
    "an RL stage samples from the whole distribution, as the learner's probabilities are of that one (with top_p=0.9 "
    "the mean ratio of learner to server is 0.91, with 0.5 it is 0.52). Leave the key out; a lower rollout.temperature "
    "samples more sharply on both sides"
)
BENDS_SAMPLING = dict.fromkeys(
    (
        *("top_p", "top_k", "min_p", "typical_p", "logit_bias"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
    _BENT,
)
"""Knobs of sampling that a rollout engine has and a learner's probabilities do not follow -> why they are refused."""
AlarmName = Literal["unscorable", "status", "jump", "repeats", "disagreement", "held_out", "blind"]


class Rollout(Strict):
    """How one batch of completions is sampled."""

    refused: ClassVar[dict[str, str]] = BENDS_SAMPLING

    prompts_per_batch: int = Field(ge=1, le=1_000_000)
    """Groups per rollout batch."""
    group_size: int = Field(ge=2, le=65536)
    """Completions per prompt; G in the GRPO paper."""
    max_completion_tokens: int = Field(ge=1)
    """A completion is cut there."""
    temperature: float = Field(default=1.0, gt=0)
    """Both sides divide logits by it. Other knobs of sampling are refused."""
    overlap: bool = False
    """Sample the next batch while the learner trains on this one, with weights one batch old."""
    max_staleness: int = Field(default=1, ge=0)
    """Weight updates between sampling a completion and training on it, at most. The importance-sampling correction
    weighs what is stale; older groups are dropped, counted."""


class DynamicSampling(Strict):
    """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): groups without spread are replaced.

    A ledger of the prompts' pass rates keeps the number of such groups low.
    """

    max_rounds: int = Field(default=3, ge=0)
    """Rounds of replacement per batch; groups without spread that remain then stay, counted. 0 turns it off."""
    oversample: float = Field(default=1.5, ge=1)
    """A round asks for as many prompts as are expected to fill the batch, at most this many times what is missing.
    1 asks for exactly what is missing, as DAPO does."""
    carry: bool = True
    """Groups with spread beyond the batch wait for the next one (within rollout.max_staleness)."""
    rest_epochs: int = Field(default=1, ge=0)
    """A prompt rests for this many epochs after a group that was all solved or all failed. The rest doubles with each
    further such group in a row, up to eight times as many."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the resting prompts that is asked nevertheless: policies forget, and they learn."""


class Overlong(Strict):
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), added to the reward."""

    cache_tokens: int = Field(ge=1)
    """The punishment grows over this many tokens before max_completion_tokens."""


class ImportanceSampling(Strict):
    """Correction for the difference between the rollout engine's and the learner's probabilities."""

    mode: Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    cap: float = Field(default=2.0, gt=1)
    """Weights above it are cut (truncate) or dropped (mask)."""


class ClipSchedule(Strict):
    """The upper clip moves linearly over the stage's updates, from `clip_high` at the first to `end` at the last.

    One reading of the report's "clip value adjusted dynamically within 0.20 to 0.28", which does not say how.
    """

    end: float = Field(ge=0)
    """Upper clip of the last update."""


class Algorithm(Strict):
    """Policy loss. docs/algorithms.md gives the paper and the section of each."""

    name: Literal["dapo", "gspo", "dr_grpo", "bnpo", "cispo", "sapo", "gdpo"] = "dapo"
    """dapo: token-level ratios, token-mean loss; gspo: one ratio per sequence, for MoE; dr_grpo: no length and no
    standard deviation in the normalisation; bnpo: token mean of each update; cispo: clipped ratios as constant weights;
    sapo: a soft gate instead of a clip; gdpo: dapo's loss, with advantages normalised per reward and then summed."""
    clip_low: float = Field(ge=0, le=1)
    """Ratios below 1 - clip_low are clipped; cispo and sapo have no lower clip."""
    clip_high: float = Field(ge=0)
    """Ratios above 1 + clip_high are clipped. For cispo the largest ratio itself (at least 1); sapo has none."""
    delta: float | None = Field(default=None, gt=1)
    """Two-sided clip: largest ratio where the advantage is negative. Above 1 + clip_high."""
    clip_schedule: ClipSchedule | None = None
    """None keeps the upper clip at clip_high."""
    sapo_temperature_positive: float = Field(default=1.0, gt=0)
    sapo_temperature_negative: float = Field(default=1.05, gt=0)
    """sapo only: steepness of the gate where the advantage is positive, and where it is negative."""
    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term against the stage's first policy; 0 leaves the reference model out."""
    scale_by_std: bool | None = None
    """Divide a group's advantages by its standard deviation. None does what the algorithm's paper does: all but dr_grpo
    divide."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's mean entropy per token, which is added to the objective."""
    top_entropy: float = Field(default=1.0, gt=0, le=1)
    """Share of the tokens, those of the highest entropy, that the policy loss acts on."""
    mask_truncated: bool = True
    """Leave completions that were cut out of the loss."""
    importance_sampling: ImportanceSampling = ImportanceSampling()

    @property
    def divides_by_std(self) -> bool:
        """`scale_by_std`, with the paper's choice where it is None."""
        return self.name != "dr_grpo" if self.scale_by_std is None else self.scale_by_std

    @model_validator(mode="after")
    def _switches_that_apply(self) -> Algorithm:
        if self.name == "cispo" and self.clip_high < 1:
            raise ValueError(
                f"clip_high={self.clip_high}: for cispo it caps the ratio itself, so it is at least 1; papers use 5"
            )
        if self.name in ("cispo", "sapo") and (self.delta or self.clip_schedule):
            raise ValueError(
                f"delta and clip_schedule move a clip that {self.name} does not have; leave them out"
            )
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(f"delta={self.delta} must be above 1 + clip_high = {1 + self.clip_high:g}")
        if self.name == "gdpo" and self.scale_by_std is False:
            raise ValueError(
                "scale_by_std=false with gdpo: its advantages are normalised per reward; leave it out"
            )
        return self


def _without_secrets(params: dict[str, Any]) -> dict[str, Any]:
    refuse_secrets(params)
    return params


Params = Annotated[dict[str, Any], AfterValidator(_without_secrets)]
"""A reward's parameters; a URL with a password is refused."""


class RewardTerm(Strict):
    """One weighted term of the reward, with a curve of its own."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    use: str
    """A built-in reward (rewards.registry.REWARDS), `package.module:Name` or `file.py:Name`; with `trl:` or
    `verl:` before it, a reward function written for that library."""
    weight: float = Field(gt=0, le=1)
    modes: tuple[Mode, ...] = ("think", "direct")
    """Modes of the rows that it grades."""
    graded: tuple[Literal["verifiable", "judged"], ...] = ("verifiable", "judged")
    """Kinds of rows that it grades: those a rule can check (verifiable), those only a judge can (verifier judge or
    none), or both. Per mode and kind the weights sum to 1."""
    gate: str | None = None
    """Name of another term. This term is asked where that one scores 1, and scores 0 elsewhere."""
    on_error: Literal["stop", "unscorable"] = "stop"
    """When the reward fails: stop the run, or count it and leave the row unscorable. It fails when it raises, returns
    what is no verdict, exceeds a limit below, or ends its process."""
    isolate: bool = True
    """Run a reward that is not built in in a process of its own. False: in the stage's, for rewards that must share
    its memory; the deadline then is the only limit, and what the reward does to the process, it does to the stage."""
    deadline_s: float = Field(default=60.0, gt=0)
    """For one call of a reward that is not built in: one completion, or the batch of a batched reward."""
    memory_gib: float = Field(default=4.0, gt=0)
    """Private memory that the process of a reward that is not built in may use."""
    params: Params = Field(default_factory=dict)

    @model_validator(mode="after")
    def _limits_are_for_users_rewards(self) -> RewardTerm:
        if ":" not in self.use:
            limits = ("deadline_s", "isolate", "memory_gib")
            given = [key for key in limits if getattr(self, key) != type(self).model_fields[key].default]
            if given:
                raise ValueError(
                    f"{given[0]} is for rewards of one's own; {self.use!r} is built in: remove it"
                )
        return self


class PassAtK(Strict):
    """Keep prompts by the starting policy's pass@k (report, section 4: pass@4 filter)."""

    source: DataSource
    into: Name
    """Name of the set that the kept rows form."""
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    drop_never_solved: bool = True
    """Think rows only: where no reasoning is needed only the always-solved are dropped (report)."""
    drop_always_solved: bool = True
    min_rows: int = Field(default=1, ge=1)
    """Fewer kept rows than this is an error: the policy is too weak or too strong for these prompts."""


class Harvest(Strict):
    """Rejection sampling: the policy's own correct, well-formed chains become think-fusion data."""

    source: DataSource
    into: Name
    keep: int = Field(ge=1)
    """Chains to keep at most; fewer than min_rows is an error."""
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    min_rows: int = Field(default=1, ge=1)


class HardCases(Strict):
    """Prompts that an earlier RL stage was unreliable on, from that stage's own record."""

    stage: str = "rlvr"
    into: Name
    max_pass_rate: float = Field(gt=0, le=1)
    """Keep prompts whose completions were correct at most this often in that stage's last visit."""
    rows: int | None = Field(default=None, ge=1)
    """Largest number of rows, hardest first."""
    min_rows: int = Field(default=1, ge=1)


class Prepare(Strict):
    """Data made before the stage with the policy that it starts from."""

    pass_at_k: PassAtK | None = None
    harvest: Harvest | None = None
    hard_cases: HardCases | None = None
    max_completion_tokens: int = Field(default=64, ge=1)

    @property
    def samples(self) -> bool:
        """Whether completions are sampled; hard cases come from an earlier stage's record."""
        return self.pass_at_k is not None or self.harvest is not None


class Parity(Strict):
    """Guard: after every weight update, servers and learner score the same sequences."""

    sequences: int = Field(default=4, ge=1)
    """Probe prompts, the same each time: only repeated prompts reveal stale caches."""
    tokens: int = Field(default=12, ge=1)
    """Sampled tokens per probe."""
    bound: float = Field(gt=0)
    """Largest absolute difference of a token's log-probability; above it the run stops."""


class Watch(Strict):
    """Bounds beyond which the watch over a stage raises an alarm. Rates and shares are in [0, 1]."""

    stop_on: tuple[AlarmName, ...] = ("unscorable",)
    """Alarms that end the run; the others are only reported."""
    max_unscorable: float = Field(default=0.1, ge=0, le=1)
    """Share of completions that no reward could judge, over the last `window` batches."""
    window: int = Field(default=5, ge=1)
    max_status: float = Field(default=0.5, ge=0, le=1)
    """Share of one component's verdicts with the same status, other than correct and wrong."""
    max_jump: float = Field(default=0.25, gt=0)
    """Change of a component's mean against its last batches, if it is also six times their spread."""
    max_repeats: float = Field(default=0.5, ge=0, le=1)
    """Share of completions that also answer another prompt of the batch, word for word."""
    repeat_tokens: int = Field(default=12, ge=1)
    """Shorter completions do not count as repeats: honest short answers coincide."""
    second_verifier: str | None = None
    """A stricter reward, by name, that grades a sample of what the answer verifier called correct."""
    second_params: Params = Field(default_factory=dict)
    second_rows: int = Field(default=32, ge=1)
    """Completions per batch that it grades."""
    max_disagreement: float = Field(default=0.1, ge=0, le=1)
    """Share of them that it does not call correct."""
    held_out: DataSource | None = None
    """Rows that neither a stage's training nor the final evaluation uses. Their greedy accuracy is logged beside the
    reward, with their images and with the images blanked."""
    every: int = Field(default=10, ge=1)
    """Rollout batches between two evaluations of these rows."""


class RLLearner(LearnerConfig):
    """The learner of an RL stage."""

    prefix: Literal["shared", "shared_flex", "stock"] = "shared"
    """shared: each prompt and image is computed once per group; shared_flex: the same with torch's flex attention (GPU
    only); stock: TRL's passes, once per completion."""
    token_budget: int | None = Field(default=None, ge=1)
    """Tokens of one packed forward-backward pass of a rank, for all but prefix=stock; a single row may exceed it.
    None: as many as TRL's pass over optim.micro_batch_size padded rows would hold."""

    @property
    def shares_prefix(self) -> bool:
        """Whether each prompt is computed once per group, by rl/shared_prefix and not by TRL."""
        return self.prefix != "stock"


class RLConfig(Strict):
    """One RL stage."""

    data: tuple[DataSource, ...] = Field(min_length=1)
    prepare: Prepare = Prepare()
    rewards: tuple[RewardTerm, ...] = Field(min_length=1)
    algorithm: Algorithm
    rollout: Rollout
    dynamic_sampling: DynamicSampling = DynamicSampling()
    overlong: Overlong | None = None
    batches: int = Field(ge=1)
    """Rollout batches in this stage (the report's episodes)."""
    mini_batch: int = Field(ge=1)
    """Completions per optimizer update."""
    passes: int = Field(default=1, ge=1)
    """Passes over the mini-batches of one rollout batch."""
    optim: Optim
    """The optimizer. `mini_batch` sets the rows of an update, `batches` the number of updates."""
    learner: RLLearner = RLLearner()
    parity: Parity
    self_test_rows: int = Field(default=64, ge=0)
    """Rows on which the rewards are tested with gold and corrupted answers before training; 0 skips the test."""
    watch: Watch = Watch()
    log_completions_every: int = Field(default=1, ge=1)
    """Rollout batches between two records of completions with their verdicts."""
    save_every: int | None = Field(default=None, ge=1)
    """Rollout batches between checkpoints with the optimizer's states and the prompts' ledger. An interrupted stage
    that is started again unchanged continues from the last one. None: it starts from its beginning."""

    @property
    def completions_per_batch(self) -> int:
        return self.rollout.prompts_per_batch * self.rollout.group_size

    @property
    def updates_per_batch(self) -> int:
        return self.completions_per_batch // self.mini_batch * self.passes

    @property
    def max_steps(self) -> int:
        """Optimizer updates in the stage."""
        return self.batches * self.updates_per_batch

    @model_validator(mode="after")
    def _arithmetic(self) -> RLConfig:
        rows, ranks = self.completions_per_batch, self.learner.processes
        for key, instead in (
            ("epochs", "batches"),
            ("max_steps", "batches"),
            ("global_batch_size", "mini_batch"),
        ):
            if getattr(self.optim, key) is not None:
                raise ValueError(f"optim.{key} is for SFT phases; an RL stage says {instead}")
        if rows % self.mini_batch:
            raise ValueError(
                f"mini_batch={self.mini_batch} does not divide the {rows} completions of a batch "
                f"(prompts_per_batch={self.rollout.prompts_per_batch} x group_size={self.rollout.group_size})"
            )
        if self.rollout.prompts_per_batch % ranks:
            raise ValueError(
                f"rollout.prompts_per_batch={self.rollout.prompts_per_batch} is not a multiple of "
                f"learner.processes={ranks}: every rank takes whole groups"
            )
        if self.rollout.overlap and not self.rollout.max_staleness:
            raise ValueError(
                "rollout.overlap samples with weights one batch old, but rollout.max_staleness=0 allows none; "
                "set it to 1, or turn overlap off"
            )
        self.optim.gradient_accumulation(ranks, self.mini_batch)
        if self.overlong and self.overlong.cache_tokens >= self.rollout.max_completion_tokens:
            raise ValueError(
                f"overlong.cache_tokens={self.overlong.cache_tokens} must be below "
                f"rollout.max_completion_tokens={self.rollout.max_completion_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _rewards_make_a_mixture(self) -> RLConfig:
        try:
            check_terms(self.rewards)
        except ValueError as error:
            raise ValueError(f"rewards: {error}") from None
        return self


class EvalConfig(Strict):
    """Greedy evaluation on the held-out sets through the rollout engine."""

    thinking: DataSource
    direct: DataSource
    max_completion_tokens: int = Field(ge=1)
    samples: int = Field(default=12, ge=0)
    """Held-out rows per mode pair that the report shows with their images."""
