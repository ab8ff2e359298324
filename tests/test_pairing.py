"""Pairs and evaluation sets against slow ones made of dictionaries, and buckets against what went in."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from askew import pairing, register, splits
from askew.cleaning import ALL
from askew.negatives import Mined, NegativeSettings
from askew.pairing import JUDGMENTS, QUERIES, Catalogue, Mine, Paired, PairSettings
from askew.records import Bad
from askew.register import ROW, Register
from askew.splits import ASIDE, NEW, SplitSettings

SPLITS = ["train", "val", ASIDE, NEW]
Query = tuple[str, str, str | None]  # its id, text, and split
Judgment = tuple[str, int, int, str | None]  # the query's id, the item's number, the grade, and the split
Grades = dict[tuple[str, str, int], int]  # of each query, split and item
Shop = tuple[list[Query], list[Judgment]]


def catalogue(folder: Path, item_splits: Sequence[str]) -> Catalogue:
    """Items i0, i1 … in these splits, those of `train` trained on."""
    rows = np.zeros(len(item_splits), ROW)
    ids = [f"i{number}" for number in range(len(rows))]
    rows["id"], rows["title"] = register.hashes(ids), np.arange(len(rows))
    rows["split"] = [SPLITS.index(name) for name in item_splits]
    np.save(folder / "part.npy", rows)
    items = Register.gather([folder / "part.npy"], folder / "register", [np.arange(4, dtype=np.uint8)])
    return Catalogue(items, pa.chunked_array([ids], pa.string()), SPLITS, ["train"])


def reasons(set_aside: list[Bad]) -> Counter[str]:
    return Counter(f"{record.kind}/{record.reason}" for record in set_aside)


def table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=False)) for row in rows], schema)


def paired(
    items: Catalogue,
    queries: Sequence[Query],
    judgments: Sequence[Judgment],
    bucket: int = 0,
    mine: Mine | None = None,
    **values: Any,
) -> Paired:
    wanted = PairSettings(**values)
    return pairing.pair(table(queries, QUERIES), table(judgments, JUDGMENTS), items, wanted, bucket, mine)


def pairs_of(found: Paired) -> list[tuple[str, str, str, int]]:
    return [(p["query_id"], p["query"], p["item_id"], p["grade"]) for p in found.pairs.to_pylist()]


def qrels_of(found: Paired) -> dict[tuple[str, str], int]:
    return {(q["query_id"], q["item_id"]): q["grade"] for q in found.qrels.to_pylist()}


@pytest.fixture
def shelf(tmp_path: Path) -> Catalogue:
    """Items 0 to 5 of training, 6 to 8 of evaluation, 9 set aside."""
    return catalogue(tmp_path, ["train"] * 6 + ["val"] * 3 + [ASIDE])


@pytest.fixture(scope="module")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Items of every split in turn."""
    return catalogue(tmp_path_factory.mktemp("shelves"), SPLITS * 3)


# --- into buckets --------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 30)), min_size=1, max_size=3), st.integers(1, 7))
def test_a_query_comes_back_whole_from_one_bucket_in_the_order_it_went(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], num_buckets: int
) -> None:
    folder, went = tmp_path_factory.mktemp("buckets"), list[tuple[str, str]]()
    paths = [folder / f"{number}.parquet" for number in range(len(files))]
    for number, (path, asked) in enumerate(zip(paths, files, strict=True)):
        rows = [(f"q{query}", f"text {number}.{place}") for place, query in enumerate(asked)]
        pairing.scatter(table(rows, QUERIES), num_buckets, path)
        went += rows
    buckets = [pairing.gathered(paths, bucket, QUERIES).to_pylist() for bucket in range(num_buckets)]
    came = [[(row["query_id"], row["query"]) for row in bucket] for bucket in buckets]
    homes = Counter(query for bucket in came for query in {query for query, _ in bucket})
    assert set(homes.values()) <= {1}
    for bucket in came:
        assert bucket == [row for row in went if row[0] in {query for query, _ in bucket}]
    assert sum(map(len, came)) == len(went)


def test_a_bucket_of_no_files_is_empty() -> None:
    assert pairing.gathered([], 0, JUDGMENTS).equals(JUDGMENTS.empty_table())


def test_a_bucket_holds_any_number_of_rows(tmp_path: Path) -> None:
    num_rows = 2**20 + 1
    rows = pa.table([pa.repeat("q", num_rows)], names=["query_id"])
    pairing.scatter(rows, 1, tmp_path / "0.parquet")
    assert pairing.gathered([tmp_path / "0.parquet"], 0, rows.schema).num_rows == num_rows


# --- cleaning ------------------------------------------------------------------------------------


def test_a_query_needs_an_id_and_a_readable_text_of_bounded_length() -> None:
    texts = {"q1": " Red\u00a0 MUG ", None: "blue", "": "blue", "q2": " \x00 ", "q3": None, "q4": "x" * 10_001}
    rows = pa.table({"query_id": list(texts), "query": list(texts.values())})
    clean, set_aside = pairing.clean_queries(rows, "file")
    assert clean.to_pylist() == [{"query_id": "q1", "query": "Red MUG", "split": None, "segment": None}]
    assert reasons(set_aside) == {"query/no_id": 2, "query/no_text": 2, "query/query_too_long": 1}
    assert {bad.source for bad in set_aside} == {"file"}


def test_a_query_may_be_a_number_and_keeps_split_and_segment() -> None:
    rows = pa.table({"query_id": ["q1"], "query": [42], "split": ["val"], "segment": ["shoes"]})
    clean, set_aside = pairing.clean_queries(rows, "file")
    assert clean.to_pylist() == [{"query_id": "q1", "query": "42", "split": "val", "segment": "shoes"}]
    assert clean.schema.equals(QUERIES)
    assert set_aside == []


def test_a_judgment_needs_a_known_item_and_a_grade_of_nought_or_more(shelf: Catalogue) -> None:
    rows = pa.table({"query_id": ["q"] * 4, "item_id": ["i3", "i99", "i2", "i98"], "grade": [0, 1, -1, -1]})
    clean, set_aside = pairing.clean_judgments(rows, shelf.register, "file")
    assert clean.to_pylist() == [{"query_id": "q", "item": 3, "grade": 0, "split": None}]
    assert [(bad.id, bad.reason) for bad in set_aside] == [
        ("q/i99", "unknown_item"), ("q/i2", "negative_grade"), ("q/i98", "negative_grade"),
    ]  # fmt: skip


# --- pairs ---------------------------------------------------------------------------------------


def test_the_highest_grade_of_repeated_judgments_counts(shelf: Catalogue) -> None:
    judgments = [("q", 1, 1, None), ("q", 1, 3, None), ("q", 1, 2, None), ("q", 0, 1, None)]
    found = paired(shelf, [("q", "mug", None)], judgments, positive_grade=2)
    assert pairs_of(found) == [("q", "mug", "i1", 3)]


def test_a_judgment_that_names_its_split_and_one_that_names_none_make_one_pair(shelf: Catalogue) -> None:
    found = paired(shelf, [("q", "mug", None)], [("q", 1, 1, "train"), ("q", 1, 2, None)])
    assert pairs_of(found) == [("q", "mug", "i1", 2)]


def test_a_query_of_several_splits_is_asked_in_each_under_an_id_of_its_own(shelf: Catalogue) -> None:
    queries = [("q", "mug", "val"), ("q", "mug", "test"), ("p", "cup", "val"), ("q", "mug", "train")]
    judgments = [("q", 6, 1, "val"), ("q", 7, 2, "test"), ("p", 8, 1, "val"), ("q", 0, 1, "train")]
    found = paired(shelf, queries, judgments)
    asked = {q["query_id"]: (q["query"], q["split"], q["segment"]) for q in found.queries.to_pylist()}
    assert asked == {
        "p": ("cup", "val", "val"), "q@val": ("mug", "val", "val"), "q@test": ("mug", "test", "test"),
    }  # fmt: skip
    assert qrels_of(found) == {("p", "i8"): 1, ("q@val", "i6"): 1, ("q@test", "i7"): 2}
    assert pairs_of(found) == [("q", "mug", "i0", 1)]


def test_a_query_id_that_each_split_gives_another_text_keeps_each(shelf: Catalogue) -> None:
    queries, judgments = [("1", "mug", "train"), ("1", "cap", "val")], [("1", 0, 1, "train"), ("1", 6, 1, "val")]
    found = paired(shelf, queries, judgments)
    assert pairs_of(found) == [("1", "mug", "i0", 1)]
    assert found.queries["query"].to_pylist() == ["cap"]


def test_another_query_of_an_id_is_set_aside_unless_it_is_the_same(shelf: Catalogue) -> None:
    queries = [("q", "mug", "train"), ("q", "cap", "train"), ("q", "mug", "train")]
    found = paired(shelf, queries, [("q", 0, 1, "train")])
    assert reasons(found.set_aside) == {"query/conflicting_id": 1}
    assert pairs_of(found) == [("q", "mug", "i0", 1)]


def test_a_judgment_of_a_query_that_its_split_does_not_have_is_set_aside(shelf: Catalogue) -> None:
    judgments = [("q", 0, 1, "train"), ("q", 6, 1, "val"), ("unheard", 0, 1, None)]
    found = paired(shelf, [("q", "mug", "train")], judgments)
    assert [(bad.id, bad.reason) for bad in found.set_aside] == [
        ("q/i6", "unknown_query"), ("unheard/i0", "unknown_query"),
    ]  # fmt: skip
    assert (found.queries.num_rows, found.pairs.num_rows) == (0, 1)


def test_what_is_set_aside_or_of_another_split_is_not_trained_on_and_counted(shelf: Catalogue) -> None:
    judgments = [("q", 0, 1, None), ("q", 6, 1, None), ("q", 7, 1, None), ("q", 9, 1, None)]
    found = paired(shelf, [("q", "mug", "train")], judgments)
    assert pairs_of(found) == [("q", "mug", "i0", 1)]
    assert (found.counts["judgments_aside"], found.counts["judgments_across_splits"]) == (1, 2)


def test_a_query_that_nothing_fits_is_set_aside(shelf: Catalogue) -> None:
    queries = [("q", "mug", "train"), ("p", "cup", "val")]
    found = paired(shelf, queries, [("q", 0, 1, None), ("p", 6, 0, None)], positive_grade=2)
    assert [(bad.id, bad.source, bad.reason) for bad in found.set_aside] == [
        ("q", "train", "no_positive"), ("p", "val", "no_positive"),
    ]  # fmt: skip
    assert (found.pairs.num_rows, found.queries.num_rows, found.qrels.num_rows) == (0, 0, 0)


def test_an_empty_bucket_is_paired_to_nothing(shelf: Catalogue) -> None:
    for make in ("given", "four"):
        found = paired(shelf, [], [], splits=SplitSettings(make=make))
        assert (found.pairs.num_rows, found.queries.num_rows, found.set_aside) == (0, 0, [])
        assert found.pairs.schema.equals(pairing.PAIRS)


def test_candidates_are_the_splits_of_judged_items(shelf: Catalogue) -> None:
    queries = [("q", "mug", "val"), ("p", "cup", "test")]
    found = paired(shelf, queries, [("q", 0, 1, None), ("q", 6, 0, None), ("p", 7, 1, None)])
    assert found.candidates == {"val": ["train", "val"], "test": ["val"]}


# --- negatives -----------------------------------------------------------------------------------

JUDGED: list[Judgment] = [("q", 0, 2, None), ("q", 1, 2, None), ("q", 2, 1, None), ("p", 3, 2, None)]
ASKED: list[Query] = [("q", "mug", "train"), ("p", "cup", "train")]


def test_negatives_carry_their_kind_and_are_no_positives(shelf: Catalogue) -> None:
    wanted = NegativeSettings(per_pair={"judged": 1, "random": 2})
    found = paired(shelf, ASKED, JUDGED, positive_grade=2, negatives=wanted).pairs.to_pylist()
    for row in found:
        named = {k: {n["item_id"] for n in row["negatives"] if n["kind"] == k} for k in ("judged", "random")}
        positives = {"i0", "i1"} if row["query_id"] == "q" else {"i3"}
        assert named["judged"] == ({"i2"} if row["query_id"] == "q" else set())
        assert named["random"] <= {f"i{n}" for n in range(6)} - positives
        assert len(named["random"]) == 2
    assert len(found) == 3


def test_what_is_mined_is_asked_by_its_text_once_for_each_pair(shelf: Catalogue) -> None:
    def mine(kind: str, texts: list[str], pairs: Any) -> Mined:
        assert kind == "bm25"
        assert [texts[q] for q in pairs.query] == ["cup", "mug", "mug"]
        found = np.tile(np.arange(6), (3, 1))
        return Mined(found, np.ones(found.shape, np.float32), np.ones(3, np.float32))

    wanted = NegativeSettings(per_pair={"bm25": 2}, range_min=0)
    found = paired(shelf, ASKED, JUDGED, mine=mine, positive_grade=2, negatives=wanted)
    mined = [[n["item_id"] for n in row["negatives"]] for row in found.pairs.to_pylist()]
    assert mined == [["i0", "i1"], ["i2", "i3"], ["i2", "i3"]]
    assert found.ledger["bm25"]["masked_known_positive"] == 5


def test_the_same_bucket_gives_the_same_rows_and_another_draws_others(tmp_path: Path) -> None:
    items = catalogue(tmp_path, ["train"] * 200)
    wanted = NegativeSettings(per_pair={"random": 5})
    one, again, other = (paired(items, ASKED, JUDGED, bucket, negatives=wanted) for bucket in (0, 0, 1))
    assert one.pairs.equals(again.pairs)
    assert pairs_of(one) == pairs_of(other)
    assert not one.pairs.equals(other.pairs)


# --- slow ones -----------------------------------------------------------------------------------


@st.composite
def shops(draw: st.DrawFn) -> Shop:
    """Queries and judgments that, each all or none, name their split; some judge an unknown query."""
    names = st.sampled_from(["train", "val", "test"])
    asked_in, judged_in = (names if draw(st.booleans()) else st.none() for _ in range(2))
    ids, items, grades = st.integers(0, 6), st.integers(0, 11), st.integers(0, 2)
    queries = draw(st.lists(st.tuples(ids, asked_in), max_size=10))
    judgments = draw(st.lists(st.tuples(ids, items, grades, judged_in), max_size=40))
    return (
        [(f"q{i}", f"words {i}", split) for i, split in queries],
        [(f"q{i}", item, grade, split) for i, item, grade, split in judgments],
    )


def slow_joined(queries: list[Query], judgments: list[Judgment]) -> tuple[Grades, int]:
    """The highest grade of each query, split and item; and how many judgments are of no query."""
    splits_of = defaultdict[str, set[str]](set)
    for query, _, split in queries:
        judged_in = {s or ALL for q, _, _, s in judgments if q == query}
        splits_of[query] |= {split} if split else judged_in or {ALL}
    best: Grades = {}
    lost = 0
    for query, item, grade, split in judgments:
        counts_in = splits_of[query] if split is None else splits_of[query] & {split}
        lost += not counts_in
        for name in counts_in:
            best[query, name, item] = max(best.get((query, name, item), 0), grade)
    return best, lost


def slow_evaluation(judged: Grades) -> tuple[dict[str, str], dict[tuple[str, str], int]]:
    """Split of each query that is asked, and its qrels, of those judged above nought somewhere."""
    asked = {(q, s) for (q, s, _), grade in judged.items() if grade}
    several = Counter(q for q, _ in asked)
    name = {(q, s): f"{q}@{s}" if several[q] > 1 else q for q, s in asked}
    rels = {(name[q, s], f"i{item}"): grade for (q, s, item), grade in judged.items() if (q, s) in asked}
    return {name[q, s]: s for q, s in asked}, rels


def check(found: Paired, trained: Grades, evaluated: Grades) -> None:
    pairs = sorted((q, f"words {q[1:]}", f"i{i}", grade) for (q, _, i), grade in trained.items() if grade)
    asked, rels = slow_evaluation(evaluated)
    assert sorted(pairs_of(found)) == pairs
    assert {q["query_id"]: q["split"] for q in found.queries.to_pylist()} == asked
    assert qrels_of(found) == rels
    assert found.queries.num_rows == len(asked)
    assert found.qrels.num_rows == len(rels)


@settings(max_examples=60)
@given(shops())
def test_given_splits_are_those_of_a_slow_join(shelves: Catalogue, shop: Shop) -> None:
    judged, lost = slow_joined(*shop)
    split = dict(enumerate(SPLITS * 3))
    judged = {key: grade for key, grade in judged.items() if split[key[2]] != ASIDE}
    trained = {k: grade for k, grade in judged.items() if k[1] in ("train", ALL) and split[k[2]] == "train"}
    evaluated = {k: grade for k, grade in judged.items() if k[1] not in ("train", ALL)}
    found = paired(shelves, *shop)
    check(found, trained, evaluated)
    assert reasons(found.set_aside)["judgment/unknown_query"] == lost


@settings(max_examples=60)
@given(shops(), st.integers(0, 20))
def test_the_four_splits_are_those_of_their_definition(shelves: Catalogue, shop: Shop, seed: int) -> None:
    share = SplitSettings(make="four", new_queries=0.5, in_domain=0.5)

    def drawn(query: str, salt: int) -> bool:
        words = register.hashes([f"words {query[1:]}"])
        return bool(splits.chosen(words, 0.5, seed, salt)[0])

    queries, judgments = shop
    anywhere, _ = slow_joined([(q, text, None) for q, text, _ in queries], [(*j[:3], None) for j in judgments])
    split = dict(enumerate(SPLITS * 3))
    judged = {k: grade for k, grade in anywhere.items() if split[k[2]] != ASIDE}
    old = {k: grade for k, grade in judged.items() if not drawn(k[0], 1) and split[k[2]] != NEW}
    trained_queries = {q for (q, _, _), grade in old.items() if grade}
    evaluated = {}
    for (query, _, item), grade in judged.items():
        new = drawn(query, 1), split[item] == NEW
        if any(new) or (query in trained_queries and drawn(query, 2)):
            name = {(True, True): "both_new", (True, False): "new_query", (False, True): "new_item"}
            evaluated[query, name.get(new, "in_domain"), item] = grade
    trained = {k: grade for k, grade in old.items() if split[k[2]] == "train"}
    found = paired(shelves, *shop, seed=seed, splits=share)
    check(found, trained, evaluated)
    used = {key[0] for part in (trained, evaluated) for key, grade in part.items() if grade}
    judged_in = {key[0] for part in (trained, evaluated) for key in part}
    without = [bad.id for bad in found.set_aside if bad.reason == "no_positive"]
    assert sorted(without) == sorted(judged_in - used)
