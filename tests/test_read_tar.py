"""Tar files of any members: each is a part of a row, or set aside."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import read_tar
from askew.errors import DataError
from askew.streams import Place

NAMES = ("a", "b", "c/d", "../e", "/f", "g\udcff", "é")
ENDINGS = {
    "jpg": st.binary(max_size=4), "txt": st.sampled_from([b"mug", b"\xff", b""]),
    "json": st.sampled_from([b"{}", b'{"n": 1}', b'{"n": "x"}', b"[1]", b"{", b"\xff", b'{"n": "\\ud800"}']),
    "\udcff": st.binary(max_size=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def read(folder: Path, data: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    (folder / "x.tar").write_bytes(data)
    chunks = list(read_tar.read(Place(str(folder), "x.tar", "item")))
    for chunk in chunks:
        json.dumps(chunk.bad, ensure_ascii=False).encode()  # what is told of them is text
    rows = [row for chunk in chunks for row in chunk.table.to_pylist()]
    return rows, [one.reason for chunk in chunks for one in chunk.bad]


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


@given(st.data())
def test_each_key_with_a_whole_member_is_a_row(folder: Path, data: st.DataObject) -> None:
    pairs = st.tuples(st.sampled_from(NAMES), st.sampled_from(list(ENDINGS)))
    chosen = sorted(data.draw(st.sets(pairs, max_size=8)))
    members = {f"{name}.{ending}": data.draw(ENDINGS[ending]) for name, ending in chosen}
    rows, why = read(folder, archive(members))
    odd = [n for n in members if n.startswith(("../", "/")) or not n.isprintable() or "\udcff" in n]
    good = {n: content for n, content in members.items() if n not in odd}
    broken = {n for n, content in good.items() if n.endswith(".json") and not is_object(content)}
    keys = {n.partition(".")[0] for n in good} - {n.partition(".")[0] for n in broken}
    assert sorted(row["item_id"] for row in rows) == sorted(keys)
    unknown = [n for n, c in good.items() if n.endswith(".txt") and c == b"\xff" and n.partition(".")[0] in keys]
    assert len(why) == len(odd) + len(broken) + len(unknown)


def is_object(content: bytes) -> bool:
    try:
        told = json.loads(content)
        json.dumps(told, ensure_ascii=False).encode()
    except ValueError:
        return False
    return isinstance(told, dict)


@given(st.binary(max_size=300), st.integers(0, 2000))
def test_any_bytes_are_rows_or_refused(folder: Path, data: bytes, at: int) -> None:
    whole = archive({"a.json": b'{"n": 1}', "a.txt": b"mug", "b.jpg": b"\xff\xd8"})
    try:
        rows, _ = read(folder, whole[:at] + data + whole[at + len(data) :])
    except DataError:
        return
    assert all(isinstance(row["item_id"], str | int) for row in rows)
