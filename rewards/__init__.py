"""Rewards: text and a row in, a verdict out. Needs neither a GPU nor torch, and knows no trainer.

| file | idea |
|---|---|
| verdict, example | what a reward returns, and what it sees |
| extract | the format contract: where the answer is, or why there is none |
| answer | is it the gold answer? (behind it: normal, equality, latex, mathcheck, mathpool, mathworker) |
| format, length, repetition, language | is it well-formed; too long; does it go in circles; in which script |
| literal | a second, stricter opinion on the answer |
| judge | a vision-language model scores the thought, the answer, the choice to think |
| judge_client, judge_cache, judge_text, judge_canaries | its connections, replies on disk, quoting, start-up check |
| mix, components | weighted terms and their gates; how each term does over a batch |
| calls | a reward in any form: plain, async, batched |
| registry, adapters | rewards by name; reward functions of TRL and verl |
| selftest | gold answers must earn full marks, corrupted ones none |

A reward is any callable `(completion, example) -> Verdict | float | bool | None`, or one of the forms in calls.
"""

from rewards.example import Example
from rewards.verdict import Status, Verdict

__all__ = ["Example", "Status", "Verdict"]
