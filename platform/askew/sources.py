"""From any shop's files to Arrow tables with our column names, in units that any worker reads by itself.

A `Table` says which files hold one kind of record and what its columns are called there; `recognise` finds
the tables of a folder that is laid out in a known way. Knows nothing of Ray, of images' contents, or of what
makes a record good.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from pydantic import Field, field_validator

from askew import columns, read_delimited, read_jsonl, read_parquet, read_tar, ready
from askew.columns import graded as graded
from askew.config import Settings
from askew.errors import DataError
from askew.read_delimited import Form
from askew.streams import Chunk as Chunk
from askew.streams import Place

SUFFIXES = {
    ".qrels.tsv": "qrels", ".qrels": "qrels", ".trec": "qrels", ".parquet": "parquet", ".jsonl": "jsonl",
    ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".tar": "tar", ".tgz": "tar",
}  # fmt: skip
REQUIRED = {
    "item": ("item_id", "title"),
    "query": ("query_id", "query"),
    "judgment": ("query_id", "item_id", "grade"),
    "click": ("query_id", "item_id"),
}
FIXED = ("parquet", "csv", "tsv", "qrels")  # formats in which every row has the same columns
MAX_JOINED_BYTES = 512 << 20


class Table(Settings):
    """The files that hold one kind of record, and what its columns are called there.

    `files` are patterns relative to the data folder. `columns` gives for our name theirs, or `=text` (a
    constant, in which `{name}` stands for their column), `#name` (an id made of that column's text), `@folder`
    (the name of the file's folder) or `@file` (its own name up to the first dot); a column that it does not
    name keeps its name. Columns of a file without a header are called 1, 2, 3 …
    """

    files: tuple[str, ...]  # patterns below the data folder
    columns: dict[str, str] = Field(default_factory=dict)  # our name -> theirs, =text, #name, @folder, @file
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv", "qrels", "tar"] = "auto"  # by the name's ending
    header: bool = True  # csv and tsv: the first row has names; else columns are called 1, 2, 3 …
    quoted: bool = True  # csv and tsv: a value may stand in double quotes
    rest: bool = False  # csv and tsv: what a row has too much belongs to its last column
    where: dict[str, str] = Field(default_factory=dict)  # their column -> the value that a row must have
    repeated: bool = False  # the same record may stand on many rows; the first of each chunk is given
    joins: dict[str, "Table"] = Field(default_factory=dict)  # our key -> a table with more columns by that key

    @field_validator("files")
    @classmethod
    def _inside(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in files:
            if not pattern or "://" in pattern or "\\" in pattern or {"/", ".."} & set(Path(pattern).parts):
                raise ValueError(f"{pattern!r} is no pattern inside the data folder")
        return files

    @field_validator("columns")
    @classmethod
    def _meant(cls, meanings: dict[str, str]) -> dict[str, str]:
        for ours, meaning in meanings.items():
            if not meaning or (meaning.startswith("@") and meaning not in ("@folder", "@file")):
                raise ValueError(f"{ours}: {meaning!r} is no column, =text, #column, @folder or @file")
        return meanings


class Layout(Settings):
    """The tables of a data folder, and what numbers its grades stand for if they are words."""

    items: tuple[Table, ...] = ()  # item_id, title, image, fields
    queries: tuple[Table, ...] = ()  # query_id, query
    judgments: tuple[Table, ...] = ()  # query_id, item_id, grade
    clicks: tuple[Table, ...] = ()  # query_id, item_id, position, impressions, clicks
    triplets: tuple[Table, ...] = ()  # ready ones: query and items in one row
    grades: dict[str, int] = Field(default_factory=dict)  # what words stand for: {Exact: 2, Partial: 1}


Unit = dict[str, Any]


# --- files ---------------------------------------------------------------------------------------


def find(data: str, patterns: Collection[str]) -> dict[str, int]:
    """List the files that match, by their path below the data folder, with their sizes in bytes.

    Raises DataError when a match leads out of the data folder.
    """
    fs, root = url_to_fs(located(data))
    root = root.rstrip("/")
    found: dict[str, int] = {}
    for pattern in patterns:
        for path, info in fs.glob(f"{_escaped(root)}/{pattern}", detail=True).items():
            info = fs.info(path) if info.get("islink") and fs.exists(path) else info
            if info["type"] == "file":
                _check_inside(fs, root, path)
                found[path.removeprefix(f"{root}/")] = int(info["size"])
    return dict(sorted(found.items()))


def located(data: str) -> str:
    """Make a local folder's path absolute, so that a worker finds it; a URL stays as it is."""
    return str(Path(data).absolute()) if get_protocol(data) == "file" and "://" not in data else data


def _escaped(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _check_inside(fs: fsspec.AbstractFileSystem, root: str, path: str) -> None:
    inside = ".." not in PurePosixPath(path).parts
    if isinstance(fs, LocalFileSystem):
        inside = Path(path).resolve().is_relative_to(Path(root).resolve())
    if not inside:
        raise DataError(f"files inside {root}", f"{path}, which leads out of it", "copy it into the folder")


def _files(table: Table, data: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for pattern in table.files:
        if not (matching := find(data, (pattern,))):
            raise DataError(f"files {pattern} in {data}", "none", "check the path and the pattern")
        found |= matching
    return dict(sorted(found.items()))


def _format(table: Table, file: str) -> str:
    if table.format != "auto":
        return table.format
    name = file.lower().removesuffix(".gz")
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix) or (kind == "qrels" and PurePosixPath(name).name == suffix[1:]):
            return kind
    raise DataError(f"a file that ends in {', '.join(SUFFIXES)}", file, "name its format")


def units(table: Table, data: str, unit_bytes: int = 64 << 20) -> list[Unit]:
    """Cut a table's files into units of about `unit_bytes`, in a fixed order, which any worker can read alone.

    A unit names data, file, format and range: of bytes (lines), of row groups (Parquet), or null for a whole
    file. Raises DataError when a pattern finds nothing or a Parquet file is truncated.
    """
    cut = []
    for file, size in _files(table, data).items():
        kind = _format(table, file)
        if kind == "parquet":
            ranges = _groups(read_parquet.row_group_bytes(Place(located(data), file, "")), unit_bytes)
        elif kind in ("jsonl", "qrels") and not file.endswith(".gz"):
            num = max(1, math.ceil(size / unit_bytes))
            ranges = [[part * size // num, (part + 1) * size // num] for part in range(num)]
        else:
            ranges = [None]
        cut += [{"data": located(data), "file": file, "format": kind, "range": span} for span in ranges]
    return cut


def _groups(sizes: list[int], unit_bytes: int) -> list[list[int] | None]:
    """Join neighbouring row groups up to `unit_bytes`; a file without any is one empty range."""
    ranges: list[list[int] | None] = []
    start, total = 0, 0
    for group, size in enumerate(sizes):
        if group > start and total + size > unit_bytes:
            ranges.append([start, group])
            start, total = group, 0
        total += size
    return [*ranges, [start, len(sizes)]]


def fingerprint(table: Table, data: str) -> dict[str, str]:
    """Tell what each file holds: its SHA-256 if local, else the store's own tag, or size and time.

    Joined files count too.
    """
    fs, root = url_to_fs(located(data))
    prints = {file: _print(fs, f"{root.rstrip('/')}/{file}") for file in _files(table, data)}
    for other in table.joins.values():
        prints |= fingerprint(other, data)
    return prints


def _print(fs: fsspec.AbstractFileSystem, path: str) -> str:
    if isinstance(fs, LocalFileSystem):
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    info = fs.info(path)
    told = {key: info[key] for key in ("ETag", "etag", "md5Hash", "content_md5") if info.get(key)}
    told = told or {key: info[key] for key in ("mtime", "LastModified", "updated", "created") if info.get(key)}
    return json.dumps({"size": info["size"], **told}, sort_keys=True, default=str)


# --- reading -------------------------------------------------------------------------------------


def read(
    unit: Unit, table: Table, kind: str, rows: int = 4096, only: Collection[str] | None = None
) -> Iterator[Chunk]:
    """Read a unit as records of a kind (item, query, judgment, click, triplet), at most `rows` rows a chunk.

    Columns have our names, those of `only` if given; ids are text; the grade is as it stands (see `graded`). A
    column that some rows lack is null there. Raises DataError when a column that the kind needs, or that the
    table names, is nowhere in the unit, or when the file is truncated.
    """
    place = Place(unit["data"], unit["file"], kind, rows)
    wanted = {*table.columns, *REQUIRED.get(kind, ())} if only is None else {*only}
    theirs = columns.needed(table.columns, table.where, wanted)
    others = [(key, _other(other, key, unit)) for key, other in table.joins.items()]
    theirs -= {name for _, other in others for name in other.table.column_names if name not in table.columns}
    set_aside = [bad for _, other in others for bad in other.bad]
    required = [name for name in REQUIRED.get(kind, ()) if only is None or name in only]
    seen: set[str] = set()
    num_rows = 0
    for chunk in _chunks(unit, table, place, None if only is None else theirs):
        seen |= set(chunk.table.column_names)
        num_rows += chunk.table.num_rows
        if unit["format"] in FIXED and seen:
            columns.present(theirs, seen, place.file)
        made = _made(chunk, table, place, others, required)
        if made.table.num_rows or made.bad or set_aside:
            yield Chunk(made.table, set_aside + made.bad)
            set_aside = []
    if num_rows:
        columns.present(theirs, seen, place.file)


def _chunks(unit: Unit, table: Table, place: Place, theirs: Collection[str] | None) -> Iterator[Chunk]:
    form = Form("\t" if unit["format"] == "tsv" else ",", table.header, table.quoted, table.rest)
    match unit["format"]:
        case "parquet":
            start, stop = unit["range"]
            return read_parquet.read(place, start, stop, theirs)
        case "jsonl":
            return read_jsonl.read(place, *(unit["range"] or ()))
        case "qrels":
            return read_delimited.read_qrels(place, *(unit["range"] or ()))
        case "tar":
            return read_tar.read(place)
        case _:
            return read_delimited.read(place, form)


def _made(
    chunk: Chunk, table: Table, place: Place, others: list[tuple[str, Chunk]], required: Collection[str]
) -> Chunk:
    """Give a chunk our columns and what is joined to it."""
    if not chunk.table.num_rows:
        return chunk
    path = PurePosixPath(place.path[1])
    rows = columns.where(chunk.table, table.where)
    rows = columns.named(rows, table.columns, path.parent.name, path.name.partition(".")[0])
    rows = columns.filled(rows, required)
    rows, set_aside = columns.identified(rows, place.kind, place.file)
    key = {"item": "item_id", "query": "query_id"}.get(place.kind)
    if table.repeated and key and rows.num_rows:
        rows = columns.distinct(rows, key)
    for name, other in others:
        rows = columns.joined(rows, name, other.table)
    return Chunk(rows, chunk.bad + set_aside)


def _other(table: Table, key: str, unit: Unit) -> Chunk:
    """Read a table to be joined, whole; what it sets aside is told with the first unit of each file only."""
    size = sum(_files(table, unit["data"]).values())
    if size > MAX_JOINED_BYTES:
        wanted = f"at most {MAX_JOINED_BYTES >> 20:,} MiB to be joined by {key}"
        raise DataError(wanted, f"{size >> 20:,} MiB in {', '.join(table.files)}", "join it beforehand")
    chunks = [c for u in units(table, unit["data"]) for c in read(u, table, "join", only={key, *table.columns})]
    rows = [c.table for c in chunks if c.table.num_rows]
    empty = pa.table({name: pa.array([], pa.string()) for name in {key: "", **table.columns}})
    first = not unit["range"] or unit["range"][0] == 0
    bad = [b._replace(kind="item") for c in chunks for b in c.bad] if first else []
    return Chunk(pa.concat_tables(rows, promote_options="permissive") if rows else empty, bad)


def read_triplets(unit: Unit, table: Table, rows: int = 4096) -> Iterator[Chunk]:
    """Read a unit of ready triplets as rows of items, queries and judgments, told apart by the column kind.

    See `ready.tagged`. The same item or query comes as often as it stands in the file, once a chunk.
    """
    for chunk in read(unit, table, "triplet", rows):
        tagged = ready.tagged(chunk.table, unit["file"])
        yield Chunk(tagged.table, chunk.bad + tagged.bad)


# --- layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "askew": "items/<split>/*.parquet, <split>.queries.jsonl, <split>.qrels.tsv",
    "BEIR": "corpus.jsonl, queries.jsonl, qrels/<split>.tsv",
    "ready triplets": "triplets*.parquet, .jsonl, .csv or .tsv",
    "flat": "items.*, queries.*, and judgments.*, qrels.* or clicks.*",
    "flat, two files": "items.*, and judgments.* or clicks.* with a column query",
}
ENDINGS = ("parquet", "jsonl", "ndjson", "csv", "tsv", "jsonl.gz", "ndjson.gz", "csv.gz", "tsv.gz")


def recognise(data: str) -> Layout:
    """Find the layout of a data folder by the files in it. Raises DataError when it is none of LAYOUTS."""
    for layout in (_own, _beir, _ready, _flat):
        if found := layout(data):
            return found
    raise unknown(data, LAYOUTS)


def unknown(data: str, layouts: dict[str, str]) -> DataError:
    """Make the error of a folder that is laid out in no known way."""
    known = "; ".join(f"{name} ({files})" for name, files in layouts.items())
    found = ", ".join(list(find(data, ("*", "*/*")))[:8]) or "no files"
    return DataError(f"a known layout in {data}: {known}", found, "name the files in a layout of your own")


def _matching(data: str, stems: Collection[str], endings: Collection[str] = ENDINGS) -> tuple[str, ...]:
    """The patterns, one a stem and an ending, that find a file."""
    return tuple(p for p in (f"{stem}.{ending}" for stem in stems for ending in endings) if find(data, (p,)))


def _own(data: str) -> Layout | None:
    items = _matching(data, ("items/*/*",))
    queries, judgments, clicks = (
        _matching(data, (f"*.{stem}",), endings)
        for stem, endings in {
            "queries": ("jsonl", "jsonl.gz"), "qrels": ("tsv", "tsv.gz"), "clicks": ENDINGS,
        }.items()
    )  # fmt: skip
    if not (items and queries):
        return None
    by_file = {"split": "@file"}
    return Layout(
        items=(Table(files=items, columns={"split": "@folder"}),),
        queries=(Table(files=queries, columns=by_file),),
        judgments=(Table(files=judgments, columns=by_file),) if judgments else (),
        clicks=(Table(files=clicks, columns=by_file),) if clicks else (),
    )


def _beir(data: str) -> Layout | None:
    items, queries, qrels = (
        _matching(data, (stem,), endings)
        for stem, endings in {
            "corpus": ("jsonl", "jsonl.gz"), "queries": ("jsonl", "jsonl.gz"), "qrels/*": ("tsv",),
        }.items()
    )  # fmt: skip
    if not (items and queries and qrels):
        return None
    judged = {"query_id": "query-id", "item_id": "corpus-id", "grade": "score", "split": "@file"}
    return Layout(
        items=(Table(files=items, columns={"item_id": "_id"}),),
        queries=(Table(files=queries, columns={"query_id": "_id", "query": "text"}),),
        judgments=(Table(files=qrels, columns=judged, quoted=False),),
    )


def _ready(data: str) -> Layout | None:
    tables = []
    for pattern in _matching(data, ("triplets*",)):
        first = _first_line(data, next(iter(find(data, (pattern,)))))
        if ".tsv" in pattern and len(first) == 4 and first[3] in ("0", "1"):
            labelled = {"query": "1", "title": "2", "image": "3", "label": "4"}
            tables.append(Table(files=(pattern,), columns=labelled, header=False, quoted=False))
        else:
            tables.append(Table(files=(pattern,)))
    return Layout(triplets=tuple(tables)) if tables else None


def _first_line(data: str, file: str) -> list[str]:
    """The first line, split at tabs."""
    with Place(located(data), file, "").open() as stream:
        return stream.readline(1 << 16).decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")


def _flat(data: str) -> Layout | None:
    items = _matching(data, ("items*",), (*ENDINGS, "tar", "tar.gz", "tgz"))
    queries = _matching(data, ("queries",))
    judgments = _matching(data, ("judgments",))
    clicks = _matching(data, ("clicks",))
    qrels = tuple(_qrels(data, p) for p in _matching(data, ("qrels",), (*ENDINGS, "trec", "txt")))
    if items and (judgments or clicks) and not (queries or qrels):
        return _asked_in_words(items, judgments, clicks)
    if not (items and queries and (judgments or clicks or qrels)):
        return None
    return Layout(
        items=(Table(files=items),),
        queries=(Table(files=queries),),
        judgments=(*((Table(files=judgments),) if judgments else ()), *qrels),
        clicks=(Table(files=clicks),) if clicks else (),
    )


def _asked_in_words(items: tuple[str, ...], judgments: tuple[str, ...], clicks: tuple[str, ...]) -> Layout:
    """The layout of a folder without queries: each row of judgments and clicks has its query's text in it."""
    by_text = {"query_id": "#query"}
    judged, clicked = ((Table(files=f, columns=by_text),) if f else () for f in (judgments, clicks))
    queries = Table(files=(*judgments, *clicks), columns=by_text, repeated=True)
    return Layout(items=(Table(files=items),), queries=(queries,), judgments=judged, clicks=clicked)


def _qrels(data: str, file: str) -> Table:
    """The table of a file called qrels: with a header, of BEIR's names or ours, else TREC's."""
    if not file.removesuffix(".gz").endswith((".tsv", ".txt", ".trec")):
        return Table(files=(file,))
    first = _first_line(data, file)
    if "query-id" in first:
        judged = {"query_id": "query-id", "item_id": "corpus-id", "grade": "score"}
        return Table(files=(file,), columns=judged, format="tsv", quoted=False)
    return Table(files=(file,), format="tsv" if "query_id" in first else "qrels")
