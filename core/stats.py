"""Statistics the evaluation and the report share."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Low and high end of the 95% Wilson score interval of a proportion, both in [0, 1].

    Unlike the normal interval it stays inside [0, 1] and has a width above 0 at 0 and n successes. With n = 0 it is
    (0, 1). Source: E. B. Wilson, JASA 22 (1927). Raises ValueError unless 0 <= successes <= n.
    """
    if successes == n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest  # importing it takes 0.9 s, and many processes never score anything

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
