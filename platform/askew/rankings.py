"""Exact rankings: the k best of any number of items for each query, in bounded memory.

Rows number items in the order of their ids, so that equal scores stand by item id. Knows nothing of models or
measures.
Shapes: Q queries, N items, D dimensions, K hits.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
SCORES_AT_ONCE, MOST_ITEMS = 1 << 25, 8192
RRF = 60  # Cormack et al., "Reciprocal rank fusion outperforms Condorcet", SIGIR 2009


@dataclass
class Top:
    """The best items of Q queries, best first, equal scores by row: rows and scores are (Q, K or fewer)."""

    rows: Rows
    scores: Vectors

    @classmethod
    def empty(cls, num_queries: int) -> Self:
        """Before any item."""
        return cls(np.empty((num_queries, 0), dtype=np.int64), np.empty((num_queries, 0), dtype=np.float32))

    def add(self, rows: Rows, scores: Vectors, k: int) -> None:
        """Take in N further items, whose scores are (Q, N)."""
        own = np.broadcast_to(rows, scores.shape)
        if scores.shape[1] > k:
            own, scores = _best(rows, scores, k)
        self.merge(Top(own, scores), k)

    def merge(self, other: "Top", k: int) -> None:
        """Take in the best of other items."""
        rows = np.concatenate([self.rows, other.rows], axis=1)
        scores = np.concatenate([self.scores, other.scores], axis=1)
        best = np.lexsort((rows, -scores))[:, :k]
        self.rows, self.scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)


def _best(rows: Rows, scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Choose each query's k best of N > k items, in no order; of those that tie for the last place, the first."""
    values, places = torch.topk(torch.from_numpy(scores), k + 1, dim=1)
    found, at = values.numpy(), places.numpy()
    for query in np.flatnonzero(found[:, k] == found[:, k - 1]):
        at[query, :k] = np.lexsort((rows, -scores[query]))[:k]
        found[query, :k] = scores[query, at[query, :k]]
    return rows[at[:, :k]], found[:, :k]


class Ranking:
    """The k best items for each of Q query vectors, while items come by batches."""

    def __init__(self, queries_QD: Vectors, k: int) -> None:
        self._queries, self._k = queries_QD, k
        self._top = Top.empty(len(queries_QD))
        self._most = int(np.clip(SCORES_AT_ONCE // max(1, len(queries_QD)), 1, MOST_ITEMS))
        self._rows: list[Rows] = []
        self._vectors: list[Vectors] = []
        self._held = 0

    def add(self, rows_N: Rows, vectors_ND: Vectors) -> None:
        """Take in N items; they are scored when there are many."""
        self._rows.append(rows_N)
        self._vectors.append(vectors_ND)
        self._held += len(rows_N)
        if self._held >= self._most:
            self._score()

    def top(self) -> Top:
        """The best of all items so far."""
        self._score()
        return self._top

    def _score(self) -> None:
        if not self._held:
            return
        rows, vectors = np.concatenate(self._rows), np.concatenate(self._vectors)
        self._rows, self._vectors, self._held = [], [], 0
        for at in range(0, len(rows), self._most):
            here = slice(at, at + self._most)
            self._top.add(rows[here], self._queries @ vectors[here].T, self._k)


def fused_by_rank(one: Top, other: Top, k: int) -> Top:
    """Fuse two rankings of the same queries by the sum of 1 / (60 + rank), which needs no scale of their scores.

    A row of -1 is no hit, in what is given and in what comes out.
    """
    shares = [1 / (RRF + 1 + np.arange(top.rows.shape[1], dtype=np.float32)) for top in (one, other)]
    rows = np.concatenate([one.rows, other.rows], axis=1)
    scores = np.where(rows >= 0, np.concatenate(shares), -np.inf).astype(np.float32)
    order = np.argsort(rows, axis=1, kind="stable")
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    again = (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)
    scores[:, :-1] += np.where(again, scores[:, 1:], 0)
    rows[:, 1:][again], scores[:, 1:][again] = -1, -np.inf
    best = np.lexsort((rows, -scores))[:, :k]
    return Top(np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1))
