"""The common base of all judges: server, limits, start-up check and batches.

Every request is one question with the answer yes or no (rewards.judge.client: batches, retries, budget, cache). The
judge receives the completion as quoted data under marks that the completion cannot forge (rewards.judge.quoting).
Before its first verdict, a judge must refuse completions that try to manipulate it (rewards.judge.canaries). If the
judge is down, is late, or gives an answer other than yes or no, the row is unscored and never gets 0.
"""

import hashlib
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, ClassVar

from rewards.example import Example
from rewards.forks import PerProcess
from rewards.judge import client as judge_client
from rewards.judge.cache import cache_at
from rewards.judge.canaries import CanaryReport, Case
from rewards.judge.meter import Limits, Meter
from rewards.judge.questions import Endpoint, Failure, Picture, Question, Reply
from rewards.judge.wording import YES_NO
from rewards.verdict import Status, Verdict

CACHE_VARIABLE = "POSTTRAIN_JUDGE_CACHE"
"""Environment variable with the path of the reply cache, for judges without the parameter `cache`."""


@dataclass(frozen=True)
class Plan:
    """The questions about one completion, and further inputs of its verdict."""

    questions: Mapping[str, Question]
    answer: str | None = None
    """The completion's answer under the format contract."""
    thought: bool = False
    """Whether the completion has a thought."""


@dataclass(frozen=True)
class Judge(ABC):
    """The common base of all judges: server, limits, batches. A subclass defines the questions and their meaning.

    Raises ValueError for a URL with a secret, a limit below its minimum, or choices other than yes and no.
    """

    kind: ClassVar[str]
    """Prefix of the judge's statistics."""
    self_test: ClassVar[str] = "skip"  # rewards.selftest: every question costs a request

    base_url: str
    """The server's API root, ending in /v1 for vLLM."""
    model: str
    """Name of the model on the server. The cache identifies a model by this name, so different weights need another
    name."""
    _: KW_ONLY
    timeout_s: float = 30.0
    """Time limit of one request."""
    max_retries: int = 2
    """Retries after temporary errors, with growing pauses."""
    max_concurrency: int = 8
    """Most concurrent requests to the server, over all judges with this limit in all threads of this process."""
    budget_s: float = 120.0
    """Time limit of one batch, with the start-up check. Rows without a verdict by then are unscored."""
    step_calls: int | None = None
    """Most requests of one batch; None: no limit."""
    step_tokens: int | None = None
    """Tokens after which a batch stops sending requests; None: no limit."""
    run_s: float | None = None
    """Seconds that this process may wait for the judge over all batches; None: no limit."""
    run_calls: int | None = None
    run_tokens: int | None = None
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; None: a dummy key is sent."""
    cache: str | None = None
    """SQLite file of the judge's replies; None: the file that POSTTRAIN_JUDGE_CACHE names, else no cache."""
    canaries: bool = True
    """Before the first verdict, refuse a judge that credits injected completions."""
    choices: tuple[str, str] = YES_NO
    """The order in which yes and no are offered to the judge."""
    max_chars: int = 60_000
    """A longer completion, in characters, is wrong (over_limit) without a request."""
    thought_open: bool = False
    """Whether the chat template has already opened <think>, so that the completion starts inside the thought."""

    def __post_init__(self) -> None:
        self._endpoint()  # refuses a URL with a password
        object.__setattr__(self, "choices", tuple(self.choices))
        if sorted(self.choices) != sorted(YES_NO):
            raise ValueError(f"choices={list(self.choices)}: they must be yes and no, in either order")
        least: dict[str, float] = {"timeout_s": 0.001, "budget_s": 0.001, "max_retries": 0}
        least |= dict.fromkeys(("max_concurrency", "step_calls", "step_tokens", "max_chars"), 1)
        least |= dict.fromkeys(("run_s", "run_calls", "run_tokens"), 0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not (lowest <= value < math.inf):
                raise ValueError(f"{name}={value}: it must be at least {lowest}")

    def __call__(self, completion: str, example: Example) -> Verdict:
        return self.batch([completion], [example])[0]

    def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Verdict]:
        """A verdict per completion, within `budget_s`.

        Raises JudgeRefused if the judge fails its start-up check, ValueError if the numbers of completions and
        examples differ or the key's environment variable is not set.
        """
        if len(completions) != len(examples):
            raise ValueError(f"{len(completions)} completions but {len(examples)} examples")
        deadline = time.monotonic() + self.budget_s
        plans = self._plans(completions, examples)
        if self.canaries and any(isinstance(plan, Plan) for plan in plans):
            report = self._checked(deadline)
            if not report.complete:
                unchecked = Verdict.unscored(f"judge not checked yet: {report.unanswered}")
                return [unchecked if isinstance(plan, Plan) else plan for plan in plans]
        return self._verdicts(plans, self._limits(), deadline)

    def check_canaries(self) -> CanaryReport:
        """Check the judge on bundled injected completions and honest controls, once per process; cached on disk.

        Raises JudgeRefused if the judge credits an injected completion or denies most controls. If the judge does not
        answer, the report's `complete` is False, and the next call tries again.
        """
        return self._checked(time.monotonic() + self.budget_s)

    def statistics(self) -> dict[str, float]:
        """The cost of this judge, and of all equal judges, in this process so far (rewards.judge.judges.statistics)."""
        return self._meter().to_dict()

    @property
    def prompt_version(self) -> str:
        """A hash of this judge's wording, which is part of the cache's keys."""
        return hashlib.sha256("\0".join((*self._wording(), *self.choices)).encode()).hexdigest()[:12]

    @abstractmethod
    def _wording(self) -> tuple[str, ...]:
        """The text that all requests share."""

    @abstractmethod
    def _plan(self, completion: str, example: Example, images: "Pictures") -> Plan | Verdict:
        """The questions about a completion, or its verdict if no question is needed."""

    @abstractmethod
    def _conclude(self, yes: Mapping[str, bool], plan: Plan) -> Verdict:
        """The verdict from the judge's replies. `yes` maps a question's name to the reply."""

    @abstractmethod
    def _cases(self) -> list[Case]:
        """The cases of the start-up check."""

    def _plans(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Plan | Verdict]:
        images = Pictures()
        return [self._plan(text, row, images) for text, row in zip(completions, examples, strict=True)]

    def _verdicts(self, plans: Sequence[Plan | Verdict], limits: Limits, deadline: float) -> list[Verdict]:
        """The plans' verdicts, in order. All their questions are sent as one batch."""
        asked = [question for plan in plans if isinstance(plan, Plan) for question in plan.questions.values()]
        path = self.cache or os.environ.get(CACHE_VARIABLE)
        replies = iter(
            judge_client.ask(
                self._endpoint(),
                asked,
                limits,
                self._meter(),
                cache_at(path) if path else None,
                deadline,
            )
        )
        verdicts = []
        for plan in plans:
            if isinstance(plan, Plan):
                said = {name: next(replies) for name in plan.questions}
                failed = [f"{name}: {reply}" for name, reply in said.items() if isinstance(reply, Failure)]
                yes = {
                    name: reply.choice == "yes" for name, reply in said.items() if isinstance(reply, Reply)
                }
                plan = Verdict.unscored("; ".join(failed)) if failed else self._conclude(yes, plan)
            verdicts.append(plan)
        return verdicts

    def _checked(self, deadline: float) -> CanaryReport:
        key = (self.kind, self.base_url, self.model, self._wording(), self.choices)
        check = _checks().setdefault(key, _Check())  # atomic
        # One thread runs the check, and the others wait for it, each until its own deadline.
        if not check.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return CanaryReport(0, 0, {}, {}, "another thread is still checking the judge")
        try:
            if check.report is None:
                report = self._examined(deadline)
                if not report.complete:
                    return report
                check.report = report
        finally:
            check.lock.release()
        check.report.raise_if_refused(f"{self.kind} {self.model!r} at {self.base_url}")
        return check.report

    def _examined(self, deadline: float) -> CanaryReport:
        cases = self._cases()
        plans = self._plans([case.completion for case in cases], [case.example for case in cases])
        # The check is not a reward step: limits per step do not apply, but limits on the run and on time do.
        limits = replace(self._limits(), step_calls=None, step_tokens=None)
        return CanaryReport.of(cases, self._verdicts(plans, limits, deadline))

    def _endpoint(self) -> Endpoint:
        return Endpoint(self.base_url, self.model, self.api_key_env)

    def _limits(self) -> Limits:
        return Limits(**{one.name: getattr(self, one.name) for one in fields(Limits)})

    def _meter(self) -> Meter:
        return _meters().setdefault((self.kind, self.base_url, self.model), Meter())  # atomic

    def _question(self, system: str, material: str, asked: str, images: Sequence[Picture]) -> Question:
        offer = f"{asked} Answer {' or '.join(self.choices)}."
        return Question(system, material, offer, tuple(images), self.choices)

    def _too_long(self, text: str) -> Verdict | None:
        if len(text) <= self.max_chars:
            return None
        return Verdict.wrong(reason=f"over {self.max_chars} characters", status=Status.OVER_LIMIT)


def statistics() -> dict[str, float]:
    """The cost of all judges in this process so far: `<kind>/calls` and so on (rewards.judge.meter.Meter).

    Counts only grow, so the cost of a step is the difference of two readings. Judges of one kind are summed.
    """
    meters = list(_meters().items())
    total: dict[str, float] = {}
    for (kind, _, _), meter in meters:
        for name, count in meter.to_dict().items():
            total[f"{kind}/{name}"] = total.get(f"{kind}/{name}", 0) + count
    return total


class Pictures:
    """The rows' pictures for requests. The pictures of a row are read once for all its completions."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, tuple[Picture, ...]]] = {}

    def of(self, example: Example) -> tuple[Picture, ...]:
        images = example.images
        if id(images) not in self._seen:
            # The reference keeps the object alive, so that its id is not reused.
            self._seen[id(images)] = (images, tuple(Picture.of(image) for image in images))
        return self._seen[id(images)][1]


class _Check:
    """One judge's start-up check in this process. At most one thread runs it at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.report: CanaryReport | None = None


_checks: PerProcess[dict[tuple, _Check]] = PerProcess(dict)
_meters: PerProcess[dict[tuple[str, str, str], Meter]] = PerProcess(dict)
