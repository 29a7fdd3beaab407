"""Rewards: text and a row in, a verdict out. Needs neither a GPU nor torch, and knows no trainer.

| file | idea |
|---|---|
| verdict, example | what a reward returns, and what it sees |
| extract | the format contract: where the answer is, or why there is none |
| answer | is it the gold answer? (behind it: normal, equality, latex, mathcheck, mathpool, mathworker) |
| format, length | is the completion well-formed; is it too long |
| judge | a vision-language model scores the thought |
| mix, registry | weighted terms; rewards by name |

A reward is any callable `(completion, example) -> Verdict | float | bool | None`.
"""

from rewards.example import Example
from rewards.verdict import Status, Verdict

__all__ = ["Example", "Status", "Verdict"]
