"""Parquet files of which bytes were changed: refused, or read as they were."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import read_parquet
from askew.errors import DataError
from askew.streams import Place

TABLE = pa.table(
    {"item_id": [str(n) for n in range(50)], "n": range(50), "tags": [["a"] * (n % 3) for n in range(50)]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def written() -> bytes:
    out = io.BytesIO()
    pq.write_table(TABLE, out, write_page_checksum=True, row_group_size=20)
    return out.getvalue()


WHOLE = written()
PAGES = WHOLE.rindex(b"PAR1") - int.from_bytes(WHOLE[-8:-4], "little") - 4  # what is before the footer


@given(st.integers(4, PAGES - 1), st.integers(1, 255))
def test_a_changed_page_is_refused_or_nothing_of_it_was_read(folder: Path, at: int, bits: int) -> None:
    (folder / "x.parquet").write_bytes(WHOLE[:at] + bytes([WHOLE[at] ^ bits]) + WHOLE[at + 1 :])
    place = Place(str(folder), "x.parquet", "item")
    try:
        groups = len(read_parquet.row_group_bytes(place))
        chunks = list(read_parquet.read(place, 0, groups))
    except DataError as error:
        found = str(error)
    else:
        found = "" if pa.concat_tables(c.table for c in chunks).equals(TABLE) else "other rows"
    assert "x.parquet" in found or not found


@given(st.integers(0, len(WHOLE)), st.binary(max_size=8))
def test_a_file_that_is_cut_short_is_refused(folder: Path, at: int, more: bytes) -> None:
    (folder / "x.parquet").write_bytes(WHOLE[:at] + more)
    if WHOLE[:at] + more != WHOLE:
        with pytest.raises(DataError, match=r"x\.parquet"):
            read_parquet.row_group_bytes(Place(str(folder), "x.parquet", "item"))
