"""Format rewards: 1 if the completion keeps its mode's contract, else 0 with the breach as the reason."""

from dataclasses import dataclass
from typing import ClassVar

from rewards.example import Example
from rewards.extract import Parsed, parse_direct, parse_thinking
from rewards.verdict import Verdict


@dataclass(frozen=True)
class ThinkFormat:
    r"""1 for one non-empty thought followed by exactly one box, else 0.

    Source: SAIL-VL2 (arXiv:2509.14033), format reward; the contract is spelt out in rewards.extract.

    >>> row = Example("row-1", "What is 2 + 2?", "4", "think")
    >>> ThinkFormat()(r"<think>2 + 2 = 4</think> \boxed{4}", row).score
    1.0
    >>> ThinkFormat()(r"<think></think> \boxed{4}", row).reason
    'the thought is empty'
    """

    thought_open: bool = False
    """The chat template has already opened <think>: the completion starts inside the thought."""

    self_test: ClassVar[str] = "form"
    contract_of: ClassVar[str] = "think"

    def __call__(self, completion: str, example: Example) -> Verdict:
        parsed = parse_thinking(completion, self.thought_open)
        # Invisible characters or a lone dot must not count as a thought.
        empty = not any(letter.isalnum() for letter in parsed.thought or "")
        if parsed.well_formed and empty and not self.thought_open:
            return Verdict.wrong(reason="the thought has no letter or digit")
        return _judge(parsed)


@dataclass(frozen=True)
class ThinkTags:
    r"""1 if the completion opens with one thought in think tags, else 0. Boxes do not matter.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, RLVR: the format reward of stage 3 asks for the reasoning in
    `<think>` tags alone; stage 5's asks for the box as well (ThinkFormat).

    >>> row = Example("row-1", "What is 2 + 2?", "4", "think")
    >>> ThinkTags()("<think>2 + 2 = 4</think> It is 4.", row).score
    1.0
    >>> ThinkTags()("2 + 2 = 4", row).reason
    'no thought'
    """

    thought_open: bool = False
    """The chat template has already opened <think>: the completion starts inside the thought."""

    self_test: ClassVar[str] = "form"
    contract_of: ClassVar[str] = "think"

    def __call__(self, completion: str, example: Example) -> Verdict:
        # The rules of ThinkFormat, applied to a text whose boxes cannot break a rule.
        with_one_box = completion.replace(r"\boxed", "") + "\n\\boxed{0}"
        return ThinkFormat(self.thought_open)(with_one_box, example)


@dataclass(frozen=True)
class DirectFormat:
    """1 for an answer without thought: some text, no think tags, no chat tokens.

    Source: ours; the report's direct rows are plain instruction answers.

    >>> row = Example("row-1", "What is 2 + 2?", "4", "direct")
    >>> DirectFormat()("4", row).score, DirectFormat()("<think>4</think>4", row).score
    (1.0, 0.0)
    """

    self_test: ClassVar[str] = "form"
    contract_of: ClassVar[str] = "direct"

    def __call__(self, completion: str, example: Example) -> Verdict:
        return _judge(parse_direct(completion))


@dataclass(frozen=True)
class Format:
    r"""The contract of the row's mode: ThinkFormat for think rows, DirectFormat for direct rows.

    >>> think, direct = (Example("row-1", "What is 2 + 2?", "4", mode) for mode in ("think", "direct"))
    >>> Format()("4", think).score, Format()("4", direct).score
    (0.0, 1.0)
    """

    thought_open: bool = False
    """Whether the chat template has already opened <think>, so that a think row's completion starts in the thought."""

    self_test: ClassVar[str] = "form"

    def __call__(self, completion: str, example: Example) -> Verdict:
        reward = ThinkFormat(self.thought_open) if example.mode == "think" else DirectFormat()
        return reward(completion, example)


def _judge(parsed: Parsed) -> Verdict:
    return Verdict.correct() if parsed.well_formed else Verdict.wrong(reason=parsed.problem)
