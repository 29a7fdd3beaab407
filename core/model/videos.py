"""The rule that turns an encoded video into pictures: which frames the model sees, and how.

1. A video is a file in one of CONTAINERS, or a folder of frames: a zip of pictures without compression, in order.
   Other containers are refused: playlists, for one, name further files and addresses.
2. Frames are sampled at the middle of equal parts of the video: at most `frames`, and at most `fps` per second.
3. The rotation in a file is applied. PyAV (FFmpeg) decodes and converts to RGB.
4. The model sees a frame as one tile, a square of the tile's side, whatever the frame's shape. Source: the authors'
   VLMEvalKit wrapper (vlmeval/vlm/sail_vl.py), which allows one tile per frame of a video.

The wrapper gets its frames from VLMEvalKit's data sets, each with a sampling of its own; the middles of equal parts are
InternVL's rule.
"""

from __future__ import annotations

import io
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from core.model.pictures import MAX_PIXELS, Picture, as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpeg", "mpegts", "flv", "asf", "ogg", "gif")
"""FFmpeg's names of the formats that are read."""
_ZIP = b"PK\x03\x04"
_WHOLE = 0.9
"""Least share of the frames that a file announces; below it the file counts as truncated."""


class Caps(NamedTuple):
    """The most frames that are sampled from a video."""

    frames: int = 16
    """Per video. Source: the report evaluates with 16 frames."""
    fps: float | None = None
    """Per second of the video; None: no limit. It does not apply to a folder of frames, which has no time."""


class Clip:
    """One encoded video. Its frames decode when they are used; no pixels are kept.

    Args:
        source: the file's bytes, or a function that reads them (from a memory-mapped table, for example).
        caps: the most frames.
    """

    __slots__ = ("_frames", "_read", "caps")

    def __init__(self, source: bytes | Callable[[], bytes], caps: Caps = Caps()) -> None:  # noqa: B008
        self._read = source if callable(source) else lambda: source
        self.caps = caps
        self._frames: tuple[Frame, ...] | None = None

    @classmethod
    def of_frames(cls, pictures: Sequence[Picture], caps: Caps = Caps()) -> Clip:  # noqa: B008
        """The clip of these frames, in order. Raises ValueError without frames."""
        if not pictures:
            raise ValueError("there are no frames")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for number, picture in enumerate(pictures):
                archive.writestr(zipfile.ZipInfo(f"{number:06d}"), picture.data)
        return cls(buffer.getvalue(), caps)

    @property
    def data(self) -> bytes:
        """The bytes of the encoded file."""
        return self._read()

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The sampled frames. Counting them reads the file, but decodes nothing. Raises ValueError as `decode`."""
        if self._frames is None:
            with _opened(self.data) as reader:
                count = len(sampled(reader.count, reader.seconds, self.caps))
            self._frames = tuple(Frame(self, number) for number in range(count))
        return self._frames

    def decode(self) -> list[Image]:
        """The sampled frames in mode RGB.

        Raises ValueError for a file that is broken, truncated, without a video stream, or in another format.
        """
        with _opened(self.data) as reader:
            return list(reader.pictures(sampled(reader.count, reader.seconds, self.caps)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Clip, (self.data, self.caps)

    def __deepcopy__(self, memo: Any) -> Clip:
        return self


class Frame(Picture):
    """A sampled frame of a clip as a picture. Used alone it decodes all frames: see `tiles` and `Decoded`."""

    __slots__ = ("clip", "number")

    def __init__(self, clip: Clip, number: int) -> None:
        super().__init__(self._encoded)
        self.clip, self.number, self.animated = clip, number, False

    def _encoded(self) -> bytes:
        return Picture.of(self.rgb()).data

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        if self._size is None:
            self._size = self.rgb().size
        return self._size

    def rgb(self) -> Image:
        return self.clip.decode()[self.number]

    def __reduce__(self) -> tuple[Any, ...]:
        return Frame, (self.clip, self.number)


class Decoded(Sequence[Any]):
    """Pictures and frames as PIL images in mode RGB, decoded at access; iteration decodes each clip once."""

    def __init__(self, pictures: Sequence[Any]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Any]:
        clips = _Clips()
        return (clips.frame(one) if isinstance(one, Frame) else as_rgb(one) for one in self.pictures)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Decoded(self.pictures[index])
        return as_rgb(self.pictures[index])


def tiles(images: Sequence[Any], side: int) -> list[Any]:
    """The images, with each `Frame` as a PIL image of `side` by `side` pixels: one tile of a core with such tiles."""
    from PIL.Image import Resampling

    clips = _Clips()
    return [
        clips.frame(one).resize((side, side), Resampling.BICUBIC) if isinstance(one, Frame) else one
        for one in images
    ]


class _Clips:
    """Frames of clips that come one after the other: the latest clip is decoded once."""

    def __init__(self) -> None:
        self._clip: Clip | None = None
        self._images: list[Image] = []

    def frame(self, frame: Frame) -> Image:
        if self._clip is not frame.clip:
            self._clip, self._images = frame.clip, frame.clip.decode()
        return self._images[frame.number]


def sampled(count: int, seconds: float | None, caps: Caps) -> list[int]:
    """The numbers of the sampled frames of a video of `count` frames: the middles of equal parts.

    >>> sampled(100, 4.0, Caps(frames=4)), sampled(100, 4.0, Caps(fps=0.5)), sampled(2, None, Caps(fps=1.0))
    ([12, 37, 62, 87], [25, 75], [0, 1])
    """
    most = min(count, caps.frames)
    if caps.fps is not None and seconds is not None:
        most = min(most, max(1, int(seconds * caps.fps)))
    return [(2 * part + 1) * count // (2 * most) for part in range(most)]


class _Folder:
    """Frames stored as pictures."""

    seconds = None

    def __init__(self, data: bytes) -> None:
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        self._members = self._archive.infolist()
        self.count = len(self._members)
        if any(member.compress_type != zipfile.ZIP_STORED for member in self._members):
            raise ValueError("a zip of frames stores them without compression")

    def pictures(self, numbers: Sequence[int]) -> Iterator[Image]:
        for number in numbers:
            yield Picture(self._archive.read(self._members[number])).rgb()


class _Film:
    """Frames of a file that FFmpeg reads, found by their time stamps."""

    def __init__(self, container: Any) -> None:
        from av.stream import Disposition

        self._container = container
        streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if not streams:
            raise ValueError("it has no video stream")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            raise ValueError(
                f"its frames have {context.width}x{context.height} pixels, at most {MAX_PIXELS} are decoded"
            )
        context.thread_count = 1  # callers decode several videos at a time
        packets = [packet for packet in container.demux(self._stream) if packet.size]
        self.count = len(packets)
        if not packets or any(one.is_corrupt for one in packets) or self.count < self._stream.frames * _WHOLE:
            raise ValueError(f"it is truncated: {self.count} of {self._stream.frames} frames")
        stamps = [packet.pts for packet in packets]
        self._times = sorted(stamps) if None not in stamps else []
        self._keys = sorted(packet.pts for packet in packets if packet.is_keyframe) if self._times else []

    @property
    def seconds(self) -> float | None:
        """Length of the video; None if the file does not tell."""
        if len(self._times) > 1:
            span = (self._times[-1] - self._times[0]) * self._stream.time_base
            return float(span * self.count / (self.count - 1))
        rate = self._stream.average_rate
        return float(self.count / rate) if rate else None

    def pictures(self, numbers: Sequence[int]) -> Iterator[Image]:
        frames = (
            self._sought(numbers) if self._keys and self._keys[0] == self._times[0] else self._read(numbers)
        )
        for frame in frames:
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image

    def _sought(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The frames, each read from the last key frame before it unless the decoder is past that already."""
        at: int | None = None
        decoder: Iterator[Any] = iter(())
        for target in (self._times[number] for number in numbers):
            key = self._keys[bisect_right(self._keys, target) - 1]
            if at is None or key > at:
                self._container.seek(key, stream=self._stream)
                decoder = self._container.decode(self._stream)
            found = next((frame for frame in decoder if frame.pts is not None and frame.pts >= target), None)
            if found is None:
                raise ValueError("it ends before its last frame")
            at = found.pts
            yield found

    def _read(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The frames of a file without time stamps, read from its start."""
        wanted = set(numbers)
        self._container.seek(0)
        found = [f for number, f in enumerate(self._container.decode(self._stream)) if number in wanted]
        if len(found) < len(wanted):
            raise ValueError("it ends before its last frame")
        return iter(found)


@contextmanager
def _opened(data: bytes) -> Iterator[_Folder | _Film]:
    """The frames of a file. Raises ValueError if it is broken or in another format."""
    import av

    if not data:
        raise ValueError("the file is empty")
    try:
        if data.startswith(_ZIP):
            yield _Folder(data)
        else:
            allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": ""}
            with av.open(io.BytesIO(data), options=allowed) as container:
                yield _Film(container)
    except (av.error.FFmpegError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        known = ", ".join(CONTAINERS)
        raise ValueError(f"it does not decode, or its format is not one of {known} ({error})") from None
