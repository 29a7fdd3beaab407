"""A rollout server's command line."""

import json

import pytest

from rl.config import PoolConfig
from rl.rollout.server import command


@pytest.mark.parametrize(
    ("any_resolution", "width", "height"), [(True, 168, 168), (False, 1792, 1344), (None, 1792, 1344)]
)
def test_vllm_measures_its_memory_with_the_largest_image_of_the_core(tmp_path, any_resolution, width, height):
    """A square of the longest side at any resolution, else 4 by 3 tiles of 448; a bare folder counts as the latter."""
    from core.tiny import TinySize, build_tiny

    if any_resolution is not None:
        build_tiny(
            tmp_path, words=["A"], seed=0, size=TinySize(any_resolution=any_resolution, max_image_px=168)
        )
    words = command(PoolConfig(max_model_tokens=64, max_images=2), tmp_path, 1234)
    limit = json.loads(words[words.index("--limit-mm-per-prompt") + 1])
    assert limit == {"image": {"count": 2, "width": width, "height": height}}
