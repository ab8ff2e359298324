"""Bad input on its way through prepare: set aside with its reason and counted, or refused in words; never lost."""

import functools
import http.server
import io
import ipaddress
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from askew import artifacts, cleaning, datasets, inputs
from askew.errors import DataError
from askew.fetching import Fetcher
from askew.triplets import PrepareSettings, prepare

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray Data leaves the log of a data set to the garbage collector
    pytest.mark.filterwarnings("ignore:.*ray-data:pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parent.parent
ITEMS = [{"item_id": f"i{n}", "title": f"item {n}"} for n in range(6)]
QUERIES = [{"query_id": "q1", "query": "red mug"}, {"query_id": "q2", "query": "blue cap"}]
JUDGED = ["q1\t0\ti0\t3", "q1\t0\ti1\t3", "q1\t0\ti2\t1", "q2\t0\ti3\t3"]
GIVEN = {"splits": {"make": "given"}}

Line = bytes | str | dict[str, Any]


# --- a shop, and what becomes of it --------------------------------------------------------------


def shop(
    folder: Path, items: Iterable[Line], queries: Iterable[Line] = QUERIES, judged: Iterable[Line] = JUDGED
) -> Path:
    """Write a flat catalogue, line by line; lines may be broken."""
    return files(folder, {"items.jsonl": items, "queries.jsonl": queries, "qrels.tsv": judged})


def files(folder: Path, contents: dict[str, Iterable[Line]]) -> Path:
    for name, lines in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\n".join(map(as_bytes, lines)) + b"\n")
    return folder


def as_bytes(line: Line) -> bytes:
    line = json.dumps(line) if isinstance(line, dict) else line
    return line.encode() if isinstance(line, str) else line


class Made(NamedTuple):
    manifest: artifacts.Manifest
    quarantine: list[dict[str, str]]
    items: dict[str, dict[str, Any]]


def made(data: Path, root: Path, **settings: Any) -> Made:
    settings = {"max_quarantined_fraction": 1.0, "image_size": 8} | GIVEN | settings
    folder = Path(prepare(PrepareSettings(data=data, root=root, **settings))["artifact"])
    items = {row["item_id"]: row for row in pq.read_table(folder / "items").to_pylist()}
    return Made(artifacts.read(folder, "triplets"), pq.read_table(folder / "quarantine").to_pylist(), items)


def refusal(data: Path, root: Path, **settings: Any) -> str:
    """Prepare data that cannot be used; returns what is said of it."""
    with pytest.raises(DataError) as told:
        made(data, root, **settings)
    assert all((told.value.wanted, told.value.found, told.value.do))
    assert not list(root.glob("triplets-*"))
    return str(told.value)


# --- records that are set aside ------------------------------------------------------------------


class Case(NamedTuple):
    """A line of a file, and how the quarantine is to show it."""

    name: str
    line: Line
    kind: str
    id: str
    reason: str
    says: str


def thing(item_id: str, **other: Any) -> dict[str, Any]:
    return {"item_id": item_id, "title": f"thing {item_id}", **other}


def photo(name: str, image: str, reason: str, says: str) -> Case:
    return Case(name, thing(name, image=image), "image", name, reason, says)


LONG = "x" * 10_000
ITEM_CASES = [
    Case("a broken line", b'{"item_id": "cut", "ti', "item", "", "broken_line", "no JSON"),
    Case("a list", b"[1, 2]", "item", "", "not_an_object", "not an object"),
    Case("a broken byte", b'{"item_id": "u", "title": "\xff"}', "item", "", "invalid_utf8", "invalid start byte"),
    Case("half a character", rb'{"item_id": "s", "title": "\ud800"}', "item", "", "invalid_utf8", "surrogates"),
    Case("an id again", thing("i0"), "item", "i0", "conflicting_id", "an earlier item of other content"),
    Case("no id", {"title": "thing"}, "item", "", "no_id", "an id is wanted"),
    Case("an id with a line end", thing("a\nb"), "item", "a\nb", "unprintable_id", r"'a\nb'"),
    Case("an id with a NUL", thing("a\0"), "item", "a\0", "unprintable_id", r"'a\x00'"),
    Case("an id of 10 kB", thing(LONG), "item", LONG[:512], "id_too_long", "10,000"),
    Case("an empty title", {"item_id": "e", "title": ""}, "item", "e", "no_text", "a readable character"),
    Case("a title of NULs", {"item_id": "n", "title": "\0\0"}, "item", "n", "no_text", "a readable character"),
    Case("a title of 1 MB", {"item_id": "l", "title": "x" * 1_000_000}, "item", "l", "text_too_long", "1,000,000"),
    Case("a line of 6 MB", {"item_id": "h", "title": "x" * 6_000_000}, "item", "", "line_too_long", "5,000,000"),
    # from here on, beyond the first 4 MB of the file, a column is new
    Case("a late column", thing("late", shade="red"), "field", "shade", "unknown_column", "the column shade"),
    photo("an empty photo", "images/empty.jpg", "empty", "has no bytes"),
    photo("a page named photo", "images/page.jpg", "not_a_photo", "<html>"),
    photo("a photo cut short", "images/cut.jpg", "truncated", "bytes that do not decode"),
    photo("a bomb", "images/bomb.png", "too_many_pixels", "2500000000 pixels"),
    photo("no such photo", "images/absent.jpg", "not_found", "There is no file"),
    photo("a photo with a NUL", "images/a\0.jpg", "not_found", "There is no file"),
    photo("a folder as photo", "images", "not_a_file", "not a regular file"),
    photo("a path upwards", "../../etc/passwd", "outside", "not a plain path"),
    photo("a path from the root", "/etc/passwd", "outside", "not a plain path"),
    photo("a link out", "images/link.jpg", "outside", "leads out of the data folder"),
    photo("a URL of this machine", "http://127.0.0.1:9/a.jpg", "refused", "no public address"),
    photo("a scheme of no store", "ftp://shop.example/a.jpg", "unsupported", "a scheme that is not read"),
]
QUERY_CASES = [
    Case("a broken line", b'{"query_id": "q7"', "query", "", "broken_line", "no JSON"),
    Case("another of the same id", {"query_id": "q1", "query": "pot"}, "query", "q1", "conflicting_id", "'pot'"),
    Case("no id", {"query": "pot"}, "query", "", "no_id", "an id is wanted"),
    Case("an id of 10 kB", {"query_id": LONG, "query": "pot"}, "query", LONG[:512], "id_too_long", "10,000"),
    Case("an id with a line end", {"query_id": "a\n", "query": "pot"}, "query", "a\n", "unprintable_id", r"a\n"),
    Case("no text", {"query_id": "q8", "query": "\0 "}, "query", "q8", "no_text", "a readable character"),
    Case("too long", {"query_id": "q9", "query": "x" * 10_001}, "query", "q9", "query_too_long", "10,001"),
    Case("no positive", {"query_id": "q3", "query": "green pot"}, "query", "q3", "no_positive", "graded 3"),
]
JUDGMENT_CASES = [
    Case("three columns", "q1\t0\ti4", "judgment", "", "wrong_number_of_columns", "3 columns where 4"),
    Case("a word as grade", "q1\t0\ti4\thigh", "judgment", "q1/i4", "not_an_integer", "'high'"),
    Case("a negative grade", "q1\t0\ti5\t-1", "judgment", "q1/i5", "negative_grade", "at least 0"),
    Case("an unknown item", "q1\t0\ti99\t3", "judgment", "q1/i99", "unknown_item", "not in the catalogue"),
    Case("an unknown query", "q99\t0\ti0\t3", "judgment", "q99/i0", "unknown_query", "not among the queries"),
]
CASES = {
    f"{file}: {case.name}": (file, case)
    for file, cases in (("items", ITEM_CASES), ("queries", QUERY_CASES), ("qrels", JUDGMENT_CASES))
    for case in cases
}
ODD_BUT_GOOD = [thing("a/b c"), thing("no photo", image=None), thing("blank photo", image="  ")]
NUM_REPEATED = 2


@pytest.fixture(scope="module")
def crooked(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A shop with a record of every bad kind among good ones, prepared in one run."""
    folder = tmp_path_factory.mktemp("crooked")
    images = folder / "shop" / "images"
    images.mkdir(parents=True)
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<html><body>sorry, sold out</body></html>")
    (images / "cut.jpg").write_bytes(jpeg(0)[:-100])
    (images / "bomb.png").write_bytes(bomb())
    (folder / "outside.jpg").write_bytes(jpeg(1))
    (images / "link.jpg").symlink_to(folder / "outside.jpg")
    items = [*ITEMS, *ODD_BUT_GOOD, *ITEMS[:NUM_REPEATED], *(case.line for case in ITEM_CASES)]
    queries = [*QUERIES, {"query_id": "q/4", "query": "asked by nobody"}, *(case.line for case in QUERY_CASES)]
    judged = [*JUDGED, "q3\t0\ti5\t1", *(case.line for case in JUDGMENT_CASES)]
    web = {"urls": True, "hosts": ["127.0.0.1"], "retries": 0}
    return made(shop(folder / "shop", items, queries, judged), folder, fetch=web)


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def bomb(side: int = 50_000, rows_a_piece: int = 500) -> bytes:
    """A whole PNG of side × side black pixels: 2.5 GB in 2.5 MB, one flushed piece of deflate over and over."""
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    piece = deflate.compress(bytes((side + 1) * rows_a_piece)) + deflate.flush(zlib.Z_FULL_FLUSH)
    num_bytes = (side + 1) * side
    checksum = struct.pack(">HH", num_bytes % 65_521, 1)  # Adler-32 of noughts
    data = b"\x78\xda" + piece * (side // rows_a_piece) + deflate.flush() + checksum
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    framed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_record_stands_in_quarantine_with_its_file_and_reason(crooked: Made, name: str) -> None:
    file, case = CASES[name]
    known = {"kind": case.kind, "id": case.id, "reason": case.reason}
    [found] = [q for q in crooked.quarantine if known.items() <= q.items() and case.says in q["message"]]
    by_several_files = case.reason in ("conflicting_id", "unknown_query", "no_positive")
    assert found["source"].startswith("" if by_several_files else f"{file}.")
    assert found["source"]


def test_nothing_else_is_in_quarantine_and_all_of_it_is_counted(crooked: Made) -> None:
    wanted = Counter(f"{case.kind}/{case.reason}" for _, case in CASES.values())
    assert Counter(f"{q['kind']}/{q['reason']}" for q in crooked.quarantine) == wanted
    assert crooked.manifest.details["quarantined"] == dict(sorted(wanted.items()))
    assert crooked.manifest.counts["quarantined"] == wanted.total()


def test_no_item_is_lost(crooked: Made) -> None:
    counts, aside = crooked.manifest.counts, sum(case.kind == "item" for case in ITEM_CASES)
    given = len(ITEMS) + len(ODD_BUT_GOOD) + NUM_REPEATED + len(ITEM_CASES)
    assert counts["items"] + aside + counts["items_repeated"] == given
    assert len(crooked.items) == counts["items"]


def test_no_query_and_no_judgment_is_lost(crooked: Made) -> None:
    counts = crooked.manifest.counts
    kept = counts["train_queries"] + counts["queries"] + counts["queries_unjudged"]
    assert kept == len(QUERIES) + 1  # nobody judged q/4; all others are among the cases
    assert counts["judgments"] == len(JUDGED) + 1  # of q3; all others are among the cases


def test_an_item_with_a_bad_photo_or_field_is_kept_as_text(crooked: Made) -> None:
    without = [case.name for case in ITEM_CASES if case.kind == "image"]
    kept = {"late", *without, *(item["item_id"] for item in ODD_BUT_GOOD)}
    assert kept < set(crooked.items)
    assert {(crooked.items[i]["has_image"], crooked.items[i]["image"]) for i in kept} == {(False, None)}
    assert crooked.items["late"]["title"] == "thing late"


def test_values_of_a_type_that_nothing_can_be_made_of_are_set_aside(tmp_path: Path) -> None:
    columns = {"image": [[b"a", b"b"]] * 6, "stock": pa.array([2**64 - 1] * 6, pa.uint64())}
    data = files(tmp_path / "shop", {"queries.jsonl": QUERIES, "qrels.tsv": JUDGED})
    pq.write_table(pa.table(pa.Table.from_pylist(ITEMS).to_pydict() | columns), data / "items.parquet")
    found = made(data, tmp_path).manifest
    assert found.details["quarantined"] == {"field/wrong_type": 6, "image/unsupported": 6}
    assert found.counts["items"] == 6


# --- photos from elsewhere -----------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All units are done in this process, where 127.0.0.1, and it alone, counts as public."""
    public = ipaddress.ip_address("127.0.0.1").__eq__
    monkeypatch.setattr(cleaning, "Fetcher", functools.partial(Fetcher, allow=public))
    monkeypatch.setattr(datasets, "spread", lambda units, work, *_, **__: [work(unit) for unit in units])


class Host(http.server.BaseHTTPRequestHandler):
    """Answers with a photo, with what its path asks for, or not at all."""

    over: threading.Event

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.over.wait(20)
        else:
            away = self.path.partition("?")[2]
            self.send_response(404 if self.path == "/gone" else 302 if away else 200)
            self.send_header("location", away)
            self.end_headers()
            self.wfile.write(jpeg(2))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    over = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Host,), {"over": over})) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        over.set()
        server.shutdown()
        thread.join()


def test_a_photo_that_the_web_does_not_give_is_set_aside(here: None, port: int, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    paths = ["good", "slow", f"to?http://127.0.0.2:{port}/good", "to?http://10.0.0.1/good", "gone"]
    items = [{**item, "image": f"{url}/{path}"} for item, path in zip(ITEMS, paths, strict=False)]
    web = {"urls": True, "hosts": ["127.0.0.1", "127.0.0.2", "10.0.0.1"], "timeout_s": 0.3, "retries": 0}
    found = made(shop(tmp_path / "shop", [*items, ITEMS[5]]), tmp_path, fetch=web)
    reasons = {q["id"]: q["reason"] for q in found.quarantine}
    assert reasons == {"i1": "timed_out", "i2": "refused", "i3": "refused", "i4": "not_found"}
    refused = [q["message"] for q in found.quarantine if q["reason"] == "refused"]
    assert refused == ["'127.0.0.2' is at no public address.", "'10.0.0.1' is at no public address."]
    assert [i for i, row in found.items.items() if row["has_image"]] == ["i0"]


def test_a_bomb_is_refused_without_memory_or_time(here: None, tmp_path: Path) -> None:
    assert not inputs.pixels(bomb(1000), 8).any()  # a photo like any other when it is small
    data = shop(tmp_path / "shop", [*ITEMS, thing("bomb", image="bomb.png")])
    (data / "bomb.png").write_bytes(bomb())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = made(data, tmp_path)
    assert [q["reason"] for q in found.quarantine] == ["too_many_pixels"]
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; its pixels are 2.5 GB


# --- data that is refused ------------------------------------------------------------------------


def cut_short(data: bytearray) -> bytes:
    return bytes(data[: len(data) // 2])


def without_footer(data: bytearray) -> bytes:
    return bytes(data[:-30])


def altered(data: bytearray) -> bytes:
    data[len(data) * 2 // 3] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize("harm", [cut_short, without_footer, altered])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, harm: Callable[[bytearray], bytes]) -> None:
    data = files(tmp_path / "shop", {"queries.jsonl": QUERIES, "qrels.tsv": JUDGED})
    rows = pa.Table.from_pylist([thing(f"i{n}") for n in range(5000)])
    path = data / "items.parquet"
    pq.write_table(rows, path, row_group_size=1000, write_page_checksum=True)
    path.write_bytes(harm(bytearray(path.read_bytes())))
    said = refusal(data, tmp_path)
    assert "wanted a whole file items.parquet" in said
    assert "copy or make the file again" in said


@pytest.mark.parametrize(
    ("items", "settings", "says"),
    [
        (ITEMS, {"text_fields": ["title", "about"]}, r"wanted columns about in items.jsonl; found item_id, title"),
        ([{"item_id": "i0"}], {}, "wanted columns title in items.jsonl; found item_id"),
        ([thing("i0", split=["a"])], {}, "wanted text or numbers as split in items.jsonl; found list"),
        ([thing("i0", split="aside")], {}, "wanted no split called aside or new, which are made here in items"),
        ([thing(f"i{n}", split=f"s{n}") for n in range(300)], {}, "wanted items in at most 250 splits"),
        ([{"item_id": ["i0"], "title": "x"}], {}, "wanted text or integers as item_id in items.jsonl; found list"),
        ([thing("")], {}, "wanted items with an id and a text; found none that can be used; mend the data"),
    ],
)  # fmt: skip
def test_items_that_cannot_be_read_as_such_are_refused(
    tmp_path: Path, items: list[Line], settings: dict[str, Any], says: str
) -> None:
    assert says in refusal(shop(tmp_path / "shop", items), tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("judgments.jsonl", [{"query_id": "q1", "item_id": "i0", "grade": [1]}]),
        ("triplets.jsonl", [{"anchor": "red mug", "positive": ["item 1"]}]),
    ],
)
def test_lists_where_text_is_wanted_are_refused(tmp_path: Path, name: str, lines: list[Line]) -> None:
    assert name in refusal(
        files(tmp_path / "shop", {"items.jsonl": ITEMS, "queries.jsonl": QUERIES, name: lines}), tmp_path
    )


def test_an_item_may_lack_a_text_field_that_others_have(tmp_path: Path) -> None:
    gap = {"item_id": "gap", "title": "x" * 4_500_000}  # too long, and the lines after it are another block
    items = [thing("i0", about="of tin"), gap, *ITEMS[1:]]
    found = made(shop(tmp_path / "shop", items), tmp_path, text_fields=["title", "about"])
    assert found.manifest.details["quarantined"] == {"item/text_too_long": 1}
    assert found.items["i0"]["text"] == "thing i0 of tin"
    assert found.items["i1"]["text"] == "item 1"


# --- splits that come out empty ------------------------------------------------------------------

VAL = [{"item_id": "v0", "title": "other 0", "split": "val"}]
ASKED = [{"query_id": "v1", "query": "red", "split": "val"}]
TRAIN = [item | {"split": "train"} for item in ITEMS]
TWINS = [{**item, "item_id": f"twin of {item['item_id']}", "split": "val"} for item in ITEMS]
TRAIN_ASKED = [query | {"split": "train"} for query in QUERIES]


@pytest.mark.parametrize(
    ("items", "queries", "judged", "settings"),
    [
        (ITEMS, QUERIES, JUDGED, {"splits": {"make": "four", "new_items": 0.99, "new_queries": 0.99}}),
        ([*TRAIN, *TWINS], TRAIN_ASKED, JUDGED, {}),
        (VAL, ASKED, ["v1\t0\tv0\t3"], {}),
        (ITEMS, QUERIES, ["q9\t0\ti0\t3"], {}),
        (ITEMS, QUERIES, ["q1\t0\ti0\t0"], {}),
    ],
    ids=["all are new", "all is set aside", "no split is trained on", "no query is known", "no grade is positive"],
)  # fmt: skip
def test_no_pair_to_train_on_is_refused(
    tmp_path: Path, items: list[Line], queries: list[Line], judged: list[Line], settings: dict[str, Any]
) -> None:
    said = refusal(shop(tmp_path / "shop", items, queries, judged), tmp_path, **settings)
    assert "wanted" in said
    assert "pair" in said


@pytest.mark.parametrize("judged", [[], ["v1\t0\tz\t3"], ["v1\t0\tv0\t0"]], ids=["none", "unknown", "grade 0"])
def test_an_evaluation_split_that_came_out_empty_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], judged: list[Line]
) -> None:
    data = shop(tmp_path / "shop", [*TRAIN, *VAL], [*TRAIN_ASKED, *ASKED], [*JUDGED, *judged])
    found = made(data, tmp_path).manifest
    assert found.counts["pairs"] == 3
    [said] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "val" in said


def test_a_query_without_a_judgment_is_counted(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", [*TRAIN, *VAL], [*TRAIN_ASKED, *ASKED])
    found = made(data, tmp_path).manifest
    assert (found.counts["train_queries"], found.counts["queries"], found.counts["queries_unjudged"]) == (2, 0, 1)


def test_a_catalogue_too_small_for_four_splits_is_trained_on(tmp_path: Path) -> None:
    found = made(shop(tmp_path / "shop", ITEMS), tmp_path, splits={"make": "four"}).manifest
    assert (found.counts["pairs"], found.counts["queries"], found.details["candidates"]) == (3, 0, {})


# --- too much of it ------------------------------------------------------------------------------

UNUSED = [
    "q9\t0\ti0\t3",
    "q1\t0\ti9\t3",
    "q9\t0\ti1\t3",
    "q9\t0\ti2\t3",
]  # 4 of 16: 6 items, 4 judgments, 2 queries


def test_as_much_quarantine_as_is_allowed_passes(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", ITEMS, judged=[*JUDGED, *UNUSED])
    assert made(data, tmp_path, max_quarantined_fraction=0.25).manifest.counts["quarantined"] == 4


def test_a_little_more_is_refused_with_the_reasons_that_are_most_frequent(tmp_path: Path) -> None:
    data = shop(tmp_path / "shop", ITEMS, judged=[*JUDGED, *UNUSED])
    said = refusal(data, tmp_path, max_quarantined_fraction=0.2499)
    assert "found 4 of 16: 3 judgment/unknown_query, 1 judgment/unknown_item; mend the data, or raise" in said


def test_the_fraction_is_compared_exactly(tmp_path: Path) -> None:
    items = [thing(f"i{n}") for n in range(65)]
    data = shop(tmp_path / "shop", items, judged=[*JUDGED, *(f"q9\t0\ti{n}\t3" for n in range(29))])
    assert made(data, tmp_path, max_quarantined_fraction=0.29).manifest.counts["quarantined"] == 29


# --- whoever does the work -----------------------------------------------------------------------

ALONE = """
import sys
import ray
from askew.triplets import PrepareSettings, prepare
ray.init("local", num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
prepare(PrepareSettings.model_validate_json(sys.argv[1]))
"""


def test_one_worker_and_four_make_the_same_bytes(tmp_path: Path) -> None:
    items = [thing(f"i{n}", image=f"{n % 60}.jpg", split="val" if n % 5 == 0 else "train") for n in range(120)]
    gap = {"item_id": "gap", "title": "x" * 4_500_000}  # beyond it columns are new
    late = [thing(f"late{n}", shade="red", hue=n, tint="x") for n in range(5)]
    asked = [{"query_id": f"q{n}", "query": f"query {n}", "split": "train" if n % 2 else "val"} for n in range(40)]
    judged = [f"q{n % 40}\t0\ti{n * 7 % 130}\t{n % 4 - 1}" for n in range(400)]
    data = shop(tmp_path / "shop", [*items[:20], gap, *late], asked, judged)
    files(data, {f"items-{n}.jsonl": [*items[n * 10 : n * 10 + 20], b"{"] for n in range(1, 11)})
    for number in range(50):
        (data / f"{number}.jpg").write_bytes(jpeg(number)[: -100 if number % 7 == 0 else None])
    how = {"data": data, "max_quarantined_fraction": 1.0, "image_size": 16, "unit_bytes": 1_000_000}
    alone(PrepareSettings(root=tmp_path / "one", **how))
    prepare(PrepareSettings(root=tmp_path / "four", **how))
    one, four = (contents(tmp_path / name) for name in ("one", "four"))
    assert one == four
    assert len([name for name in one if name.startswith("items/")]) > 10
    assert json.loads(one["manifest.json"])["counts"]["quarantined"] > 50


def alone(settings: PrepareSettings) -> None:
    """Prepare in a process of its own, by a cluster of one processor."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", ALONE, settings.model_dump_json()]
    job = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert job.returncode == 0, job.stderr.decode()


def contents(root: Path) -> dict[str, bytes]:
    [folder] = root.glob("triplets-*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
