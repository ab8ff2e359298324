"""CSV and TSV against the standard library's reader: each row comes out as it is, or is set aside."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from askew import read_delimited
from askew.errors import DataError
from askew.read_delimited import Form
from askew.streams import Place

Read = tuple[list[list[str]], list[str]]
PIECES = st.sampled_from(["", "a", "é", '"', ",", "\t", " ", "\n", "\u2028", "\x0b", "\x85", "0", "x" * 40])
VALUES = st.lists(PIECES, max_size=4).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read(folder: Path, data: bytes, form: Form) -> Read:
    """Its rows, and why others were set aside."""
    (folder / "x.csv").write_bytes(data)
    chunks = list(read_delimited.read(Place(str(folder), "x.csv", "item"), form))
    rows = [list(row.values()) for chunk in chunks for row in chunk.table.to_pylist()]
    return rows, [one.reason for chunk in chunks for one in chunk.bad]


@given(st.lists(st.tuples(VALUES, VALUES), max_size=6), st.sampled_from([",", "\t"]))
def test_what_is_written_is_read_back(folder: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows([("one", "two"), *rows])
    assert read(folder, out.getvalue().encode(), Form(delimiter)) == ([list(row) for row in rows], [])


UNQUOTED = st.text(st.sampled_from('aé" 0\u2028\x0b\x85'), min_size=1, max_size=5)


@given(st.lists(st.lists(UNQUOTED, min_size=1, max_size=5), max_size=6), st.booleans())
@example([["1", "x\u2028y", "3"]], True)
def test_a_row_of_another_width_is_mended_or_set_aside(folder: Path, rows: list[list[str]], rest: bool) -> None:
    data = "\n".join(map(",".join, [["one", "two"], *rows])).encode()
    found, why = read(folder, data, Form(quoted=False, rest=rest))
    wide = [[row[0], ",".join(row[1:])] for row in rows if len(row) == 2 or (rest and len(row) > 2)]
    assert sorted(found) == sorted(wide)  # those that were mended come last of their chunk
    assert why == ["wrong_number_of_columns"] * (len(rows) - len(wide))


@given(st.lists(st.lists(UNQUOTED, min_size=2, max_size=2), min_size=1, max_size=6))
def test_without_a_header_the_first_row_is_one_of_them(folder: Path, rows: list[list[str]]) -> None:
    data = "\n".join(map(",".join, rows)).encode()
    assert read(folder, data, Form(header=False, quoted=False)) == (rows, [])


@given(st.binary(max_size=60), st.sampled_from([",", "\t"]), st.booleans(), st.booleans(), st.booleans())
@example(b"a,b\r1,2\r", ",", True, True, False)
@example(b"a\rb\n1\n", ",", True, False, False)
def test_any_bytes_are_rows_or_refused(
    folder: Path, data: bytes, delimiter: str, header: bool, quoted: bool, rest: bool
) -> None:
    try:
        rows, _ = read(folder, data, Form(delimiter, header, quoted, rest))
    except DataError:
        return
    assert len({len(row) for row in rows}) <= 1


@pytest.mark.parametrize("mark", [read_delimited.END, read_delimited.INVALID])
def test_a_row_of_the_marks_that_reading_uses_is_set_aside(folder: Path, mark: str) -> None:
    rows = ["one,two", "1,2", f"{mark},x", mark, "3,4", f"5,{mark}"]
    found, why = read(folder, "\n".join(rows).encode(), Form())
    assert (found, why) == ([["1", "2"], ["3", "4"]], ["invalid_utf8"] * 3)


def test_a_long_value_is_read_in_a_header_and_in_a_row_that_is_mended(folder: Path) -> None:
    long = "x" * 200_000
    assert read(folder, f"a,{long}\n1,2\n".encode(), Form()) == ([["1", "2"]], [])
    assert read(folder, f"a,b\n1,{long},3\n".encode(), Form(rest=True)) == ([["1", f"{long},3"]], [])
