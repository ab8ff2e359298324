"""Rankings against full sorts: by batches, with ties, and fused by rank."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import rankings
from askew.rankings import RRF, Ranking, Top, fused_by_rank


@pytest.mark.parametrize("size", [1, 7, 50])
def test_top_by_batches_is_the_top_of_a_full_sort(size: int) -> None:
    random = np.random.default_rng(size)
    scores = random.integers(0, 6, (5, 50)).astype(np.float32)  # few values, hence many ties
    order = random.permutation(50)
    top = Top.empty(5)
    for start in range(0, 50, size):
        rows = order[start : start + size]
        top.add(rows, scores[:, rows], k=12)
    expected = [sorted(range(50), key=lambda row: (-s[row], row))[:12] for s in scores]
    assert top.rows.tolist() == expected
    np.testing.assert_array_equal(top.scores, np.take_along_axis(scores, top.rows, axis=1))


@pytest.mark.parametrize("values", [2, 1000])
def test_vectors_that_come_by_batches_are_ranked_as_all_at_once(
    values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rankings, "MOST_ITEMS", 64)
    random = np.random.default_rng(values)
    queries, items = (random.integers(0, values, (n, 4)).astype(np.float32) for n in (9, 500))
    ranking, order = Ranking(queries, 20), random.permutation(500)
    for rows in np.array_split(order, 23):
        ranking.add(rows, items[rows])
    scores = queries @ items.T
    expected = np.lexsort((np.broadcast_to(np.arange(500), scores.shape), -scores))[:, :20]
    found = ranking.top()
    assert found.rows.tolist() == expected.tolist()
    assert (found.scores == np.take_along_axis(scores, expected, axis=1)).all()


def test_fewer_items_than_hits_are_all_found() -> None:
    ranking = Ranking(np.eye(2, dtype=np.float32), 10)
    ranking.add(np.arange(2), np.eye(2, dtype=np.float32))
    assert ranking.top().rows.tolist() == [[0, 1], [1, 0]]


def test_ranks_are_fused_as_by_hand() -> None:
    one = Top(np.array([[4, 2, 7], [1, -1, -1]]), np.array([[9, 8, 7], [3, -np.inf, -np.inf]], np.float32))
    other = Top(np.array([[2, 5, 4], [-1, -1, -1]]), np.zeros((2, 3), np.float32))
    found = fused_by_rank(one, other, 4)
    score = {
        2: 1 / (RRF + 2) + 1 / (RRF + 1),
        4: 1 / (RRF + 1) + 1 / (RRF + 3),
        5: 1 / (RRF + 2),
        7: 1 / (RRF + 3),
    }
    assert found.rows[0].tolist() == sorted(score, key=lambda row: -score[row])
    assert found.scores[0] == pytest.approx([score[row] for row in found.rows[0]])
    assert found.rows[1].tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("seed", range(3))
def test_fused_ranks_are_those_of_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    tops = [Top(np.stack([random.permutation(15)[:8] for _ in range(20)]), np.zeros((20, 8))) for _ in range(2)]
    found = fused_by_rank(*tops, 10)
    for query in range(20):
        scores: dict[int, float] = {}
        for top in tops:
            for rank, row in enumerate(top.rows[query].tolist(), 1):
                scores[row] = scores.get(row, 0.0) + float(np.float32(1 / (RRF + rank)))
        expected = sorted(scores, key=lambda row: (-np.float32(scores[row]), row))[:10]
        assert found.rows[query].tolist() == expected


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 8), st.randoms(), st.data())
def test_any_split_of_the_items_in_any_order_merges_to_the_top_of_a_full_sort(
    values: list[int], k: int, chance: Any, data: st.DataObject
) -> None:
    order = list(range(len(values)))
    chance.shuffle(order)
    scores = np.array([values], np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=4)))
    whole = Top.empty(1)
    for rows in np.split(np.array(order), cuts):
        part = Top.empty(1)
        part.add(rows, scores[:, rows], k)
        whole.merge(part, k)
    assert whole.rows.tolist() == [sorted(order, key=lambda row: (-values[row], row))[:k]]
