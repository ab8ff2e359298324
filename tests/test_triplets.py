import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from askew import artifacts, config, inputs, tables
from askew.errors import DataError
from askew.triplets import PrepareSettings, prepare

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).parent.parent


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
    settings = {"max_quarantined_fraction": 1.0, "image_size": 8} | settings
    folder = Path(prepare(PrepareSettings(data=data, root=root, **settings))["artifact"])
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
    judged, random = pairs[0]["negatives"]
    assert judged == {"item_id": "i2", "kind": "judged"}  # judged worse for q1
    assert random["kind"] == "random"
    assert random["item_id"] not in ("i0", "i1")
    assert [n["kind"] for n in pairs[2]["negatives"]] == ["random"]  # none is judged worse for q2
    assert pairs[2]["negatives"][0]["item_id"] != "i3"
    assert manifest.counts["items_without_image"] == 6
    assert manifest.counts["pairs"] == 3


def test_a_lower_positive_grade_makes_more_pairs(tmp_path: Path) -> None:
    _, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS), tmp_path, positive_grade=1)
    assert manifest.counts["pairs"] == 4


def test_the_drawn_catalogue_goes_through_whole(triplets_folder: Path, drawn_folder: Path) -> None:
    manifest = artifacts.read(triplets_folder, "triplets")
    assert manifest.counts["items"] == 300
    assert manifest.counts["quarantined"] == 0
    assert manifest.details["candidates"] == {"val": ["train", "val"]}
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
        (item(0, title="other"), "conflicting_id"),
        (item(9, item_id=""), "no_id"),
        (item(9, item_id="a\nb"), "unprintable_id"),
        (item(9, item_id="x" * 10_000), "id_too_long"),
        (item(9, item_id=None), "no_id"),
        (item(9, title=""), "no_text"),
        (item(9, title=None), "no_text"),
        (item(9, title="\x00\x07"), "no_text"),
        (item(9, title="x" * 1_000_000), "text_too_long"),
    ],
    ids=["conflict", "empty id", "newline", "long id", "no id", "empty title", "null title", "NUL", "long title"],
)
def test_an_item_that_cannot_be_used_is_quarantined(tmp_path: Path, bad: dict[str, Any], reason: str) -> None:
    folder, manifest = made(shop(tmp_path / "shop", [*ITEMS, bad], QRELS), tmp_path)
    assert manifest.counts["items"] == 6
    assert [q["kind"] for q in quarantine(folder)] == ["item"]
    assert quarantine(folder)[0]["reason"] == reason
    assert manifest.counts["quarantined"] == 1
    assert manifest.details["quarantined"] == {f"item/{reason}": 1}


def test_the_item_that_conflicts_is_named_in_whichever_file_it_lies(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS)
    again = [item(7), item(4, title="other"), item(8)]
    pq.write_table(pa.Table.from_pylist(again), data / "items" / "train" / "part-1.parquet")
    folder, _ = made(data, tmp_path)
    assert [(q["id"], q["reason"]) for q in quarantine(folder)] == [("i4", "conflicting_id")]


def test_a_repeated_item_is_counted_and_an_id_may_hold_a_slash(tmp_path: Path) -> None:
    folder, manifest = made(shop(tmp_path / "shop", [*ITEMS, item(0), item(7, item_id="a/b c")], QRELS), tmp_path)
    assert (manifest.counts["items"], manifest.counts["items_repeated"], quarantine(folder)) == (7, 1, [])
    assert "a/b c" in pq.read_table(folder / "items")["item_id"].to_pylist()


@pytest.mark.parametrize("image", [b"", b"<html></html>", b"\xff\xd8\xff\xe0truncated"])
def test_an_item_with_a_broken_image_is_kept_as_text(tmp_path: Path, image: bytes) -> None:
    folder, manifest = made(shop(tmp_path / "shop", [*ITEMS, item(6, image=image)], QRELS), tmp_path)
    kept = pq.read_table(folder / "items").to_pylist()[6]
    assert (kept["item_id"], kept["has_image"], kept["pixels"]) == ("i6", False, None)
    assert [(q["kind"], q["id"]) for q in quarantine(folder)] == [("image", "i6")]
    assert manifest.counts["items_without_image"] == 7


@pytest.mark.parametrize(
    ("line", "reason"),
    [("q9\t0\ti0\t3", "unknown_query"), ("q1\t0\ti99\t3", "unknown_item"), ("q2\t0\ti4\t-1", "negative_grade")],
)
def test_a_judgment_that_cannot_be_used_is_quarantined(tmp_path: Path, line: str, reason: str) -> None:
    folder, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS + line + "\n"), tmp_path)
    assert [q["kind"] for q in quarantine(folder)] == ["judgment"]
    assert quarantine(folder)[0]["reason"] == reason
    assert manifest.counts["pairs"] == 3


def test_an_empty_query_is_quarantined_with_its_judgments(tmp_path: Path) -> None:
    queries = [{"query_id": "q1", "query": "red mug"}, {"query_id": "q2", "query": " \x00 "}]
    folder, manifest = made(shop(tmp_path / "shop", ITEMS, QRELS, queries), tmp_path)
    assert sorted(q["kind"] for q in quarantine(folder)) == ["judgment", "query"]
    assert manifest.counts["pairs"] == 2


def test_too_much_quarantine_fails_with_the_reasons_and_leaves_nothing(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS + "q9\t0\ti0\t3\n" * 5)
    with pytest.raises(DataError, match="judgment/unknown_query"):
        made(data, tmp_path / "root", max_quarantined_fraction=0.05)
    assert not list((tmp_path / "root").glob("triplets-*"))


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        made(tmp_path / "absent", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="items/<split>"):
        made(tmp_path / "empty", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("items/train/part-0.parquet", b"PAR1 cut", "part-0.parquet"),
        ("train.queries.jsonl", b'{"id": "q1", "query": "x"}', "query_id"),
        ("train.qrels.tsv", b"", "judgments"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS)
    (data / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        made(data, tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("train.queries.jsonl", b'\n{"query_id": "q3"', "query/broken_line"),
        ("train.queries.jsonl", b'\n{"query_id": "q3", "query": "\xff"}', "query/invalid_utf8"),
        ("train.qrels.tsv", b"q1\t0\ti0\n", "judgment/wrong_number_of_columns"),
        ("train.qrels.tsv", b"q1\t0\ti0\thigh\n", "judgment/not_an_integer"),
    ],
)
def test_a_line_that_cannot_be_read_is_quarantined(tmp_path: Path, name: str, line: bytes, reason: str) -> None:
    data = shop(tmp_path / "shop", ITEMS, QRELS)
    (data / name).write_bytes((data / name).read_bytes() + line)
    _folder, manifest = made(data, tmp_path)
    assert manifest.details["quarantined"] == {reason: 1}
    assert manifest.counts["pairs"] == 3


def test_a_query_without_a_positive_is_quarantined(tmp_path: Path) -> None:
    queries = [{"query_id": f"q{n}", "query": f"query {n}"} for n in (1, 2, 3)]
    folder, _manifest = made(shop(tmp_path / "shop", ITEMS, QRELS + "q3\t0\ti5\t1\n", queries), tmp_path)
    assert [(q["kind"], q["id"], q["reason"]) for q in quarantine(folder)] == [("query", "q3", "no_positive")]


def test_what_shares_a_title_or_a_photo_with_evaluation_is_not_trained_on(tmp_path: Path) -> None:
    def photo(seed: int, quality: int = 90) -> bytes:
        rough = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))
        out = io.BytesIO()
        rough.resize((96, 96), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
        return out.getvalue()

    items = [item(n, image=photo(n)) for n in range(6)]
    data = shop(tmp_path / "shop", items, QRELS)
    (data / "items" / "val").mkdir()
    leaks = [
        item(10, title="ITEM 0", image=photo(10)),
        item(11, image=photo(1, quality=60)),
        item(12, image=photo(12)),
    ]
    pq.write_table(pa.Table.from_pylist(leaks), data / "items" / "val" / "part-0.parquet")
    (data / "val.queries.jsonl").write_text('{"query_id": "v1", "query": "red mug"}\n')
    (data / "val.qrels.tsv").write_text("v1\t0\ti10\t3\nv1\t0\ti0\t3\n")
    folder, manifest = made(data, tmp_path, image_size=48)
    split = dict(pq.read_table(folder / "items").select(["item_id", "split"]).to_pydict().items())
    aside = [i for i, s in zip(split["item_id"], split["split"], strict=True) if s == "aside"]
    assert aside == ["i0", "i1"]
    assert manifest.counts["items_aside"] == 2
    assert manifest.counts["judgments_aside"] == 3
    assert [p["item_id"] for p in pq.read_table(folder / "pairs").to_pylist()] == ["i3"]
    assert manifest.details["candidates"] == {"val": ["val"]}


def test_without_splits_four_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"i{n},thing number {n},{n % 7}" for n in range(400)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,size", *rows]))
    (folder / "queries.csv").write_text("\n".join(["query_id,query", *(f"q{n},words {n}" for n in range(200))]))
    judged = [f"q{n},i{(n * 7 + m) % 400},{m % 2 + 1}" for n in range(200) for m in range(6)]
    (folder / "judgments.csv").write_text("\n".join(["query_id,item_id,grade", *judged]))
    out, manifest = made(folder, tmp_path, splits={"new_items": 0.2, "new_queries": 0.2, "in_domain": 0.2})
    queries, qrels = (pq.read_table(out / name).to_pylist() for name in ("queries", "qrels"))
    split = {row["item_id"]: row["split"] for row in pq.read_table(out / "items").to_pylist()}
    assert {q["split"] for q in queries} == {"in_domain", "new_query", "new_item", "both_new"}
    of = {q["query_id"]: q["split"] for q in queries}
    for row in qrels:
        assert split[row["item_id"]] == ("new" if of[row["query_id"]] in ("new_item", "both_new") else "train")
    pairs = pq.read_table(out / "pairs").to_pylist()
    trained = {p["query"] for p in pairs}
    for q in queries:
        assert q["split"] == "new_item" or (q["query"] in trained) == (q["split"] == "in_domain")
    assert {split[p["item_id"]] for p in pairs} == {"train"}
    assert len({q["query_id"] for q in queries}) == len(queries)
    assert 40 < sum(s == "new" for s in split.values()) < 120
    assert manifest.details["candidates"]["both_new"] == ["new"]
    assert pq.read_table(out / "items").schema.field("fields").type.field("size").type == pa.int64()


def test_clicks_become_judgments(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},thing {n}\n" for n in range(20)))
    (folder / "queries.csv").write_text("query_id,query\n" + "".join(f"q{n},words {n}\n" for n in range(20)))
    lines = ["query_id,item_id,position,impressions,clicks"]
    for n in range(20):
        lines += [
            f"q{n},i{n},5,100,30",
            f"q{n},i{(n + 1) % 20},1,100,20",
            f"q{n},i{(n + 2) % 20},5,100,1",
            f"q{n},i{(n + 3) % 20},5,100,1",
        ]
    lines += ["q0,i9,1,3,1", "q0,i9,1,3,4"]
    (folder / "clicks.csv").write_text("\n".join(lines))
    out, manifest = made(folder, tmp_path, splits={"make": "given"})
    pairs = pq.read_table(out / "pairs").to_pylist()
    assert {(p["query_id"], p["item_id"]) for p in pairs} == {(f"q{n}", f"i{n}") for n in range(20)}
    assert manifest.counts["clicks_too_few_impressions"] == 1
    assert manifest.details["quarantined"] == {"click/clicks_above_impressions": 1}


def test_ready_triplets_need_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [{"anchor": f"query {n}", "positive": f"thing {n}", "negative": f"thing {n + 1}"} for n in range(30)]
    (folder / "triplets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, manifest = made(folder, tmp_path, splits={"make": "given"})
    pairs = pq.read_table(out / "pairs").to_pylist()
    titles = {row["item_id"]: row["title"] for row in pq.read_table(out / "items").to_pylist()}
    assert manifest.counts["items"] == 31
    found = {(p["query"], titles[p["item_id"]], titles[p["negatives"][0]["item_id"]]) for p in pairs}
    assert found == {(r["anchor"], r["positive"], r["negative"]) for r in rows}
    assert manifest.counts["quarantined"] == 0


def test_mined_negatives_look_alike_and_are_masked(tmp_path: Path) -> None:
    items = [item(n, title=f"red mug number {n}") for n in range(12)] + [
        item(20 + n, title=f"blue cap {n}") for n in range(4)
    ]
    items.append(item(40, title="Red mug number 3"))  # the title of a positive
    qrels = "".join(f"q1\t0\ti{n}\t3\n" for n in range(4))
    negatives = {"per_pair": {"bm25": 2}, "range_min": 0, "range_max": 20}
    folder, _ = made(shop(tmp_path / "shop", items, qrels), tmp_path, negatives=negatives)
    for row in pq.read_table(folder / "pairs").to_pylist():
        assert {n["kind"] for n in row["negatives"]} == {"bm25"}
        assert {n["item_id"] for n in row["negatives"]} <= {f"i{n}" for n in range(4, 12)}
    ledger = json.loads((folder / "statistics.json").read_text())["categories"]["negatives"]
    assert ledger["bm25, masked known positive"] == 4 * 4
    assert ledger["bm25, masked same title"] == 4
    assert ledger["bm25, kept"] == 8


@pytest.mark.parametrize("unit_bytes", [2_000, 1 << 20])
def test_units_change_neither_order_nor_rows(tmp_path: Path, unit_bytes: int) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [{"item_id": f"i{n}", "title": f"thing {n}", "n": n} for n in range(500)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"query_id": f"q{n}", "query": f"words {n}"} for n in range(100)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "qrels.tsv").write_text("".join(f"q{n % 100}\t0\ti{n}\t1\n" for n in range(500)))
    out, _ = made(folder, tmp_path, unit_bytes=unit_bytes, splits={"make": "given"})
    assert pq.read_table(out / "items")["item_id"].to_pylist() == [r["item_id"] for r in rows]
    pairs = pq.read_table(out / "pairs").to_pylist()
    assert {(p["query_id"], p["item_id"]) for p in pairs} == {(f"q{n % 100}", f"i{n}") for n in range(500)}


def test_pixels_cells_come_back_as_they_went(triplets_folder: Path) -> None:
    batch = next(tables.batches(tables.parts(triplets_folder / "items"), ["pixels"], 4))
    cells = tables.pixels(batch["pixels"], 32)
    assert cells.shape == (4, 32, 32, 3)
    assert cells[2].tobytes() == batch["pixels"][2].as_py()
    assert (tables.pixels(pa.array([None], pa.binary()), 32) == 0).all()


def flat(folder: Path, items: list[dict[str, Any]], queries: list[dict[str, Any]], qrels: str) -> Path:
    """Write a shop as three files, whose items may name their splits."""
    folder.mkdir()
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels.tsv").write_text(qrels)
    return folder


def splits_of(folder: Path) -> dict[str, str]:
    rows = pq.read_table(folder / "items", columns=["item_id", "split"]).to_pylist()
    return {row["item_id"]: row["split"] for row in rows}


ASKED = [
    {"query_id": "q1", "query": "red mug", "split": "train"},
    {"query_id": "v", "query": "cap", "split": "val"},
]


@pytest.mark.parametrize("splits", [("train", "val"), ("val", "train")], ids="then".join)
def test_an_item_of_training_and_of_evaluation_is_evaluated(tmp_path: Path, splits: tuple[str, str]) -> None:
    items = [{"item_id": "a", "title": "mug", "split": "train"}]
    items += [{"item_id": "both", "title": "cap", "split": split} for split in splits]
    folder, manifest = made(flat(tmp_path / "shop", items, ASKED, "q1\t0\ta\t1\nv\t0\tboth\t1\n"), tmp_path)
    assert splits_of(folder) == {"a": "train", "both": "val"}
    assert (manifest.counts["items_repeated"], manifest.counts["items_aside"], manifest.counts["queries"]) == (
        1,
        0,
        1,
    )


def test_an_item_that_names_no_split_is_training_and_leaks_as_such(tmp_path: Path) -> None:
    items = [{"item_id": "a", "title": "cap"}, {"item_id": "b", "title": "Cap", "split": "val"}]
    items.append({"item_id": "c", "title": "mug"})
    folder, _ = made(flat(tmp_path / "shop", items, ASKED, "q1\t0\tc\t1\nv\t0\tb\t1\n"), tmp_path)
    assert splits_of(folder) == {"a": "aside", "b": "val", "c": "train"}


def test_the_settings_file_states_the_defaults(tmp_path: Path) -> None:
    stated = config.load(PrepareSettings, ROOT / "jobs" / "prepare.yaml", ["data=/d", f"root={tmp_path}"])
    assert stated == PrepareSettings(data="/d", root=tmp_path)
