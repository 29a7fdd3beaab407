"""Sampling of whole sets: balanced chain lengths, and uniform latent classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from core.strict import Name
from corpus.curation.base import Decision, Dropped, Parts, SetOperator, Signs, Tools
from corpus.schema import Record

if TYPE_CHECKING:
    import numpy as np

_TOKEN = re.compile(r"\w+|[^\w\s]")
_FIT_ROWS, _FIT_ROWS_PER_CLASS = 20_000, 64
"""The clusters are fitted on the larger of these numbers of embeddings; all rows are assigned to them."""


def caps(counts: Sequence[int], wanted: int) -> list[int]:
    """How many rows to take of each class so that `wanted` are taken in all, as evenly as the classes allow.

    >>> caps([100, 10, 50], 60)
    [25, 10, 25]
    """
    taken = [0] * len(counts)
    left = min(wanted, sum(counts))
    for done, place in enumerate(sorted(range(len(counts)), key=lambda place: counts[place])):
        taken[place] = min(counts[place], left // (len(counts) - done))
        left -= taken[place]
    return taken


def evenly(labels: np.ndarray, wanted: int, seed: int, reason: str) -> list[Dropped | None]:
    """Drops that leave `wanted` rows, drawn by the seed, spread evenly over the labels."""
    import numpy as np

    random = np.random.default_rng(seed)
    names, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    drops: list[Dropped | None] = [None] * len(labels)
    for place, cap in enumerate(caps(counts.tolist(), wanted)):
        members = np.flatnonzero(inverse == place)
        drop = Dropped(reason, f"class {names[place]}")
        for row in random.permutation(members)[cap:].tolist():
            drops[row] = drop
    return drops


class BalanceLengths(SetOperator):
    """Resample rows so that short and long chains are equally frequent, as far as there are enough.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, LongCoT data, step 8: resample by chain length. The report gives no
    bins. Ours are powers of two of the chain's length in words and signs. Rows without a chain pass.
    """

    op: Literal["balance_lengths"]
    keep_share: float = Field(gt=0, le=1)
    """Share of the rows with a chain that is kept."""

    def sign(self, rows: Sequence[Record], tools: Tools) -> Signs:
        import numpy as np

        return {"length": np.array([len(_TOKEN.findall(row.get("chain") or "")) for row in rows], np.int32)}

    def decide(self, parts: Parts, seed: int) -> Decision:
        import numpy as np

        lengths = parts.column("length")
        chained = np.flatnonzero(lengths)
        bins = np.floor(np.log2(np.maximum(lengths[chained], 1))).astype(int)
        drops: list[Dropped | None] = [None] * len(lengths)
        chosen = evenly(bins, round(len(chained) * self.keep_share), seed, "chain length too frequent")
        for row, drop in zip(chained.tolist(), chosen, strict=True):
            drops[row] = drop
        names, counts = np.unique(bins, return_counts=True)
        return Decision(
            drops,
            {
                f"chains of {2**name} to {2 ** (name + 1) - 1} tokens": int(n)
                for name, n in zip(names.tolist(), counts, strict=True)
            },
        )


class LatentClasses(SetOperator):
    """Cluster the rows by their phrases (`describe`) and sample uniformly over the clusters.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, SAIL-Instruction2: a phrase per row, about ten times as many classes
    as there were data-set names, uniform sampling. Differs from the report: the classes come from the phrases'
    embeddings alone; servers do not return the logits that the report also uses.
    """

    op: Literal["latent_classes"]
    keep_share: float = Field(gt=0, le=1)
    """Share of the rows that is kept."""
    classes: int | None = Field(default=None, ge=2)
    """Number of clusters; None: ten times the number of distinct sources (the report), but at most half the rows."""
    embedder: Name | None = None
    """Model of the curation that embeds the phrases; None: hashed word counts (scikit-learn)."""

    def models(self) -> tuple[Name, ...]:
        return (self.embedder,) if self.embedder else ()

    def sign(self, rows: Sequence[Record], tools: Tools) -> Signs:
        import numpy as np
        import xxhash

        texts = [str(row["meta"].get("phrase") or row["question"]) for row in rows]
        embedded = tools.embed(self.embedder, texts) if self.embedder else hashed(texts)
        sources = np.array([xxhash.xxh64_intdigest(row["source"].encode()) for row in rows], np.uint64)
        return {"embedding": embedded.astype(np.float16), "source": sources}

    def decide(self, parts: Parts, seed: int) -> Decision:
        import numpy as np
        from sklearn.cluster import MiniBatchKMeans

        rows, sources = parts.rows(), len(np.unique(parts.column("source")))
        count = min(self.classes or 10 * sources, max(1, rows // 2))
        random, share = np.random.default_rng(seed), max(_FIT_ROWS, _FIT_ROWS_PER_CLASS * count) / rows
        sample = [one["embedding"][random.random(len(one["embedding"])) < share] for one in parts]
        clusters = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096)
        clusters.fit(np.concatenate(sample).astype(np.float32))
        labels = np.concatenate([clusters.predict(one["embedding"].astype(np.float32)) for one in parts])
        drops = evenly(labels, round(rows * self.keep_share), seed, "latent class too frequent")
        sizes = np.sort(np.bincount(labels, minlength=count))
        facts = {
            "sources": sources,
            "classes": count,
            "largest class": int(sizes[-1]),
            "median class": int(sizes[count // 2]),
        }
        return Decision(drops, facts)


def hashed(texts: Sequence[str]) -> np.ndarray:
    """Embeddings by hashed counts of words and word pairs, (texts, 512), unit length. Needs no model."""
    import numpy as np
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(n_features=512, ngram_range=(1, 2), norm="l2")
    return vectorizer.transform(texts).toarray().astype(np.float32)
