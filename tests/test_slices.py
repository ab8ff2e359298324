"""Slices of queries, told from triplets."""

from pathlib import Path

import pyarrow as pa
import pytest

from askew import slices, tables
from askew.slices import Labels

ITEMS = [
    {"item_id": "a", "text": "Red striped mugs", "has_image": True, "fields": {"kind": "mug", "short": "Cup"}},
    {"item_id": "b", "text": "Mug", "has_image": False, "fields": {"kind": "mug", "short": None}},
    {"item_id": "c", "text": "Lamp", "has_image": True, "fields": {"kind": "lamp", "short": "Lamp"}},
]
QUERIES = [
    ("q1", "red striped mug", "word"), ("q2", "blue mug", "word"), ("q3", "lamp", ""), ("q4", "nothing", ""),
    ("q5", "lamp", ""),
]  # fmt: skip
QRELS = {"q1": {"a": 2, "b": 1}, "q2": {"a": 2, "b": 2}, "q3": {"c": 2}, "q4": {}, "q5": {"c": 2, "elsewhere": 2}}
ASKED = {"red striped mug": 20, "lamp": 4, "another": 9}


@pytest.fixture
def triplets(tmp_path: Path) -> Path:
    for number, rows in enumerate((ITEMS[:1], ITEMS[1:])):
        table = pa.Table.from_pylist(rows, pa.Table.from_pylist(ITEMS).schema)
        tables.write(tmp_path / "items" / f"part-{number}.parquet", table)
        asked = [text for text, count in ASKED.items() for _ in range(count // 2)]
        tables.write(tmp_path / "pairs" / f"part-{number}.parquet", pa.table({"query": asked}))
    return tmp_path


def labels(triplets: Path, **other: str) -> Labels:
    columns = zip(*QUERIES, strict=True)
    queries = pa.table({n: list(c) for n, c in zip(("query_id", "query", "segment"), columns, strict=True)})
    return slices.labels(triplets, queries, QRELS, least=2, **other)


def test_queries_are_labelled_by_what_is_known_of_them(triplets: Path) -> None:
    assert labels(triplets, kind_field="kind") == {
        "segment": ["word", "word", "none", "none", "none"],
        "query": ["seen", "new", "seen", "new", "seen"],
        "popularity": ["head", "never", "torso", "never", "torso"],
        "photos": ["all there", "some missing", "all there", "all there", "all there"],
        "titles": ["say it", "say some", "say it", "unknown", "say it"],
        "kind": ["mug", "mug", "lamp", "unknown", "lamp"],
    }


def test_titles_are_judged_by_what_is_read(triplets: Path) -> None:
    assert labels(triplets, text="short")["titles"] == ["say little", "say little", "say it", "unknown", "say it"]


def test_a_dimension_in_which_all_are_alike_is_left_out(triplets: Path) -> None:
    found = slices.labels(triplets, pa.table({"query_id": ["q3"], "query": ["lamp"], "segment": [""]}), QRELS, 2)
    assert found == {}
