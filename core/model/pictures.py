"""The rule that turns an encoded picture into eight bits of red, green and blue.

Processor, learner, rollout servers, the vLLM plug-in, evaluation, judges and reports all read pictures through it.

The rule:

1. A file is read in one of FORMATS. Other formats are refused: EPS, for one, would start Ghostscript.
2. A file of more than MAX_PIXELS is refused before it is decoded.
3. An animation shows its first frame. `Picture.animated` tells that there were more.
4. The orientation in the file's EXIF or XMP data is applied. Unreadable EXIF data is ignored.
5. Transparent pixels are blended over white.
6. More than eight bits are scaled to eight. The scale is the smallest of 8, 10, 12, 14, 16, ... bits that holds the
   largest value: a 12-bit scan in a 16-bit file is not black. Floats of at most 1 are scaled by 1.
7. CMYK, YCbCr, LAB, HSV, palettes, greys and bitmaps are converted by Pillow. Colour profiles are not applied.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are read; MPO files, which phones write, are read as JPEG."""
MAX_PIXELS = 89_478_485
"""Width times height of the largest picture; Pillow's own limit (`Image.MAX_IMAGE_PIXELS`), 256 MiB of RGB."""
_ORIENTATION = 0x0112
"""The EXIF tag (JEITA CP-3451, 4.6.4 A)."""
_PNG_METADATA = re.compile(rb"exif|xmp", re.IGNORECASE)


class Picture:
    """One encoded picture. It decodes when it is used and keeps no pixels.

    Args:
        source: the file's bytes, or a function that reads them (from a memory-mapped table, for example).
    """

    __slots__ = ("_read", "_size", "animated")

    def __init__(self, source: bytes | Callable[[], bytes]) -> None:
        self._read = source if callable(source) else lambda: source
        self._size: tuple[int, int] | None = None
        self.animated: bool | None = None
        """Whether the file has more than one frame; None until the picture was decoded."""

    @classmethod
    def of(cls, image: Any) -> Picture:
        """A `Picture` from a `Picture`, a file's bytes, or a PIL image (stored as a PNG of what the model sees).

        Raises TypeError for anything else.
        """
        if isinstance(image, Picture):
            return image
        if isinstance(image, bytes):
            return cls(image)
        if not hasattr(image, "getexif"):
            raise TypeError(f"expected the bytes of an encoded picture, got {image!r:.80}")
        buffer = io.BytesIO()
        as_rgb(image).save(buffer, format="PNG")
        return cls(buffer.getvalue())

    @property
    def data(self) -> bytes:
        """The bytes of the encoded file."""
        return self._read()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as the model sees the picture, read from the file's header."""
        if self._size is None:
            data = self.data
            image = _opened(data)
            # Pillow returns a TIFF's size with the orientation applied. It looks for a PNG's EXIF data after the
            # pixels and decodes them to get there, so this is skipped for a PNG without EXIF data.
            known = image.format == "TIFF" or (image.format == "PNG" and not _PNG_METADATA.search(data))
            turned = not known and _orientation(image) in (5, 6, 7, 8)
            self._size = (image.height, image.width) if turned else image.size
        return self._size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def rgb(self) -> Image:
        """The decoded picture in mode RGB. Raises ValueError if the rule refuses it, OSError if the file is broken."""
        data = self.data
        image = _opened(data)
        # The second view of a phone's MPO file is a thumbnail or a depth map, not a frame.
        self.animated = getattr(image, "is_animated", False) and image.format != "MPO"
        deep = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile)
        seen = _turned(_sixteen_bits(data), _orientation(image)) if deep else as_rgb(image)
        self._size = seen.size
        return seen

    def grey(self, at_least: int) -> Image:
        """The picture in mode L, with sides of at least `at_least` pixels if it has them, for hashes and thumbnails.

        A JPEG is decoded at a reduced scale, which takes half the time. Raises as `rgb`.
        """
        image = _opened(self.data)
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return self.rgb().convert("L")
        self.animated = False
        image.draft("L", (at_least, at_least))
        return _turned(image.convert("L"), _orientation(image))

    def __reduce__(self) -> tuple[Any, ...]:
        return Picture, (self.data,)

    def __deepcopy__(self, memo: Any) -> Picture:
        return self


def as_rgb(image: Image | Picture) -> Image:
    """A `Picture` or a PIL image in mode RGB by the rule. An image that is RGB already is returned unchanged.

    Raises ValueError for an image without pixels, and for values that cannot be scaled (negative, not finite).
    """
    if isinstance(image, Picture):
        return image.rgb()
    if not (image.width and image.height):
        raise ValueError(f"the image has {image.width}x{image.height} pixels: it shows nothing; remove it")
    image.load()  # Pillow applies a TIFF's orientation while it loads it, and removes the tag
    turn = _orientation(image)  # conversions drop it
    if image.mode == "F" or image.mode.startswith("I"):
        import numpy as np
        from PIL.Image import fromarray

        return _turned(fromarray(_eight_bits(np.asarray(image))).convert("RGB"), turn)
    if image.has_transparency_data:
        return _turned(_over_white(image), turn)
    return _turned(image if image.mode == "RGB" else image.convert("RGB"), turn)


def as_bytes(image: Any) -> Any:
    """A PIL image in mode RGB by the rule; an array unchanged.

    Raises ValueError as `as_rgb`, and for arrays of another type than uint8.
    """
    if isinstance(image, Picture) or hasattr(image, "getextrema"):
        return as_rgb(image)
    if str(getattr(image, "dtype", "")).removeprefix("torch.") != "uint8":
        raise ValueError(
            f"an image of type {type(image).__name__} and dtype {getattr(image, 'dtype', None)}: give a PIL "
            "image, or an array of bytes (uint8) with three channels"
        )
    return image


def named(source: str) -> Picture:
    """The picture of a file's path, a data URL or base64 text. Raises ValueError for an address on the network."""
    if re.match(r"[a-z][a-z0-9+.-]+://", source):
        raise ValueError(
            f"{source[:80]!r}: no picture is fetched from an address; download it and give its path"
        )
    if not source.startswith("data:") and os.path.isfile(source):
        return Picture(Path(source).read_bytes())
    try:
        return Picture(base64.b64decode(source.partition("base64,")[2] or source, validate=True))
    except ValueError:
        raise ValueError(f"{source[:80]!r}: neither a file nor a picture in base64") from None


def decoded(images: Any) -> Any:
    """The images of any nesting of lists: each `Picture`, path and data URL decoded, everything else as it is."""
    if isinstance(images, list | tuple):
        return [decoded(image) for image in images]
    if isinstance(images, str):
        images = named(images)
    return images.rgb() if isinstance(images, Picture) else images


def _opened(data: bytes) -> Any:
    """The PIL image of a file, its pixels not yet read."""
    from PIL import Image

    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"the file is broken, or its format is not one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"at most {MAX_PIXELS} pixels are decoded; scale it down ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        raise ValueError(f"the image has {size} pixels, at most {MAX_PIXELS} are decoded; scale it down")
    return image


def _orientation(image: Any) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises many types for broken EXIF data
        return 1


def _turned(image: Any, orientation: int) -> Any:
    """The image rotated and mirrored by its orientation (EXIF, 1 to 8)."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    if orientation not in turns:
        return image
    turned = image.transpose(turns[orientation])
    turned.info = {}  # or the orientation would be applied again
    return turned


def _over_white(image: Any) -> Any:
    """The image in mode RGB, blended over white as vLLM does it, so that a stock server shows the same pixels."""
    from PIL import Image

    plain = {"La": "LA", "RGBa": "RGBA"}.get(
        image.mode
    )  # premultiplied modes; Pillow converts them only to these
    image = (image.convert(plain) if plain else image).convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of any depth as uint8, of the same shape."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high < float("inf")):  # NaN is neither
        raise ValueError(
            f"the image has values from {low:g} to {high:g}: they must be finite and not negative; scale "
            "them to 0..255 and save the image with eight bits per channel"
        )
    if values.dtype.kind == "f" and high <= 1:
        full = 1.0
    else:
        bits = max(8, int(high).bit_length())
        full = float(2 ** (bits + bits % 2) - 1)
    return np.rint(values * (255 / full)).clip(0, 255).astype(np.uint8)


def _sixteen_bits(data: bytes) -> Any:
    """A file with several channels of 16 bits, in mode RGB; Pillow would truncate the channels to eight bits."""
    import cv2
    import numpy as np
    from PIL import Image

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("the file has 16 bits per channel and does not decode")
    colours = _eight_bits(values[..., 2::-1])  # BGR
    if values.shape[-1] == 3:
        return Image.fromarray(colours)
    return _over_white(Image.fromarray(np.dstack([colours, _eight_bits(values[..., 3:])])))
