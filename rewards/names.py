"""Suggestions for an unknown name."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X? Known: ...`, or only the known words if none is similar.

    >>> nearest("anser", ["answer", "format"])
    'did you mean answer? Known: answer, format'
    """
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known: {', '.join(words) or 'none'}"
