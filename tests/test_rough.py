"""Rough scores leave out nothing that is among the best, and exact search by them is exact search."""

import numpy as np
import pytest
from numpy.typing import NDArray

from askew import ann, rough
from askew.ann import Effort, Index
from askew.rough import Rough


def made(size: int, dim: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Vectors near one direction, as those of one kind of product are: their scores lie close together."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(size, dim)) + 3 * np.ones(dim)
    return (scale * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("size", "dim", "batch", "k", "scale"), [
    (70_001, 16, 33, 10, 1), (200_000, 8, 8, 100, 1), (90_000, 128, 64, 1, 1), (70_000, 16, 32, 10, 1000),
    (70_000, 16, 32, 10, 1e-3),
])  # fmt: skip
def test_all_of_the_best_are_given(size: int, dim: int, batch: int, k: int, scale: float) -> None:
    vectors, queries = made(size, dim, scale=scale), made(batch, dim, seed=1)
    exact = vectors.astype(np.float64) @ queries.T.astype(np.float64)
    pairs = Rough(vectors).among_best(queries, k)
    assert pairs is not None
    number, row = pairs
    assert (np.diff(number) >= 0).all()
    for query in range(batch):
        best = np.argsort(-exact[:, query])[:k]
        given = row[number == query]
        assert set(best) <= set(given.tolist())
        assert len(given) == len(set(given.tolist()))
    assert len(row) < 0.2 * size * batch


def test_what_cannot_be_told_is_not() -> None:
    vectors, queries = made(70_000, 8), made(8, 8, seed=1)
    assert Rough(vectors).among_best(-queries, 10) is None  # no score is positive
    assert Rough(vectors).among_best(queries, 5000) is None  # of 1,094 groups


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rough, "fast", lambda: True)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("k", [1, 50, 3000])
def test_exact_search_by_rough_scores_is_exact_search(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = made(70_000, 16), made(40, 16, seed=1)
    vectors[10_000:10_300] = vectors[:300]  # equal ones: the lesser row stands first
    index = Index.flat(16)
    index.add(vectors)
    with monkeypatch.context() as slow:
        slow.setattr(rough, "fast", lambda: False)
        wanted = index.search(queries, k, Effort())
    found = index.search(queries, k, Effort())
    assert index._rough is not None
    assert (found[0] == wanted[0]).all()
    assert (found[1] == wanted[1]).all()


@pytest.mark.usefixtures("fast")
def test_what_is_added_later_is_found() -> None:
    vectors = made(70_000, 16)
    index = Index.flat(16)
    index.add(vectors)
    index.search(vectors[:8], 1, Effort())
    index.add(2 * vectors[:8])
    assert index.search(vectors[:8], 1, Effort())[1][:, 0].tolist() == list(range(70_000, 70_008))
    other = Index.flat(16)
    other.add(3 * vectors[:8])
    index.join(other)
    assert index.search(vectors[:8], 1, Effort())[1][:, 0].tolist() == list(range(70_008, 70_016))


@pytest.mark.usefixtures("fast")
def test_few_queries_or_vectors_want_no_second_copy() -> None:
    index = Index.flat(16)
    index.add(made(70_000, 16))
    index.search(made(ann.BLAS_FROM_BATCH - 1, 16), 10, Effort())
    assert index._rough is None
