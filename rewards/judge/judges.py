"""The judges: of a thought, of an answer that rules cannot check, and of the need to think."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rewards.answers.plain import plain_text
from rewards.example import Example
from rewards.extract import MAX_BOX_CHARS, parse, parse_thinking
from rewards.judge.base import Judge, Pictures, Plan, statistics
from rewards.judge.canaries import Case, answer_cases, need_cases, thinking_cases
from rewards.judge.quoting import quoted
from rewards.judge.wording import (
    ANSWER_ASKED,
    ANSWER_SYSTEM,
    CRITERIA,
    HOLISTIC,
    NEED_ASKED,
    NEED_SYSTEM,
    SYSTEM,
)
from rewards.verdict import Status, Verdict

__all__ = ["CRITERIA", "AnswerJudge", "Judge", "JudgingReward", "VisionJudge", "statistics"]


@dataclass(frozen=True)
class VisionJudge(Judge):
    """Scores a thought: one verdict on all criteria, or the mean of one verdict per criterion.

    Source: verdict "holistic" is the thinking reward of SAIL-VL2 (arXiv:2509.14033), stage 5: one judgement, 0 or 1,
    over logical soundness, factual grounding and consistency of the answer. Verdict "mean" is SAIL-RL's
    (arXiv:2511.02280): three binary judgements and their mean, three requests.

    >>> row = Example("row-1", "What is 2 + 2?", "4", "think")
    >>> VisionJudge("http://127.0.0.1:8100/v1", "judge")("4", row).reason
    'nothing to judge: no thought'

    A thinking completion without a thought scores 0 and costs no request. Raises ValueError for an unknown
    verdict or criterion, or a limit below its minimum.
    """

    kind: ClassVar[str] = "vision_judge"
    verdict: str = "holistic"
    """"holistic" or "mean"."""
    criteria: tuple[str, ...] = tuple(CRITERIA)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "criteria", tuple(self.criteria))
        unknown = [name for name in self.criteria if name not in CRITERIA]
        if unknown or not self.criteria:
            raise ValueError(f"criteria={list(self.criteria)}: give at least one of {', '.join(CRITERIA)}")
        if self.verdict not in ("holistic", "mean"):
            raise ValueError(f'verdict={self.verdict!r}: it must be "holistic" or "mean"')

    def _asked(self) -> dict[str, str]:
        """Name of each question -> its text."""
        if self.verdict == "mean":
            return {name: CRITERIA[name] for name in self.criteria}
        return {"holistic": " ".join((HOLISTIC, *(CRITERIA[name] for name in self.criteria)))}

    def _wording(self) -> tuple[str, ...]:
        return (SYSTEM, *self._asked().values())

    def _plan(self, completion: str, example: Example, images: "Pictures") -> Plan | Verdict:
        too_long = self._too_long(completion)
        if too_long:
            return too_long
        if example.mode == "think":
            parsed = parse_thinking(completion, self.thought_open)
            if not parsed.thought:
                reason = f"nothing to judge: {parsed.problem}"
                return Verdict.wrong(reason=reason, status=Status.NO_ANSWER)
        material = quoted({"question": example.question, "response": completion})
        shown = images.of(example)
        questions = {
            name: self._question(SYSTEM, material, asked, shown) for name, asked in self._asked().items()
        }
        return Plan(questions)

    def _conclude(self, yes: Mapping[str, bool], plan: Plan) -> Verdict:
        reason = ", ".join(f"{name} {'yes' if said else 'no'}" for name, said in yes.items())
        status = Status.CORRECT if all(yes.values()) else Status.WRONG
        return Verdict(sum(yes.values()) / len(yes), status, None, reason)

    def _cases(self) -> list[Case]:
        return thinking_cases(self.thought_open)


@dataclass(frozen=True)
class AnswerJudge(Judge):
    r"""1 if the judge finds the answer equivalent to the gold answer, else 0; for rows with verifier "judge".

    Source: SAIL-VL2 (arXiv:2509.14033), answer reward: "for tasks with no deterministic check, a
    vision-language judge gives it".

    The judge sees the question, the gold answer (and the alternatives in meta["answers"]) and the completion's answer
    under the format contract: the content of the box, or the whole text of a direct completion without a box. An answer
    equal to the gold's text is right without a request, and a missing answer is wrong without a request.

    >>> row = Example("row-1", "Who painted it?", "Vincent van Gogh", "think", verifier="judge")
    >>> reward = AnswerJudge("http://127.0.0.1:8100/v1", "judge")
    >>> reward(r"<think>Sunflowers.</think>\boxed{vincent van Gogh.}", row).score
    1.0
    >>> reward("<think>Sunflowers.</think> Van Gogh", row).status.value
    'no_answer'
    """

    kind: ClassVar[str] = "answer_judge"
    show_images: bool = False
    """Show the row's images to the judge, for gold answers that depend on them."""

    def _wording(self) -> tuple[str, ...]:
        return (ANSWER_SYSTEM, ANSWER_ASKED)

    def _plan(self, completion: str, example: Example, images: "Pictures") -> Plan | Verdict:
        if example.verifier != "judge":
            return Verdict.unscored(
                f'verifier "{example.verifier}": a rule grades this row; judged rows have "judge"'
            )
        others = example.meta.get("answers", ())
        others = (others,) if isinstance(others, str) else others
        golds = [str(gold) for gold in (example.answer, *others) if str(gold).strip()]
        if not golds:
            return Verdict.unscored("no gold answer to compare with; add one")
        parsed = parse(completion, example.mode, self.thought_open)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        too_long = self._too_long(parsed.answer)
        if too_long:
            return too_long
        if any(plain_text(parsed.answer) == plain_text(gold) for gold in golds):
            return Verdict.correct(parsed.answer, "the gold answer's own words")
        blocks = {
            "question": example.question,
            "reference": "\nor\n".join(golds),
            "answer": parsed.answer,
        }
        shown = images.of(example) if self.show_images else ()
        question = self._question(ANSWER_SYSTEM, quoted(blocks), ANSWER_ASKED, shown)
        return Plan({"equivalent": question}, answer=parsed.answer[:MAX_BOX_CHARS])

    def _conclude(self, yes: Mapping[str, bool], plan: Plan) -> Verdict:
        if yes["equivalent"]:
            return Verdict.correct(plan.answer, "the judge finds it equivalent")
        return Verdict.wrong(plan.answer, "the judge finds it different")

    def _cases(self) -> list[Case]:
        return answer_cases()


@dataclass(frozen=True)
class JudgingReward(Judge):
    """1 if the completion has a thought exactly when the question needs one, else 0.

    Source: SAIL-RL (arXiv:2511.02280), judging reward, which "adaptively determines whether deep reasoning or
    direct answering is appropriate". Ours: a judge decides only from the question and images whether thinking is
    needed. So the completion cannot manipulate the judge, and a group costs one request. meta["needs_thinking"] of a
    row replaces the judge's decision. A completion counts as thinking if it has a non-empty thought.

    >>> row = Example("row-1", "What is 17 * 23?", "391", "think", meta={"needs_thinking": True})
    >>> reward = JudgingReward("http://127.0.0.1:8100/v1", "judge")
    >>> reward(r"<think>17 * 23 = 391</think>\boxed{391}", row).score
    1.0
    >>> reward("391", row).reason
    'thinking was needed, and it did not think'
    """

    kind: ClassVar[str] = "judging"

    def _wording(self) -> tuple[str, ...]:
        return (NEED_SYSTEM, NEED_ASKED)

    def _plan(self, completion: str, example: Example, images: "Pictures") -> Plan | Verdict:
        thought = bool(parse_thinking(completion, self.thought_open).thought)
        known = example.meta.get("needs_thinking")
        if isinstance(known, bool):
            return _judging(known, thought)
        material = quoted({"question": example.question})
        question = self._question(NEED_SYSTEM, material, NEED_ASKED, images.of(example))
        return Plan({"needed": question}, thought=thought)

    def _conclude(self, yes: Mapping[str, bool], plan: Plan) -> Verdict:
        return _judging(yes["needed"], plan.thought)

    def _cases(self) -> list[Case]:
        return need_cases()


def _judging(needed: bool, thought: bool) -> Verdict:
    reason = (
        f"thinking was {'' if needed else 'not '}needed, and it {'thought' if thought else 'did not think'}"
    )
    return Verdict.correct(reason=reason) if needed == thought else Verdict.wrong(reason=reason)
