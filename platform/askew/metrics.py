"""How good rankings are: measures by ir-measures, intervals and comparisons by bootstrap over queries.

nDCG takes grades as they are (linear gain, as trec_eval does); recall, precision, reciprocal rank and average
precision count an item as relevant from a grade on. Knows nothing of what made the rankings.
Shapes: N queries, M columns of values, R resamples.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray

from askew.errors import DataError

MEASURES = ("nDCG@10", "R@10", "R@50", "R@100", "P@50", "F1@50", "RR@10", "AP@10", "Judged@10")
LEAST_QUERIES = 10  # fewer have no interval: their resamples hardly differ
ROWS_AT_ONCE = 4_000_000  # resampled queries that are held at a time
Qrels = Mapping[str, Mapping[str, int]]  # query_id → item_id → grade; what is absent is not relevant
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """Rankings of q queries as arrays: hit i of query j is `item_ids[rows[j, i]]` with `scores[j, i]`.

    rows and scores are (q, k); a row of -1 is no hit.
    """

    query_ids: Sequence[str]
    item_ids: Sequence[str]
    rows: NDArray[np.int64]
    scores: NDArray[np.float32]

    def ranking(self, query: int) -> list[str]:
        """The item ids found for a query, best score first, equal scores by item id."""
        hits = zip(self.rows[query].tolist(), self.scores[query].tolist(), strict=True)
        ranked = [(-score, self.item_ids[row]) for row, score in hits if row >= 0]
        return [item_id for _, item_id in sorted(ranked)]


@dataclass(frozen=True)
class Scores:
    """Each measure's value for each of n queries; `left_out` further queries have nothing relevant to find."""

    query_ids: list[str]
    values: dict[str, Values]
    left_out: int

    @classmethod
    def joined(cls, parts: "Sequence[Scores]") -> "Scores":
        """Put the scores of different queries one after the other."""
        ids = [query_id for part in parts for query_id in part.query_ids]
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        return cls(ids, values, sum(part.left_out for part in parts))

    def means(self, mask: NDArray[np.bool_] | slice = slice(None)) -> dict[str, float]:
        """The mean of each measure over the queries, or over those of a mask."""
        return {name: float(values[mask].mean()) for name, values in self.values.items()}


def relevant_from(qrels: Qrels) -> int:
    """The highest grade that the judgments hold. Raises DataError when there is none above 0."""
    highest = max((grade for judged in qrels.values() for grade in judged.values()), default=0)
    if highest < 1:
        raise DataError("judgments with a grade above 0", "none", "see qrels.parquet of the triplets")
    return highest


def score(qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES, min_relevant: int | None = None) -> Scores:
    """Measure a run, query by query, in the run's order.

    `min_relevant` is the grade from which an item counts as relevant (None: the highest grade there is); a query
    without an item of such a grade is left out of every measure. F1@k is the harmonic mean of P@k and R@k of
    each query.
    """
    least = relevant_from(qrels) if min_relevant is None else min_relevant
    asked = [i for i, q in enumerate(run.query_ids) if max(qrels.get(q, {}).values(), default=0) >= least]
    ids = [run.query_ids[i] for i in asked]
    # ir-measures breaks equal scores by a rule of its own: it is given ranks, which are never equal. A query
    # without a hit would make its Judged@k divide by nought: it finds what nobody can have judged.
    ranks = {run.query_ids[i]: {item: -float(n) for n, item in enumerate(run.ranking(i) or [""])} for i in asked}
    parts = {name: _parts(name) for name in measures}
    wanted = {_measure(part, least): part for part in dict.fromkeys(p for each in parts.values() for p in each)}
    found = {name: np.zeros(len(ids)) for name in wanted.values()}
    at = {query_id: i for i, query_id in enumerate(ids)}
    for one in ir_measures.iter_calc(list(wanted), {q: dict(qrels[q]) for q in ids}, ranks):
        found[wanted[one.measure]][at[one.query_id]] = one.value
    values = {name: found[name] if name in found else _f1(*(found[p] for p in parts[name])) for name in measures}
    return Scores(ids, values, len(run.query_ids) - len(ids))


def _parts(name: str) -> tuple[str, ...]:
    """The measures of ir-measures that a measure is made of."""
    depth = re.fullmatch(r"F1(@\d+)", name)
    return (f"P{depth[1]}", f"R{depth[1]}") if depth else (name,)


def _f1(precision: Values, recall: Values) -> Values:
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)


def _measure(name: str, least: int) -> Any:
    measure = ir_measures.parse_measure(name)
    return measure if "rel" not in measure.SUPPORTED_PARAMS else measure(rel=least)


# --- how sure ------------------------------------------------------------------------------------


def resampled(values_NM: Values, resamples: int = 10_000, seed: int = 0) -> Values:
    """Draw N queries with replacement, R times, and average each column over them: (R, M).

    All columns see the same queries, so that differences of columns are paired.
    """
    num, random = len(values_NM), np.random.default_rng(seed)
    out = np.empty((resamples, values_NM.shape[1]))
    step = max(1, ROWS_AT_ONCE // num)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num)
        out[start : start + rows] = times @ values_NM / num
    return out


def intervals(values_NM: Values, resamples: int = 10_000, seed: int = 0) -> list[tuple[float, float] | None]:
    """The 95 % interval of each column's mean (percentiles); None for fewer than LEAST_QUERIES queries."""
    if len(values_NM) < LEAST_QUERIES:
        return [None] * values_NM.shape[1]
    low, high = np.quantile(resampled(values_NM, resamples, seed), [0.025, 0.975], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def paired_bootstrap(a: Values, b: Values, resamples: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Compare two rankings of the same queries by the mean of a - b: difference, 95 % interval (low, high), p.

    p is two-sided: 2 · (c + 1) / (resamples + 1), at most 1, where c counts the resampled means on the
    other side of 0 or at it (the smaller count of <= 0 and >= 0). It is never 0. Raises DataError for
    fewer than two queries.
    """
    if len(a) != len(b) or len(a) < 2:
        found = f"{len(a)} and {len(b)} queries"
        raise DataError("two rankings of the same two or more queries", found, "judge more queries")
    return bootstrapped((a - b)[:, None], resamples, seed)[0]


def bootstrapped(differences_NM: Values, resamples: int = 10_000, seed: int = 0) -> list[dict[str, float]]:
    """Do what `paired_bootstrap` does for each column of differences, by the same resamples for all."""
    means = resampled(differences_NM, resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    other = np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * (other + 1) / (resamples + 1))
    columns = zip(differences_NM.mean(axis=0), low, high, p, strict=True)
    return [dict(zip(("difference", "low", "high", "p"), map(float, column), strict=True)) for column in columns]


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p-values of comparisons that are made together, so that one false alarm in all is as rare as said.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = np.argsort(ps, kind="stable")
    corrected = np.empty(len(ps))
    corrected[order] = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1))
    return [float(p) for p in np.minimum(corrected, 1.0)]
