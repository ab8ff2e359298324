import gzip
import hashlib
import io
import json
import sys
import tarfile
import warnings
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from askew import read_jsonl, sources, streams
from askew.errors import DataError
from askew.records import Bad
from askew.sources import Layout, Table
from askew.streams import Place


def rows_of(
    table: Table, data: object, kind: str = "item", unit_bytes: int = 64 << 20, **options: object
) -> tuple[list[dict[str, object]], list[Bad]]:
    chunks = [
        chunk
        for unit in sources.units(table, str(data), unit_bytes)
        for chunk in sources.read(json.loads(json.dumps(unit)), table, kind, **options)  # type: ignore[arg-type]
    ]
    return [row for c in chunks for row in c.table.to_pylist()], [bad for c in chunks for bad in c.bad]


def reasons(bad: list[Bad]) -> list[str]:
    return [b.reason for b in bad]


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(folder: Path, name: str, columns: dict[str, object], **options: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


ITEMS = [{"item_id": "a", "title": "red mug"}, {"item_id": "b", "title": "blue, mug"}]


# --- every format gives the same rows ------------------------------------------------------------


def as_file(folder: Path, ending: str) -> str:
    name = f"items.{ending}"
    if ending == "parquet":
        write_parquet(folder, name, {"item_id": ["a", "b"], "title": ["red mug", "blue, mug"]})
    elif ending.startswith("tar"):
        write_tar(folder / name, {f"{i['item_id']}.txt": i["title"].encode() for i in ITEMS})
    else:
        texts = {
            "jsonl": "".join(json.dumps(i) + "\n" for i in ITEMS),
            "csv": 'item_id,title\na,red mug\nb,"blue, mug"\n',
            "tsv": "item_id\ttitle\na\tred mug\nb\tblue, mug",
        }
        text = texts[ending.removesuffix(".gz").replace("ndjson", "jsonl")].encode()
        write(folder, name, gzip.compress(text) if ending.endswith(".gz") else text)
    return name


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "ending",
    ["parquet", "jsonl", "ndjson", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz", "tar", "tar.gz"],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    name = as_file(tmp_path, ending)
    assert rows_of(Table(files=(name,)), tmp_path) == (ITEMS, [])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_byte_order_marks_and_crlf_do_no_harm(tmp_path: Path, ending: str) -> None:
    path = tmp_path / as_file(tmp_path, ending)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert rows_of(Table(files=(path.name,)), tmp_path) == (ITEMS, [])


def test_a_remote_folder_reads_like_a_local_one() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/shop/items.jsonl", b"".join(json.dumps(i).encode() + b"\n" for i in ITEMS))
    table = Table(files=("*.jsonl",))
    assert rows_of(table, "memory://shop", unit_bytes=20) == (ITEMS, [])
    print_ = sources.fingerprint(table, "memory://shop")
    assert json.loads(print_["items.jsonl"])["size"] == 76
    memory.rm("/shop", recursive=True)


def test_the_data_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "shop [1]*"
    as_file_in = write(folder, "items.csv", "item_id,title\na,red mug\n")
    assert rows_of(Table(files=(as_file_in.name,)), folder)[0] == ITEMS[:1]


# --- units ---------------------------------------------------------------------------------------


def test_units_are_the_same_each_time_and_name_their_ranges(tmp_path: Path) -> None:
    write_parquet(tmp_path, "items/b.parquet", {"item_id": list(range(1000))}, row_group_size=100)
    write(tmp_path, "items/a.jsonl", '{"item_id": 1}\n' * 100)
    write(tmp_path, "items/c.csv", "item_id\n1\n")
    table = Table(files=("items/*",))
    units = sources.units(table, str(tmp_path), 500)
    assert units == sources.units(table, str(tmp_path), 500)
    assert [u["range"] for u in units if u["file"] == "items/a.jsonl"] == [[0, 500], [500, 1000], [1000, 1500]]
    groups = [u["range"] for u in units if u["file"] == "items/b.parquet"]
    assert [g[0] for g in groups[1:]] == [g[1] for g in groups[:-1]]
    assert (groups[0][0], groups[-1][1]) == (0, 10)
    assert units[-1]["range"] is None


def test_row_groups_are_read_in_parts_with_the_needed_columns_alone(tmp_path: Path) -> None:
    columns = {"id": list(range(1000)), "title": ["mug"] * 1000, "other": ["x"] * 1000}
    write_parquet(tmp_path, "items.parquet", columns, row_group_size=300)
    table = Table(files=("*.parquet",), columns={"item_id": "id"})
    rows, _ = rows_of(table, tmp_path, unit_bytes=1, rows=64, only=("item_id",))
    assert rows == [{"item_id": str(i)} for i in range(1000)]


def test_a_batch_of_large_rows_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("askew.read_parquet.MAX_CHUNK_BYTES", 10_000)
    images = [bytes([i]) * 1000 for i in range(100)]
    write_parquet(
        tmp_path, "i.parquet", {"item_id": list(range(100)), "title": ["x"] * 100, "image": images},
        compression="none", use_dictionary=False,
    )  # fmt: skip
    table = Table(files=("*.parquet",))
    sizes = [c.table.num_rows for u in sources.units(table, str(tmp_path)) for c in sources.read(u, table, "item")]
    assert max(sizes) <= 10
    assert sum(sizes) == 100


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from(["", " ", "1", '"äöü"', "[1]", '{"item_id": "x"}', '{"item_id": 12}', "{"])),
    st.integers(1, 60),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_ranges_give_every_line_once(lines: list[str], size: int, end: str, ended: bool) -> None:
    data = (end.join(lines) + (end if ended else "")).encode()
    memory = fsspec.filesystem("memory")
    memory.pipe("/ranges/x.jsonl", data)
    place = Place("memory://ranges", "x.jsonl", "item")
    whole = list(read_jsonl.read(place))
    parts = [c for start in range(0, max(len(data), 1), size) for c in read_jsonl.read(place, start, start + size)]
    found = [
        (
            [[*map(str, r.values())] for c in chunks for r in c.table.to_pylist()],
            [b for c in chunks for b in c.bad],
        )
        for chunks in (whole, parts)
    ]
    assert found[0] == found[1]
    assert sum(map(len, found[0])) == sum(1 for line in lines if line.strip())


def test_a_file_larger_than_a_block_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    write(tmp_path, "items.jsonl", "".join(f'{{"item_id": {i}, "title": "t"}}\n' for i in range(500)))
    rows, bad = rows_of(Table(files=("items.jsonl",)), tmp_path, unit_bytes=3000, rows=7)
    assert [row["item_id"] for row in rows] == [str(i) for i in range(500)]
    assert not bad


# --- broken JSON lines ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"item_id": "x", "title": ', "broken_line"),
        (b'{"item_id": "x"} {"item_id": "y"}', "broken_line"),
        (b'{"item_id": "x"}{"item_id": "y"}', "broken_line"),
        (b"\x00", "broken_line"),
        (b'{"item_id": "x", "title": "caf\xe9"}', "invalid_utf8"),
        (b'{"item_id": "x", "title": "\\ud800"}', "invalid_utf8"),
        (b"[1, 2]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"item_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "broken_line"),
        (b'{"item_id": ' + b"[" * 500 + b"]" * 500 + b"}", "too_deep"),
        (b'{"item_id": "' + b"x" * 6_000_000 + b'"}', "line_too_long"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)
def test_a_broken_line_is_set_aside_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    good = [json.dumps(i).encode() for i in ITEMS]
    write(tmp_path, "items.jsonl", b"\n".join([good[0], line, good[1]]) + b"\n")
    rows, bad = rows_of(Table(files=("items.jsonl",)), tmp_path)
    assert rows == ITEMS
    assert [(b.kind, b.source, b.reason) for b in bad] == [
        ("item", f"items.jsonl:byte {len(good[0]) + 1}", reason)
    ]
    assert len(bad[0].message) <= 300


def test_a_line_that_is_too_long_is_set_aside_at_a_range_border_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 64)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 100)
    lines = [json.dumps(i) for i in ITEMS]
    write(tmp_path, "items.jsonl", "\n".join([lines[0], "x" * 1000, lines[1], "y" * 1000]))
    for unit_bytes in (10, 50, 77, 5000):
        rows, bad = rows_of(Table(files=("items.jsonl",)), tmp_path, unit_bytes=unit_bytes)
        assert rows == ITEMS
        assert reasons(bad) == ["line_too_long"] * 2


def test_ids_of_mixed_types_become_text_and_large_ones_stay_exact(tmp_path: Path) -> None:
    ids = [1, "1x", 12345678901234567890, 9007199254740993, 2.0, 2**70]
    lines = [json.dumps({"item_id": i, "title": "t"}) for i in ids]
    write(tmp_path, "items.jsonl", "\n".join(lines))
    expected = ["1", "1x", "12345678901234567890", "9007199254740993", "2", str(2**70)]
    assert [r["item_id"] for r in rows_of(Table(files=("*.jsonl",)), tmp_path)[0]] == expected
    each = [r["item_id"] for r in rows_of(Table(files=("*.jsonl",)), tmp_path, unit_bytes=20)[0]]
    assert each == expected


def test_values_keep_their_types_and_text_like_a_time_stays_text(tmp_path: Path) -> None:
    row = {"item_id": "a", "title": "2024-01-01", "sizes": ["S", "M"], "box": {"at": "2024-01-01 10:00:00"}}
    write(tmp_path, "items.jsonl", json.dumps(row) + "\n" + json.dumps({"item_id": "b", "title": None}))
    rows, bad = rows_of(Table(files=("*.jsonl",)), tmp_path)
    assert rows == [row, {"item_id": "b", "title": None, "sizes": None, "box": None}]
    assert not bad


def test_nul_bytes_stay_in_values(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", b'{"item_id": "1", "title": "x\x00y"}\n{"item_id": "2", "title": "x\\u0000y"}\n')
    write(tmp_path, "b.csv", b"item_id,title\n3,x\x00y\n")
    rows, bad = rows_of(Table(files=("*.*",)), tmp_path)
    assert [r["title"] for r in rows] == ["x\x00y"] * 3
    assert not bad


def test_an_empty_object_is_a_row_without_values(tmp_path: Path) -> None:
    write(tmp_path, "items.jsonl", '{}\n{"item_id": "a", "title": "t"}\n')
    assert rows_of(Table(files=("*.jsonl",)), tmp_path)[0][0] == {"item_id": None, "title": None}


# --- broken CSV and TSV --------------------------------------------------------------------------


def test_rows_of_the_wrong_width_are_set_aside_alone(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", 'item_id,title\na,red mug\nx\ny,1,2\nb,"blue, mug"\n')
    rows, bad = rows_of(Table(files=("items.csv",)), tmp_path)
    assert rows == ITEMS
    assert [(b.source, b.reason) for b in bad] == [
        ("items.csv:row 3", "wrong_number_of_columns"),
        ("items.csv:row 4", "wrong_number_of_columns"),
    ]


def test_invalid_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", b'item_id,title\na,red mug\nx,caf\xe9\n\xff,1,2\nb,"blue, mug"\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, bad = rows_of(Table(files=("items.csv",)), tmp_path)
    assert rows == ITEMS
    assert reasons(bad) == ["invalid_utf8", "invalid_utf8"]
    assert "x" in {b.id for b in bad}


def test_a_quoted_value_may_hold_line_ends_and_a_stray_quote_is_text(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", 'item_id,title\na,"two\nlines, ""quoted"""\nb,12" pan\n')
    assert [r["title"] for r in rows_of(Table(files=("*.csv",)), tmp_path)[0]] == [
        'two\nlines, "quoted"',
        '12" pan',
    ]


@pytest.mark.parametrize("tail", ['c,"open\nd,x\n', 'c,"open\nd,x', '"open\nd,x\n'])
def test_a_quote_that_is_never_closed_is_told(tmp_path: Path, tail: str) -> None:
    write(tmp_path, "items.csv", f"item_id,title\na,red mug\n{tail}")
    rows, bad = rows_of(Table(files=("*.csv",)), tmp_path)
    assert rows == ITEMS[:1]
    assert reasons(bad) == ["unclosed_quote"]
    unquoted, bad = rows_of(Table(files=("*.csv",), quoted=False), tmp_path)
    assert len(unquoted) + len(bad) == 3


def test_a_quote_that_swallows_megabytes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", 'item_id,title\na,"x\n' + "b,some title\n" * 1_500_000)
    with pytest.raises(DataError, match="quote"):
        rows_of(Table(files=("*.csv",)), tmp_path)


def test_a_column_alone_needs_no_delimiter(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", "item_id\na\nb\n")
    rows, bad = rows_of(Table(files=("*.csv",), columns={"title": "=mug {item_id}"}), tmp_path)
    assert rows == [{"title": "mug a", "item_id": "a"}, {"title": "mug b", "item_id": "b"}]
    assert not bad


def test_what_a_row_has_too_much_may_belong_to_its_last_column(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", 'item_id,title\na,red, hot, mug\nb,mug\nc,"q, r",s\n')
    rows, bad = rows_of(Table(files=("*.csv",), rest=True), tmp_path)
    assert {r["item_id"]: r["title"] for r in rows} == {"a": "red, hot, mug", "b": "mug", "c": "q, r,s"}
    assert not bad


def test_names_that_stand_twice_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", "item_id,title,title\na,b,c\n")
    with pytest.raises(DataError, match="title"):
        rows_of(Table(files=("*.csv",)), tmp_path)


# --- empty and broken files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("items.parquet", b""),
        ("items.parquet", b"PAR1 and no more"),
        ("items.csv", b""),
        ("items.csv", b"\n\n"),
        ("items.tar", b""),
        ("items.tar", b"no tar file at all" * 100),
        ("items.csv.gz", gzip.compress(b"item_id,title\na,b\n" * 1000)[:-20]),
        ("items.jsonl.gz", b"no gzip"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, name, content)
    with pytest.raises(DataError, match=name):
        rows_of(Table(files=(name,)), tmp_path)


@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / as_file(tmp_path, ending)
    path.write_bytes(path.read_bytes()[: 700 if ending == "tar" else -30])
    with pytest.raises(DataError, match=path.name):
        rows_of(Table(files=(path.name,)), tmp_path)


def test_parquet_with_altered_pages_is_refused(tmp_path: Path) -> None:
    columns = {"item_id": [str(i) for i in range(10_000)], "title": ["x"] * 10_000}
    path = write_parquet(tmp_path, "items.parquet", columns, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"items\.parquet"):
        rows_of(Table(files=(path.name,)), tmp_path)


def test_invalid_utf8_in_parquet_costs_its_row_alone(tmp_path: Path) -> None:
    titles = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    write_parquet(tmp_path, "items.parquet", {"item_id": ["a", "b"], "title": titles})
    rows, bad = rows_of(Table(files=("*.parquet",)), tmp_path)
    assert rows == [{"item_id": "a", "title": "ok"}]
    assert reasons(bad) == ["invalid_utf8"]


@pytest.mark.parametrize("name", ["items.jsonl", "items.csv", "items.parquet"])
def test_a_file_without_rows_gives_none(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        write_parquet(tmp_path, name, {"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string())})
    else:
        write(tmp_path, name, "item_id,title" if name.endswith("csv") else "")
    assert rows_of(Table(files=(name,)), tmp_path) == ([], [])


@pytest.mark.parametrize("name", ["items.jsonl", "items.csv", "items.parquet"])
def test_a_missing_column_is_named_beside_those_found(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        write_parquet(tmp_path, name, {"sku": ["a"], "name": ["b"]})
    else:
        write(tmp_path, name, "sku,name\n" if name.endswith("csv") else '{"sku": "a", "name": "b"}\n')
    with pytest.raises(DataError) as told:
        rows_of(Table(files=(name,)), tmp_path)
    assert str(told.value) == f"wanted columns item_id, title in {name}; found name, sku; name them under columns"
    with pytest.raises(DataError, match="colour"):
        rows_of(Table(files=(name,), columns={"item_id": "sku", "title": "name", "color": "colour"}), tmp_path)


def test_a_pattern_that_finds_nothing_is_named(tmp_path: Path) -> None:
    as_file(tmp_path, "csv")
    with pytest.raises(DataError, match="missing"):
        sources.units(Table(files=("items.csv", "missing*.csv")), str(tmp_path))
    write(tmp_path, "items.xlsx", b"x")
    with pytest.raises(DataError, match="name its format"):
        sources.units(Table(files=("items.xlsx",)), str(tmp_path))


@pytest.mark.parametrize("pattern", ["../*.csv", "/etc/*", "a/../../b", "s3://x/*", ""])
def test_patterns_stay_inside_the_data_folder(pattern: str) -> None:
    with pytest.raises(ValidationError):
        Table(files=(pattern,))


def test_links_stay_inside_the_data_folder(tmp_path: Path) -> None:
    outside = write(tmp_path, "outside.csv", "item_id,title\na,b\n")
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "items.csv").symlink_to(outside)
    with pytest.raises(DataError, match="out of it"):
        sources.units(Table(files=("*.csv",)), str(inside))
    (inside / "items.csv").unlink()
    (inside / "items.csv").symlink_to(write(inside, "other.txt", "item_id,title\na,b\n"))
    assert len(rows_of(Table(files=("*.csv",)), inside)[0]) == 1


# --- columns -------------------------------------------------------------------------------------


def test_columns_are_renamed_made_up_and_taken_from_the_path(tmp_path: Path) -> None:
    write(tmp_path, "train/part.0.csv", "sku,name,brand\n7,mug,acme\n")
    columns = {
        "item_id": "sku", "title": "name", "shop": "=ours", "split": "@folder", "part": "@file",
        "image": "=images/{sku}.jpg", "key": "#name",
    }  # fmt: skip
    rows, _ = rows_of(Table(files=("*/*.csv",), columns=columns), tmp_path)
    key = "t" + hashlib.sha256(b"mug").hexdigest()[:16]
    assert rows == [
        {
            "item_id": "7", "title": "mug", "shop": "ours", "split": "train", "part": "part",
            "image": "images/7.jpg", "key": key, "brand": "acme",
        }
    ]  # fmt: skip


@pytest.mark.parametrize("meaning", ["", "@path"])
def test_an_unknown_meaning_is_refused(meaning: str) -> None:
    with pytest.raises(ValidationError):
        Table(files=("x.csv",), columns={"item_id": meaning})


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1, 2, None]), ["1", "2", None]),
        (pa.array([1.0, 2.0, None]), ["1", "2", None]),
        (pa.array(["01", " 2"]).dictionary_encode(), ["01", " 2"]),
        (pa.array(["x"], pa.large_string()), ["x"]),
        (pa.array([b"x"]), ["x"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
    ],
)
def test_ids_become_text(tmp_path: Path, ids: pa.Array, expected: list[str | None]) -> None:
    write_parquet(tmp_path, "items.parquet", {"item_id": ids, "title": ["t"] * len(ids)})
    assert [r["item_id"] for r in rows_of(Table(files=("*.parquet",)), tmp_path)[0]] == expected


def test_ids_that_are_no_whole_numbers_are_set_aside(tmp_path: Path) -> None:
    ids = [1.0, 1.5, float("nan"), float("inf"), 2.0**60]
    write_parquet(tmp_path, "items.parquet", {"item_id": ids, "title": ["t"] * 5})
    rows, bad = rows_of(Table(files=("*.parquet",)), tmp_path)
    assert [r["item_id"] for r in rows] == ["1"]
    assert [b.id for b in bad] == ["1.5", "nan", "inf", str(2.0**60)]
    assert set(reasons(bad)) == {"not_an_id"}


@pytest.mark.parametrize("ids", [pa.array([True]), pa.array([["a"]]), pa.array([{"a": 1}])])
def test_ids_of_another_type_are_refused(tmp_path: Path, ids: pa.Array) -> None:
    write_parquet(tmp_path, "items.parquet", {"item_id": ids, "title": ["t"]})
    with pytest.raises(DataError, match="item_id"):
        rows_of(Table(files=("*.parquet",)), tmp_path)


def test_rows_may_be_chosen_made_distinct_and_joined(tmp_path: Path) -> None:
    write(tmp_path, "items.csv", "item_id,title,locale\n1,a,us\n1,b,us\n2,c,es\n3,d,us\n")
    write(tmp_path, "urls.csv", "id,url\n3,http://x/3.jpg\n3,http://x/other.jpg\nbroken\n9,y\n")
    images = Table(files=("urls.csv",), columns={"item_id": "id", "image": "url"})
    table = Table(files=("items.csv",), where={"locale": "us"}, repeated=True, joins={"item_id": images})
    rows, bad = rows_of(table, tmp_path)
    assert [(r["item_id"], r["title"], r["image"]) for r in rows] == [
        ("1", "a", None),
        ("3", "d", "http://x/3.jpg"),
    ]
    assert reasons(bad) == ["wrong_number_of_columns"]
    assert set(sources.fingerprint(table, str(tmp_path))) == {"items.csv", "urls.csv"}


def test_a_table_too_large_to_be_joined_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_JOINED_BYTES", 10)
    as_file(tmp_path, "csv")
    table = Table(files=("items.csv",), joins={"item_id": Table(files=("items.csv",))})
    with pytest.raises(DataError, match="joined by item_id"):
        rows_of(table, tmp_path)


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / as_file(tmp_path, "csv")
    table = Table(files=("*.csv",))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sources.fingerprint(table, str(tmp_path)) == {"items.csv": expected}


# --- grades --------------------------------------------------------------------------------------


def judged(grades: pa.Array) -> pa.Table:
    ids = [str(i) for i in range(len(grades))]
    return pa.table({"query_id": ids, "item_id": ids, "grade": grades})


def test_grades_are_names_or_whole_numbers() -> None:
    table, bad = sources.graded(judged(pa.array(["E", " S ", "2", "+1", "1.0"])), {"E": 3, "S": 2})
    assert table["grade"].to_pylist() == [3, 2, 2, 1, 1]
    assert table["grade"].type == pa.int64()
    assert not bad
    assert sources.graded(judged(pa.array([2.0, -1.0])), {}).table["grade"].to_pylist() == [2, -1]


@pytest.mark.parametrize(
    ("grade", "names", "reason"),
    [
        ("X", {"E": 3}, "unknown_grade"),
        ("0.5", {}, "not_an_integer"),
        ("good", {}, "not_an_integer"),
        ("99999999999999999999", {}, "not_an_integer"),
        (0.5, {}, "not_an_integer"),
        (float("nan"), {}, "not_an_integer"),
        (None, {}, "no_grade"),
        ("", {"E": 3}, "no_grade"),
    ],
)
def test_what_is_no_grade_is_set_aside(grade: object, names: dict[str, int], reason: str) -> None:
    table, bad = sources.graded(judged(pa.array([grade])), names, "x.csv")
    assert table.num_rows == 0
    assert [(b.kind, b.id, b.source, b.reason) for b in bad] == [("judgment", "0/0", "x.csv", reason)]


# --- tar -----------------------------------------------------------------------------------------


def test_members_of_one_key_become_one_row(tmp_path: Path) -> None:
    members = {
        "a/1.jpg": b"jpeg", "a/1.json": b'{"title": "mug", "price": 3}', "a/2.png": b"png", "a/2.txt": b"pan",
        "a/2.cls": b"7", "3.json": b'{"item_id": "sku3", "title": "pot"}',
    }  # fmt: skip
    write_tar(tmp_path / "items-0.tar", members)
    rows, bad = rows_of(Table(files=("*.tar",)), tmp_path)
    assert [{k: v for k, v in r.items() if v is not None} for r in rows] == [
        {"item_id": "a/1", "title": "mug", "price": 3, "image": b"jpeg"},
        {"item_id": "a/2", "title": "pan", "image": b"png", "cls": "7"},
        {"item_id": "sku3", "title": "pot"},
    ]
    assert not bad


def test_members_that_lead_out_and_odd_ones_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("askew.read_tar.MAX_MEMBER_BYTES", 100)
    path = tmp_path / "items.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in {
            "../x.jpg": b"x", "/etc/y.jpg": b"y", "big.jpg": b"z" * 101, "bin.npy": b"\xff\xfe",
            "bad.json": b"{", "list.json": b"[]", "ok.jpg": b"1", "ok.2.jpg": b"2", "ok.txt": b"mug",
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    rows, bad = rows_of(Table(files=("items.tar",)), tmp_path)
    assert [r["item_id"] for r in rows if r["title"]] == ["ok"]
    assert reasons(bad) == [
        "unsafe_name", "unsafe_name", "too_large", "unknown_member", "broken_json", "broken_json",
        "more_than_one_image", "not_a_file",
    ]  # fmt: skip
    assert not [r for r in rows if r["item_id"] in ("..", "x", "link", "bad")]


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("x.jpg", tarfile.SYMTYPE, "../secret"), ("x.jpg", tarfile.LNKTYPE, "ok.jpg"),
        ("x.jpg", tarfile.LNKTYPE, "/etc/passwd"), ("x.jpg", tarfile.CHRTYPE, ""), ("x.jpg", tarfile.BLKTYPE, ""),
        ("x.jpg", tarfile.FIFOTYPE, ""), ("../x.jpg", tarfile.REGTYPE, ""), ("a/../../x.jpg", tarfile.REGTYPE, ""),
        ("/x.jpg", tarfile.REGTYPE, ""), ("..", tarfile.REGTYPE, ""), ("../up", tarfile.DIRTYPE, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_nothing_of_a_tar_is_put_anywhere_or_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: bytes, target: str, form: int
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "shop").mkdir()
    fine = {"ok.jpg": b"1", "ok.txt": b"mug", "ok2.jpg": b"2"}
    members = [*((one, tarfile.REGTYPE, data) for one, data in fine.items()), (name, kind, b"")]
    with tarfile.open(tmp_path / "shop" / "items.tar", "w", format=form) as archive:
        for member, type_, data in members:
            info = tarfile.TarInfo("n" if member == name and form == tarfile.PAX_FORMAT else member)
            info.type, info.linkname, info.size = type_, target if member == name else "", len(data)
            info.pax_headers = {"path": member}  # which counts more than the name
            archive.addfile(info, io.BytesIO(data))
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path / "shop")
    rows, bad = rows_of(Table(files=("items.tar",)), tmp_path / "shop")
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [(row["item_id"], row["image"]) for row in rows if row.get("image")] == [("ok", b"1"), ("ok2", b"2")]
    assert b"secret" not in str(rows).encode()
    wanted = [] if kind == tarfile.DIRTYPE else ["unsafe_name" if kind == tarfile.REGTYPE else "not_a_file"]
    assert reasons(bad) == wanted


# --- layouts -------------------------------------------------------------------------------------


def read_layout(layout: Layout, data: Path) -> tuple[list[str], list[str], list[tuple[object, ...]]]:
    items = [r for t in layout.items for r in rows_of(t, data)[0]]
    queries = [r for t in layout.queries for r in rows_of(t, data, "query")[0]]
    judgments = [r for t in layout.judgments for r in rows_of(t, data, "judgment")[0]]
    ids = [str(r["item_id"]) for r in items], [str(r["query_id"]) for r in queries]
    return *ids, [(r["query_id"], r["item_id"], int(str(r["grade"]))) for r in judgments]


EXPECTED = (["a", "b"], ["q1"], [("q1", "a", 2), ("q1", "b", 0)])


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_askews_own_layout_is_recognised(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "items" / "train"
    folder.mkdir(parents=True)
    as_file(folder, ending)
    write(tmp_path, "train.queries.jsonl", '{"query_id": "q1", "query": "mug"}\n')
    write(tmp_path, "train.qrels.tsv", "q1\t0\ta\t2\nq1\t0\tb\t0\n")
    layout = sources.recognise(str(tmp_path))
    assert read_layout(layout, tmp_path) == EXPECTED
    for tables, kind in ((layout.items, "item"), (layout.queries, "query"), (layout.judgments, "judgment")):
        assert {r["split"] for r in rows_of(tables[0], tmp_path, kind)[0]} == {"train"}


def test_beirs_layout_is_recognised(tmp_path: Path) -> None:
    write(tmp_path, "corpus.jsonl", "".join(f'{{"_id": "{i}", "title": "t", "text": "x"}}\n' for i in "ab"))
    write(tmp_path, "queries.jsonl", '{"_id": "q1", "text": "mug", "metadata": {}}\n')
    write(tmp_path, "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\n")
    layout = sources.recognise(str(tmp_path))
    assert read_layout(layout, tmp_path) == EXPECTED
    assert {r["split"] for r in rows_of(layout.judgments[0], tmp_path, "judgment")[0]} == {"test"}
    assert rows_of(layout.queries[0], tmp_path, "query")[0][0]["query"] == "mug"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("judgments.csv", "query_id,item_id,grade\nq1,a,2\nq1,b,0\n"),
        (
            "judgments.jsonl",
            '{"query_id":"q1","item_id":"a","grade":2}\n{"query_id":"q1","item_id":"b","grade":0}',
        ),
        ("qrels.tsv", "q1\t0\ta\t2\nq1\t0\tb\t0\n"),
        ("qrels.tsv", "query_id\titem_id\tgrade\nq1\ta\t2\nq1\tb\t0\n"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\n"),
        ("qrels.txt", "q1 0 a  2\r\nq1 Q0 b 0"),
        ("qrels.trec", " q1 0 a 2\n\nq1 0 b 0\n"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "tar"])
def test_the_flat_layout_is_recognised(tmp_path: Path, name: str, content: str, ending: str) -> None:
    as_file(tmp_path, ending)
    write(tmp_path, "queries.csv", "query_id,query\nq1,mug\n")
    write(tmp_path, name, content)
    write(tmp_path, "clicks.csv", "query_id,item_id,position,clicks,impressions\nq1,a,1,3,10\n")
    layout = sources.recognise(str(tmp_path))
    assert read_layout(layout, tmp_path) == EXPECTED
    assert rows_of(layout.clicks[0], tmp_path, "click")[0][0]["item_id"] == "a"


IN_WORDS = {
    "judgments.csv": "query,item_id,grade,split\nmug,a,2,test\nmug,b,0,test\n",
    "judgments.jsonl": '{"query":"mug","item_id":"a","grade":2,"split":"test"}\n'
    '{"query":"mug","item_id":"b","grade":0,"split":"test"}\n',
    "clicks.csv": "query,item_id,position,impressions,clicks,split\nmug,a,1,30,9,test\nmug,b,2,30,0,test\n",
}


@pytest.mark.parametrize("name", IN_WORDS)
def test_judgments_and_clicks_may_have_the_querys_text_instead_of_an_id(tmp_path: Path, name: str) -> None:
    as_file(tmp_path, "csv")
    write(tmp_path, name, IN_WORDS[name])
    layout = sources.recognise(str(tmp_path))
    said, kind = (layout.clicks, "click") if name.startswith("clicks") else (layout.judgments, "judgment")
    [query] = rows_of(layout.queries[0], tmp_path, "query")[0]  # once, though it stands on both rows
    assert (query["query"], query["split"]) == ("mug", "test")
    rows, bad = rows_of(said[0], tmp_path, kind)
    assert [(row["query_id"], row["item_id"]) for row in rows] == [(query["query_id"], i) for i in ("a", "b")]
    assert not bad


def test_without_queries_a_column_of_their_text_is_needed(tmp_path: Path) -> None:
    as_file(tmp_path, "csv")
    write(tmp_path, "judgments.csv", "query_id,item_id,grade\nq1,a,2\n")
    layout = sources.recognise(str(tmp_path))
    with pytest.raises(DataError, match=r"wanted columns query in judgments\.csv; found grade, item_id, query_id"):
        rows_of(layout.judgments[0], tmp_path, "judgment")


def test_broken_lines_of_qrels_are_set_aside_alone(tmp_path: Path) -> None:
    write(tmp_path, "test.qrels.tsv", b"q1 0 a 2\nq1 a 2\nq\xff 0 a 1\nq1\t0\tb c\t1\n" * 2)
    rows, bad = rows_of(Table(files=("*.tsv",)), tmp_path, "judgment", unit_bytes=20)
    assert [(r["query_id"], r["item_id"], r["grade"]) for r in rows] == [("q1", "a", "2"), ("q1", "b c", "1")] * 2
    assert sorted(reasons(bad)) == ["invalid_utf8"] * 2 + ["wrong_number_of_columns"] * 2


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, "stuff.csv", "a,b\n")
    with pytest.raises(DataError, match=r"BEIR.*stuff\.csv"):
        sources.recognise(str(tmp_path))


# --- ready triplets ------------------------------------------------------------------------------


def triplet_rows(data: Path) -> tuple[list[dict[str, object]], list[Bad]]:
    (table,) = sources.recognise(str(data)).triplets
    chunks = [c for u in sources.units(table, str(data)) for c in sources.read_triplets(u, table)]
    return [r for c in chunks for r in c.table.to_pylist()], [b for c in chunks for b in c.bad]


def judgments_by_text(rows: list[dict[str, object]]) -> set[tuple[object, object, object]]:
    queries = {r["query_id"]: r["query"] for r in rows if r["kind"] == "query"}
    items = {r["item_id"]: r["title"] or r["text"] for r in rows if r["kind"] == "item"}
    judged = [r for r in rows if r["kind"] == "judgment"]
    assert len(rows) == len(queries) + len(items) + len(judged)
    return {(queries[r["query_id"]], items[r["item_id"]], r["grade"]) for r in judged}


TRIPLETS = {("mug", "red mug", 1), ("mug", "pan", 0), ("mug", "pot", 0), ("pan", "pan", 1), ("pan", "pot", 0)}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_triplets_in_the_order_of_sentence_transformers(tmp_path: Path, ending: str) -> None:
    names = ["anchor", "positive", "negative_1", "negative_2"]
    rows = [["mug", "red mug", "pan", "pot"], ["pan", "pan", "pot", None]]
    if ending == "parquet":
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        write_parquet(tmp_path, "triplets-train.parquet", columns)
    elif ending == "jsonl":
        write(tmp_path, "triplets.jsonl", "\n".join(json.dumps(dict(zip(names, r, strict=True))) for r in rows))
    else:
        mark = "," if ending == "csv" else "\t"
        write(tmp_path, f"triplets.{ending}", "\n".join(mark.join(v or "pot" for v in r) for r in [names, *rows]))
    found, bad = triplet_rows(tmp_path)
    assert judgments_by_text(found) == TRIPLETS
    assert not bad
    ids = {r["query_id"] for r in found if r["query"] == "mug"}
    assert ids == {"t" + hashlib.sha256(b"mug").hexdigest()[:16]}


def test_triplets_of_tevatron(tmp_path: Path) -> None:
    lines = [
        {
            "query_id": 7, "query": "mug", "positive_passages": [{"docid": "1", "title": "red mug", "text": "x"}],
            "negative_passages": [{"docid": "2", "title": "pan", "text": ""}, {"title": "pot", "text": "y"}],
        },
        {
            "query_id": 8, "query": "pan", "positive_passages": [{"docid": "2", "title": "pan", "text": ""}],
            "negative_passages": [{"title": "pot", "text": "y"}],
        },
        {"query_id": 9, "query": "none", "positive_passages": [], "negative_passages": []},
    ]  # fmt: skip
    write(tmp_path, "triplets.jsonl", "\n".join(map(json.dumps, lines)))
    found, bad = triplet_rows(tmp_path)
    assert judgments_by_text(found) == TRIPLETS
    assert {r["query_id"] for r in found if r["kind"] == "query"} == {"7", "8"}
    assert {r["item_id"] for r in found if r["title"] in ("red mug", "pan")} == {"1", "2"}
    assert [(b.kind, b.id, b.reason) for b in bad] == [("triplet", "9", "no_positive")]


def test_labelled_pairs_without_a_header(tmp_path: Path) -> None:
    lines = ["mug\tred mug\ta.jpg\t1", 'mug\t"pan\tb.jpg\t0', "mug\tpot\tc.jpg\t2", "\tpot\tc.jpg\t1"]
    write(tmp_path, "triplets.tsv", "\n".join(lines))
    found, bad = triplet_rows(tmp_path)
    assert judgments_by_text(found) == {("mug", "red mug", 1), ("mug", '"pan', 0)}
    assert {r["image"] for r in found if r["kind"] == "item"} == {"a.jpg", "b.jpg"}
    assert sorted(reasons(bad)) == ["empty_query", "not_a_label"]


def test_triplets_of_another_form_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "triplets.csv", "question,answer\na,b\n")
    with pytest.raises(DataError, match="question"):
        triplet_rows(tmp_path)
    write(tmp_path, "triplets.csv", "query,answer\na,b\n")
    with pytest.raises(DataError, match="anchor and positive"):
        triplet_rows(tmp_path)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    row = json.dumps({"item_id": "x", "title": "t" * 1000}) + "\n"
    write(tmp_path, "items.jsonl", row * 60_000)
    write(tmp_path, "items.csv", "item_id,title\n" + ("x," + "t" * 1000 + "\n") * 60_000)
    before = pa.total_allocated_bytes()
    for name in ("items.jsonl", "items.csv"):
        table = Table(files=(name,))
        (unit,) = sources.units(table, str(tmp_path))
        peak = max(pa.total_allocated_bytes() for _ in sources.read(unit, table, "item"))
        assert peak - before < 45 << 20
    assert sys.getsizeof(row) < 2000
