"""Segments against an exact search in plain Python: any split, any number of shards, ties and damage."""

import tempfile
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

from askew import artifacts, segments
from askew.errors import ArtifactError
from askew.segments import ITEMS, VECTORS, Shard, assigned, merge

Hits = list[dict[str, Any]]
DIM = 4


def items(ids: Sequence[str]) -> pa.Table:
    rows = [{"item_id": i, "title": f"title of {i}", "fields": {"colour": "red"}, "image": b"jpeg"} for i in ids]
    return pa.Table.from_pylist(rows)


def make(root: Path, vectors: NDArray[np.float32], ids: Sequence[str], cuts: Sequence[int]) -> Path:
    """An index with a segment between each cut and the next."""
    with artifacts.draft(root, "index", {}, {}) as draft:
        for n, rows in enumerate(np.split(np.arange(len(ids)), cuts)):
            segments.write(draft.folder / f"segment-{n:05d}", vectors[rows], items([ids[r] for r in rows]))
        draft.details["dim"] = vectors.shape[1]
    return artifacts.place(root, "index", artifacts.key("index", {}, {}))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def flat(scores: NDArray[np.float64], ids: Sequence[str], k: int) -> list[list[str]]:
    """The k best of all items for each query, equal scores by id: all of them, sorted."""
    return [[i for _, i in sorted(zip(-row, ids, strict=True))][:k] for row in scores]


def asked(folder: Path, queries: NDArray[np.float32], k: int, num_shards: int) -> list[Hits]:
    """What the shards answer, merged, for each query."""
    answers = []
    for number in range(num_shards):
        shard = Shard(folder, assigned(names(folder), number, num_shards))
        found = shard.search(queries, k)
        assert found.scores.shape == found.rows.shape == (len(queries), min(k, shard.size))
        answers.append(shard.hits(found))
    return [merge(of_query, k) for of_query in zip(*answers, strict=True)]


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


@pytest.mark.parametrize("num_shards", range(1, 10))
def test_each_segment_is_of_one_shard_and_shards_differ_by_one_segment_at_most(num_shards: int) -> None:
    every = [f"segment-{n:05d}" for n in range(9)]
    shards = [assigned(every, number, num_shards) for number in range(num_shards)]
    assert sorted(name for shard in shards for name in shard) == every
    assert {len(shard) for shard in shards} <= {9 // num_shards, -(-9 // num_shards)}


@given(st.dictionaries(st.text(), st.sampled_from([-0.0, 0.0, 0.5, 1.0])), st.integers(1, 4), st.integers(0, 9))
def test_merging_is_sorting_whatever_the_order_of_shards(scores: dict[str, float], shards: int, k: int) -> None:
    hits = [{"item_id": i, "score": s} for i, s in sorted(scores.items(), key=lambda p: (-p[1], p[0]))]
    answers = [hits[n::shards] for n in range(shards)]
    assert merge(answers, k) == merge(answers[::-1], k) == hits[:k]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of 6 items in segments of 1, 2 and 3; item n is n times the first axis."""
    vectors = np.outer(np.arange(6), np.eye(DIM)[0]).astype(np.float32)
    return make(tmp_path, vectors, [f"i{n}" for n in range(6)], [1, 3])


def test_hits_are_for_display_and_hold_no_photo(index: Path) -> None:
    shard = Shard(index, names(index))
    [[first, second]] = shard.hits(shard.search(np.eye(1, DIM, dtype=np.float32), 2))
    assert first == {"item_id": "i5", "title": "title of i5", "fields": {"colour": "red"}, "score": 5.0}
    assert type(first["score"]) is float
    assert second["item_id"] == "i4"


def test_no_queries_and_no_hits_are_answered_as_such(index: Path) -> None:
    shard = Shard(index, names(index))
    assert shard.hits(shard.search(np.empty((0, DIM), dtype=np.float32), 3)) == []
    assert shard.hits(shard.search(np.ones((2, DIM), dtype=np.float32), 0)) == [[], []]


@pytest.mark.parametrize(
    "queries", [np.ones(DIM), np.ones((1, DIM + 1)), np.full((1, DIM), np.nan), np.full((1, DIM), np.inf)]
)
def test_queries_of_another_form_are_refused(index: Path, queries: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="finite and of shape"):
        Shard(index, names(index)).search(queries.astype(np.float32), 1)


def test_a_segment_opens_without_askew_in_one_order(index: Path) -> None:
    vectors = faiss.read_index(str(index / "segment-00002" / VECTORS)).reconstruct_n(0, 3)
    table = pa.ipc.open_file(pa.memory_map(str(index / "segment-00002" / ITEMS))).read_all()
    assert vectors[:, 0].tolist() == [3, 4, 5]
    assert table.to_pylist() == items(["i3", "i4", "i5"]).to_pylist()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("harm", ["remove", "empty", "truncate", "replace"])
@pytest.mark.parametrize("name", [VECTORS, ITEMS])
def test_a_damaged_file_is_refused_by_name_and_other_segments_are_not(
    index: Path, name: str, harm: str, verify: bool
) -> None:
    path = index / "segment-00001" / name
    content = {"empty": b"", "truncate": path.read_bytes()[:-9], "replace": bytes(200)}
    path.unlink() if harm == "remove" else path.write_bytes(content[harm])
    with pytest.raises(ArtifactError, match=f"segment-00001/{name}"):
        Shard(index, names(index), verify=verify)
    assert Shard(index, ["segment-00000", "segment-00002"], verify=verify).size == 4


@pytest.mark.parametrize("name", [VECTORS, ITEMS])
def test_every_flipped_byte_is_refused(index: Path, name: str) -> None:
    path = index / "segment-00001" / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=name):
            Shard(index, ["segment-00001"])


def test_an_absent_segment_or_index_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="segment-00009"):
        Shard(index, ["segment-00000", "segment-00009"])
    with pytest.raises(ArtifactError, match=r"no .*manifest\.json"):
        Shard(tmp_path / "absent", ["segment-00000"])


@pytest.mark.parametrize("verify", [True, False])
def test_files_of_different_segments_do_not_go_together(index: Path, verify: bool) -> None:
    (index / "segment-00001" / ITEMS).replace(index / "segment-00002" / ITEMS)
    with pytest.raises(ArtifactError):
        Shard(index, ["segment-00002"], verify=verify)


@pytest.mark.parametrize("kind", [faiss.IndexFlatIP(DIM + 1), faiss.IndexFlatL2(DIM)], ids=["width", "metric"])
def test_vectors_of_another_make_are_refused(index: Path, kind: Any) -> None:
    kind.add(np.ones((1, kind.d), dtype=np.float32))
    faiss.write_index(kind, str(index / "segment-00000" / VECTORS))
    with pytest.raises(ArtifactError, match=f"inner product over {DIM} dimensions"):
        Shard(index, ["segment-00000"], verify=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_refused_with_its_item(tmp_path: Path, bad: float) -> None:
    vectors = np.ones((3, DIM), dtype=np.float32)
    vectors[1, 2] = bad
    with pytest.raises(ArtifactError, match=r"1 that are not, of items \['b'\]"):
        segments.write(tmp_path / "segment", vectors, items(["a", "b", "c"]))


@pytest.mark.parametrize(("rows", "ids"), [(2, ["a"]), (0, [])])
def test_vectors_without_their_items_are_refused(tmp_path: Path, rows: int, ids: list[str]) -> None:
    with pytest.raises(ArtifactError, match=f"{rows} for {len(ids)}"):
        segments.write(tmp_path / "segment", np.ones((rows, DIM), dtype=np.float32), items(ids))


def test_a_segment_that_a_dead_worker_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "segment").mkdir()
    (tmp_path / "segment" / VECTORS).write_bytes(b"half")
    segments.write(tmp_path / "segment", np.ones((1, DIM), dtype=np.float32), items(["a"]))
    assert faiss.read_index(str(tmp_path / "segment" / VECTORS)).ntotal == 1
