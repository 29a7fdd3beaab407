"""Rows as cards of a page: pictures, texts, and what a step changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chain.report.pictures import data_url
from chain.report.render import template
from core.manifest import now, versions
from core.model.videos import Clip

_PICTURES = 4
_SHOWN = ("question", "answer", "chain", "response")
_CHARACTERS = 1500


def card(
    row: Mapping[str, Any], before: Mapping[str, Any] | None = None, reason: str = "", detail: str = ""
) -> dict[str, Any]:
    """One row for the template. A broken picture is left out; its reason says so."""
    changes = [
        (name, _cut(before.get(name)), _cut(row.get(name)))
        for name in (*_SHOWN, "verifier", "meta")
        if before is not None and before.get(name) != row.get(name)
    ]
    changed = {name for name, *_ in changes}
    return {
        **{name: str(row.get(name)) for name in ("id", "mode", "source")},
        "reason": reason,
        "detail": detail,
        "texts": [(name, _cut(row[name])) for name in _SHOWN if row.get(name) and name not in changed],
        "changes": changes,
        "pictures": _pictures(row.get("images") or (), row.get("videos") or ()),
    }


def _pictures(images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, Any]]:
    """Thumbnails of the first pictures, and of the first frame of each video."""
    found = []
    for image in (*images[:_PICTURES], *videos[:_PICTURES]):
        try:
            found.append(data_url((image.frames[0] if isinstance(image, Clip) else image).rgb()))
        except Exception:  # decoders raise errors of any type; a broken file is the reason of the drop
            continue
    return found


def _cut(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}... ({len(text)} characters)"


def rows_page(
    title: str,
    about: str,
    facts: Sequence[str],
    tables: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
) -> str:
    """A page of tables and of parts with cards."""
    return template("curation.html.jinja").render(
        title=title,
        about=about,
        facts=[*facts, now()],
        tables=tables,
        parts=parts,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )
