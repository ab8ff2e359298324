"""Segments on disk: they open without askew, and no damage to one is passed over."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from askew import artifacts, segments
from askew.ann import Design, Index
from askew.artifacts import MANIFEST
from askew.errors import ArtifactError
from askew.segments import ITEMS, VECTORS, Plan, assigned
from askew.shards import Shard

DIM = 4


def items(ids: Sequence[str]) -> pa.Table:
    rows = [{"item_id": i, "title": f"title of {i}", "fields": {"colour": "red"}, "image": b"jpeg"} for i in ids]
    return pa.Table.from_pylist(rows)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of 6 items in segments of 1, 2 and 3; item n is n times the first axis."""
    vectors = np.outer(np.arange(6), np.eye(DIM)[0]).astype(np.float32)
    names = [f"segment-{n:05d}" for n in range(3)]
    with artifacts.draft(tmp_path, "index", {}, {}) as draft:
        for name, rows in zip(names, np.split(np.arange(6), [1, 3]), strict=True):
            segments.write(draft.folder / name, vectors[rows], items([f"i{n}" for n in rows]), None, "r1")
        segments.tell(draft, names)
    return artifacts.place(tmp_path, "index", artifacts.key("index", {}, {}))


def shard(index: Path, *names: str, verify: bool = True) -> Shard:
    return Shard(Plan.read(index), names or None, verify=verify)


@pytest.mark.parametrize("num_shards", range(1, 10))
def test_each_segment_is_of_one_shard_and_shards_differ_by_one_segment_at_most(num_shards: int) -> None:
    every = [f"segment-{n:05d}" for n in range(9)]
    shards = [assigned(every, number, num_shards) for number in range(num_shards)]
    assert sorted(name for shard in shards for name in shard) == every
    assert {len(shard) for shard in shards} <= {9 // num_shards, -(-9 // num_shards)}


def test_hits_are_for_display_and_hold_no_photo(index: Path) -> None:
    opened = shard(index)
    [[first, second]] = opened.hits(opened.search(np.eye(1, DIM, dtype=np.float32), 2))
    assert first == {"item_id": "i5", "title": "title of i5", "fields": {"colour": "red"}, "score": 5.0}
    assert type(first["score"]) is float
    assert second["item_id"] == "i4"


def test_no_queries_and_no_hits_are_answered_as_such(index: Path) -> None:
    opened = shard(index)
    assert opened.hits(opened.search(np.empty((0, DIM), dtype=np.float32), 3)) == []
    assert opened.hits(opened.search(np.ones((2, DIM), dtype=np.float32), 0)) == [[], []]


@pytest.mark.parametrize(
    "queries", [np.ones(DIM), np.ones((1, DIM + 1)), np.full((1, DIM), np.nan), np.full((1, DIM), np.inf)]
)
def test_queries_of_another_form_are_refused(index: Path, queries: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="finite and of shape"):
        shard(index).search(queries.astype(np.float32), 1)


def test_a_segment_opens_without_askew_in_one_order(index: Path) -> None:
    vectors = faiss.read_index(str(index / "segment-00002" / VECTORS)).reconstruct_n(0, 3)
    table = pa.ipc.open_file(pa.memory_map(str(index / "segment-00002" / ITEMS))).read_all()
    assert vectors[:, 0].tolist() == [3, 4, 5]
    assert table.to_pylist() == items(["i3", "i4", "i5"]).to_pylist()
    told = json.loads((index / "segment-00002" / MANIFEST).read_text())
    assert (told["counts"], told["inputs"], told["details"]["design"]["kind"]) == (
        {"items": 3},
        {"release": "r1"},
        "flat",
    )


@pytest.mark.parametrize("harm", ["remove", "empty", "truncate", "replace"])
@pytest.mark.parametrize("name", [VECTORS, ITEMS])
def test_a_damaged_file_is_refused_by_name_and_other_segments_are_not(index: Path, name: str, harm: str) -> None:
    path = index / "segment-00001" / name
    content = {"empty": b"", "truncate": path.read_bytes()[:-9], "replace": bytes(200)}
    path.unlink() if harm == "remove" else path.write_bytes(content[harm])
    with pytest.raises(ArtifactError, match=f"segment-00001/{name}"):
        shard(index)
    with pytest.raises(ArtifactError, match=f"segment-00001/{name}"):
        shard(index, verify=False)
    with pytest.raises(ArtifactError, match=f"segment-00001/{name}"):
        artifacts.read(index, "index")
    assert shard(index, "segment-00000", "segment-00002").size == 4


@pytest.mark.parametrize("name", [VECTORS, ITEMS])
def test_every_flipped_byte_is_refused(index: Path, name: str) -> None:
    path = index / "segment-00001" / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=name):
            shard(index, "segment-00001")


def test_every_flipped_byte_of_a_segments_manifest_is_refused_with_the_index(index: Path) -> None:
    path = index / "segment-00001" / MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"segment-00001/manifest\.json"):
            artifacts.read(index, "index")


def altered(index: Path, name: str, change: Any) -> None:
    """Change a manifest as someone would by hand."""
    path = index / name / MANIFEST if name else index / MANIFEST
    told = json.loads(path.read_text())
    change(told)
    told.pop("sum")
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("", lambda m: m.update(format=2), "format 2"),
        ("", lambda m: m["details"].pop("effort"), "no 'effort'"),
        ("", lambda m: m["details"].pop("design"), "an index's design"),
        ("", lambda m: m["details"]["segments"].append(m["details"]["segments"][0]), "stands there twice"),
        ("", lambda m: m["details"]["segments"][1].update(key="other"), "segment other in .*segment-00001"),
        ("", lambda m: m["details"].update(release="r2"), "of release r2"),
        ("", lambda m: m["details"]["design"].update(dim=8), "Flat in .*segment-00000"),
        ("", lambda m: m["details"].update(segments=[]), "segments inside of"),
        ("", lambda m: m["details"]["segments"][1].update(name="../segment-00001"), "segments inside of"),
        ("", lambda m: m["details"]["segments"][1].update(items=-1), "what an index tells"),
        ("", lambda m: m["details"]["segments"][1].pop("key"), "what an index tells"),
        ("segment-00001", lambda m: m.update(format=2), "format 2"),
        ("segment-00001", lambda m: m.update(inputs={}), "what a segment tells .* no 'release'"),
        ("segment-00001", lambda m: m.update(counts={}), "what a segment tells .* no 'items'"),
        ("segment-00001", lambda m: m["counts"].update(items=3), "3 vectors in .*segment-00001"),
        ("segment-00001", lambda m: m["details"]["design"].update(kind="ivf_flat"), "an index's design"),
    ],
)  # fmt: skip
def test_manifests_that_do_not_fit_are_refused(index: Path, name: str, change: Any, found: str) -> None:
    altered(index, name, change)
    with pytest.raises(ArtifactError, match=found):
        shard(index)


def test_an_index_of_another_release_is_refused(index: Path) -> None:
    assert Plan.read(index, "r1").release == "r1"
    with pytest.raises(ArtifactError, match=r"an index of release r2 in .*; found one of r1"):
        Plan.read(index, "r2")


def test_an_absent_segment_or_index_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="segment-00009"):
        shard(index, "segment-00000", "segment-00009")
    with pytest.raises(ArtifactError, match=r"no .*manifest\.json"):
        shard(tmp_path / "absent")


def test_a_half_built_index_is_never_taken_for_whole(tmp_path: Path) -> None:
    def break_off() -> None:
        with artifacts.draft(tmp_path, "index", {}, {}, resume=True) as draft:
            segments.write(draft.folder / "segment-00000", np.ones((1, DIM), np.float32), items(["a"]))
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    [left] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.name.startswith(".")
    with pytest.raises(ArtifactError, match=r"no .*manifest\.json"):
        Plan.read(left)


@pytest.mark.parametrize("verify", [True, False])
def test_files_of_different_segments_do_not_go_together(index: Path, verify: bool) -> None:
    (index / "segment-00001" / ITEMS).replace(index / "segment-00002" / ITEMS)
    with pytest.raises(ArtifactError):
        shard(index, "segment-00002", verify=verify)


def test_a_segment_in_the_place_of_another_is_refused(index: Path) -> None:
    (index / "segment-00001").rename(index / "aside")
    (index / "segment-00002").rename(index / "segment-00001")
    (index / "aside").rename(index / "segment-00002")
    with pytest.raises(ArtifactError, match=r"segment [0-9a-f]{12} in .*segment-00001"):
        shard(index)


@pytest.mark.parametrize("kind", [faiss.IndexFlatIP(DIM + 1), faiss.IndexFlatL2(DIM)], ids=["width", "metric"])
def test_vectors_of_another_make_are_refused(index: Path, kind: Any) -> None:
    kind.add(np.ones((1, kind.d), dtype=np.float32))
    faiss.write_index(kind, str(index / "segment-00000" / VECTORS))
    with pytest.raises(ArtifactError, match=f"inner product over {DIM} dimensions"):
        shard(index, "segment-00000", verify=False)


def test_vectors_of_another_kind_are_refused(index: Path) -> None:
    other = Index.trained(Design(kind="ivf_flat", dim=DIM, lists=1), np.eye(DIM, dtype=np.float32))
    other.add(np.ones((1, DIM), dtype=np.float32))
    other.write(index / "segment-00000" / VECTORS)
    with pytest.raises(ArtifactError, match=r"wanted Flat in .*; found IndexIVFFlat"):
        shard(index, "segment-00000", verify=False)


def test_numbers_of_another_type_are_refused(tmp_path: Path) -> None:
    halves, bytes_ = (Design.model_validate({"kind": k, "dim": DIM, "lists": 1}) for k in ("ivf_fp16", "ivf_sq8"))
    Index.trained(halves, np.eye(DIM, dtype=np.float32)).write(tmp_path / VECTORS)
    assert Index.read(tmp_path / VECTORS, halves).size == 0
    with pytest.raises(ArtifactError, match=r"wanted IVF1,SQ8 in .*; found IndexIVFScalarQuantizer"):
        Index.read(tmp_path / VECTORS, bytes_)


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


def test_an_item_that_stands_twice_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"each item once in .*; found \['a'\] more than once"):
        segments.write(tmp_path / "segment", np.ones((3, DIM), dtype=np.float32), items(["a", "b", "a"]))
    segments.write(index / "segment-00001", np.ones((1, DIM), dtype=np.float32), items(["i3"]), None, "r1")
    key = artifacts.read(index / "segment-00001", "segment").key
    altered(index, "", lambda m: m["details"]["segments"][1].update(key=key))
    with pytest.raises(ArtifactError, match=r"\['i3'\] more than once"):
        shard(index)


def test_a_segment_that_a_dead_worker_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "segment").mkdir()
    (tmp_path / "segment" / VECTORS).write_bytes(b"half")
    (tmp_path / ".segment.999999").mkdir()
    segments.write(tmp_path / "segment", np.ones((1, DIM), dtype=np.float32), items(["a"]))
    assert faiss.read_index(str(tmp_path / "segment" / VECTORS)).ntotal == 1
    assert [p.name for p in tmp_path.iterdir()] == ["segment"]
