"""compare.html: the figures of a comparison, and the questions whose verdict changed, with both completions.

All text is escaped, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from chain.compare.answers import Answers
from chain.compare.paired import Comparison, Pair
from chain.report.pictures import data_url
from chain.report.render import template
from core.model.pictures import Picture

log = logging.getLogger(__name__)

SHOWN = 200
"""Most changed questions of one comparison on the page."""


def page(comparisons: Sequence[Comparison], base: Answers) -> str:
    """The whole page."""
    return template("compare.html.jinja").render(
        base=base.label,
        comparisons=[
            {
                "other": one.other,
                "tables": {"set": one.sets, **one.groups},
                "measures": one.measures,
                "unpaired": one.unpaired,
                "flipped": len(one.flipped),
                "cards": _cards(one, base),
            }
            for one in comparisons
        ],
    )


def _cards(comparison: Comparison, base: Answers) -> list[dict[str, Any]]:
    shown = sorted(comparison.flipped, key=lambda pair: pair.change)[:SHOWN]
    pictures = _pictures(shown, base)
    return [
        {
            "won": pair.change > 0,
            "key": " · ".join(pair.base.key),
            "question": pair.base.question,
            "gold": pair.base.gold,
            "base": pair.base.completion,
            "other": pair.other.completion,
            "pictures": pictures.get(pair.base.key, ()),
        }
        for pair in shown
    ]


def _pictures(pairs: Sequence[Pair], base: Answers) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Pictures of the questions: kept by the evaluation, or read from the rows of its sets."""
    from chain.tracking.content import PictureIndex

    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, place in base.sets.items():
        ids = [pair.base.key[1] for pair in pairs if pair.base.key[0] == name]
        images = PictureIndex([place]).of(ids) if ids else {}
        found |= {(name, row): [data_url(image) for image in own] for row, own in images.items()}
    for pair in pairs:
        for file in pair.base.pictures:
            if not file.resolve().is_relative_to(base.folder.resolve()) or not file.is_file():
                log.warning("%s: the picture is missing, or lies outside %s", file, base.folder)
                continue
            found.setdefault(pair.base.key, []).append(data_url(Picture(file.read_bytes()).rgb()))
    bare = Counter(
        pair.base.key[0]
        for pair in pairs
        if pair.base.groups["images"] != "0" and not found.get(pair.base.key)
    )
    for name, count in bare.items():
        place = base.sets.get(name, "unknown")
        log.warning(
            "set %s: %d questions are shown without pictures; place of their rows: %s", name, count, place
        )
    return found
