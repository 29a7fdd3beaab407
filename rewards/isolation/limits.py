"""Which rewards come under limits: all that are not built in."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.calls import Reward
from rewards.isolation.isolated import Isolated
from rewards.isolation.shared import Shared
from rewards.registry import is_builtin, load_reward

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
    """The reward of that name (rewards.registry.load_reward); one that is not built in comes under limits.

    Args:
        name: for messages; "" takes `use`.
        isolate: run it in a process of its own. False: in this one, with a deadline alone.
        deadline_s: for one call: a completion, or the batch of a batched reward.
        memory_gib: of its process's private memory.

    Raises what `load_reward` raises, RewardError where the reward cannot be loaded for another reason.
    """
    if is_builtin(use):
        return load_reward(use, params, folders)
    if isolate:
        return Isolated(use, dict(params or {}), folders, name or use, deadline_s, memory_gib)
    return Shared(load_reward(use, params, folders), name or use, deadline_s)
