"""One-to-one matching: every wanted thing with a given one of its own."""

from collections.abc import Callable


def matches_all(wanted: int, given: int, fits: Callable[[int, int], bool]) -> bool:
    """Whether the wanted things, by number, fit given ones of their own; augmenting paths, exact.

    >>> matches_all(2, 2, lambda want, give: (want, give) in {(0, 0), (0, 1), (1, 0)})
    True
    >>> matches_all(2, 2, lambda want, give: give == 0)
    False
    """
    taken: dict[int, int] = {}
    known: dict[tuple[int, int], bool] = {}

    def edge(want: int, give: int) -> bool:
        if (want, give) not in known:
            known[want, give] = fits(want, give)
        return known[want, give]

    def place(want: int, tried: set[int]) -> bool:
        # The same place first: an answer in the gold's order costs one comparison an element.
        for give in sorted(range(given), key=lambda other: other != want):
            if give not in tried and edge(want, give):
                tried.add(give)
                if give not in taken or place(taken[give], tried):
                    taken[give] = want
                    return True
        return False

    return wanted <= given and all(place(want, set()) for want in range(wanted))
