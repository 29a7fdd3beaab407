"""Soft overlong punishment, by hand."""

import pytest

from rewards.style.length import SoftOverlong


def test_punishment_of_dapo_equation_13():
    punish = SoftOverlong(max_tokens=20480, cache_tokens=4096)
    # free up to 20480 - 4096 = 16384; then (16384 - n) / 4096; -1 past the end
    assert [punish(n) for n in (1, 16384, 17408, 18432, 20480, 20481)] == [0, 0, -0.25, -0.5, -1, -1]


@pytest.mark.parametrize(("max_tokens", "cache_tokens"), [(10, 0), (10, -1), (10, 11)])
def test_a_slope_longer_than_the_limit_is_refused(max_tokens, cache_tokens):
    with pytest.raises(ValueError, match=f"cache_tokens={cache_tokens} must be above 0"):
        SoftOverlong(max_tokens, cache_tokens)
