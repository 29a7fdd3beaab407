"""Learners score few of a packed row's positions: only their hidden states reach the output layer."""

from __future__ import annotations

from typing import Any


def take_keep(core: Any) -> None:
    """Let the backbone of `core` take `keep` (positions,): of its hidden states (1, tokens, hidden) those come back.

    The argument travels through the wrappers (DDP, DeepSpeed, PEFT, TRL's fused head) to the backbone, whose forward
    is replaced on the instance, as TRL does with the core's own. Calls without it stay as they are.
    """
    plain = core.model.forward

    def forward(*args: Any, keep: Any = None, **inputs: Any) -> Any:
        outputs = plain(*args, **inputs)
        if keep is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, keep]
        return outputs

    core.model.forward = forward
