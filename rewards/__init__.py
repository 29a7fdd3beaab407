"""Rewards: map a completion and its row to a verdict. This package needs neither a GPU nor torch nor a trainer.

| file | purpose |
|---|---|
| verdict, example | the return value of a reward, and its input row |
| extract | the format contract: finds the answer in a completion |
| answer, answers/, pool | compares the answer with the gold answer |
| style/ | rewards for format, length, repetition and language; a second, stricter answer reward |
| judge/ | a vision-language model scores the thought, the answer, or the choice to think |
| mix, components | weighted terms and their gates; metrics of each term over a batch |
| calls | calls a reward of any form: plain, async, batched |
| isolation/ | runs users' rewards in separate processes, under limits |
| registry, adapters | loads rewards by name; adapts reward functions of TRL and verl |
| selftest | checks that gold answers score 1 and corrupted answers score 0 |
| offline/ | commands that score stored completions, test rewards and audit judges |
| forks | threads, connections and locks that belong to one process |

A reward is any callable `(completion, example) -> Verdict | float | bool | None`, or one of the forms in calls.
"""

from rewards.example import Example
from rewards.verdict import Status, Verdict

__all__ = ["Example", "Status", "Verdict"]
