"""Columns against a plain reading, a value at a time: grades, ids, joins."""

import re

import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from askew import columns

WORDS = (
    st.none() | st.text(st.sampled_from("0129.+-e \tx１"), max_size=5) | st.sampled_from(["1.0", "9" * 30, "E"])
)
NAMES = {"E": 3, "1": 7}


@given(st.lists(WORDS, max_size=6), st.sampled_from([{}, NAMES]))
@example([" 1 ", "+2.", "1.0", "01"], {})
def test_each_judgment_has_its_grade_or_is_set_aside(words: list[str | None], names: dict[str, int]) -> None:
    ids = [str(n) for n in range(len(words))]
    rows = {"item_id": pa.array(ids, pa.string()), "query_id": pa.array(ids, pa.string())}
    found = columns.graded(pa.table({**rows, "grade": pa.array(words, pa.string())}), names)
    expected = {}
    for at, word in zip(ids, words, strict=True):
        trimmed = (word or "").strip(" \t")
        if trimmed in names:
            expected[at] = names[trimmed]
        elif re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", trimmed):
            expected[at] = int(trimmed.partition(".")[0])
    kept = dict(zip(found.table["item_id"].to_pylist(), found.table["grade"].to_pylist(), strict=True))
    assert kept == expected
    assert sorted(one.id.partition("/")[0] for one in found.bad) == sorted(set(ids) - set(expected))


@given(st.lists(st.none() | st.floats() | st.integers(-9, 9).map(float) | st.sampled_from([2.0**53, -(2.0**60)])))
def test_each_float_is_an_id_or_set_aside(values: list[float | None]) -> None:
    table = pa.table({"item_id": pa.array(values, pa.float64()), "n": pa.array(range(len(values)), pa.int64())})
    found = columns.identified(table, "item", "x.parquet")
    whole = {
        n: None if value is None else str(int(value))
        for n, value in enumerate(values)
        if value is None or (abs(value) < 2**53 and value == int(value))
    }
    assert dict(zip(found.table["n"].to_pylist(), found.table["item_id"].to_pylist(), strict=True)) == whole
    assert len(found.bad) == len(values) - len(whole)


@given(st.lists(st.integers(0, 5) | st.none()), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99))))
def test_a_join_finds_the_first_row_of_a_key(keys: list[int | None], pairs: list[tuple[int, int]]) -> None:
    table = pa.table({"key": pa.array(keys, pa.int64())})
    other = pa.table(
        {"key": pa.array([k for k, _ in pairs], pa.int64()), "more": pa.array([v for _, v in pairs], pa.int64())}
    )
    first = {key: value for key, value in reversed(pairs)}
    found = columns.joined(table, "key", other)
    assert found["more"].to_pylist() == [None if key is None else first.get(key) for key in keys]
    kept = columns.distinct(other, "key")
    assert dict(zip(kept["key"].to_pylist(), kept["more"].to_pylist(), strict=True)) == first
