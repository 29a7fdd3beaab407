"""A batched async reward: it needs the whole batch, and could ask a server about it."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from sailvl2_posttrain import Example


class Novelty:
    """1 for an answer that no other completion of the same row gives, 1/n for one that n of them give."""

    async def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        await asyncio.sleep(0)  # an embedding server could be asked here
        keys = [
            (example.id, completion.rpartition("</think>")[2].strip())
            for completion, example in zip(completions, examples, strict=True)
        ]
        counts = Counter(keys)
        return [1 / counts[key] for key in keys]
