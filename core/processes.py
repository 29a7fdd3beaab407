"""What launchers (torchrun, accelerate) leave in the environment of the processes they start."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
        *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    )
)
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def launcher_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of those variables: they must not reach a process that is no rank of that launcher's."""
    return [name for name in environment if name in _NAMES or name.startswith(_PREFIXES)]
