"""Metrics: a worked example, a slow oracle in numpy, ties, and the bootstrap against known distributions."""

import math

import numpy as np
import pytest

from askew import metrics
from askew.errors import DataError
from askew.metrics import LEAST_QUERIES, Qrels, Run, holm, intervals, paired_bootstrap, resampled, score


def run_of(rankings: dict[str, list[str]]) -> Run:
    """A run from rankings of up to k items, best first."""
    item_ids = sorted({item for ranking in rankings.values() for item in ranking})
    k = max(len(ranking) for ranking in rankings.values())
    rows = np.full((len(rankings), k), -1)
    scores = np.full((len(rankings), k), -np.inf, dtype=np.float32)
    for i, ranking in enumerate(rankings.values()):
        rows[i, : len(ranking)] = [item_ids.index(item) for item in ranking]
        scores[i, : len(ranking)] = np.linspace(1, 0, len(ranking))
    return Run(list(rankings), item_ids, rows, scores)


def test_a_worked_example() -> None:
    """Exact 3, substitute 2, complement 1: found in the order substitute, nothing, exact."""
    qrels = {"q": {"exact": 3, "substitute": 2, "complement": 1, "other exact": 3}}
    scores = score(qrels, run_of({"q": ["substitute", "unjudged", "exact"]}))
    found = 2 / math.log2(2) + 0 + 3 / math.log2(4)
    ideal = 3 / math.log2(2) + 3 / math.log2(3) + 2 / math.log2(4) + 1 / math.log2(5)
    assert scores.means() == pytest.approx({
        "nDCG@10": found / ideal, "R@10": 1 / 2, "R@50": 1 / 2, "R@100": 1 / 2, "P@50": 1 / 50,
        "F1@50": 2 / (50 + 2), "RR@10": 1 / 3, "AP@10": (1 / 3) / 2, "Judged@10": 2 / 3,
    })  # fmt: skip
    lenient = score(qrels, run_of({"q": ["substitute", "unjudged", "exact"]}), min_relevant=2)
    assert lenient.means() == pytest.approx({
        "nDCG@10": found / ideal, "R@10": 2 / 3, "R@50": 2 / 3, "R@100": 2 / 3, "P@50": 2 / 50,
        "F1@50": 2 * 2 / (50 + 3), "RR@10": 1, "AP@10": (1 + 2 / 3) / 3, "Judged@10": 2 / 3,
    })  # fmt: skip


def slow(judged: dict[str, int], ranking: list[str], least: int) -> dict[str, float]:
    def dcg(grades: list[int]) -> float:
        return sum(g / math.log2(n + 2) for n, g in enumerate(grades[:10]))

    relevant = {item for item, grade in judged.items() if grade >= least}
    right = [item in relevant for item in ranking]
    first = [1 / (n + 1) for n, one in enumerate(right[:10]) if one]
    ideal = dcg(sorted(judged.values(), reverse=True))
    found = sum(right[:50])
    return {
        "nDCG@10": dcg([judged.get(item, 0) for item in ranking]) / ideal,
        "R@10": sum(right[:10]) / len(relevant),
        "R@50": found / len(relevant),
        "R@100": sum(right[:100]) / len(relevant),
        "P@50": found / 50,
        "F1@50": 2 * found / (50 + len(relevant)),
        "RR@10": first[0] if first else 0.0,
        "AP@10": sum(sum(right[: n + 1]) / (n + 1) for n, one in enumerate(right[:10]) if one) / len(relevant),
        "Judged@10": sum(item in judged for item in ranking[:10]) / max(1, len(ranking[:10])),
    }


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_a_slow_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    items = [f"item-{i}" for i in range(300)]
    qrels: dict[str, dict[str, int]] = {}
    rankings: dict[str, list[str]] = {}
    for q in range(30):
        judged = random.choice(items, 40, replace=False)
        qrels[f"q{q}"] = {str(i): int(random.integers(0, 4)) for i in judged} | {str(judged[0]): 3}
        rankings[f"q{q}"] = [str(i) for i in random.permutation(items)[: random.integers(0, 120)]]
    scores = score(qrels, run_of(rankings))
    assert scores.query_ids == list(qrels)
    for i, query_id in enumerate(scores.query_ids):
        expected = slow(qrels[query_id], rankings[query_id], least=3)
        assert {name: values[i] for name, values in scores.values.items()} == pytest.approx(expected)


def test_equal_scores_stand_by_item_id_whatever_their_rows() -> None:
    rows, scores = np.array([[2, 0, 1, 3]]), np.array([[0.5, 0.5, 0.5, 0.9]], dtype=np.float32)
    run = Run(["q"], ["c", "a", "b", "z"], rows, scores)
    assert run.ranking(0) == ["z", "a", "b", "c"]
    assert score({"q": {"b": 1}}, run).means()["RR@10"] == pytest.approx(1 / 3)


def test_a_query_with_nothing_relevant_is_left_out_and_counted() -> None:
    run = run_of({"unjudged": ["a"], "good": ["a"], "poor": ["a"], "missed": ["b"], "none": []})
    qrels: Qrels = {"poor": {"a": 2}, **{q: {"a": 3} for q in ("good", "missed", "none", "elsewhere")}}
    scores = score(qrels, run)
    assert scores.query_ids == ["good", "missed", "none"]
    assert scores.left_out == 2
    assert scores.means()["RR@10"] == pytest.approx(1 / 3)
    assert scores.means(np.array([True, False, False]))["RR@10"] == 1


def test_judgments_without_a_positive_are_an_error() -> None:
    with pytest.raises(DataError, match="above 0"):
        score({"q": {"a": 0}}, run_of({"q": ["a"]}))


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 1000)
    [span, other] = intervals(np.stack([values, 2 * values], axis=1))
    half = 1.96 * values.std() / math.sqrt(1000)
    assert span == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert other == pytest.approx(2 * np.array(span))  # of the same queries


def test_too_few_queries_have_no_interval() -> None:
    values = np.random.default_rng(0).random((LEAST_QUERIES, 2))
    assert intervals(values[1:]) == [None, None]
    assert None not in intervals(values)


@pytest.mark.parametrize("num", [2, 37])
def test_resampling_is_that_of_a_slow_oracle(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 3 * num)  # in several pieces
    values = np.random.default_rng(num).random((num, 3))
    random = np.random.default_rng(5)
    drawn = np.concatenate([random.integers(0, num, (rows, num)) for rows in (3, 3, 1)])
    expected = [[np.mean([values[i, column] for i in row]) for column in range(3)] for row in drawn]
    assert resampled(values, 7, seed=5) == pytest.approx(np.array(expected))


def test_corrected_p_values_are_those_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_clear_difference_has_a_small_p_but_never_0() -> None:
    random = np.random.default_rng(0)
    a, b = random.random(200) + 1, random.random(200)
    found = paired_bootstrap(a, b)
    assert found["difference"] == pytest.approx(float((a - b).mean()))
    assert found["low"] < found["difference"] < found["high"]
    assert found["p"] == pytest.approx(2 / 10_001)
    back = paired_bootstrap(b, a)
    assert (back["difference"], back["p"]) == (-found["difference"], found["p"])


def test_no_difference_has_p_1() -> None:
    a = np.random.default_rng(0).random(50)
    assert paired_bootstrap(a, a) == {"difference": 0, "low": 0, "high": 0, "p": 1}


def test_p_is_that_of_the_normal_approximation() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(0.1, 1, 400), np.zeros(400)
    z = a.mean() / (a.std() / math.sqrt(400))
    assert paired_bootstrap(a, b)["p"] == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = np.random.default_rng(0).random((2, 30))
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7) != paired_bootstrap(a, b, seed=8)


def test_one_query_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="two or more"):
        paired_bootstrap(np.ones(1), np.zeros(1))
