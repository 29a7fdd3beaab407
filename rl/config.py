"""Configuration of the RL stages, their rollout pool, data preparation and evaluation. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from core.strict import Name, Strict
from core.training.config import LearnerConfig, Optim
from corpus.records import DataSource
from rewards.judge.address import refuse_secrets
from rewards.mix import check_terms

Mode = Literal["think", "direct"]
_BENT = (
    "an RL stage samples from the whole distribution, over which the learner computes probabilities (with top_p=0.9 "
    "the mean ratio of learner to server is 0.91, with 0.5 it is 0.52). Leave the key out; a lower rollout.temperature "
    "makes both distributions sharper"
)
BENDS_SAMPLING = dict.fromkeys(
    (
        *("top_p", "top_k", "min_p", "typical_p", "logit_bias"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
    _BENT,
)
"""Sampling parameters of a rollout engine that the learner's probabilities do not reflect -> why they are refused."""
AlarmName = Literal["unscorable", "status", "jump", "repeats", "disagreement", "held_out", "blind"]


class Rollout(Strict):
    """How one batch of completions is sampled."""

    refused: ClassVar[dict[str, str]] = BENDS_SAMPLING

    prompts_per_batch: int = Field(ge=1, le=1_000_000)
    """Groups per rollout batch."""
    group_size: int = Field(ge=2, le=65536)
    """Completions per prompt; G in the GRPO paper."""
    max_completion_tokens: int = Field(ge=1)
    """Most tokens of a completion; a longer one is truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Rollout servers and learner both divide logits by it. Other sampling parameters are refused."""
    overlap: bool = False
    """Sample the next batch while the learner trains on this one, with weights one batch old."""
    max_staleness: int = Field(default=1, ge=0)
    """Most weight updates between sampling a completion and training on it. The importance-sampling correction weighs
    stale completions; older groups are dropped and counted."""


class DynamicSampling(Strict):
    """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): groups without spread are replaced.

    A ledger of the prompts' pass rates keeps the number of such groups low.
    """

    max_rounds: int = Field(default=3, ge=0)
    """Rounds of replacement per batch; groups without spread that remain after them stay and are counted. 0: off."""
    oversample: float = Field(default=1.5, ge=1)
    """A round samples as many prompts as are expected to fill the batch, but at most this multiple of the number of
    missing groups. 1 samples exactly the missing number, as DAPO does."""
    carry: bool = True
    """Whether surplus groups with spread are kept for the next batch (within rollout.max_staleness)."""
    rest_epochs: int = Field(default=1, ge=0)
    """A prompt is skipped for this many epochs after a group that was all solved or all failed. The number doubles with
    each further such group in a row, up to eight times."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the resting prompts that is sampled nevertheless, because a policy forgets and learns."""


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
    """Weights above it are lowered to it (truncate) or set to 0 (mask)."""


class ClipSchedule(Strict):
    """The upper clip moves linearly over the stage's updates, from `clip_high` at the first to `end` at the last.

    This is one reading of the report's "clip value adjusted dynamically within 0.20 to 0.28"; the report does not
    describe the adjustment.
    """

    end: float = Field(ge=0)
    """Upper clip at the last update."""


class Teacher(Strict):
    """Servers of a larger core with the student's tokenizer, started by `posttrain rollout-server`."""

    urls: tuple[str, ...] = Field(min_length=1)
    """URLs (http://host:port) of the teacher's servers, which all serve the same weights."""
    token_file: str
    """File of mode 0600 with these servers' token."""
    concurrency: int = Field(default=8, ge=1, le=65536)
    """Prompts that a server scores at the same time."""
    request_timeout_s: float = Field(default=1800, gt=0)
    """Seconds in which a server must answer."""


class Algorithm(Strict):
    """Policy loss. docs/algorithms.md gives the paper and the section of each."""

    name: Literal["dapo", "gspo", "dr_grpo", "bnpo", "cispo", "sapo", "gdpo", "distill"] = "dapo"
    """dapo: token-level ratios, token-mean loss; gspo: one ratio per sequence, for MoE; dr_grpo: no length and no
    standard deviation in the normalisation; bnpo: token mean of each update; cispo: clipped ratios as constant weights;
    sapo: a soft gate instead of a clip; gdpo: dapo's loss, with advantages normalised per reward and then summed;
    distill: on-policy distillation, each token's advantage is log teacher - log student. Rewards are only reported."""
    teacher: Teacher | None = None
    """distill only: the teacher's servers."""
    clip_low: float = Field(ge=0, le=1)
    """Ratios below 1 - clip_low are clipped; cispo and sapo have no lower clip."""
    clip_high: float = Field(ge=0)
    """Ratios above 1 + clip_high are clipped. For cispo it is the largest ratio itself (at least 1); sapo has none."""
    delta: float | None = Field(default=None, gt=1)
    """Two-sided clip: the largest ratio at a negative advantage. It must exceed 1 + clip_high."""
    clip_schedule: ClipSchedule | None = None
    """None keeps the upper clip at clip_high."""
    sapo_temperature_positive: float = Field(default=1.0, gt=0)
    sapo_temperature_negative: float = Field(default=1.05, gt=0)
    """sapo only: steepness of the gate at positive advantages, and at negative ones."""
    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term against the stage's initial policy; with 0 no reference model is loaded."""
    scale_by_std: bool | None = None
    """Whether to divide a group's advantages by the standard deviation of its rewards. None: as in the algorithm's
    paper; all but dr_grpo divide."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the policy's mean entropy per token, which is added to the objective."""
    top_entropy: float = Field(default=1.0, gt=0, le=1)
    """Share of the tokens, those with the highest entropy, that enter the policy loss."""
    mask_truncated: bool = True
    """Whether to exclude truncated completions from the loss."""
    importance_sampling: ImportanceSampling = ImportanceSampling()

    @property
    def divides_by_std(self) -> bool:
        """`scale_by_std`, or the paper's choice if it is None."""
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
        if (self.name == "distill") != (self.teacher is not None):
            raise ValueError(
                f"teacher with name={self.name}: distill needs a teacher, and no other algorithm has one"
            )
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
    """One weighted term of the reward; metrics and report show it as a separate curve."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    use: str
    """A built-in reward (rewards.registry.REWARDS), `package.module:Name` or `file.py:Name`. The prefix `trl:` or
    `verl:` marks a reward function written for that library."""
    weight: float = Field(gt=0, le=1)
    modes: tuple[Mode, ...] = ("think", "direct")
    """Modes of the rows that it grades."""
    graded: tuple[Literal["verifiable", "judged"], ...] = ("verifiable", "judged")
    """Kinds of rows that the term grades: rows that a rule can check (verifiable), rows that only a judge can check
    (verifier judge or none), or both. Per mode and kind the weights sum to 1."""
    gate: str | None = None
    """Name of another term. This term is called only where that term scores 1; elsewhere it scores 0."""
    on_error: Literal["stop", "unscorable"] = "stop"
    """If the reward fails: stop the run, or count the failure and leave the row unscored. A reward fails if it raises,
    returns something other than a verdict, exceeds a limit below, or ends its process."""
    isolate: bool = True
    """Whether a reward that is not built in runs in a separate process. False: it runs in the stage's process, for
    rewards that must share its memory. The deadline is then the only limit, and a crash ends the stage."""
    deadline_s: float = Field(default=60.0, gt=0)
    """Seconds for one call of a reward that is not built in: one completion, or the batch of a batched reward."""
    memory_gib: float = Field(default=4.0, gt=0)
    """Private memory that the process of a reward that is not built in may use."""
    params: Params = Field(default_factory=dict)

    @model_validator(mode="after")
    def _limits_are_for_users_rewards(self) -> RewardTerm:
        if ":" not in self.use:
            limits = ("deadline_s", "isolate", "memory_gib")
            given = [key for key in limits if getattr(self, key) != type(self).model_fields[key].default]
            if given:
                raise ValueError(f"{given[0]} is for users' own rewards; {self.use!r} is built in: remove it")
        return self


class PassAtK(Strict):
    """Keep prompts by the starting policy's pass@k (report, section 4: pass@4 filter)."""

    source: DataSource
    into: Name
    """Name of the set of kept rows."""
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    drop_never_solved: bool = True
    """Whether to drop never-solved think rows too. Of direct rows, only always-solved ones are dropped (report)."""
    drop_always_solved: bool = True
    min_rows: int = Field(default=1, ge=1)
    """Keeping fewer rows than this is an error: the policy is too weak or too strong for these prompts."""


class Harvest(Strict):
    """Rejection sampling: the policy's own correct, well-formed chains become think-fusion data."""

    source: DataSource
    into: Name
    keep: int = Field(ge=1)
    """Most chains to keep; keeping fewer than min_rows is an error."""
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    min_rows: int = Field(default=1, ge=1)


class HardCases(Strict):
    """Prompts on which an earlier RL stage was unreliable, taken from that stage's record."""

    stage: str = "rlvr"
    into: Name
    max_pass_rate: float = Field(gt=0, le=1)
    """Keep prompts whose pass rate in their last group of that stage was at most this."""
    rows: int | None = Field(default=None, ge=1)
    """Largest number of rows, hardest first."""
    min_rows: int = Field(default=1, ge=1)


class Prepare(Strict):
    """Data that the stage's initial policy produces before the stage."""

    pass_at_k: PassAtK | None = None
    harvest: Harvest | None = None
    hard_cases: HardCases | None = None
    max_completion_tokens: int = Field(default=64, ge=1)

    @property
    def samples(self) -> bool:
        """Whether completions are sampled; hard cases need none, as they come from an earlier stage's record."""
        return self.pass_at_k is not None or self.harvest is not None


class Parity(Strict):
    """Parity guard: after every weight update, servers and learner score the same sequences."""

    sequences: int = Field(default=4, ge=1)
    """Probe prompts, the same each time: only repeated prompts reveal stale caches."""
    tokens: int = Field(default=12, ge=1)
    """Sampled tokens per probe."""
    bound: float = Field(gt=0)
    """Largest absolute difference of a token's log-probability; above it the run stops."""


class Watch(Strict):
    """Bounds of the watcher's alarms. Rates and shares are in [0, 1]."""

    stop_on: tuple[AlarmName, ...] = ("unscorable",)
    """Alarms that end the run; the others are only reported."""
    max_unscorable: float = Field(default=0.1, ge=0, le=1)
    """Share of completions that no reward could judge, over the last `window` batches."""
    window: int = Field(default=5, ge=1)
    max_status: float = Field(default=0.5, ge=0, le=1)
    """Share of one component's verdicts with the same status, other than correct and wrong."""
    max_jump: float = Field(default=0.25, gt=0)
    """Change of a component's mean against its last batches; the change must also exceed six times their spread."""
    max_repeats: float = Field(default=0.5, ge=0, le=1)
    """Share of completions whose text also occurs as the completion of another prompt of the batch."""
    repeat_tokens: int = Field(default=12, ge=1)
    """Shorter completions are not counted as repeats, because honest short answers coincide."""
    second_verifier: str | None = None
    """Name of a stricter reward that grades a sample of the completions that the answer verifier called correct."""
    second_params: Params = Field(default_factory=dict)
    second_rows: int = Field(default=32, ge=1)
    """Completions per batch that the second verifier grades."""
    max_disagreement: float = Field(default=0.1, ge=0, le=1)
    """Share of these completions that the second verifier does not call correct."""
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
    """Most tokens of one packed forward-backward pass of a rank, unless prefix=stock; a single row may exceed it.
    None: the tokens of TRL's pass over optim.micro_batch_size padded rows."""

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
    """Punishment of over-long completions. Over-long prompts: `unaskable` of `data`."""
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
    """Number of rows on which the rewards are tested with gold and corrupted answers before training; 0: no test."""
    watch: Watch = Watch()
    log_completions_every: int = Field(default=1, ge=1)
    """Rollout batches from one whose completions are logged with their verdicts to the next."""
    save_every: int | None = Field(default=None, ge=1)
    """Rollout batches between two checkpoints with the optimizer's states and the prompts' ledger. An interrupted stage
    that is started again unchanged resumes from the last checkpoint. None: the stage starts from its beginning."""

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

    @field_validator("overlong", mode="before")
    @classmethod
    def _overlong_is_about_completions(cls, value: Any) -> Any:
        # The report's "periodically" is about rows of SFT's packed stream; RL's 16,384 tokens are the servers' context.
        if isinstance(value, str):
            raise ValueError(
                f"{value!r} is a choice of SFT stages. Here `overlong: {{cache_tokens: N}}` punishes long completions; "
                "prompts beyond servers.max_model_tokens are refused or dropped: data's `unaskable`"
            )
        return value

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
        self._check_distillation()
        if self.overlong and self.overlong.cache_tokens >= self.rollout.max_completion_tokens:
            raise ValueError(
                f"overlong.cache_tokens={self.overlong.cache_tokens} must be below "
                f"rollout.max_completion_tokens={self.rollout.max_completion_tokens}"
            )
        return self

    def _check_distillation(self) -> None:
        if self.algorithm.teacher is None:
            return
        if self.rollout.temperature != 1:
            raise ValueError(
                f"rollout.temperature={self.rollout.temperature:g} with distill: the teacher scores at temperature 1, "
                "so the student must sample at 1"
            )
        if self.dynamic_sampling.max_rounds:
            raise ValueError(
                "dynamic_sampling.max_rounds with distill: groups need no spread of rewards to learn from a teacher; "
                "set it to 0"
            )

    @model_validator(mode="after")
    def _rewards_make_a_mixture(self) -> RLConfig:
        try:
            check_terms(self.rewards)
        except ValueError as error:
            raise ValueError(f"rewards: {error}") from None
        return self
