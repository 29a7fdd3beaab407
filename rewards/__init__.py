"""Rewards: text and a row in, a verdict out. Needs neither a GPU nor torch, and knows no trainer.

| file | idea |
|---|---|
| verdict, example | what a reward returns, and what it sees |
| extract | the format contract: where the answer is, or why there is none |
| answer, answers/, pool | is it the gold answer? |
| style/ | form, length, repetition, language; a stricter second opinion on the answer |
| judge/ | a vision-language model scores the thought, the answer, the choice to think |
| mix, components | weighted terms and their gates; how each term does over a batch |
| calls | a reward in any form: plain, async, batched |
| isolation/ | users' rewards in processes of their own, under limits |
| registry, adapters | rewards by name; reward functions of TRL and verl |
| selftest | gold answers must earn full marks, corrupted ones none |
| offline/ | commands: score stored completions, test rewards, audit judges |
| forks | threads, connections and locks that belong to one process |

A reward is any callable `(completion, example) -> Verdict | float | bool | None`, or one of the forms in calls.
"""

from rewards.example import Example
from rewards.verdict import Status, Verdict

__all__ = ["Example", "Status", "Verdict"]
