"""Rough scores: vectors once more in bfloat16, whose products tell of which few exact scores are wanted.

Nothing is approximated: how far a rough score can be off has a bound, and all vectors that may be among the best
are given. Processors with instructions for bfloat16 multiply it two to three times as fast as floats.
Shapes: B queries, N vectors, D dimensions, G vectors in a group.
"""

import numpy as np
import torch
from numpy.typing import NDArray

GROUP = 64  # vectors of which the best is looked at first
BLOCK = 1 << 19  # scores at a time: they stay in the processor's cache
UNIT = 2.0**-8  # bfloat16 rounds by so much at most, relatively
ROUNDING = 1e-6  # and sums in floats by so much

Bits = NDArray[np.int16]  # of positive bfloat16 numbers, which are in the same order as these


def fast() -> bool:
    """Tell whether this processor multiplies bfloat16 faster than floats."""
    return torch.cpu._is_avx512_bf16_supported()


class Rough:
    """Vectors in bfloat16."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._halves = torch.zeros((-(-len(vectors) // GROUP) * GROUP, vectors.shape[1]), dtype=torch.bfloat16)
        self._error = self._longest = 0.0
        for at in range(0, len(vectors), BLOCK // GROUP):
            some = torch.from_numpy(vectors[at : at + BLOCK // GROUP])
            halves = self._halves[at : at + len(some)].copy_(some)
            self._error = max(self._error, float((some - halves).norm(dim=1).max()))
            self._longest = max(self._longest, float(halves.norm(dim=1).max()))

    def among_best(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Find all vectors that may be among the k best for queries (B, D): pairs of a query's number and a row.

        Pairs are sorted by query. None where it can't be told: a k-th best score that is not positive, or a k that
        is more than an eighth of the groups.
        """
        exact = torch.from_numpy(queries)
        halves = exact.bfloat16()
        product = halves.t().contiguous()
        off = self._error * exact.norm(dim=1) + self._longest * (exact - halves).norm(dim=1)
        off += ROUNDING * self._longest * exact.norm(dim=1)
        size = max(BLOCK // len(queries) // GROUP, 1) * GROUP
        starts = range(0, len(self._halves), size)
        first = -(-2 * k * GROUP // size)  # blocks, with twice as many groups as are wanted
        if first > len(starts) // 4:
            return None
        best = [self._rough(at, size, product).reshape(GROUP, -1, len(queries)).max(0) for at in starts[:first]]
        least = _least(best, k, off.numpy())
        if not least.all():
            return None
        best, rows, numbers, kept = [], [], [], []
        for count, at in enumerate(starts, 1):
            scores = self._rough(at, size, product).reshape(GROUP, -1, len(queries))
            best.append(scores.max(0))
            group, query = np.nonzero(best[-1] >= least)
            inside = scores[:, group, query]
            place, pair = np.nonzero(inside >= least[query])
            rows.append(at + place * scores.shape[1] + group[pair])
            numbers.append(query[pair])
            kept.append(inside[place, pair])
            if count > first and count & (count - 1) == 0:
                least = np.maximum(least, _least(best, k, off.numpy()))
        number = np.concatenate(numbers)
        worth = np.flatnonzero(np.concatenate(kept) >= np.maximum(least, _least(best, k, off.numpy()))[number])
        worth = worth[np.argsort(number[worth], kind="stable")]
        return number[worth], np.concatenate(rows)[worth]

    def _rough(self, at: int, size: int, product: torch.Tensor) -> Bits:
        bits: Bits = torch.mm(self._halves[at : at + size], product).view(torch.int16).numpy()
        return bits


def _least(best: list[Bits], k: int, off: NDArray[np.float32]) -> Bits:
    """Of groups' best scores: what a rough score must be at least to be of the k best (B,), 0 if not positive."""
    every = np.ascontiguousarray(np.concatenate(best).T)
    kth = np.partition(every, every.shape[1] - k, axis=1)[:, every.shape[1] - k]
    found = (kth.astype(np.int32) << 16).view(np.float32)
    found = np.maximum(found * (1 - 2 * UNIT) - 2 * off, 0)
    bits: Bits = (found.view(np.int32) >> 16).astype(np.int16)
    return bits
