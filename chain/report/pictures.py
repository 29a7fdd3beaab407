"""Pictures as data URLs for self-contained pages, and the thumbnails of a report."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.model.pictures import Picture

log = logging.getLogger(__name__)

THUMBNAIL_PX = 256
"""Larger images are reduced to this size. Smaller images keep their size, with every pixel visible."""
BYTES = 8 << 20
"""Most Base64 characters of one page's thumbnails."""


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


class Thumbnails:
    """Data URLs of pictures, made once per picture; a served report keeps the object between its looks."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], list[str]] = {}

    def of_rows(self, places: Sequence[str], ids: Collection[str]) -> dict[str, list[str]]:
        """Row id -> data URLs of its pictures. Rows without a readable picture have an empty list.

        Args:
            places: Parquet files or folders of the rows; nothing is found at other places.
            ids: of the rows.
        """
        from chain.tracking.content import PictureIndex

        files = [Path(place) for place in places]
        state = [f"{file} {file.stat().st_mtime_ns if file.exists() else 0}" for file in files]
        new = [row for row in ids if (*state, row) not in self._known]
        self._known |= {(*state, row): [] for row in new}
        try:
            for row, pictures in PictureIndex(places).each(new) if new else ():
                self._known[(*state, row)] = [_url(picture) for picture in pictures]
        except (OSError, ValueError) as error:  # a report must not end the run that it is about
            log.warning("%s: no pictures: %s", ", ".join(places), error)
        return {row: self._known[(*state, row)] for row in ids}

    def of_files(self, folder: Path, names: Sequence[Any]) -> list[str]:
        """Data URLs of picture files. A name that leaves the folder, and a file that does not decode, is left out."""
        return [url for name in names for url in self._of_file(folder, name)]

    def _of_file(self, folder: Path, name: Any) -> Iterator[str]:
        path = (folder / str(name)).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return
        key = (str(path), str(path.stat().st_mtime_ns))
        if key not in self._known:
            try:
                self._known[key] = [_url(Picture(path.read_bytes()).rgb())]
            except Exception:  # Pillow passes on any exception of a decoder
                self._known[key] = []
        yield from self._known[key]


def _url(picture: Any) -> str:
    made = data_url(picture)
    return f"data:image/{made['kind']};base64,{made['data']}"
