"""Filters against a plain reading of the same conditions, an item at a time."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import filters
from askew.errors import DataError

ITEMS = pa.Table.from_pylist(
    [
        {"item_id": "a", "has_image": True, "fields": {"kind": "mug", "price": 5.0, "stock": 3, "sold": True}},
        {"item_id": "b", "has_image": False, "fields": {"kind": "mug", "price": 10.0, "stock": 0, "sold": False}},
        {"item_id": "c", "has_image": True, "fields": {"kind": "bag", "price": None, "stock": 7, "sold": None}},
        {"item_id": "d", "has_image": True, "fields": {"kind": None, "price": 99.5, "stock": None, "sold": True}},
    ],
    pa.schema({
        "item_id": pa.string(), "has_image": pa.bool_(),
        "fields": pa.struct({"kind": pa.string(), "price": pa.float64(), "stock": pa.int32(), "sold": pa.bool_()}),
    }),
)  # fmt: skip


def passing(where: Any, items: pa.Table = ITEMS) -> str:
    return "".join(np.array(items["item_id"].to_pylist())[filters.mask(where, items)])


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"kind": "mug"}, "ab"), ({"kind": ["mug", "bag"]}, "abc"), ({"kind": None}, "d"),
        ({"kind": ["mug", None]}, "abd"), ({"price": 10}, "b"), ({"price": {"gt": 5}}, "bd"),
        ({"price": {"gte": 5, "lt": 10.0}}, "a"), ({"stock": 3.0}, "a"), ({"stock": 3.5}, ""),
        ({"stock": {"lte": 3.5}}, "ab"), ({"stock": [10**30, 7]}, "c"), ({"sold": True}, "ad"),
        ({"has_image": False}, "b"), ({"item_id": ["c", "d", "x"]}, "cd"), ({"kind": {"gte": "m"}}, "ab"),
        ({"not": {"kind": "mug"}}, "cd"), ({"not": {"price": {"lt": 50}}}, "cd"),
        ({"kind": "mug", "sold": True}, "a"), ({"or": [{"kind": "bag"}, {"price": {"gt": 50}}]}, "cd"),
        ({"and": [{"has_image": True}, {"not": {"sold": True}}]}, "c"),
        ({"or": [{"kind": "bag"}, {"and": [{"kind": "mug"}, {"stock": 0}]}], "has_image": False}, "b"),
    ],
)  # fmt: skip
def test_conditions_mean_what_they_say(where: Any, ids: str) -> None:
    assert passing(where) == ids


def slowly(where: Any, item: dict[str, Any]) -> bool:
    """One item, in plain Python."""
    for key, value in where.items():
        if key in ("and", "or"):
            held = (all if key == "and" else any)(slowly(one, item) for one in value)
        elif key == "not":
            held = not slowly(value, item)
        else:
            own = item[key] if key in item else item["fields"][key]
            if isinstance(value, dict):
                signs = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}
                held = own is not None and all(getattr(float(own), signs[n])(float(v)) for n, v in value.items())
            else:
                held = own in (value if isinstance(value, list) else [value])
        if not held:
            return False
    return True


words, numbers = st.sampled_from(["mug", "bag", "x", None]), st.sampled_from([0, 3, 5.0, 7.5, 99.5, None])
bounds = st.dictionaries(
    st.sampled_from(["gt", "gte", "lt", "lte"]), st.sampled_from([0, 5, 7.5, 99.5]), min_size=1
)
leaves = st.one_of(
    st.fixed_dictionaries({"kind": words | st.lists(words, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"price": numbers | bounds | st.lists(numbers, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"stock": numbers | bounds}),
    st.fixed_dictionaries({"has_image": st.booleans(), "sold": st.sampled_from([True, False, None])}),
)


def groups(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries({"and": several}) | st.fixed_dictionaries({"or": several, "not": inner})


NAMES = st.sampled_from(
    ["kind", "price", "stock", "sold", "has_image", "item_id", "gt", "lte", "and", "or", "not"]
)


@given(st.recursive(leaves, groups, max_leaves=6))
def test_any_filter_is_what_plain_python_makes_of_it(where: Any) -> None:
    expected = "".join(item["item_id"] for item in ITEMS.to_pylist() if slowly(where, item))
    assert passing(where) == expected
    assert filters.canonical(where) == filters.canonical(dict(reversed(where.items())))


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({}, "found {}"), ([], r"found \[\]"), ("kind", 'found "kind"'), ({"not": []}, r"found \[\]"),
        ({"size": 3}, "one of has_image, item_id, kind, price, sold, stock; found 'size'"),
        ({"and": {}}, "a list of filters in 'and'"), ({"or": []}, "a list of filters in 'or'"),
        ({"kind": 3}, "a string for 'kind'; found 3"), ({"kind": {"lt": 3}}, "a string for 'kind'; found 3"),
        ({"price": "5"}, 'a number for \'price\'; found "5"'),
        ({"price": True}, "a number for 'price'; found true"),
        ({"price": float("nan")}, "a number for 'price'; found NaN"), ({"price": float("inf")}, "found Infinity"),
        ({"price": {}}, "bounds of 'price' among gt, gte, lt, lte"),
        ({"price": {"above": 3}}, "bounds of 'price'"),
        ({"price": {"gt": None}}, "a bound of 'price' that is a number; found null"),
        ({"sold": {"gt": False}}, "true or false for 'sold'; found bounds"), ({"sold": 1}, "true or false"),
        ({"kind": []}, "1 to 1000 values of 'kind'; found 0"), ({"kind": ["x"] * 1001}, "found 1001"),
        ({"kind": [["mug"]]}, "a string for 'kind'"),
        ({"or": [{"kind": "mug"}] * 65}, "at most 64 conditions; found 65"),
        (None, "found null"),
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_read_is_refused(where: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        filters.mask(where, ITEMS)


def test_a_filter_is_bounded_in_depth() -> None:
    where: Any = {"kind": "mug"}
    for _ in range(filters.MAX_DEPTH - 1):
        where = {"not": where}
    filters.mask(where, ITEMS)
    with pytest.raises(DataError, match="at most 8 levels"):
        filters.mask({"not": where}, ITEMS)


def test_fields_that_no_filter_compares_are_said_to_be_such() -> None:
    items = pa.table({"item_id": ["a"], "fields": [{"tags": ["x"]}]})
    with pytest.raises(DataError, match="no filter compares list"):
        filters.mask({"tags": "x"}, items)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ({"price": 10**400}, "a number for 'price'; found 1000"), ({"price": {"gt": -(10**400)}}, "found -1000"),
        ({"stock": {"lt": 10**400}}, "a number for 'stock'"), ({"kind": "\ud800"}, "a string for 'kind'"),
        ({"kind": {"gt": "a\udfff"}}, "a string for 'kind'"),
        ({"item_id": ["a", "\udc00"]}, "a string for 'item_id'"),
    ],
)  # fmt: skip
def test_what_json_can_say_and_no_column_hold_is_refused(where: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        filters.mask(json.loads(json.dumps(where)), ITEMS)


def test_fields_without_a_sign_are_compared_with_any_number() -> None:
    fields = pa.array([{"code": 0}, {"code": 200}, {"code": None}], pa.struct({"code": pa.uint8()}))
    items = pa.table({"item_id": ["a", "b", "c"], "fields": fields})
    asked = [({"code": 200}, "b"), ({"code": [-1, 0, 256]}, "a"), ({"code": {"gt": -1}}, "ab"), ({"code": -1}, "")]
    assert [passing(where, items) for where, _ in asked] == [ids for _, ids in asked]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, ANY, max_size=3))
def test_any_json_is_a_filter_or_refused(where: Any) -> None:
    try:
        found = filters.mask(where, ITEMS)
    except DataError:
        return
    assert found.shape == (4,)
