"""JSON lines against the standard library's parser, a line at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import read_jsonl
from askew.streams import Place

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
OF_ONE_KIND = {
    "text": TEXT, "whole": st.integers(-(2**63), 2**63 - 1), "float": st.floats(-1e6, 1e6), "yes": st.booleans(),
    "list": st.lists(TEXT, max_size=3), "time": st.just("2024-01-01"),
}  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({}, optional={k: v | st.none() for k, v in OF_ONE_KIND.items()}), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read(folder: Path, data: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    (folder / "x.jsonl").write_bytes(data)
    chunks = list(read_jsonl.read(Place(str(folder), "x.jsonl", "item")))
    rows = [row for chunk in chunks for row in chunk.table.to_pylist()]
    return rows, [one.reason for chunk in chunks for one in chunk.bad]


@given(ROWS, st.booleans())
def test_what_is_written_is_read_back(folder: Path, rows: list[dict[str, Any]], ascii_only: bool) -> None:
    found, why = read(folder, "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode())
    told = [{name: value for name, value in row.items() if value is not None} for row in found]
    assert told == [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert why == []


PIECES = [
    b"{}", b'{"a": 1}', b'{"a": "x"}', b'{"a": [1, "x"]}', b'{"a": NaN}', b"[1]", b"3", b"{", b"\xff", b" ", b"\0",
    b'{"a": "\\ud800"}', b'{"a": 1}{"a": 2}', b"\xef\xbb\xbf", b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", b'{"": {"": null}}', b'{"a": {"b": 1}}', b"\r",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8).map(lambda b: b.replace(b"\n", b"")), max_size=6))
def test_each_line_is_a_row_or_set_aside(folder: Path, lines: list[bytes]) -> None:
    rows, why = read(folder, b"\n".join(lines))
    whole = b"\n".join(lines).removeprefix(read_jsonl.BOM).split(b"\n")
    assert len(rows) + len(why) == sum(bool(line.strip()) for line in whole)
    assert set(why) <= {"broken_line", "invalid_utf8", "not_an_object", "too_deep"}
