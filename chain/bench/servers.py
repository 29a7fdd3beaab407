"""Tile caps and frames of a suite: what the rollout servers must have room for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chain.bench.suite import Suite
from rl.rollout.config import PoolConfig


def own_tiles(model: Path) -> int | None:
    """The checkpoint's tile cap; None if its core does not cut images into tiles."""
    from core.model.image_tiles import SailVL2ImageProcessor

    saved, _ = SailVL2ImageProcessor.get_image_processor_dict(model)
    return (
        saved.get("max_patches")
        if saved.get("image_processor_type") == SailVL2ImageProcessor.__name__
        else None
    )


def for_suite(servers: PoolConfig, suite: Suite, models: Sequence[Path]) -> PoolConfig:
    """The servers with room for the suite's largest images and its frames of a video.

    vLLM takes a tile cap in a request only if the server trusts its clients, which hold the run's token. It sizes its
    encoder's cache by the default cap, so the default becomes the largest cap of all benchmarks and checkpoints; every
    request names its own. Servers that run already keep their settings.
    """
    benchmarks = suite.benchmarks.values()
    changes: dict[str, Any] = {
        "max_images": max([servers.max_images, *(one.frames or 0 for one in benchmarks)])
    }
    own = [tiles for model in models if (tiles := own_tiles(model)) is not None]
    if servers.engine == "vllm" and own and suite.has_caps:
        caps = json.dumps({"max_patches": max([*own, *(one.tiles or 0 for one in benchmarks)])})
        flags = ("--trust-request-mm-kwargs", "--mm-processor-kwargs", caps)
        changes["extra_args"] = (*servers.extra_args, *flags)
    return servers.model_copy(update=changes)
