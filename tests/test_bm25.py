"""BM25 against a slow one written from the formula, and against queries of any characters."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from askew.bm25 import BM25

WORDS = ["red", "green", "blue", "mug", "plate", "lamp", "oak", "steel", "tin", "jar"]


def slow_scores(texts: list[str], query: str) -> list[float]:
    """BM25 by its formula, for texts of words that stemming leaves as they are."""
    documents = [Counter(text.split()) for text in texts]
    lengths = [sum(d.values()) for d in documents]
    mean = sum(lengths) / len(texts)
    scores = [0.0] * len(texts)
    for word in query.split():
        holding = sum(word in d for d in documents)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for i, document in enumerate(documents):
            n = document[word]
            scores[i] += idf * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * lengths[i] / mean)) if n else 0.0
    return scores


def test_scores_are_those_of_the_formula() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(300)]
    queries = [" ".join(random.choice(WORDS, 3, replace=False)) for _ in range(20)]
    rows, scores = BM25(texts).search(queries, 300)
    for query, found, score in zip(queries, rows, scores, strict=True):
        expected = np.array(slow_scores(texts, query))
        assert set(found[found >= 0]) == set(np.flatnonzero(expected > 0))
        np.testing.assert_allclose(score[found >= 0], expected[found[found >= 0]], rtol=1e-5)
        assert (np.diff(score[found >= 0]) <= 0).all()


def test_equal_scores_stand_in_the_order_of_the_rows_also_where_k_cuts() -> None:
    texts = ["oak lamp"] * 500 + ["oak oak lamp"] * 2 + ["tin jar"]
    rows, _ = BM25(texts).search(["oak"], 6)
    assert rows.tolist() == [[500, 501, 0, 1, 2, 3]]


def test_what_is_not_found_is_padding() -> None:
    rows, scores = BM25(["red mug", "blue mug"]).search(["mug", "zzz", ""], 3)
    assert rows.tolist() == [[0, 1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert np.isneginf(scores[1:]).all()
    assert scores[0, 0] == scores[0, 1] > 0


def test_words_are_stemmed_and_lower_cased() -> None:
    rows, _ = BM25(["Running SHOES for women", "lamp"]).search(["run shoe"], 1)
    assert rows.tolist() == [[0]]


@pytest.mark.parametrize("query", ['mug AND -"', "text:mug", "(mug", "mug* OR [a TO", "mug^9", "+mug:\\", "/mug/"])
def test_query_syntax_has_no_meaning(query: str) -> None:
    rows, _ = BM25(["lamp", "red mug"]).search([query], 1)
    assert rows.tolist() == [[1]]


SHOP = BM25(["red mug", "blue plate"])


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_a_query(query: str) -> None:
    rows, _ = SHOP.search([query], 2)
    assert rows.shape == (1, 2)
