"""Statistics the evaluation and the report share."""

from math import sqrt

Z_95 = 1.959963984540054
"""The standard normal's 97.5% quantile: two-sided 95% intervals."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Low and high end of the 95% Wilson score interval of a proportion, both in [0, 1].

    Unlike the normal interval it stays inside [0, 1] and is honest at 0 and n successes. With n = 0 nothing
    is known: (0, 1). Source: E. B. Wilson, JASA 22 (1927). Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson(successes={successes}, n={n}): successes must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n successes the exact ends are 0 and 1; rounding would leave 1e-17.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high
