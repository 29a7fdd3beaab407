"""Limits on users' rewards: a deadline in every case, and by default a separate process.

| file | purpose |
|---|---|
| progress | records which rows are being graded, and since when |
| shared | a reward in this process, with only a deadline |
| isolated | a reward in a separate process: attributes failures to rows, and grades other rows again |
| process | the parent's side of that process |
| worker | the code of that process |
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.calls import Reward
from rewards.isolation.isolated import Isolated
from rewards.isolation.shared import Shared
from rewards.registry import is_builtin, load_reward

__all__ = ["DEADLINE_S", "MEMORY_GIB", "Isolated", "load_limited"]

DEADLINE_S = 60.0
MEMORY_GIB = 4.0


def load_limited(
    use: str,
    params: Mapping[str, Any] | None = None,
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    name: str = "",
    isolate: bool = True,
    deadline_s: float = DEADLINE_S,
    memory_gib: float = MEMORY_GIB,
) -> Reward:
    """Load a reward (rewards.registry.load_reward). A reward that is not built in is limited.

    Args:
        name: name in messages; "": `use`.
        isolate: run the reward in a separate process. False: in this process, with only a deadline.
        deadline_s: time limit of one call, which grades a completion or, for a batched reward, a batch.
        memory_gib: limit on the private memory of the separate process.

    Raises the exceptions of `load_reward`, and RewardError if the reward cannot be loaded for another reason.
    """
    if is_builtin(use):
        return load_reward(use, params, folders)
    if isolate:
        return Isolated(use, dict(params or {}), folders, name or use, deadline_s, memory_gib)
    return Shared(load_reward(use, params, folders), name or use, deadline_s)
