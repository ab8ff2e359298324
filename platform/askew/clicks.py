"""Click logs become graded judgments: clicks over expected clicks, so that a good item low down is not punished.

A position's propensity is the click-through rate that an average pair of query and item has there, and a
pair's ratio of clicks to expected clicks (COEC) says how much better than average it is. Knows nothing of
files, of what a query or an item is, or of other judgments.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from scipy.optimize import minimize

from askew.config import Settings
from askew.errors import DataError
from askew.records import Bad, bad

IDS, NUMBERS = ("query_id", "item_id"), ("position", "impressions", "clicks")
SCHEMA = pa.schema([*((name, pa.string()) for name in IDS), *((name, pa.int64()) for name in NUMBERS)])
GRADES = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.int64())])
MAX_NUMBER = 10**12  # a million such rows still add up in 64 bits
WHOLE_NUMBER = r"^[+-]?[0-9]+(\.0*)?$"
REASONS = {
    "no_query_id": "a query_id is wanted, null or empty found",
    "no_item_id": "an item_id is wanted, null or empty found",
    "not_a_number": "whole numbers of at most 10¹² are wanted for position, impressions and clicks",
    "position_below_one": "a position counted from 1 is wanted; add 1 if the log counts from 0",
    "negative": "impressions and clicks of at least 0 are wanted",
    "clicks_above_impressions": "at most as many clicks as impressions are wanted",
}


class ClickSettings(Settings):
    """Settings of grading by clicks.

    `prior` is the strength of the belief that a pair is average, in expected clicks; a pair of fewer than
    `min_impressions` gets no judgment; `thresholds` are the ratios from which a pair has grade 1, 2, 3, ….
    """

    propensity: Literal["rate", "pairs"] = "rate"
    prior: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    min_impressions: PositiveInt = 20
    thresholds: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError("thresholds must rise")
        return thresholds


# --- what a log may hold -------------------------------------------------------------------------


def check(table: pa.Table, source: str) -> tuple[pa.Table, list[Bad]]:
    """Set aside the rows of a log that cannot be used; the others come back as SCHEMA, in order.

    A log of single events has no `impressions`, and `clicked` or `clicks` of true, false, 1 or 0: each row is
    then one impression. Raises DataError when a column is missing or an id is no plain value.
    """
    table = _columns(table, source)
    reason = _reasons(table)
    wrong = table.append_column("reason", reason).filter(pc.is_valid(reason)).to_pylist()
    return table.filter(pc.is_null(reason)), [_bad(row, source) for row in wrong]


def _columns(table: pa.Table, source: str) -> pa.Table:
    names = set(table.column_names)
    clicks = "clicks" if "clicks" in names else "clicked"
    if missing := {"query_id", "item_id", "position", clicks} - names:
        wanted = f"columns {', '.join(SCHEMA.names)} in {source}, or query_id, item_id, position, clicked"
        raise DataError(wanted, f"no {', '.join(sorted(missing))}", "add or rename the columns")
    once = pa.chunked_array([pa.repeat(pa.scalar(1, pa.int64()), table.num_rows)])
    columns = [_text(table[name], name, source) for name in IDS]
    columns.append(_whole(table["position"]))
    columns.append(_whole(table["impressions"]) if "impressions" in names else once)
    columns.append(_whole(table[clicks]))
    return pa.table(columns, schema=SCHEMA)


def _text(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"text or numbers as {name} in {source}", str(column.type), "mend the column") from error


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Read a column as whole numbers; what is none becomes null."""
    try:
        numbers = _numbers(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # lists, dates: of no use, whatever they hold
        return pa.chunked_array([pa.nulls(len(column), pa.int64())])
    whole = pc.and_(pc.equal(pc.floor(numbers), numbers), pc.less_equal(pc.abs(numbers), MAX_NUMBER))
    return pc.if_else(whole, numbers, None).cast(pa.int64())


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_integer(column.type):
        return column.cast(pa.float64(), safe=False)  # inexact only far above MAX_NUMBER
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return column.cast(pa.float64())
    text = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string())))
    text = pc.if_else(pc.equal(text, "true"), "1", pc.if_else(pc.equal(text, "false"), "0", text))
    return pc.if_else(pc.match_substring_regex(text, WHOLE_NUMBER), text, None).cast(pa.float64())


def _reasons(table: pa.Table) -> pa.ChunkedArray:
    """Name the first of REASONS that speaks against each row; null where none does."""
    position, impressions, clicks = (table[name] for name in NUMBERS)
    against = [
        *(pc.fill_null(pc.equal(table[name], ""), True) for name in IDS),
        pc.is_null(pc.add(pc.add(position, impressions), clicks)),
        pc.less(position, 1),
        pc.less(pc.min_element_wise(impressions, clicks), 0),
        pc.greater(clicks, impressions),
    ]
    conditions = pa.StructArray.from_arrays(
        [pc.fill_null(holds, False).combine_chunks() for holds in against], names=list(REASONS)
    )
    return pc.case_when(conditions, *(pa.scalar(reason) for reason in REASONS))


def _bad(row: Mapping[str, object], source: str) -> Bad:
    reason = str(row["reason"])
    found = ", ".join(f"{name} {'none' if row[name] is None else row[name]}" for name in NUMBERS)
    return bad("click", f"{row['query_id']}/{row['item_id']}", source, reason, f"{REASONS[reason]}; found {found}")


# --- sums ----------------------------------------------------------------------------------------


def totals(table: pa.Table) -> pa.Table:
    """Sum impressions and clicks by query, item and position.

    Sums add up: the totals of a log are the totals of its chunks' totals put one after the other.
    """
    sums = [("impressions", "sum"), ("clicks", "sum")]
    groups = table.group_by([*IDS, "position"], use_threads=False).aggregate(sums)
    return groups.rename_columns(SCHEMA.names).cast(SCHEMA)


# --- propensities --------------------------------------------------------------------------------


def propensities(totals: pa.Table, settings: ClickSettings) -> dict[int, float]:
    """Estimate, for each position, the click-through rate that an average pair has there.

    Whichever way, the expected clicks of the whole log are its clicks; only ratios between positions differ.

    "rate" is the click-through rate over all queries (Zhang and Jones, "Comparing click logs and editorial
    labels for training query rewriting", 2007). It confounds relevance with position: a good ranker puts
    the good items first, so that the rate falls faster than attention does. Items on top are then held to
    too high a standard and items below to too low a one, and grades are flattened across positions.

    "pairs" compares a pair only with itself at another position, so that relevance cancels out (the
    interventions that Agarwal et al., "Estimating position bias without intrusive interventions", 2019,
    harvest). Clicks are taken as Poisson with mean impressions × propensity × relevance of the pair; given
    how often a pair was clicked, relevance drops out of the likelihood, and the propensities are found by
    maximum likelihood. It wants pairs that were seen at several positions for reasons that are not their
    relevance that day (tests, ranker changes, ties); a position that no such pair links to the others
    keeps its plain rate.
    """
    positions, column = np.unique(_array(totals, "position"), return_inverse=True)
    impressions, clicks = _array(totals, "impressions"), _array(totals, "clicks")
    seen, clicked = (np.bincount(column, weights, len(positions)) for weights in (impressions, clicks))
    if settings.propensity == "rate":
        values = clicked / np.maximum(seen, 1)
    else:
        prior = np.log((clicked + 0.5) / (seen + 1))
        values = np.exp(_fit(column, _pair(totals), impressions, clicks, prior))
        values *= clicked.sum() / max(float(values @ seen), np.finfo(float).tiny)
    return {int(position): float(value) for position, value in zip(positions, values, strict=True)}


def _array(table: pa.Table, name: str) -> NDArray[np.int64]:
    array: NDArray[np.int64] = table[name].to_numpy()
    return array


def _pair(totals: pa.Table) -> NDArray[np.int64]:
    """Number the pairs of query and item from 0; returns each row's."""
    query, item = (totals[name].combine_chunks().dictionary_encode() for name in IDS)
    keys = query.indices.to_numpy().astype(np.int64) * max(len(item.dictionary), 1) + item.indices.to_numpy()
    return np.unique(keys, return_inverse=True)[1]


def _fit(
    position: NDArray[np.int64],
    pair: NDArray[np.int64],
    impressions: NDArray[np.int64],
    clicks: NDArray[np.int64],
    prior: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Maximise the likelihood of clicks' positions given each pair's clicks, with a unit normal prior.

    Takes rows of (position, pair), and log propensities a position, which the prior is centred on. Returns
    log propensities.
    """
    clicked_by_pair = np.bincount(pair, clicks)
    clicked_by_position = np.bincount(position, clicks, len(prior))

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = impressions * np.exp(values)[position]
        total = np.maximum(np.bincount(pair, weight), np.finfo(float).tiny)
        expected = np.bincount(position, weight * (clicked_by_pair / total)[pair], len(prior))
        off = values - prior
        likelihood = clicked_by_position @ values - clicked_by_pair @ np.log(total)
        return float(0.5 * off @ off - likelihood), off - clicked_by_position + expected

    found: NDArray[np.float64] = minimize(loss, prior, jac=True, method="L-BFGS-B").x
    return found


# --- grades --------------------------------------------------------------------------------------


def judgments(
    totals: pa.Table, propensity: Mapping[int, float], settings: ClickSettings
) -> tuple[pa.Table, dict[str, int]]:
    """Grade each pair by (prior + clicks) / (prior + expected clicks); returns GRADES, sorted by pair, and counts.

    Expected clicks are the sum of impressions × propensity over the positions that the pair was seen at, and
    the prior a gamma distribution of mean 1 (COEC, as smoothed for little evidence; cf. Chapelle and Zhang,
    "A dynamic Bayesian network click model for web search ranking", 2009). Counts are of `pairs`, and of
    those without a judgment: `too_few_impressions`, and `no_expected_clicks` (seen only where nobody clicks).
    """
    expected = pa.array(_array(totals, "impressions") * _at(_array(totals, "position"), propensity))
    sums = [("impressions", "sum"), ("clicks", "sum"), ("expected", "sum")]
    pairs = totals.append_column("expected", expected).group_by(list(IDS), use_threads=False).aggregate(sums)
    few = pc.less(pairs["impressions_sum"], settings.min_impressions)
    unseen = pc.and_(pc.invert(few), pc.less_equal(pairs["expected_sum"], 0.0))
    counts = {
        "pairs": pairs.num_rows,
        "too_few_impressions": int(pc.sum(few).as_py() or 0),
        "no_expected_clicks": int(pc.sum(unseen).as_py() or 0),
    }
    pairs = pairs.filter(pc.invert(pc.or_(few, unseen))).sort_by([(name, "ascending") for name in IDS])
    ratio = (settings.prior + pairs["clicks_sum"].to_numpy()) / (settings.prior + pairs["expected_sum"].to_numpy())
    grades = pa.array(np.digitize(ratio, settings.thresholds), pa.int64())
    return pa.table([*(pairs[name] for name in IDS), grades], schema=GRADES), counts


def _at(position: NDArray[np.int64], propensity: Mapping[int, float]) -> NDArray[np.float64]:
    """Look up the propensity of each row's position."""
    known = np.array(sorted(propensity), dtype=np.int64)
    assert np.isin(position, known).all(), "propensities are wanted of every position in the totals"
    values = np.array([propensity[key] for key in known.tolist()])
    return values[np.searchsorted(known, position)] if len(position) else np.zeros(0)
