"""Negatives against a loop over every proposal, and each reason for masking one by itself."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from askew import negatives
from askew.negatives import KINDS, NONE, Kind, Mined, NegativeSettings, Pairs
from askew.register import ROW

Numbers = NDArray[np.int64]
Proposals = dict[Kind, tuple[Numbers, NDArray[np.bool_]]]
NUM_ITEMS = 12


def rows_of(num_rows: int = NUM_ITEMS, **columns: Any) -> NDArray[np.void]:
    """Register rows of items that have nothing in common but what is said."""
    rows = np.zeros(num_rows, ROW)
    rows["title"] = 1000 + np.arange(num_rows)
    for name, values in columns.items():
        rows[name] = values
    return rows


def pairs_of(*positives: tuple[int, int], known: tuple[tuple[int, int], ...] = ()) -> Pairs:
    query, item = np.array(positives, dtype=np.int64).reshape(-1, 2).T
    known_query, known_item = np.array([*positives, *known], dtype=np.int64).reshape(-1, 2).T
    return Pairs(query, item, known_query, known_item)


def proposed(*items: list[int], close: frozenset[int] = frozenset()) -> tuple[Numbers, NDArray[np.bool_]]:
    numbers = np.array(items, dtype=np.int64)
    return numbers, np.isin(numbers, list(close))


def kept(pairs: Pairs, rows: NDArray[np.void], *items: list[int], wanted: int = 2) -> list[list[int]]:
    """What is kept of random proposals."""
    settings = NegativeSettings(per_pair={"random": wanted})
    found: list[list[int]] = negatives.choose(pairs, {"random": proposed(*items)}, rows, settings)[0].tolist()
    return found


# --- choosing ------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pairs, Proposals, NDArray[np.void], NegativeSettings]:
    """A few pairs of few items that share titles and photos, and proposals of every kind."""
    few = st.lists(st.integers(0, 3), min_size=NUM_ITEMS, max_size=NUM_ITEMS)
    rows = rows_of(title=draw(few), photo=draw(few))
    judged = st.tuples(st.integers(0, 2), st.integers(0, NUM_ITEMS - 1))
    positives, known = draw(st.lists(judged, min_size=1, max_size=4)), draw(st.lists(judged, max_size=3))
    per_pair = draw(st.dictionaries(st.sampled_from(KINDS), st.integers(0, 3)))
    numbers, items = draw(st.integers(0, 6)), st.integers(NONE, NUM_ITEMS - 1)
    row = st.lists(items, min_size=numbers, max_size=numbers)
    table = st.lists(row, min_size=len(positives), max_size=len(positives))
    proposals = {kind: proposed(*draw(table), close=draw(st.frozensets(items))) for kind in per_pair}
    pairs = pairs_of(*sorted(positives), known=tuple(known))
    return pairs, proposals, rows, NegativeSettings(per_pair=per_pair)


def slow_reason(query: int, item: int, close: bool, pairs: Pairs, rows: NDArray[np.void]) -> str:
    known = {int(i) for q, i in zip(pairs.known_query, pairs.known_item, strict=True) if q == query}
    if item in known:
        return "known_positive"
    if rows["title"][item] in {rows["title"][i] for i in known}:
        return "same_title"
    if rows["photo"][item] and rows["photo"][item] in {rows["photo"][i] for i in known}:
        return "same_photo"
    return "margin" if close else ""


@given(cases())
def test_negatives_are_those_of_a_loop_over_every_proposal(
    case: tuple[Pairs, Proposals, NDArray[np.void], NegativeSettings],
) -> None:
    pairs, proposals, rows, settings = case
    table: list[list[int]] = [[] for _ in pairs.query]
    ledger: dict[str, Counter[str]] = {}
    for kind in (kind for kind in KINDS if settings.per_pair.get(kind)):
        count, wanted = ledger.setdefault(kind, Counter()), settings.per_pair[kind]
        for row, query in enumerate(pairs.query.tolist()):
            left: list[int] = []
            for item, close in zip(*(part[row].tolist() for part in proposals[kind]), strict=True):
                reason = slow_reason(query, item, close, pairs, rows)
                if item != NONE:
                    count.update(["proposed", f"masked_{reason}"] if reason else ["proposed"])
                if item != NONE and not reason and item not in left and item not in table[row]:
                    left.append(item)
            count["kept"] += len(left[:wanted])
            table[row] += (left + [NONE] * wanted)[:wanted]
    found, kinds, counts = negatives.choose(pairs, proposals, rows, settings)
    assert found.tolist() == table
    assert kinds == [kind for kind in KINDS for _ in range(settings.per_pair.get(kind, 0))]
    assert {kind: +count for kind, count in counts.items()} == {kind: +count for kind, count in ledger.items()}


@pytest.mark.parametrize(
    ("columns", "known", "reason"),
    [
        ({}, ((0, 5),), "known_positive"),
        ({"title": [7, 1, 2, 3, 4, 7, 6]}, (), "same_title"),
        ({"photo": [9, 1, 2, 3, 4, 9, 0]}, (), "same_photo"),
    ],
)
def test_a_proposal_that_may_be_a_positive_is_masked_and_counted(
    columns: dict[str, Any], known: tuple[tuple[int, int], ...], reason: str
) -> None:
    pairs, settings = pairs_of((0, 0), known=known), NegativeSettings(per_pair={"random": 2})
    found, _, ledger = negatives.choose(pairs, {"random": proposed([5, 6])}, rows_of(7, **columns), settings)
    assert found.tolist() == [[6, NONE]]
    assert +ledger["random"] == Counter({"proposed": 2, f"masked_{reason}": 1, "kept": 1})


def test_what_is_known_of_another_query_masks_nothing() -> None:
    assert kept(pairs_of((0, 0), (1, 5)), rows_of(), [5, 6], [0, 6]) == [[5, 6], [0, 6]]


def test_items_without_a_photo_do_not_look_alike() -> None:
    assert kept(pairs_of((0, 0)), rows_of(photo=0), [5, 6]) == [[5, 6]]


def test_what_is_too_close_is_masked() -> None:
    settings = NegativeSettings(per_pair={"model": 2})
    found, _, ledger = negatives.choose(
        pairs_of((0, 0)), {"model": proposed([5, 6, 7], close=frozenset({5}))}, rows_of(), settings
    )
    assert found.tolist() == [[6, 7]]
    assert ledger["model"]["masked_margin"] == 1


def test_an_item_proposed_again_is_kept_once() -> None:
    assert kept(pairs_of((0, 0)), rows_of(), [5, 5, 6, 5], wanted=3) == [[5, 6, NONE]]


def test_an_item_proposed_by_two_kinds_is_kept_once() -> None:
    settings = NegativeSettings(per_pair={"judged": 1, "random": 1})
    proposals: Proposals = {"judged": proposed([5]), "random": proposed([5, 6])}
    assert negatives.choose(pairs_of((0, 0)), proposals, rows_of(), settings)[0].tolist() == [[5, 6]]


def test_no_pairs_have_no_negatives() -> None:
    settings = NegativeSettings(per_pair={"random": 2})
    items = negatives.random(pairs_of(), np.arange(3), 2, np.random.default_rng(0))
    found, kinds, _ = negatives.choose(pairs_of(), {"random": (items, items > 0)}, rows_of(), settings)
    assert (found.shape, kinds) == ((0, 2), ["random", "random"])


# --- proposing -----------------------------------------------------------------------------------

TRIES = 500  # at so many draws each of a few items is missed by a chance below 10⁻³⁰


def test_random_items_are_of_the_pool_and_any_of_it() -> None:
    found = negatives.random(pairs_of((0, 0), (1, 1)), np.array([3, 5, 9]), TRIES, np.random.default_rng(0))
    assert [set(row) for row in found.tolist()] == [{3, 5, 9}, {3, 5, 9}]


def test_judged_items_are_those_judged_worse_for_the_query_and_all_of_them() -> None:
    worse_query, worse_item = np.array([0, 0, 2, 2, 2]), np.array([5, 6, 6, 7, 8])
    pairs = pairs_of((0, 0), (1, 1), (2, 2))
    found = negatives.judged(pairs, worse_query, worse_item, TRIES, np.random.default_rng(0))
    assert [set(row) for row in found.tolist()] == [{5, 6}, {NONE}, {6, 7, 8}]


def test_the_same_kind_with_other_traits_is_proposed_and_nothing_for_what_has_no_kind() -> None:
    rows = rows_of(8, kind=[1, 1, 1, 2, 2, 0, 0, 1], traits=[10, 10, 11, 10, 12, 10, 11, 13])
    pool = np.array([5, 6, 0, 1, 2, 3, 4])  # by kind; item 7 is not trained on
    pairs = pairs_of((0, 0), (0, 2), (0, 3), (0, 5))
    found = negatives.same_kind(pairs, pool, rows, TRIES, np.random.default_rng(0))
    assert [set(row) - {NONE} for row in found.tolist()] == [{2}, {0, 1}, {4}, set()]


def test_nothing_is_proposed_of_an_empty_pool() -> None:
    pairs, nothing, generator = pairs_of((0, 0)), np.empty(0, np.int64), np.random.default_rng(0)
    found = [
        negatives.random(pairs, nothing, 2, generator),
        negatives.judged(pairs, nothing, nothing, 2, generator),
        negatives.same_kind(pairs, nothing, rows_of(), 2, generator),
    ]
    assert {item for items in found for item in items.ravel().tolist()} <= {NONE}


# --- mined ---------------------------------------------------------------------------------------

SCORES = np.array([[1.0, 0.9, 0.8, 0.7, 0.6, -np.inf]], np.float32)
FOUND = Mined(np.array([[3, 4, 5, 6, 7, NONE]]), SCORES, SCORES[:, 2])  # the positive is item 5


def test_what_is_mined_is_passed_over_at_first_and_no_deeper_than_the_range() -> None:
    items, close = negatives.mined(FOUND, NegativeSettings(range_min=1, range_max=4), "bm25")
    assert items.tolist() == [[4, 5, 6]]
    assert not close.any()


@pytest.mark.parametrize(
    ("kind", "margin", "max_score", "close"),
    [
        ("model", None, None, 0),
        ("model", 0.0, None, 2),  # above 0.8
        ("model", 0.2, None, 4),  # above 0.64
        ("bm25", 0.2, None, 0),  # whose scores have no scale
        ("bm25", None, 0.75, 3),
        ("model", 0.0, 0.65, 4),
    ],
)
def test_what_scores_close_to_the_positive_or_above_the_highest_is_too_close(
    kind: Kind, margin: float | None, max_score: float | None, close: int
) -> None:
    settings = NegativeSettings(range_min=0, range_max=6, relative_margin=margin, max_score=max_score)
    assert negatives.mined(FOUND, settings, kind)[1].tolist() == [[place < close for place in range(6)]]
