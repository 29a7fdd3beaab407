"""The experts that a server chose, as an array, and their form in a reply: base64 of a .npy file, as vLLM returns it.

Routing replay (R3, arXiv:2510.11370) lets the learner use them (rl.shared_prefix.routing).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Routing:
    """The shape of what a mixture of experts chooses per token."""

    layers: int
    """Layers of the language model. A layer without experts has zeros."""
    per_token: int
    """Experts that a token visits."""
    experts: int
    """Experts of a layer."""

    @classmethod
    def of(cls, text: Mapping[str, Any]) -> Routing:
        """The routing of a text configuration. Raises ValueError for a dense model."""
        experts = text.get("num_experts") or text.get("num_local_experts")
        if not experts:
            raise ValueError(
                "servers.routing_replay is for mixtures of experts; this core is dense, remove it"
            )
        return cls(text["num_hidden_layers"], text["num_experts_per_tok"], experts)

    def read(self, reply: str | None, tokens: int) -> np.ndarray:
        """The experts (tokens, layers, experts per token) of a reply, int16. Raises ValueError for any other content.

        The server has chosen experts for every token but the last one, which it has not read.
        """
        import numpy as np

        if reply is None:
            raise ValueError(
                "the server returned no experts; start it with servers.routing_replay (vLLM: "
                "--enable-return-routed-experts)"
            )
        file = BytesIO(base64.b64decode(reply))
        np.lib.format.read_magic(file)
        shape, by_column, kind = np.lib.format.read_array_header_1_0(file)
        expected = (tokens, self.layers, self.per_token)
        if shape != expected or by_column or kind.kind not in "ui":
            raise ValueError(
                f"the server returned experts of shape {shape} and type {kind}; {expected} integers are due"
            )
        found = np.frombuffer(file.read(), kind).reshape(shape)
        if found.size and not 0 <= found.min() <= found.max() < self.experts:
            raise ValueError(f"the server returned experts {found.min()} to {found.max()} of {self.experts}")
        return found.astype(np.int16)


def written(experts: np.ndarray) -> str:
    """The form of `experts` in a reply."""
    import numpy as np

    file = BytesIO()
    np.save(file, experts, allow_pickle=False)
    return base64.b64encode(file.getbuffer()).decode()


def routers(core: Any) -> dict[int, Any]:
    """Layer number -> router, for the layers of a native core that have experts."""
    layers = enumerate(core.model.language_model.layers)
    return {number: layer.mlp.gate for number, layer in layers if hasattr(layer.mlp, "gate")}


class Recorder:
    """Notes what the routers of a native core choose while it generates.

    Args:
        core: the model.
        rows: sequences that it generates together.
    """

    def __init__(self, core: Any, rows: int) -> None:
        self.core, self.rows = core, rows
        self._chosen: dict[int, list[np.ndarray]] = {number: [] for number in routers(core)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, every pass is noted."""

        def note(number: int, output: Any) -> None:
            experts = output[2].cpu().numpy()  # (rows x tokens, experts per token)
            self._chosen[number].append(experts.reshape(self.rows, -1, experts.shape[-1]))

        hooks = [
            router.register_forward_hook(lambda _, __, output, number=number: note(number, output))
            for number, router in routers(self.core).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def experts(self) -> np.ndarray:
        """(rows, tokens, layers, experts per token), int16, of all passes; zeros for layers without experts."""
        import numpy as np

        by_layer = {number: np.concatenate(passes, axis=1) for number, passes in self._chosen.items()}
        blank = np.zeros_like(next(iter(by_layer.values())))
        layers = range(len(self.core.model.language_model.layers))
        return np.stack([by_layer.get(number, blank) for number in layers], axis=2).astype(np.int16)
