"""Parts of a table are one table, wherever it is cut."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import tables


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 25), st.integers(0, 25), st.integers(1, 9)
)
def test_rows_of_parts_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, stop: int, size: int
) -> None:
    folder, numbers = tmp_path_factory.mktemp("parts"), np.arange(sum(sizes))
    for part, mine in enumerate(np.split(numbers, np.cumsum(sizes)[:-1])):
        tables.write(folder / f"{part:03d}.parquet", pa.table({"n": pa.array(mine, pa.int64())}))
    found = [
        n for batch in tables.rows(tables.parts(folder), ["n"], size, start, stop) for n in batch["n"].to_pylist()
    ]
    assert found == numbers[start:stop].tolist()
    assert tables.column(tables.parts(folder), "n").to_pylist() == numbers.tolist()
    batches = tables.batches(tables.parts(folder), ["n"], size)
    assert [n for batch in batches for n in batch["n"].to_pylist()] == numbers.tolist()


@given(st.lists(st.booleans(), max_size=12))
def test_cells_of_photos_are_the_photos_again(has: list[bool]) -> None:
    there = np.array(has, np.bool_)
    photos = np.random.default_rng(0).integers(1, 255, (int(there.sum()), 2, 2, 3), dtype=np.uint8)
    found = tables.pixels(tables.cells(photos, there), 2) if len(has) and there.any() else photos
    expected = np.zeros((len(has), 2, 2, 3), np.uint8) if there.any() else photos
    expected[there if there.any() else slice(0)] = photos if there.any() else 0
    assert (found == expected).all()


def test_a_part_that_was_not_finished_is_no_part(tmp_path: Path) -> None:
    with pytest.raises(KeyError), tables.opened(tmp_path / "a.parquet", pa.schema([("n", pa.int64())])):
        raise KeyError
    assert tables.parts(tmp_path) == []
