"""Shards against an exact search in plain Python: any split and number of shards, every kind, ties, filters."""

import gc
import itertools
import json
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from askew import ann, artifacts, segments
from askew.ann import Design, Effort, Index, lists_of
from askew.errors import DataError
from askew.hits import Packed, merge, packed, shown
from askew.segments import Plan, assigned
from askew.shards import Shard

Hits = list[dict[str, Any]]
DIM = 4
FULL = Effort(lists=1 << 20, again=1 << 20, breadth=1 << 20)
KINDS = {
    "flat": {}, "ivf_flat": {"lists": 8}, "ivf_fp16": {"lists": 8}, "ivf_sq8": {"lists": 8},
    "ivf_pq": {"lists": 8, "refine": "fp32"}, "ivf_rabitq": {"lists": 8, "refine": "fp32"}, "hnsw": {},
}  # fmt: skip


def items(ids: Sequence[str]) -> pa.Table:
    rows = [{"item_id": i, "title": f"title of {i}", "fields": {"colour": "red"}, "image": b"jpeg"} for i in ids]
    return pa.Table.from_pylist(rows)


def make(
    root: Path, vectors: NDArray[np.float32], table: pa.Table | Sequence[str], cuts: Sequence[int],
    design: Design | None = None, effort: Effort | None = None,
) -> Path:  # fmt: skip
    """An index with a segment between each cut and the next."""
    table = table if isinstance(table, pa.Table) else items(table)
    with artifacts.draft(root, "index", {}, {}) as draft:
        empty = None
        if design is not None:
            empty = Index.trained(design, vectors)
            empty.write(draft.folder / segments.EMPTY)
        names = []
        for n, rows in enumerate(np.split(np.arange(len(vectors)), cuts)):
            names.append(f"segment-{n:05d}")
            segments.write(draft.folder / names[-1], vectors[rows], table.take(pa.array(rows)), empty, "release")
        segments.tell(draft, names, effort)
    return artifacts.place(root, "index", artifacts.key("index", {}, {}))


def flat(scores: NDArray[np.float64], ids: Sequence[str], k: int) -> list[list[str]]:
    """The k best of all items for each query, equal scores by id: all of them, sorted."""
    return [[i for _, i in sorted(zip(-row, ids, strict=True))][:k] for row in scores]


def asked(folder: Path, queries: NDArray[np.float32], k: int, num_shards: int, **how: Any) -> list[Hits]:
    """What the shards answer, merged, for each query."""
    answers, plan = [], Plan.read(folder)
    for number in range(num_shards):
        shard = Shard(plan, assigned(list(plan.segments), number, num_shards))
        found = shard.search(queries, k, **how)
        assert found.scores.shape == found.rows.shape
        if "where" not in how:
            assert found.scores.shape == (len(queries), min(k, shard.size))
        answers.append(shard.answer(found))
    return merge(answers, k)


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[str], list[int], int]:
    """Vectors of few whole numbers, so that scores are exact and many are equal; ids; cuts; dimensions."""
    ids = draw(st.lists(st.text("aB0-é😀", min_size=1), min_size=1, max_size=40, unique=True))
    dim = draw(st.integers(1, 5))
    vectors = np.random.default_rng(draw(st.integers(0, 99))).integers(-1, 2, (len(ids), dim))
    cuts = sorted(draw(st.sets(st.integers(1, len(ids) - 1)))) if len(ids) > 1 else []
    return vectors.astype(np.float32), ids, cuts, dim


@settings(deadline=None, max_examples=60)
@given(catalogues(), st.data())
def test_any_split_answers_as_one_flat_search(
    catalogue: tuple[NDArray[np.float32], list[str], list[int], int], data: st.DataObject
) -> None:
    vectors, ids, cuts, dim = catalogue
    k, num_shards = data.draw(st.integers(1, len(ids) + 5)), data.draw(st.integers(1, len(cuts) + 1))
    size = data.draw(st.sampled_from([1, 3, 20]))  # FAISS goes another way from 8 queries on
    queries = np.random.default_rng(size).integers(-2, 3, (size, dim)).astype(np.float32)
    exact = queries.astype(np.float64) @ vectors.T
    with tempfile.TemporaryDirectory() as root:
        found = asked(make(Path(root), vectors, ids, cuts), queries, k, num_shards)
    assert [[hit["item_id"] for hit in hits] for hits in found] == flat(exact, ids, k)
    for row, hits in zip(exact, found, strict=True):
        assert [hit["score"] for hit in hits] == [row[ids.index(hit["item_id"])] for hit in hits]


@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("num_shards", [1, 3, 5])
@pytest.mark.parametrize("k", [1, 10, 25, 5000])
def test_equal_vectors_stand_by_id_wherever_they_lie(
    tmp_path: Path, num_queries: int, num_shards: int, k: int
) -> None:
    random = np.random.default_rng(0)
    # Whole numbers, of which 32 bits hold every sum: on some processors a matrix product adds up equal vectors in
    # different orders by where they lie, and rounds them apart.
    distinct = random.integers(-99, 99, (30, 64)).astype(np.float32)
    of = random.permutation(np.arange(600) % 30)  # each vector is that of 20 items
    ids = [f"i{n}" for n in random.permutation(600)]
    queries = random.integers(-99, 99, (num_queries, 64)).astype(np.float32)
    exact = (queries.astype(np.float64) @ distinct.T)[:, of]
    found = asked(make(tmp_path, distinct[of], ids, [7, 100, 350, 599]), queries, k, num_shards)
    assert [[hit["item_id"] for hit in hits] for hits in found] == flat(exact, ids, k)
    scores = [[hit["score"] for hit in hits] for hits in found]
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :k], rtol=1e-4, atol=1e-4)


def sorted_by_hand(
    answers: Sequence[Sequence[Sequence[tuple[str, float]]]], k: int
) -> list[list[tuple[str, float]]]:
    """The k best of all shards' answers to each query; of an item twice, the better."""
    found = []
    for of_query in zip(*answers, strict=True):
        best: dict[str, float] = {}
        for item_id, score in itertools.chain(*of_query):
            best[item_id] = max(score, best.get(item_id, -np.inf))
        found.append(sorted(best.items(), key=lambda hit: (-hit[1], hit[0]))[:k])
    return found


HITS = st.lists(st.tuples(st.sampled_from("aB0é😀xyz"), st.sampled_from([-0.5, 0.0, 0.5, 1.0])), max_size=9)


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(HITS, min_size=n, max_size=n), min_size=1)),
    st.integers(0, 9),
)
def test_merging_is_sorting_whatever_the_order_of_shards(
    answers: list[list[list[tuple[str, float]]]], k: int
) -> None:
    def sent(answer: list[list[tuple[str, float]]]) -> Packed:
        every = list(itertools.chain(*answer))
        table = pa.table({"item_id": pa.array([i for i, _ in every], pa.string())})
        of = np.repeat(np.arange(len(answer)), [len(hits) for hits in answer])
        return packed(shown(table), np.array([s for _, s in every], np.float32), of, len(answer))

    wanted = sorted_by_hand(answers, k)
    for way in (answers, answers[::-1]):
        found = merge([sent(answer) for answer in way], k)
        assert [[(hit["item_id"], hit["score"]) for hit in hits] for hits in found] == wanted


def test_hits_of_a_catalogue_without_fields_have_none() -> None:
    items = pa.table({"item_id": ["a"], "title": ["A"], "fields": pa.nulls(1, pa.struct([("none", pa.null())]))})
    answer = packed(shown(items), np.array([0.5], np.float32), np.zeros(1, np.int64), 2)
    assert merge([answer], 3) == [[{"item_id": "a", "title": "A", "fields": {}, "score": 0.5}], []]


def test_a_hit_is_the_json_that_its_shard_wrote() -> None:
    fields = {"price": 1e-7, "tags": ["x", None], "new": True}
    row = {"item_id": 'a "1"', "title": "größe 👍🏽\n\\", "fields": fields}
    scores = np.array([0.5, -1e-7], np.float32)
    items = shown(pa.Table.from_pylist([row, {**row, "item_id": "b"}]))
    [[first, second]] = merge([packed(items, scores, np.zeros(2, np.int64), 1)], 2)
    assert json.loads(first.json) == first == {**row, "score": 0.5}
    assert json.loads(second.json) == second == {**row, "item_id": "b", "score": float(scores[1])}
    assert (len(first), [*first], first["fields"]) == (4, ["item_id", "title", "fields", "score"], row["fields"])
    assert repr(first) == repr({**row, "score": 0.5})


def test_what_is_shown_is_the_same_from_memory_and_when_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, queries = clustered(1, 60, 8, 6)
    shard = Shard(Plan.read(make(tmp_path, vectors, shop(60), [20, 40], Design(kind="flat", dim=8))))
    found = shard.search(queries, 7)
    rows = [*zip(*(shop(60)[n].to_pylist() for n in ("item_id", "title", "fields")), strict=True)]
    for kept in (20_000, 20_000, 3, 3):
        monkeypatch.setattr("askew.shards.KEPT_SHOWN", kept)
        told = [[(hit["item_id"], hit["title"], hit["fields"]) for hit in hits] for hits in shard.hits(found)]
        assert told == [[rows[row] for row in of] for of in found.rows.tolist()]


# --- kinds, efforts, filters and deletions -------------------------------------------------------


def clustered(seed: int, size: int, dim: int, num_queries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors around centres, and queries near some of them."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(12, dim))
    vectors = centres[random.integers(12, size=size)] + 0.4 * random.normal(size=(size, dim))
    queries = vectors[random.integers(size, size=num_queries)] + 0.2 * random.normal(size=(num_queries, dim))
    vectors, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    return vectors.astype(np.float32), queries.astype(np.float32)


def shop(size: int) -> pa.Table:
    """Items with fields to filter by: a tenth are red, a price of 0 to 99, and some are in no stock."""
    rows = [
        {
            "item_id": f"i{n * 7919 % size:04d}", "title": f"title {n}", "has_image": n % 4 > 0,
            "fields": {
                "colour": "red" if n % 10 == 0 else "blue", "price": float(n % 100), "stock": n % 3,
                "sold": bool(n % 2), "brand": None if n % 5 == 0 else "Acme",
            },
        }
        for n in range(size)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_every_kind_at_full_effort_answers_as_an_exact_search_over_any_number_of_shards(
    kind: str, seed: int, data: st.DataObject
) -> None:
    size, dim = data.draw(st.integers(20, 150)), 8
    vectors, queries = clustered(seed, size, dim, 5)
    vectors[size // 2 :] = vectors[: size - size // 2]  # ties
    ids = [f"i{n}" for n in np.random.default_rng(seed).permutation(size)]
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=6)))
    k, num_shards = data.draw(st.integers(1, size)), data.draw(st.integers(1, len(cuts) + 1))
    with tempfile.TemporaryDirectory() as root:
        folder = make(Path(root), vectors, ids, cuts, Design(kind=kind, dim=dim, **KINDS[kind]))
        every = [
            Index.read(p / segments.VECTORS, Plan.read(folder).design) for p in sorted(folder.glob("segment-*"))
        ]
        kept = np.concatenate([index.vectors(np.arange(index.size)) for index in every])
        found = asked(folder, queries, k, num_shards, effort=FULL)
    scores = queries.astype(np.float64) @ kept.T.astype(np.float64)
    at = {item_id: n for n, item_id in enumerate(ids)}
    for row, hits in zip(scores, found, strict=True):
        mine = [row[at[hit["item_id"]]] for hit in hits]
        np.testing.assert_allclose([hit["score"] for hit in hits], mine, atol=1e-5)
        np.testing.assert_allclose(mine, -np.sort(-row)[:k], atol=1e-5)
        told = [(-hit["score"], hit["item_id"]) for hit in hits]
        assert told == sorted(told)
        if kind == "flat":
            exact = [i for _, i in sorted(zip(-row.astype(np.float32), ids, strict=True))][:k]
            assert [hit["item_id"] for hit in hits] == exact


@pytest.mark.parametrize("kind", KINDS)
def test_shards_miss_no_more_than_one_index_at_the_same_effort(kind: str, tmp_path: Path) -> None:
    vectors, queries = clustered(0, 2000, 16, 50)
    design = Design(kind=kind, dim=16, **{**KINDS[kind], **({"lists": 32} if "lists" in KINDS[kind] else {})})
    folder = make(tmp_path, vectors, [f"i{n}" for n in range(2000)], list(range(250, 2000, 250)), design)
    effort = Effort(lists=3, again=40, breadth=16)
    truth = flat(queries.astype(np.float64) @ vectors.T, [f"i{n}" for n in range(2000)], 10)

    def recall(num_shards: int) -> float:
        found = asked(folder, queries, 10, num_shards, effort=effort)
        return (
            float(
                np.mean([len({h["item_id"] for h in hits} & set(t)) for hits, t in zip(found, truth, strict=True)])
            )
            / 10
        )

    one = recall(1)
    assert one > 0.5
    for num_shards in (2, 4, 8):
        assert recall(num_shards) >= one - 0.02  # the best are not spread quite evenly


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({"colour": "red"}, lambda n: n % 10 == 0),
        ({"price": {"gte": 10, "lt": 60}}, lambda n: 10 <= n % 100 < 60),
        ({"stock": [1, 2], "sold": True}, lambda n: n % 3 > 0 and n % 2 == 1),
        ({"or": [{"colour": "red"}, {"price": {"gt": 97.5}}], "not": {"brand": None}},
         lambda n: (n % 10 == 0 or n % 100 > 97) and n % 5 > 0),
        ({"has_image": False, "price": {"lte": 0}}, lambda n: n % 4 == 0 and n % 100 == 0),
        ({"colour": "green"}, lambda n: False),
    ],
)  # fmt: skip
def test_a_filter_is_part_of_the_search(
    kind: str, where: Any, passes: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("askew.shards.EXACT_BELOW", 20)  # so that the kinds' own search by filter is met too
    vectors, queries = clustered(1, 900, 16, 20)
    table = shop(900)
    ids = table["item_id"].to_pylist()
    folder = make(tmp_path, vectors, table, [200, 450, 700], Design(kind=kind, dim=16, **KINDS[kind]))
    passing = np.array([passes(n) for n in range(900)])
    scores = np.where(passing, queries.astype(np.float64) @ vectors.T, -np.inf)
    truth = flat(scores, ids, min(10, int(passing.sum())))
    found = asked(folder, queries, 10, 3, where=where, effort=Effort(lists=4, again=80, breadth=64))
    allowed = {i for i, p in zip(ids, passing, strict=True) if p}
    for hits, wanted in zip(found, truth, strict=True):
        assert len(hits) == len(wanted)  # k come back where k exist
        assert {hit["item_id"] for hit in hits} <= allowed
    same = [
        len({h["item_id"] for h in hits} & set(t)) / max(len(t), 1) for hits, t in zip(found, truth, strict=True)
    ]
    assert not allowed or np.mean(same) >= (1.0 if kind == "flat" else 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_k_come_back_where_the_effort_would_find_fewer(kind: str, tmp_path: Path) -> None:
    vectors, queries = clustered(2, 300, 8, 4)
    folder = make(tmp_path, vectors, [f"i{n}" for n in range(300)], [100], Design(kind=kind, dim=8, **KINDS[kind]))
    shard = Shard(Plan.read(folder))
    found = shard.search(queries, 300, effort=Effort(lists=1, breadth=16))
    assert found.rows.shape == (4, 300)
    assert all(sorted(row) == list(range(300)) for row in found.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_search_scores_every_item_whatever_the_kind(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors, queries = (random.normal(size=(n, 8)).astype(np.float32) for n in (300, 20))
    ids, design = [f"i{n:03d}" for n in range(300)], Design(kind=kind, dim=8, **KINDS[kind])
    folder = make(tmp_path, vectors, ids, [100], design, Effort(lists=1, breadth=10))
    shard = Shard(Plan.read(folder))
    held = np.concatenate([part.index.vectors(np.arange(part.items.num_rows)) for part in shard._every])
    scores = queries.astype(np.float64) @ held.T
    wanted = -np.sort(-scores, axis=1)[:, :10]
    assert kind in ("flat", "hnsw") or not np.allclose(shard.search(queries, 10).scores, wanted, atol=1e-5)
    assert np.allclose(shard.search(queries, 10, exact=True).scores, wanted, atol=1e-5)
    shard.delete(ids[:20])
    wanted = -np.sort(-scores[:, 20:], axis=1)[:, :10]
    assert np.allclose(shard.search(queries, 10, exact=True).scores, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_found_at_once_and_deletions_never_again(kind: str, tmp_path: Path) -> None:
    vectors, _ = clustered(3, 300, 8, 1)
    table = shop(300)
    ids = table["item_id"].to_pylist()
    folder = make(tmp_path, vectors, table, [100, 200], Design(kind=kind, dim=8, **KINDS[kind]))
    shard = Shard(Plan.read(folder))
    shard.delete([*ids[:50], "unknown"])
    shard.upsert(vectors[:2], table.slice(50, 2))  # items 50 and 51 move to where items 0 and 1 were
    new = table.slice(0, 1).set_column(0, "item_id", pa.array(["new"]))
    shard.upsert(-vectors[:1], new)
    assert shard.size == 300 - 50 + 1
    everything = shard.search(vectors[:1], 300, effort=FULL)
    [hits] = shard.hits(everything)
    assert sorted(h["item_id"] for h in hits) == sorted([*ids[50:], "new"])
    assert hits[0]["item_id"] == ids[50]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert hits[-1]["item_id"] == "new"
    shard.upsert(vectors[:1], new)
    shard.delete([ids[50]])
    [[best]] = shard.hits(shard.search(vectors[:1], 1))
    assert best["item_id"] == "new"
    assert shard.hits(shard.search(vectors[:1], 5, {"colour": "red", "brand": None}))[0][0]["item_id"] == "new"


def test_what_was_added_and_deleted_stays_deleted_when_more_is_added(tmp_path: Path) -> None:
    vectors, _ = clustered(5, 30, 8, 1)
    table = shop(30)
    shard = Shard(Plan.read(make(tmp_path, vectors[:20], table.slice(0, 20), [10])))
    added = table["item_id"].to_pylist()[20:]
    shard.upsert(vectors[20:25], table.slice(20, 5))
    shard.delete(added[:2])
    shard.upsert(vectors[25:], table.slice(25, 5))
    [hits] = shard.hits(shard.search(vectors[20:21], 30))
    assert len(hits) == shard.size == 28
    assert {hit["item_id"] for hit in hits}.isdisjoint(added[:2])


def test_the_fewer_pass_a_filter_the_wider_is_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("askew.shards.EXACT_BELOW", 0)
    vectors, queries = clustered(6, 2000, 16, 40)
    table = shop(2000)
    shard = Shard(Plan.read(make(tmp_path, vectors, table, [900], Design(kind="ivf_flat", dim=16, lists=32))))
    red = np.arange(0, 2000, 10)
    wanted = red[np.argsort(-queries @ vectors[red].T, axis=1)[:, :10]]
    found = shard.search(queries, 10, {"colour": "red"}, Effort(lists=2)).rows
    assert np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]) >= 0.97


def test_a_filter_that_does_not_fit_is_refused_before_anything_is_searched(tmp_path: Path) -> None:
    vectors, queries = clustered(4, 20, 8, 1)
    shard = Shard(Plan.read(make(tmp_path, vectors, shop(20), [10])))
    with pytest.raises(
        DataError, match=r"one of brand, colour, has_image, item_id, price, sold, stock; found 'size'"
    ):
        shard.search(queries, 3, {"size": 3})
    with pytest.raises(DataError, match="a number for 'price'; found"):
        shard.search(queries, 3, {"price": "low"})


def test_lists_grow_with_the_root_of_the_catalogue() -> None:
    assert [lists_of(n) for n in (1, 10_000, 1_000_000, 100_000_000)] == [16, 128, 1024, 8192]


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_fp16", "ivf_sq8", "ivf_rabitq"])
def test_without_a_gpu_nothing_changes_and_with_one_the_same_is_found(kind: str) -> None:
    lists = {} if kind == "flat" else {"lists": 4}
    made = Design.model_validate({"kind": kind, "dim": 16, **lists})
    random = np.random.default_rng(0)
    vectors, queries = (random.normal(size=(n, 16)).astype(np.float32) for n in (2000, 20))
    index = Index.trained(made, vectors)
    index.add(vectors)
    before = index.search(queries, 10, Effort(lists=4))
    assert index.accelerate() == (kind in ann.ON_GPU and faiss.get_num_gpus() > 0)
    scores, rows = index.search(queries, 10, Effort(lists=4))
    np.testing.assert_array_equal(rows, before[1])
    np.testing.assert_allclose(scores, before[0], rtol=1e-5)


def test_what_is_let_go_of_leaves_memory_at_once(tmp_path: Path) -> None:
    """Garbage of a large process is looked for so seldom that indexes would pile up with each release."""
    folder = make(tmp_path, np.eye(4, dtype=np.float32), list("abcd"), [2])
    shard = Shard(Plan.read(folder))
    shard.search(np.ones((1, 4), np.float32), 2, {"colour": "red"})
    shard.upsert(np.ones((1, 4), np.float32), items(["e"]).cast(shard._parts[0].items.schema))
    kept = [weakref.ref(part.index) for part in shard._every]
    gc.disable()
    try:
        del shard
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()
