"""Format rewards: 1 if the completion keeps its mode's contract, else 0 with the breach as the reason."""

from dataclasses import dataclass

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

    def __call__(self, completion: str, example: Example) -> Verdict:
        return _judge(parse_thinking(completion, self.thought_open))


@dataclass(frozen=True)
class DirectFormat:
    """1 for an answer without thought: some text, no think tags, no chat tokens.

    Source: ours; the report's direct rows are plain instruction answers.

    >>> row = Example("row-1", "What is 2 + 2?", "4", "direct")
    >>> DirectFormat()("4", row).score, DirectFormat()("<think>4</think>4", row).score
    (1.0, 0.0)
    """

    def __call__(self, completion: str, example: Example) -> Verdict:
        return _judge(parse_direct(completion))


def _judge(parsed: Parsed) -> Verdict:
    return Verdict.correct() if parsed.well_formed else Verdict.wrong(reason=parsed.problem)
