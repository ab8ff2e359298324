"""Values of fields counted, against a count in plain Python, in any number of parts and shards."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import facets

KINDS = pa.struct(
    [("colour", pa.string()), ("new", pa.bool_()), ("price", pa.float64()), ("stock", pa.int64()),
     ("tags", pa.list_(pa.string()))]
)  # fmt: skip
ROW = st.fixed_dictionaries({
    "colour": st.none() | st.sampled_from(["red", "blue", ""]), "new": st.none() | st.booleans(),
    "price": st.none() | st.floats(-9, 9), "stock": st.none() | st.integers(-9, 9),
    "tags": st.none() | st.just(["a"]),
})  # fmt: skip


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({"fields": pa.array(rows, KINDS)})


@given(st.lists(st.lists(st.tuples(ROW, st.booleans()), max_size=5), min_size=1, max_size=4), st.integers(1, 3))
def test_the_counts_are_those_of_all_items_together(
    parts: list[list[tuple[dict[str, Any], bool]]], cut: int
) -> None:
    given_ = [(table([row for row, _ in part]), np.array([kept for _, kept in part], bool)) for part in parts]
    counted = facets.added([facets.count(given_[:cut]), facets.count(given_[cut:])])
    rows = [row for part in parts for row, kept in part if kept]
    told = {one["name"]: one for one in facets.shown(counted, 9)}
    assert list(told) == [field.name for field in KINDS]
    for name in ("colour", "new"):
        wanted = Counter(row[name] for row in rows if row[name] is not None)
        assert {one["value"]: one["items"] for one in told[name]["values"]} == wanted
        assert (told[name]["items"], told[name]["distinct"]) == (wanted.total(), len(wanted))
    for name in ("price", "stock"):
        values = [row[name] for row in rows if row[name] is not None]
        assert (told[name]["least"], told[name]["greatest"]) == (
            min(values, default=None),
            max(values, default=None),
        )
        assert (told[name]["items"], told[name]["values"]) == (len(values), [])
    assert told["tags"]["kind"] == "other"


def test_the_most_frequent_values_come_first_and_no_more_than_wanted() -> None:
    rows = [{"colour": colour} for colour in "abbcccddd"]
    [colour, *_] = facets.shown(facets.count([(table(rows), None)]), 3)
    assert colour["values"] == [
        {"value": "c", "items": 3}, {"value": "d", "items": 3}, {"value": "b", "items": 2},
    ]  # fmt: skip
    assert colour["distinct"] == 4


def test_of_very_many_values_the_most_frequent_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facets, "KEPT", 2)
    [colour, *_] = facets.shown(facets.count([(table([{"colour": c} for c in "abbccc"]), None)]), 9)
    assert [one["value"] for one in colour["values"]] == ["c", "b"]
    assert colour["distinct"] == 3


def test_items_without_fields_have_none() -> None:
    assert facets.count([(pa.table({"item_id": ["a"]}), None)]) == {}
