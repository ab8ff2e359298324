import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from askew import artifacts, inputs, tables
from askew.errors import DataError
from askew.triplets import PrepareSettings, negatives, prepare

pytestmark = pytest.mark.usefixtures("cluster")


def shop(
    folder: Path, items: list[dict[str, Any]], qrels: str, queries: list[dict[str, Any]] | None = None
) -> Path:
    """Write a catalogue of one training split and an evaluation split without judgments."""
    (folder / "items" / "train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(items), folder / "items" / "train" / "part-0.parquet")
    asked = queries or [{"query_id": "q1", "query": "red mug"}, {"query_id": "q2", "query": "blue cap"}]
    (folder / "train.queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "train.qrels.tsv").write_text(qrels)
    return folder


def item(number: int, **other: Any) -> dict[str, Any]:
    return {"item_id": f"i{number}", "title": f"item {number}", "price": 1.5, "image": None, **other}


ITEMS = [item(n) for n in range(6)]
QRELS = "q1\t0\ti0\t3\nq1\t0\ti1\t3\nq1\t0\ti2\t1\nq2\t0\ti3\t3\n"


def made(data: Path, root: Path, **settings: Any) -> tuple[Path, artifacts.Manifest]:
    settings = {"max_quarantined_fraction": 1.0} | settings
    folder = Path(prepare(PrepareSettings(data=data, root=root, image_size=8, **settings))["artifact"])
    return folder, artifacts.read(folder, "triplets")


def quarantine(folder: Path) -> list[dict[str, str]]:
    return list(pq.read_table(folder / "quarantine").to_pylist())


def test_pairs_are_positives_with_a_negative_of_their_own_query(tmp_path: Path) -> None:
    folder, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS), tmp_path)
    pairs = pq.read_table(folder / "pairs").to_pylist()
    assert [(p["query_id"], p["item_id"], p["grade"]) for p in pairs] == [
        ("q1", "i0", 3),
        ("q1", "i1", 3),
        ("q2", "i3", 3),
    ]
    assert [p["negative_id"] for p in pairs[:2]] == ["i2", "i2"]  # judged worse for q1
    assert pairs[2]["negative_id"] != "i3"  # none judged worse: any other
    assert manifest.counts["items_without_image"] == 6
    assert manifest.counts["pairs"] == 3


def test_a_lower_positive_grade_makes_more_pairs(tmp_path: Path) -> None:
    _, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS), tmp_path, positive_grade=1)
    assert manifest.counts["pairs"] == 4


def test_the_drawn_catalogue_goes_through_whole(triplets_folder: Path, drawn_folder: Path) -> None:
    manifest = artifacts.read(triplets_folder, "triplets")
    assert manifest.counts["items"] == 300
    assert manifest.counts["quarantined"] == 0
    assert manifest.details["candidate_splits"] == ["train", "val"]
    assert manifest.details["made_up"]
    assert 0 < manifest.details["text_ceiling"]["val"] < 1
    source = pq.read_table(drawn_folder / "items" / "val").to_pylist()[0]
    row = next(
        r for r in pq.read_table(triplets_folder / "items").to_pylist() if r["item_id"] == source["item_id"]
    )
    assert row["split"] == "val"
    assert row["fields"]["colour"] == source["colour"]
    assert row["pixels"] == inputs.pixels(source["image"], 32).tobytes()


def test_the_same_data_is_found_done_and_gives_the_same_bytes(
    triplets_folder: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    settings = PrepareSettings(data=drawn_folder, root=tmp_path, image_size=32)
    first, again = prepare(settings), prepare(settings)
    assert (first["skipped"], again["skipped"]) == (False, True)
    one, other = (artifacts.read(Path(p), "triplets") for p in (first["artifact"], triplets_folder))
    assert one == other


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (item(0), "stands once"),
        (item(9, item_id=""), "item_id"),
        (item(9, item_id="a\nb"), "item_id"),
        (item(9, item_id="x" * 10_000), "item_id"),
        (item(9, item_id=None), "item_id"),
        (item(9, title=""), "text"),
        (item(9, title=None), "text"),
        (item(9, title="x" * 1_000_000), "text"),
    ],
    ids=["duplicate", "empty id", "newline", "long id", "no id", "empty title", "null title", "long title"],
)
def test_an_item_that_cannot_be_used_is_quarantined(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    folder, manifest = made(shop(tmp_path / "shop", [*ITEMS, bad], QRELS), tmp_path)
    assert manifest.counts["items"] == 6
    assert [q["kind"] for q in quarantine(folder)] == ["item"]
    assert reason in quarantine(folder)[0]["reason"]
    assert manifest.counts["quarantined"] == 1


@pytest.mark.parametrize("image", [b"", b"<html></html>", b"\xff\xd8\xff\xe0truncated"])
def test_an_item_with_a_broken_image_is_kept_as_text(tmp_path: Path, image: bytes) -> None:
    folder, manifest = made(shop(tmp_path / "shop", [*ITEMS, item(6, image=image)], QRELS), tmp_path)
    kept = pq.read_table(folder / "items").to_pylist()[6]
    assert (kept["item_id"], kept["has_image"], kept["pixels"]) == ("i6", False, None)
    assert [(q["kind"], q["id"]) for q in quarantine(folder)] == [("image", "i6")]
    assert manifest.counts["items_without_image"] == 7


@pytest.mark.parametrize(
    ("line", "reason"),
    [("q9\t0\ti0\t3", "known query"), ("q1\t0\ti99\t3", "known item"), ("q2\t0\ti4\t-1", "grade")],
)
def test_a_judgment_that_cannot_be_used_is_quarantined(tmp_path: Path, line: str, reason: str) -> None:
    folder, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS + line + "\n"), tmp_path)
    assert [q["kind"] for q in quarantine(folder)] == ["judgment"]
    assert reason in quarantine(folder)[0]["reason"]
    assert manifest.counts["pairs"] == 3


def test_an_empty_query_is_quarantined_with_its_judgments(tmp_path: Path) -> None:
    queries = [{"query_id": "q1", "query": "red mug"}, {"query_id": "q2", "query": " \x00 "}]
    folder, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS, queries), tmp_path)
    assert sorted(q["kind"] for q in quarantine(folder)) == ["judgment", "query"]
    assert manifest.counts["pairs"] == 2


def test_too_much_quarantine_fails_with_the_reasons_and_leaves_nothing(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS + "q9\t0\ti0\t3\n" * 5)
    with pytest.raises(DataError, match="a known query"):
        made(data, tmp_path / "root", max_quarantined_fraction=0.05)
    assert list((tmp_path / "root").iterdir()) == []


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        made(tmp_path / "absent", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="items/<split>"):
        made(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("items/train/part-0.parquet", b"PAR1 cut", "part-0.parquet"),
        ("train.queries.jsonl", b'{"query_id": "q1"', "train.queries.jsonl"),
        ("train.queries.jsonl", b'{"id": "q1", "query": "x"}', "query_id"),
        ("train.qrels.tsv", b"q1 0 i0 3\n", "train.qrels.tsv"),
        ("train.qrels.tsv", b"q1\t0\ti0\thigh\n", "train.qrels.tsv"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS)
    (data / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        made(data, tmp_path)


def test_negatives_are_never_positives() -> None:
    random = np.random.default_rng(0)
    judged = np.unique(random.integers(0, [40, 30], size=(400, 2)), axis=0)
    positive = random.random(len(judged)) < 0.5
    chosen = negatives(judged[:, 0], judged[:, 1], positive, 30, seed=0)
    right = {(q, i) for (q, i), p in zip(judged.tolist(), positive, strict=True) if p}
    asked = judged[positive, 0].tolist()
    assert len(chosen) == positive.sum()
    assert not [pair for pair in zip(asked, chosen.tolist(), strict=True) if pair in right]


def test_pixels_cells_come_back_as_they_went(triplets_folder: Path) -> None:
    batch = next(tables.batches(tables.parts(triplets_folder / "items"), ["pixels"], 4))
    cells = tables.pixels(batch["pixels"], 32)
    assert cells.shape == (4, 32, 32, 3)
    assert cells[2].tobytes() == batch["pixels"][2].as_py()
    assert (tables.pixels(pa.array([None], pa.binary()), 32) == 0).all()
