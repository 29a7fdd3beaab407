"""Pictures as data URLs for a self-contained page."""

from __future__ import annotations

import base64
import io
from typing import Any

THUMBNAIL_PX = 256
"""Larger images are reduced to this size. Smaller images keep their size, with every pixel visible."""


def data_url(picture: Any) -> dict[str, Any]:
    """A PIL image in mode RGB for a page's template: its kind, its Base64 text and whether it is small."""
    shown = picture.copy()
    small = max(shown.size) <= THUMBNAIL_PX // 2
    shown.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG" if small else "JPEG")
    return {
        "kind": "png" if small else "jpeg",
        "small": small,
        "data": base64.b64encode(buffer.getvalue()).decode(),
    }
