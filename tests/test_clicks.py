from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr

from askew import clicks
from askew.clicks import ClickSettings
from askew.errors import DataError

NUM_QUERIES, NUM_ITEMS = 60, 10
ATTENTION = 1 / np.arange(1, NUM_ITEMS + 1)  # what the simulated shopper looks at


def log(*rows: tuple[Any, ...]) -> pa.Table:
    """A log of (query_id, item_id, position, impressions, clicks)."""
    return pa.table(dict(zip(clicks.SCHEMA.names, zip(*rows, strict=True), strict=True)))


def simulated(good: bool) -> tuple[pa.Table, dict[tuple[str, str], float]]:
    """A log of rankers that differ a little (good, or of their own taste), and each pair's true relevance."""
    random = np.random.default_rng(0)
    relevance = random.beta(1, 3, (NUM_QUERIES, NUM_ITEMS))
    taste = relevance if good else random.uniform(size=relevance.shape)
    tables = []
    for _ in range(8):  # rankers
        order = np.argsort(-(taste + 0.3 * random.normal(size=taste.shape)), axis=1)
        shown = random.integers(300, 500, size=order.shape)
        clicked = random.binomial(shown, ATTENTION * np.take_along_axis(relevance, order, axis=1))
        query = np.repeat(np.arange(NUM_QUERIES), NUM_ITEMS)
        position = np.tile(np.arange(1, NUM_ITEMS + 1), NUM_QUERIES)
        rows = (query, order.ravel(), position, shown.ravel(), clicked.ravel())
        tables.append(pa.table(dict(zip(clicks.SCHEMA.names, rows, strict=True))))
    table, bad = clicks.check(pa.concat_tables(tables), "simulated")
    assert not bad
    truth = {(str(q), str(i)): relevance[q, i] for q in range(NUM_QUERIES) for i in range(NUM_ITEMS)}
    return clicks.totals(table), truth


def relative(propensity: dict[int, float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([propensity[k] / propensity[1] for k in sorted(propensity)])


def agreement(grades: pa.Table, column: str, truth: dict[tuple[str, str], float]) -> float:
    """Spearman's correlation of a column with true relevance."""
    true = [truth[row["query_id"], row["item_id"]] for row in grades.to_pylist()]
    return float(spearmanr(grades[column].to_numpy(), true).statistic)


def through_rates(totals: pa.Table) -> pa.Table:
    pairs = totals.group_by(["query_id", "item_id"]).aggregate([("clicks", "sum"), ("impressions", "sum")])
    rate = pairs["clicks_sum"].to_numpy() / pairs["impressions_sum"].to_numpy()
    return pairs.append_column("rate", pa.array(rate))


# --- estimates -----------------------------------------------------------------------------------


def test_pairs_recover_known_propensities_where_the_plain_rate_does_not() -> None:
    totals, _ = simulated(good=True)
    pairs = relative(clicks.propensities(totals, ClickSettings(propensity="pairs")))
    rate = relative(clicks.propensities(totals, ClickSettings(propensity="rate")))
    np.testing.assert_allclose(pairs, ATTENTION, rtol=0.08)
    assert (rate[1:] < 0.9 * ATTENTION[1:]).all()  # relevance falls with position too


@pytest.mark.parametrize("propensity", ["rate", "pairs"])
def test_the_expected_clicks_of_a_log_are_its_clicks(propensity: Any) -> None:
    totals, _ = simulated(good=True)
    found = clicks.propensities(totals, ClickSettings(propensity=propensity))
    expected = sum(found[r["position"]] * r["impressions"] for r in totals.to_pylist())
    assert expected == pytest.approx(sum(totals["clicks"].to_pylist()))


def test_grades_order_as_relevance_does_and_better_than_raw_click_through() -> None:
    totals, truth = simulated(good=False)
    raw = agreement(through_rates(totals), "rate", truth)
    fine = tuple(np.geomspace(0.1, 8, 30))
    settings = ClickSettings(propensity="pairs", thresholds=fine)
    graded, _ = clicks.judgments(totals, clicks.propensities(totals, settings), settings)
    assert agreement(graded, "grade", truth) > 0.98 > 0.9 > raw


def test_a_good_item_low_down_is_graded_above_a_poor_one_on_top() -> None:
    totals, _ = simulated(good=True)
    extra = log(("q", "poor", 1, 10_000, 1_500), ("q", "good", 10, 10_000, 700))  # raw: 0.15 > 0.07
    totals = clicks.totals(pa.concat_tables([totals, extra]))
    settings = ClickSettings(propensity="pairs")
    graded, _ = clicks.judgments(totals, clicks.propensities(totals, settings), settings)
    by_id = {(r["query_id"], r["item_id"]): r["grade"] for r in graded.to_pylist()}
    assert by_id["q", "good"] > by_id["q", "poor"]


def test_pairs_seen_at_one_position_each_leave_the_plain_rate() -> None:
    totals = clicks.totals(log(("q", "a", 1, 1000, 500), ("q", "b", 2, 1000, 100), ("q", "c", 3, 1000, 0)))
    rate, pairs = (clicks.propensities(totals, ClickSettings(propensity=p)) for p in ("rate", "pairs"))
    assert rate == {1: 0.5, 2: 0.1, 3: 0.0}
    assert pairs == pytest.approx(rate, abs=0.001)


def test_totals_of_chunks_add_up_to_those_of_the_whole() -> None:
    totals, _ = simulated(good=True)
    parts = [clicks.totals(totals.slice(start, 1000)) for start in range(0, totals.num_rows, 1000)]
    whole = [(name, "ascending") for name in ("query_id", "item_id", "position")]
    twice = clicks.totals(pa.concat_tables([*parts, *parts]))
    assert twice.num_rows == totals.num_rows
    both = twice.sort_by(whole)["clicks"].to_numpy(), totals.sort_by(whole)["clicks"].to_numpy()
    np.testing.assert_array_equal(both[0], 2 * both[1])


# --- grades --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clicked", "grade"), [(0, 0), (3, 0), (4, 1), (8, 1), (9, 2), (18, 2), (19, 3), (99, 3)])
def test_the_smoothed_ratio_makes_the_grade(clicked: int, grade: int) -> None:
    totals = clicks.totals(log(("q", "i", 1, 100, clicked)))
    graded, _ = clicks.judgments(totals, {1: 0.09, 2: 0.05}, ClickSettings())  # (1 + clicks) / (1 + 9)
    assert graded.schema == clicks.GRADES
    assert graded.to_pylist() == [{"query_id": "q", "item_id": "i", "grade": grade}]


def test_a_pair_without_evidence_gets_no_judgment_and_is_counted() -> None:
    totals = clicks.totals(
        log(("q", "a", 1, 19, 9), ("q", "b", 1, 10, 2), ("q", "b", 2, 10, 2), ("q", "c", 9, 5000, 0))
    )
    graded, counts = clicks.judgments(totals, clicks.propensities(totals, ClickSettings()), ClickSettings())
    assert graded["item_id"].to_pylist() == ["b"]
    assert counts == {"pairs": 3, "too_few_impressions": 1, "no_expected_clicks": 1}


def test_a_larger_prior_draws_a_pair_of_little_evidence_to_the_average() -> None:
    totals = clicks.totals(log(("q", "i", 1, 100, 8)))
    grades = []
    for prior in (0.1, 100.0):
        table, _ = clicks.judgments(totals, {1: 0.02}, ClickSettings(prior=prior))
        grades += table["grade"].to_pylist()
    assert grades == [3, 2]


@pytest.mark.parametrize("propensity", ["rate", "pairs"])
def test_an_empty_log_makes_no_judgment(propensity: Any) -> None:
    settings = ClickSettings(propensity=propensity)
    totals = clicks.totals(clicks.SCHEMA.empty_table())
    graded, counts = clicks.judgments(totals, clicks.propensities(totals, settings), settings)
    assert (graded.schema, graded.num_rows, counts["pairs"]) == (clicks.GRADES, 0, 0)


@pytest.mark.parametrize("propensity", ["rate", "pairs"])
def test_a_log_without_a_click_or_an_impression_makes_no_judgment(propensity: Any) -> None:
    settings = ClickSettings(propensity=propensity)
    totals = clicks.totals(log(("q", "a", 1, 50, 0), ("q", "a", 2, 50, 0), ("q", "b", 3, 0, 0)))
    graded, counts = clicks.judgments(totals, clicks.propensities(totals, settings), settings)
    assert (graded.num_rows, counts["no_expected_clicks"], counts["too_few_impressions"]) == (0, 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prior": 0},
        {"prior": float("inf")},
        {"min_impressions": 0},
        {"thresholds": ()},
        {"thresholds": (1, 0.5)},
        {"thresholds": (1, 1)},
        {"thresholds": (0, 1)},
        {"propensity": "guess"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClickSettings(**wrong)


# --- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ((None, "i", 1, 2, 1), "no_query_id"),
        (("", "i", 1, 2, 1), "no_query_id"),
        (("q", None, 1, 2, 1), "no_item_id"),
        (("q", "", 1, 2, 1), "no_item_id"),
        (("q", "i", None, 2, 1), "not_a_number"),
        (("q", "i", 1, None, 1), "not_a_number"),
        (("q", "i", 1, 2, None), "not_a_number"),
        (("q", "i", 1, 2.5, 1.0), "not_a_number"),
        (("q", "i", 1, float("nan"), 1.0), "not_a_number"),
        (("q", "i", 1, float("inf"), 1.0), "not_a_number"),
        (("q", "i", 1, 10**15, 1), "not_a_number"),
        (("q", "i", 0, 2, 1), "position_below_one"),
        (("q", "i", -3, 2, 1), "position_below_one"),
        (("q", "i", 1, -2, 1), "negative"),
        (("q", "i", 1, 2, -1), "negative"),
        (("q", "i", 1, 2, 3), "clicks_above_impressions"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_used_is_set_aside(row: tuple[Any, ...], reason: str) -> None:
    table, bad = clicks.check(log(("q", "kept", 1, 2, 1), row), "log.parquet")
    assert table.schema == clicks.SCHEMA
    assert table["item_id"].to_pylist() == ["kept"]
    assert [(b.kind, b.source, b.reason) for b in bad] == [("click", "log.parquet", reason)]
    assert bad[0].id == f"{row[0]}/{row[1]}"
    assert len(bad[0].message) <= 300


@pytest.mark.parametrize(
    "positions",
    [
        [" 3 ", "three", None],
        [3.0, 3.5, float("nan")],
        [Decimal(3), Decimal("3.5"), None],
        pa.array([3, 2**64 - 1, None], pa.uint64()),
        pa.array(["3", "1e3", ""]).dictionary_encode(),
    ],
    ids=["text", "float", "decimal", "unsigned", "dictionary"],
)
def test_positions_of_every_type_are_read_as_whole_numbers(positions: Any) -> None:
    ids = {"query_id": ["q"] * 3, "item_id": [1, 2, 3]}
    table, bad = clicks.check(pa.table({**ids, "position": positions, "clicked": [1, 0, 1]}), "log.csv")
    assert table["position"].to_pylist() == [3]
    assert table["item_id"].to_pylist() == ["1"]
    assert [b.reason for b in bad] == ["not_a_number"] * 2


@pytest.mark.parametrize("name", ["clicked", "clicks"])
@pytest.mark.parametrize("values", [[True, False], [1, 0], ["true", "False"], [1.0, 0.0]], ids=str)
def test_single_events_are_one_impression_each(name: str, values: list[Any]) -> None:
    events = pa.table({"query_id": ["q", "q"], "item_id": ["i", "i"], "position": [1, 1], name: values})
    table, bad = clicks.check(events, "events.jsonl")
    assert (table["impressions"].to_pylist(), table["clicks"].to_pylist(), bad) == ([1, 1], [1, 0], [])
    assert clicks.totals(table).to_pylist()[0]["impressions"] == 2


def test_an_event_of_two_clicks_is_set_aside() -> None:
    events = pa.table({"query_id": ["q"], "item_id": ["i"], "position": [1], "clicked": [2]})
    assert [b.reason for b in clicks.check(events, "events.jsonl")[1]] == ["clicks_above_impressions"]


@pytest.mark.parametrize("missing", ["query_id", "item_id", "position", "clicks"])
def test_a_missing_column_is_named(missing: str) -> None:
    with pytest.raises(DataError, match=rf"log\.csv.*no {missing if missing != 'clicks' else 'clicked'}"):
        clicks.check(log(("q", "i", 1, 2, 1)).drop_columns([missing]), "log.csv")


def test_ids_that_are_no_plain_value_are_refused() -> None:
    table = log(("q", "i", 1, 2, 1)).set_column(0, "query_id", pa.array([["q"]]))
    with pytest.raises(DataError, match="query_id"):
        clicks.check(table, "log.parquet")


def test_a_column_of_lists_holds_no_number() -> None:
    table = log(("q", "i", 1, 2, 1)).set_column(2, "position", pa.array([[1]]))
    assert [b.reason for b in clicks.check(table, "log.parquet")[1]] == ["not_a_number"]


def test_an_empty_log_is_checked_too() -> None:
    table, bad = clicks.check(clicks.SCHEMA.empty_table(), "log.parquet")
    assert (table.num_rows, bad) == (0, [])


NUMBERS = st.none() | st.integers(-2, 12) | st.sampled_from([10**12, 10**13, 0.5, -0.5, 1e300])
WORDS = st.none() | st.sampled_from(["", "1", " 2 ", "+3.0", "true", "-1", "1e3", "x", "9" * 400, "0x1", "１"])
IDS = st.sampled_from(["", "a", "b", None])


@given(st.lists(st.tuples(IDS, IDS, WORDS, WORDS, WORDS), max_size=6))
def test_each_row_of_words_is_used_as_it_reads_or_set_aside(rows: list[tuple[str | None, ...]]) -> None:
    columns = [pa.array([row[n] for row in rows], pa.string()) for n in range(5)]
    table, bad = clicks.check(pa.table(columns, names=clicks.SCHEMA.names), "log.csv")
    known = {"1": 1, " 2 ": 2, "+3.0": 3, "true": 1, "-1": -1}
    good = []
    for query, item, *words in rows:
        position, impressions, clicked = (known.get(word or "") for word in words)
        if query and item and None not in (position, impressions, clicked):
            assert position is not None
            assert impressions is not None
            assert clicked is not None
            if position >= 1 and 0 <= clicked <= impressions:
                good.append((query, item, position, impressions, clicked))
    assert [tuple(row.values()) for row in table.to_pylist()] == good
    assert len(bad) == len(rows) - len(good)


@given(st.lists(st.tuples(IDS, IDS, NUMBERS, NUMBERS, NUMBERS), max_size=6))
def test_each_row_of_numbers_is_used_or_set_aside(rows: list[tuple[Any, ...]]) -> None:
    kinds = [pa.string()] * 2 + [pa.float64()] * 3
    columns = [pa.array([row[n] for row in rows], kind) for n, kind in enumerate(kinds)]
    table, bad = clicks.check(pa.table(columns, names=clicks.SCHEMA.names), "log.parquet")
    assert table.num_rows + len(bad) == len(rows)
    assert {one.reason for one in bad} <= set(clicks.REASONS)


COUNTED = st.tuples(
    st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)
)


@given(st.lists(st.lists(COUNTED, max_size=5), max_size=4))
def test_totals_of_any_chunks_add_up(chunks: list[list[tuple[Any, ...]]]) -> None:
    tables = [log(*chunk) if chunk else clicks.SCHEMA.empty_table() for chunk in chunks]
    parts = [clicks.totals(table) for table in tables]
    found = clicks.totals(pa.concat_tables([clicks.SCHEMA.empty_table(), *parts]))
    expected: dict[tuple[Any, ...], list[int]] = {}
    for query, item, position, impressions, clicked in (row for chunk in chunks for row in chunk):
        sums = expected.setdefault((query, item, position), [0, 0])
        sums[0], sums[1] = sums[0] + impressions, sums[1] + clicked
    assert {tuple(row.values())[:3]: [*row.values()][3:] for row in found.to_pylist()} == expected
