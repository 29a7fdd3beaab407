"""Penalty for length. It is not a verdict: it may be negative, and it is added to the weighted reward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to max_tokens - cache_tokens tokens, then a linear fall to -1 at max_tokens; -1 beyond.

    Source: DAPO (arXiv:2503.14476) Eq. 13, soft overlong punishment; the paper uses max 20,480 and cache 4,096 tokens.

    >>> punish = SoftOverlong(max_tokens=100, cache_tokens=20)
    >>> punish(80), punish(90), punish(100), punish(400)
    (0.0, -0.5, -1.0, -1.0)

    Raises ValueError unless 0 < cache_tokens <= max_tokens.
    """

    max_tokens: int
    """Length, in tokens, at which the penalty is -1."""
    cache_tokens: int
    """Length, in tokens, of the slope before it."""

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} must be above 0 and at most max_tokens={self.max_tokens}"
            )

    def __call__(self, completion_tokens: int) -> float:
        over = completion_tokens - (self.max_tokens - self.cache_tokens)
        return -min(max(over / self.cache_tokens, 0.0), 1.0) or 0.0  # "or": -0.0 reads badly in a table
