"""How good rankings are: measures by ir-measures, intervals and comparisons by bootstrap over queries.

nDCG takes grades as they are (linear gain, as trec_eval does); recall and reciprocal rank count an item
as relevant from a grade on. Knows nothing of what made the rankings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from askew.errors import DataError

MEASURES = ("nDCG@10", "R@10", "R@100", "RR")
Qrels = Mapping[str, Mapping[str, int]]  # query_id → item_id → grade; what is absent is not relevant


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
    values: dict[str, NDArray[np.float64]]
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

    `min_relevant` is the grade from which an item counts for R and RR (None: the highest grade there is);
    a query without an item of such a grade is left out of every measure. RR looks as far as the run goes.
    """
    least = relevant_from(qrels) if min_relevant is None else min_relevant
    asked = [i for i, q in enumerate(run.query_ids) if max(qrels.get(q, {}).values(), default=0) >= least]
    ids = [run.query_ids[i] for i in asked]
    # ir-measures breaks equal scores by a rule of its own: it is given ranks, which are never equal.
    ranks = {run.query_ids[i]: {item: -float(n) for n, item in enumerate(run.ranking(i))} for i in asked}
    wanted = {_measure(name, least): name for name in measures}
    values = {name: np.zeros(len(ids)) for name in measures}
    at = {query_id: i for i, query_id in enumerate(ids)}
    for found in ir_measures.iter_calc(list(wanted), {q: dict(qrels[q]) for q in ids}, ranks):
        values[wanted[found.measure]][at[found.query_id]] = found.value
    return Scores(ids, values, len(run.query_ids) - len(ids))


def interval(values: NDArray[np.float64], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean by bootstrap over queries (percentiles); of no width for a single query."""
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    found = _bootstrap(values, resamples, seed).confidence_interval
    return float(found.low), float(found.high)


def paired_bootstrap(
    a: NDArray[np.float64], b: NDArray[np.float64], resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Compare two rankings of the same queries by the mean of a - b: difference, 95 % interval (low, high), p.

    p is two-sided: 2 · (c + 1) / (resamples + 1), at most 1, where c counts the resampled means on the
    other side of 0 or at it (the smaller count of <= 0 and >= 0). It is never 0. Raises DataError for
    fewer than two queries.
    """
    if len(a) != len(b) or len(a) < 2:
        found = f"{len(a)} and {len(b)} queries"
        raise DataError("two rankings of the same two or more queries", found, "judge more queries")
    drawn = _bootstrap(a - b, resamples, seed)
    means = drawn.bootstrap_distribution
    other = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return {
        "difference": float((a - b).mean()),
        "low": float(drawn.confidence_interval.low),
        "high": float(drawn.confidence_interval.high),
        "p": min(1.0, 2 * (int(other) + 1) / (resamples + 1)),
    }


def _measure(name: str, least: int) -> Any:
    measure = ir_measures.parse_measure(name)
    return measure if "rel" not in measure.SUPPORTED_PARAMS else measure(rel=least)


def _bootstrap(values: NDArray[np.float64], resamples: int, seed: int) -> Any:
    return stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", vectorized=True,
        batch=max(1, 10_000_000 // len(values)), rng=np.random.default_rng(seed),
    )  # fmt: skip
