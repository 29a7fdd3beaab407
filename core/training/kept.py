"""Restricts the output layer to the few positions of a packed row that a learner scores."""

from __future__ import annotations

from typing import Any


def take_keep(core: Any) -> None:
    """Let the backbone of `core` accept `keep` (positions,); it then returns hidden states (1, positions, hidden).

    The argument passes through the wrappers (DDP, DeepSpeed, PEFT, TRL's fused head) to the backbone. The backbone's
    forward is replaced on the instance, as TRL replaces the core's. Calls without `keep` are unchanged.
    """
    plain = core.model.forward

    def forward(*args: Any, keep: Any = None, **inputs: Any) -> Any:
        outputs = plain(*args, **inputs)
        if keep is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[:, keep]
        return outputs

    core.model.forward = forward
