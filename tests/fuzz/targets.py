"""What is fuzzed: functions of any bytes, which end well or raise; and bytes to begin from.

Each gives its bytes to the product as the file or the message that they might be. It ends well when the product
refused them by the documented error, or took them and what it then says is right. Needs no atheris: what was found
is replayed by tests/test_fuzz.py.
"""

import io
import itertools
import json
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import ValidationError

from askew import (
    ann,
    artifacts,
    config,
    filters,
    inputs,
    live,
    read_delimited,
    read_jsonl,
    read_tar,
    releases,
    segments,
    wal,
    wire,
)
from askew.ann import Design, Index
from askew.errors import ArtifactError, ConfigError, DataError
from askew.messages import SearchRequest
from askew.pipeline import PipelineSettings
from askew.recipes import TrainSettings
from askew.segments import ITEMS, VECTORS, Segment
from askew.streams import Chunk, Place

DIM = 4
ROOT = Path(__file__).parents[2]


class Target(NamedTuple):
    """A function of bytes, and bytes that it takes well."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    json: bool = False  # whether values of the bytes as JSON are worth changing one by one
    most: int = 4096  # bytes


@cache
def scratch() -> Path:
    """A folder of this process alone, in memory where there is one, gone with it."""
    memory = Path("/dev/shm")
    held = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    scratch.held = held  # type: ignore[attr-defined]
    return Path(held.name)


# --- manifests -----------------------------------------------------------------------------------


@cache
def index() -> Path:
    """An index of two segments, one item deleted since and one put in."""
    root, names = scratch() / "index", ["segment-00000", "segment-00001"]
    with artifacts.draft(root, "index", {}, {}) as draft:
        for number, name in enumerate(names):
            ids = [f"i{number}{n}" for n in range(2)]
            rows = [{"item_id": i, "title": i, "fields": {"colour": "red"}, "has_image": False} for i in ids]
            vectors = np.eye(2, DIM, dtype=np.float32)
            segments.write(draft.folder / name, vectors, pa.Table.from_pylist(rows), None, "r1")
        segments.tell(draft, names)
    folder = artifacts.place(root, "index", artifacts.key("index", {}, {}))
    with live.Live(folder) as log:
        item = {"item_id": "new", "title": "new", "fields": {"colour": "blue"}, "has_image": False}
        log.upsert(np.ones((1, DIM), np.float32), [item])
        log.delete(["i00"])
        log.compact()
    return folder


def manifests() -> list[Path]:
    """The files that say what an index is."""
    return [
        index() / "manifest.json", index() / "segment-00000" / "manifest.json", live.place(index()) / "state.json",
    ]  # fmt: skip


@cache
def whole() -> list[bytes]:
    """What stands in them."""
    return [path.read_bytes() for path in manifests()]


def manifest(data: bytes) -> None:
    """Bytes, after one that chooses the file, as what an index, a segment or its changes say of themselves."""
    contents = whole()
    which = data[0] % len(contents) if data else 0
    path = manifests()[which]
    path.write_bytes(data[1:])
    try:
        artifacts.read(index(), "index")
        plan, _ = live.read(index())
        assert plan.schema.names
        assert plan.size >= 0
        for name in plan.segments:
            segment = plan.open(name)
            assert segment.index().size == segment.items().num_rows == segment.size
        live.Follower(index())
    except ArtifactError:
        if data[1:] == contents[which]:
            raise
    finally:
        path.write_bytes(contents[which])


def served(data: bytes) -> None:
    """Bytes as the note of what an endpoint served last: read or passed over."""
    path = scratch() / "served.json"
    path.write_bytes(data)
    kept = releases.remembered(path)
    assert kept is None or releases.Kept.model_validate_json(kept.model_dump_json()) == kept


def kept() -> bytes:
    """Such a note."""
    release = releases.Release(
        name="shop", version="3", model="m", index="i", identity="r", model_key="m", index_key="i", sizes=(2, 1),
        schema_=pa.schema([("item_id", pa.string())]).serialize().to_pybytes(),
    )  # fmt: skip
    return releases.Kept(deployed="d", now=release, before=release).model_dump_json().encode()


# --- segments' files -----------------------------------------------------------------------------


def vectors(data: bytes) -> None:
    """Bytes, after one that chooses the design, as an index file of FAISS: refused, or of so many vectors."""
    design = designs()[data[0] % len(designs()) if data else 0]
    path = scratch() / VECTORS
    path.write_bytes(data[1:])
    try:
        found = Index.read(path, design)
    except ArtifactError:
        return
    assert found.size >= 0


@cache
def designs() -> list[Design]:
    """One of each kind."""
    lists = {kind: 0 if kind in ("flat", "hnsw") else 2 for kind in ann.CLASSES}
    return [Design.model_validate({"kind": kind, "dim": DIM, "lists": n}) for kind, n in lists.items()]


def indexes() -> list[bytes]:
    """An index file of each design."""
    found, random = [], np.random.default_rng(0)
    for number, design in enumerate(designs()):
        sample = random.standard_normal((32, DIM), dtype=np.float32)
        one = Index.trained(design, sample)
        one.add(sample[:8])
        one.write(scratch() / VECTORS)
        found.append(bytes([number]) + (scratch() / VECTORS).read_bytes())
    return found


def items(data: bytes) -> None:
    """Bytes as a segment's items, unchecked by their sum: refused, or a table that can be read through."""
    path = scratch() / ITEMS
    path.write_bytes(data)
    try:
        table = segments.mapped(path)
    except ArtifactError:
        return
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:  # what the sum alone tells
        return
    table.to_pylist()


def segment(data: bytes) -> None:
    """Bytes, after one that chooses the file, as a file of a segment: refused, unless they are the file's own."""
    folder = index() / "segment-00001"
    path = folder / (VECTORS, ITEMS)[(data[0] if data else 0) % 2]
    own = path.read_bytes()
    path.unlink()
    path.write_bytes(data[1:])
    try:
        Segment.open(folder)
        assert data[1:] == own
    except ArtifactError:
        assert data[1:] != own
    finally:
        path.write_bytes(own)


def of_a_segment(name: str) -> bytes:
    """What stands in a file of a segment."""
    return (index() / "segment-00001" / name).read_bytes()


# --- photos --------------------------------------------------------------------------------------


def photo(data: bytes) -> None:
    """Bytes as a photo: a square, or refused with one of the reasons."""
    try:
        found = inputs.pixels(data, 16)
    except DataError as error:
        if inputs.problem(error) not in ("empty", "not_a_photo", "truncated", "too_many_pixels", "broken"):
            raise
    else:
        assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)


def photos() -> list[bytes]:
    """A small photo of each format and mode."""
    kinds = [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
        ("PNG", "I;16"), ("GIF", "P"), ("WEBP", "RGBA"), ("AVIF", "RGB"),
    ]  # fmt: skip
    found = []
    for kind, mode in kinds:
        out = io.BytesIO()
        drawn = Image.linear_gradient("L").resize((24, 16))
        (Image.new(mode, (24, 16), 999) if mode == "I;16" else drawn.convert(mode)).save(out, kind)
        found.append(out.getvalue())
    return found


# --- what is asked -------------------------------------------------------------------------------

SHOP = pa.Table.from_pylist(
    [
        {"item_id": "a", "has_image": True, "fields": {"kind": "mug", "price": 5.0, "stock": 3, "code": 1}},
        {"item_id": "b", "has_image": False, "fields": {"kind": "bag", "price": None, "stock": -7, "code": 255}},
        {"item_id": "ä", "has_image": True, "fields": {"kind": None, "price": 0.1, "stock": None, "code": None}},
    ],
    pa.schema({
        "item_id": pa.string(), "has_image": pa.bool_(),
        "fields": pa.struct({"kind": pa.string(), "price": pa.float64(), "stock": pa.int64(), "code": pa.uint8()}),
    }),
)  # fmt: skip


def where(data: bytes) -> None:
    """Bytes as a filter in JSON: refused, or what plain Python makes of it, an item at a time."""
    try:
        asked = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        found = filters.mask(asked, SHOP)
    except DataError:
        return
    assert found.tolist() == [fulfils(item, asked) for item in SHOP.to_pylist()], asked
    assert json.loads(filters.canonical(asked)) == asked


def fulfils(item: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether an item fulfils a filter, in plain Python."""
    signs = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}
    for key, value in asked.items():
        if key in ("and", "or"):
            held = (all if key == "and" else any)([fulfils(item, one) for one in value])
        elif key == "not":
            held = not fulfils(item, value)
        else:
            own = item[key] if key in filters.OWN else item["fields"][key]
            if isinstance(value, dict):
                held = own is not None and all(compared(own, signs[name], bound) for name, bound in value.items())
            else:
                held = own in (value if isinstance(value, list) else [value])
        if not held:
            return False
    return True


def compared(own: Any, sign: str, bound: Any) -> bool:
    """Compare as 64-bit floats where the bound is one or is as large."""
    numbers = isinstance(bound, int | float)
    if numbers and (isinstance(bound, float) or isinstance(own, float) or abs(bound) >= 1 << 53):
        own, bound = float(own), float(bound)
    return bool(getattr(own, sign)(bound))


def body(data: bytes) -> None:
    """Bytes as the body of a search: refused, or a search that is the same when it is written and read again."""
    try:
        asked = SearchRequest.model_validate_json(data)
    except ValidationError:
        return
    assert SearchRequest.model_validate_json(asked.model_dump_json(exclude_unset=True)) == asked


# --- logs and frames -----------------------------------------------------------------------------


def log(data: bytes) -> None:
    """Bytes as a write-ahead log: refused, or read alike by both ends, and what is appended comes last."""
    folder = scratch() / "log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / f"{1:020d}{wal.SUFFIX}").write_bytes(data)
    try:
        before = list(wal.Tail(folder, 0).read())
        with wal.Log(folder) as writer:
            assert writer.last == len(before)
            assert writer.append(b"more") == len(before) + 1
    except ArtifactError:
        return
    after = [entry.content for entry in wal.Tail(folder, 0).read()]
    assert after == [*(entry.content for entry in before), b"more"]


def framed(number: int, content: bytes) -> bytes:
    """A change as the log has it."""
    checksum = zlib.crc32(content, zlib.crc32(wal.struct.pack("<QI", number, len(content))))
    return wal.HEAD.pack(wal.MARK, len(content), number, checksum) + content


def logs() -> list[bytes]:
    """Logs of some changes."""
    one, two = framed(1, b"one"), framed(2, b"")
    return [one, one + two, one + two + framed(3, wal.MARK * 9), one + framed(3, b"gap")]


def frame(data: bytes) -> None:
    """Bytes as what a replica sends another: refused, or values that go back over as they came."""
    try:
        value = wire.unpacked(data)
    except ValueError:
        return
    again = wire.unpacked(wire.packed(value))
    assert repr(again) == repr(value)


def frames() -> list[bytes]:
    """Some of those."""
    vectors = np.eye(2, 3, dtype=np.float32)
    return [
        wire.packed(one) for one in (["search", [vectors, 10, ""], 0.5, 0.1, {}], {"a": [1, None, b"x", -1.5]})
    ]


# --- files that a shop gives, and settings -------------------------------------------------------


def read(name: str, data: bytes, reader: Callable[[Place], Iterator[Chunk]]) -> list[Chunk] | None:
    """Read bytes as a file; None where they are refused."""
    (scratch() / name).write_bytes(data)
    try:
        chunks = list(reader(Place(str(scratch()), name, "item")))
    except DataError:
        return None
    for chunk in chunks:
        chunk.table.validate(full=True)
        json.dumps([one.source + one.id + one.message for one in chunk.bad], ensure_ascii=False).encode()
    return chunks


def lines(data: bytes) -> None:
    """Bytes as JSON lines: each line that is not blank is a row or is set aside."""
    chunks = read("x.jsonl", data, read_jsonl.read)
    told = sum(bool(line.strip()) for line in data.removeprefix(read_jsonl.BOM).split(b"\n"))
    assert chunks is None or sum(c.table.num_rows + len(c.bad) for c in chunks) == told


def delimited(data: bytes) -> None:
    """Bytes, after one that chooses the form, as CSV or TSV."""
    forms = itertools.product(",\t", (True, False), (True, False), (True, False))
    form = read_delimited.Form(*list(forms)[data[0] % 16 if data else 0])
    chunks = read("x.csv", data[1:], lambda place: read_delimited.read(place, form))
    for first, other in itertools.pairwise(c.table.column_names for c in chunks or () if c.table.num_rows):
        assert first == other


def judged(data: bytes) -> None:
    """Bytes as judgments in TREC's form: each line of more than blanks and marks is a row or is set aside."""
    chunks = read("x.tsv", data, read_delimited.read_qrels)
    least = sum(bool(line.replace(read_jsonl.BOM, b"").strip()) for line in data.splitlines())
    most = sum(bool(line.strip()) for line in data.splitlines())
    assert chunks is None or least <= sum(c.table.num_rows + len(c.bad) for c in chunks) <= most


def tar(data: bytes) -> None:
    """Bytes as a tar file."""
    for chunk in read("x.tar", data, read_tar.read) or ():
        assert chunk.table.num_rows == len(chunk.table.to_pylist())


def tars() -> list[bytes]:
    """Small tar files of both forms."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, content in (("a.json", b'{"n": 1}'), ("a.txt", b"mug"), ("b.jpg", b"\xff\xd8")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found.append(out.getvalue()[:4096])
    return found


def settings(data: bytes) -> None:
    """Bytes as a file of settings: refused by name, or settings."""
    path = scratch() / "settings.yaml"
    path.write_bytes(data)
    for kind in (TrainSettings, PipelineSettings):
        try:
            found = config.load(kind, path)
        except ConfigError:
            continue
        json.dumps(found.model_dump(mode="json"), allow_nan=False)


def settings_files() -> list[bytes]:
    """The recipes."""
    return [b"triplets: t\nroot: r\n" + path.read_bytes() for path in sorted((ROOT / "jobs").glob("train.*.yaml"))]


TARGETS = {
    "manifest": Target(manifest, lambda: [bytes([n]) + one for n, one in enumerate(whole())], json=True),
    "served": Target(served, lambda: [kept()], json=True),
    "segment": Target(
        segment, lambda: [bytes([n]) + of_a_segment(name) for n, name in enumerate((VECTORS, ITEMS))]
    ),
    "vectors": Target(vectors, indexes),
    "items": Target(items, lambda: [of_a_segment(ITEMS)]),
    "photo": Target(photo, photos),
    "filter": Target(
        where,
        lambda: [
            b'{"kind": "mug", "price": {"gte": 1, "lt": 9.5}, "not": {"stock": [1, 3]}}',
            b'{"or": [{"item_id": "a"}, {"and": [{"code": {"gt": 3}}, {"has_image": false}, {"kind": null}]}]}',
        ],
        json=True,
    ),
    "body": Target(
        body, lambda: [b'{"query": "red mug", "k": 3, "filter": {"kind": "mug"}, "explain": true}'], json=True
    ),
    "log": Target(log, logs),
    "frame": Target(frame, frames),
    "lines": Target(
        lines, lambda: [b'{"item_id": 1, "n": 0.5}\n{"item_id": "x", "t": ["a"]}\n[1]\n{"a": {"b": 1}}']
    ),
    "delimited": Target(
        delimited, lambda: [b'\x00item_id,title\n1,"a ""mug"""\n2,x\n', b"\x06a,b\n1,x,y\n", b"\x01a\tb\n1\t2\n"]
    ),
    "judged": Target(judged, lambda: [b"q1 0 i1 3\nq2\t0\ti 2\t1\n"]),
    "tar": Target(tar, tars),
    "settings": Target(settings, settings_files),
}
