"""Duplicates of image-question pairs, exact and near, within a set and with held-out rows.

A row's signature has two parts. One is a 256-bit perceptual hash of each picture and of three frames of each video:
the lowest 16 x 16 coefficients of a discrete cosine transform against their median (imagehash's phash). The other is a
MinHash of the user's words (datasketch: 32 permutations of 4-letter shingles). Rows are compared if they share a band
of the MinHash, a 16-bit band of the first picture's lowest frequencies, the number of pictures and the numbers in the
words. So "12 + 13 = ?" and "12 + 14 = ?" are different questions. A signature takes about 200 bytes for a row with one
picture; only signatures are in memory.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from corpus.curation.base import Decision, Dropped, Parts, SetOperator, Signs, Tools
from corpus.schema import PLACEHOLDER, Record, users_of

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

HASH_SIDE = 16
HASH_BYTES = HASH_SIDE * HASH_SIDE // 8
HASH_PX = 2 * HASH_SIDE
"""Side to which a picture is reduced before it is hashed."""
_PERMUTATIONS, _BAND_ROWS, _SHINGLE = 32, 4, 4
_WINDOW = 64
"""Rows that follow a row in its group, sorted by picture, with which it is compared."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NOT_WORDS = re.compile(r"[\W_]+")


class Similar(SetOperator):
    """The limits of similarity, shared by the operators."""

    max_distance: int = Field(default=24, ge=0, le=64)
    """Most differing bits, of 256, between the hashes of two pictures that count as one."""
    min_jaccard: float = Field(default=0.7, gt=0, le=1)
    """Least estimated share of common shingles of two questions that count as one."""

    def sign(self, rows: Sequence[Record], tools: Tools) -> Signs:
        """text (rows, 32) uint32, exact and numbers (rows,) uint64, count (rows,), pictures (rows, 32) uint8 of the
        first picture, others (rows,) uint64 of the rest."""
        import numpy as np
        import xxhash

        plain = [normalised(" ".join(users_of(row))) for row in rows]
        hashes = [row["hashes"] for row in rows]
        first = [one[0] if one else bytes(HASH_BYTES) for one in hashes]
        return {
            "text": np.stack([_minhash(text) for text in plain]),
            "exact": np.array([xxhash.xxh64_intdigest(text.encode()) for text in plain], np.uint64),
            "numbers": np.array(
                [xxhash.xxh64_intdigest(" ".join(_NUMBER.findall(t)).encode()) for t in plain], np.uint64
            ),
            "count": np.array([len(one) for one in hashes], np.uint8),
            "pictures": np.frombuffer(b"".join(first), np.uint8).reshape(len(rows), HASH_BYTES),
            "others": np.array([xxhash.xxh64_intdigest(b"".join(one[1:])) for one in hashes], np.uint64),
        }

    def pairs(self, parts: Parts) -> np.ndarray:
        """Similar pairs (pairs, 3): the earlier row, the later row, and whether they are equal; each pair once."""
        import numpy as np

        signs = {
            name: parts.column(name) for name in ("text", "exact", "numbers", "count", "pictures", "others")
        }
        found = [pair for key in _keys(signs) for pair in self._in_groups(key, signs)]
        if not found:
            return np.zeros((0, 3), np.int64)
        return np.unique(np.concatenate(found), axis=0)

    def _in_groups(self, key: np.ndarray, signs: Signs) -> Iterator[np.ndarray]:
        """The similar pairs among rows with the same key."""
        import numpy as np

        order = np.lexsort((*signs["pictures"][:, :8].T[::-1], key))
        sorted_key = key[order]
        for shift in range(1, _WINDOW + 1):
            same = np.flatnonzero(sorted_key[shift:] == sorted_key[:-shift])
            if not len(same):
                return
            one, two = order[same], order[same + shift]
            distance = np.bitwise_count(signs["pictures"][one] ^ signs["pictures"][two]).sum(1)
            jaccard = (signs["text"][one] == signs["text"][two]).mean(1)
            alike = (distance <= self.max_distance) & (jaccard >= self.min_jaccard)
            alike &= (signs["others"][one] == signs["others"][two]) & (
                signs["numbers"][one] == signs["numbers"][two]
            )
            equal = (distance == 0) & (signs["exact"][one] == signs["exact"][two])
            one, two, equal = one[alike], two[alike], equal[alike]
            yield np.stack([np.minimum(one, two), np.maximum(one, two), equal], 1).astype(np.int64)


def _keys(signs: Signs) -> Iterator[np.ndarray]:
    """For each band of the text and of the picture, one number per row; similar rows are equal in some of them."""
    import numpy as np

    low = (
        np.unpackbits(signs["pictures"], axis=1).reshape(-1, HASH_SIDE, HASH_SIDE)[:, :8, :8].reshape(-1, 64)
    )
    bands = np.packbits(low, axis=1).view(np.uint16).astype(np.uint64)
    base = _mixed(signs["numbers"], signs["count"].astype(np.uint64))
    for start in range(0, _PERMUTATIONS, _BAND_ROWS):
        words = base
        for place in range(start, start + _BAND_ROWS):
            words = _mixed(words, signs["text"][:, place].astype(np.uint64))
        for band in range(bands.shape[1]):
            yield _mixed(words, bands[:, band])


def _mixed(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """A hash of two columns of uint64 (the constants of splitmix64)."""
    import numpy as np

    mixed = (one ^ (two + np.uint64(0x9E3779B97F4A7C15) + (one << np.uint64(6)))) * np.uint64(
        0xBF58476D1CE4E5B9
    )
    return mixed ^ (mixed >> np.uint64(31))


class Duplicates(Similar):
    """Keep the first row of each group of equal or nearly equal image-question pairs.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, LongCoT data, steps 3 and 5 (duplicates of image-question pairs).
    The measure of nearness is ours; docs/curation.md has its measured recall and precision.
    """

    op: Literal["duplicates"]

    def decide(self, parts: Parts, seed: int) -> Decision:
        drops: list[Dropped | None] = [None] * parts.rows()
        pairs = self.pairs(parts)
        ids = parts.ids(pairs[:, 0].tolist())
        for first, later, equal in pairs[pairs[:, 1].argsort(kind="stable")].tolist():
            if drops[first] is None and drops[later] is None:
                drops[later] = Dropped("duplicate" if equal else "near duplicate", f"of {ids[first]}")
        return Decision(drops)


class Decontaminate(Similar):
    """Drop rows whose image-question pair is equal or nearly equal to a held-out row: the curation's `held_out` sets,
    among them the benchmarks that are evaluated.

    Source: ours; the report does not describe decontamination. The hashes are those of `duplicates`.
    """

    op: Literal["decontaminate"]

    def reads_held_out(self) -> bool:
        return True

    def decide(self, parts: Parts, seed: int) -> Decision:
        total, mine = parts.rows(), parts.own
        drops: list[Dropped | None] = [None] * mine
        pairs = self.pairs(parts)
        ids = parts.ids(pairs[:, 1].tolist())
        for first, later, equal in pairs.tolist():
            if first < mine <= later:
                words = "equal to a held-out row" if equal else "nearly equal to a held-out row"
                if drops[first] is None or equal:
                    drops[first] = Dropped(words, ids[later])
        return Decision(drops, {"held-out rows": total - mine})


def normalised(question: str) -> str:
    """The question in lower case, with single spaces in place of everything but letters and digits."""
    text = unicodedata.normalize("NFKC", PLACEHOLDER.sub(" ", question)).casefold()
    return _NOT_WORDS.sub(" ", re.sub(r"(?<=\d)\.(?=\d)", "·", text)).strip()


def _minhash(text: str) -> np.ndarray:
    import numpy as np

    signature = _blank().copy()
    padded = f" {text} "
    signature.update_batch(
        {padded[at : at + _SHINGLE].encode() for at in range(len(padded) - _SHINGLE + 1)} or {b" "}
    )
    return signature.hashvalues.astype(np.uint32)


def _hash(data: bytes) -> int:
    import xxhash

    return xxhash.xxh32_intdigest(data)


@cache
def _blank() -> Any:
    """An empty MinHash; its copies share the permutations."""
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, hashfunc=_hash, seed=1)


def reduced(image: Image) -> np.ndarray:
    """A PIL image in mode L as the pixels that are hashed, (32, 32) uint8."""
    import numpy as np
    from PIL.Image import Resampling

    return np.asarray(image.resize((HASH_PX, HASH_PX), Resampling.LANCZOS))


def picture_hashes(pixels: Sequence[np.ndarray]) -> list[bytes]:
    """The perceptual hashes of reduced pictures, 32 bytes each.

    They are those of imagehash.phash(hash_size=16, highfreq_factor=2), which takes one picture at a time: in a batch,
    a hash needs a quarter of the time.
    """
    import numpy as np
    from scipy.fft import dct

    if not pixels:
        return []
    waves = dct(dct(np.stack(pixels), axis=1), axis=2)[:, :HASH_SIDE, :HASH_SIDE].reshape(len(pixels), -1)
    bits = np.packbits(waves > np.median(waves, axis=1, keepdims=True), axis=1)
    return [one.tobytes() for one in bits]
