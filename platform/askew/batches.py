"""Training batches: which query meets which item at which step, and their tensors.

An epoch asks every training query, once or as often as it is repeated, with one of its positives. What step s of
a run holds depends on the seed and s alone: not on the number of workers, nor on where the run was interrupted.
Knows nothing of towers or clusters.
Shapes: P examples of a batch, B pairs, M items, L tokens, S image side.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from askew.config import Settings
from askew.inputs import PADDING
from askew.shuffle import permuted, uniform

Rows = NDArray[np.int64]
POSITIVE, NEGATIVE, VARIANT, DROPPED, ORDER, FLIPPED, ZOOM, DOWN, RIGHT, WORD, ASKED = range(
    11
)  # what chance is for


class BatchSettings(Settings):
    """What a step shows, beside its pairs."""

    queries_per_item: int = Field(default=1, ge=1)  # more: its pair's query, and others that it is right for
    negatives: float = Field(default=0.0, ge=0, le=1)  # share of the pairs that bring a prepared negative along
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of the photos that are hidden
    augment: float = Field(
        default=0.0, ge=0, le=0.5
    )  # photos: mirrored at random, moved and zoomed by at most this
    word_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of the titles' tokens that are left out


class Examples(NamedTuple):
    """B pairs of P examples, the examples' own first; their P positives, then the negatives if there are any."""

    queries: Rows  # (B,)
    brings: NDArray[np.bool_]  # (B,), the pairs that bring a negative
    weights: NDArray[np.float32]  # (B,), grade of each pair, relative to the highest
    items: Rows  # (M,)
    numbers: Rows  # (M,), the example that each item is of
    variants: Rows  # (M,), which text of each item is read
    hidden: NDArray[np.bool_]  # (M,), whose photo is not shown

    def targets(self) -> Rows:
        """The place of each pair's positive among the items, (B,): the first P again for each further query."""
        num = len(self.items) - int(self.brings.sum())
        return np.arange(len(self.queries)) % num


class Batch(NamedTuple):
    """The tensors of B queries and M items."""

    queries_BL: NDArray[np.int32]
    titles_ML: NDArray[np.int32]
    pixels_MSS3: NDArray[np.uint8]
    has_image_M: NDArray[np.bool_]


class Triplets:
    """A training split that was laid out, for random access."""

    def __init__(self, layout: Path) -> None:
        self._arrays = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in layout.glob("*.npy")}
        self.num_queries, self.epoch = len(self._arrays["queries"]), len(self._arrays["asked"])
        self.num_variants, self.num_items = self._arrays["titles"].shape[:2]
        self.num_pairs = len(self._arrays["positives"])
        self.has_validation = "valid_qrels" in self._arrays

    def examples(self, seed: int, start: int, stop: int, settings: BatchSettings) -> Examples:
        """Choose the run's examples `start` to `stop`; a pair without a negative brings any item in its stead.

        An item's photo costs far more than a query does: `queries_per_item` shows more pairs for nearly the same.
        """
        a, number = self._arrays, np.arange(start, stop)
        queries = np.empty_like(number)
        epochs = number // self.epoch
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places = number[here] - epoch * self.epoch
            queries[here] = a["asked"][permuted(places, self.epoch, _key(seed, ORDER, int(epoch)))]
        draw = {what: uniform(number, _key(seed, what)) for what in (POSITIVE, NEGATIVE, VARIANT, DROPPED)}
        first, last = a["first_positives"][queries], a["first_positives"][queries + 1]
        pairs = first + (draw[POSITIVE] * (last - first)).astype(np.int64)
        share = settings.negatives
        brings = np.floor((number + 1) * share) > np.floor(number * share)  # evenly, whoever has which examples
        negatives = self._negatives(pairs[brings], draw[NEGATIVE][brings])
        variants = (draw[VARIANT] * self.num_variants).astype(np.int64)
        hidden = draw[DROPPED] < settings.modality_dropout
        positives, more = a["positives"][pairs], settings.queries_per_item - 1
        others = self._others(positives, uniform(number, _key(seed, ASKED)), more)
        return Examples(
            np.concatenate([queries, np.searchsorted(a["first_positives"], others, "right") - 1]),
            np.concatenate([brings, np.zeros(len(others), np.bool_)]),
            a["grades"][np.concatenate([pairs, others])],
            np.concatenate([positives, negatives]),
            np.concatenate([number, number[brings]]),
            np.concatenate([variants, variants[brings]]),
            np.concatenate([hidden, hidden[brings]]),
        )

    def _others(self, positives: Rows, draw: NDArray[np.float64], count: int) -> Rows:
        """Choose so many pairs of each of P positives, one after the other from any of them on: (count · P,)."""
        first, last = self._arrays["first_pairs"][positives], self._arrays["first_pairs"][positives + 1]
        turn = (draw * (last - first)).astype(np.int64) + np.arange(count)[:, None]
        pairs: Rows = self._arrays["pairs"][first + turn % (last - first)]
        return pairs.ravel()

    def _negatives(self, pairs: Rows, draw: NDArray[np.float64]) -> Rows:
        first, last = self._arrays["first_negatives"][pairs], self._arrays["first_negatives"][pairs + 1]
        at = first + (draw * (last - first)).astype(np.int64)
        anything: Rows = (draw * self.num_items).astype(np.int64)
        table = self._arrays["negatives"]
        if len(table):
            anything = np.where(last > first, table[np.minimum(at, len(table) - 1)], anything)
        return np.asarray(anything)

    def batch(self, examples: Examples, settings: BatchSettings, seed: int = 0) -> Batch:
        """Gather the tensors of examples; chance falls alike wherever and whenever an example is made."""
        a, items = self._arrays, examples.items
        titles, pixels = a["titles"][examples.variants, items], a["pixels"][items]
        if settings.word_dropout:
            titles = _thinned(titles, examples.numbers, settings.word_dropout, seed)
        if settings.augment:
            pixels = _moved(pixels, examples.numbers, settings.augment, seed)
        return Batch(_trimmed(a["queries"][examples.queries]), _trimmed(titles), pixels, self.has_image(examples))

    def has_image(self, examples: Examples) -> NDArray[np.bool_]:
        """Tell which items of the batch show a photo, (M,)."""
        shown: NDArray[np.bool_] = self._arrays["has_image"][examples.items] & ~examples.hidden
        return shown

    def known(self, queries: Rows, items: Rows) -> NDArray[np.bool_]:
        """Tell for each of B queries and N items whether the item is a known positive: (B, N).

        Walks the queries' positives, not all pairs: a batch of 8,192 would have 67 million.
        """
        out = np.zeros((len(queries), len(items)), dtype=np.bool_)
        order = np.argsort(items, kind="stable")
        ordered = items[order]
        first, last = (self._arrays["first_positives"][queries + step] for step in (0, 1))
        row, at = _ranges(first, last)
        positives = self._arrays["positives"][at]
        left, right = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
        pair, place = _ranges(left, right)
        out[row[pair], order[place]] = True
        return out

    def log_q(self, items: Rows) -> NDArray[np.float32]:
        """The logarithm of each item's chance to be the positive of an example."""
        chances: NDArray[np.float32] = self._arrays["log_q"][items]
        return chances

    def validation_queries(self) -> NDArray[np.int32]:
        """Tokens of the queries that are ranked while training, (q, L)."""
        return np.asarray(self._arrays["valid_queries"])

    def validation_items(self, start: int, stop: int, variant: int = 0) -> Batch:
        """Tensors of some of the items that they are ranked over, without queries."""
        a, here = self._arrays, slice(start, stop)
        titles, pixels = a["valid_titles"][variant, here], a["valid_pixels"][here]
        return Batch(np.empty((0, 1), np.int32), _trimmed(titles), pixels, a["valid_has_image"][here])

    def validation_qrels(self) -> NDArray[np.int64]:
        """Their judgments: rows of (query, item, grade)."""
        return np.asarray(self._arrays["valid_qrels"])

    @property
    def num_validation_items(self) -> int:
        """How many items validation ranks over."""
        return len(self._arrays["valid_pixels"])


def _thinned(titles_ML: NDArray[np.int32], numbers: Rows, share: float, seed: int) -> NDArray[np.int32]:
    """Leave out a share of each title's tokens, but the first; what is left moves up."""
    length = titles_ML.shape[1]
    drawn = uniform(numbers[:, None] * length + np.arange(length), _key(seed, WORD))
    drawn[:, 0] = 1.0
    kept = np.where(drawn >= share, titles_ML, PADDING)
    order = np.argsort(kept == PADDING, axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)


def _moved(pixels_MSS3: NDArray[np.uint8], numbers: Rows, most: float, seed: int) -> NDArray[np.uint8]:
    """Mirror half of the photos, and zoom and move each by at most so much of its side; edges are carried on."""
    side = pixels_MSS3.shape[1]
    zoom, down, right = (most * (2 * uniform(numbers, _key(seed, what)) - 1) for what in (ZOOM, DOWN, RIGHT))
    places = (np.arange(side) - (side - 1) / 2)[None, :] * (1 + zoom)[:, None] + (side - 1) / 2
    rows, columns = (
        np.clip(np.rint(places + side * by[:, None]), 0, side - 1).astype(np.intp) for by in (down, right)
    )
    mirrored = uniform(numbers, _key(seed, FLIPPED)) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    photo = np.arange(len(pixels_MSS3))[:, None, None]
    return np.asarray(pixels_MSS3[photo, rows[:, :, None], columns[:, None, :]])


def _ranges(first: Rows, last: Rows) -> tuple[Rows, Rows]:
    """List all numbers from first[i] to last[i]: for each its i, and the number itself."""
    count = last - first
    row = np.repeat(np.arange(len(count)), count)
    ends = np.cumsum(count)
    return row, np.arange(len(row)) - np.repeat(ends - count, count) + np.repeat(first, count)


def _key(seed: int, what: int, epoch: int = 0) -> int:
    return (epoch * 1_000_003 + seed) * 16 + what


def _trimmed(tokens_NL: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cut columns that are padding in every row, so that a short batch costs little."""
    longest = max(1, int((tokens_NL != PADDING).sum(1).max(initial=1)))
    return np.ascontiguousarray(tokens_NL[:, :longest])
