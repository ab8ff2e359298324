"""Clean: a unit of raw items becomes parts of clean ones, rows of the register, and what was set aside.

An item whose photo is missing or broken is kept as text, and the photo set aside. Knows nothing of queries,
or of other units.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew import inputs, register, sources, splits, tables
from askew.config import Settings
from askew.errors import DataError
from askew.fetching import Fetcher, FetchSettings, Problem
from askew.overview import Tally
from askew.records import MAX_ID, Bad, bad, table
from askew.words import clean

MAX_TEXT = 10_000
ROWS_AT_ONCE, BYTES_AT_ONCE = 256, 32 << 20
OWN = frozenset({"item_id", "title", "image", "split"})
SAMPLED_FILES, SAMPLED_ROWS = 1000, 1000
MAX_SPLITS = 250  # a split is one byte of the register
NO_FIELD = "none"  # Parquet knows no struct without a field
NUMBERS = {  # as shops write them: no codes like 007, 0x1F or 12E4, no nan
    pa.int64(): r"^\s*[+-]?(0|[1-9][0-9]*)\s*$",
    pa.float64(): r"^\s*[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?\s*$",
}
ALL = "all"  # the split of items whose data names none
Fetch = Callable[[Sequence[object]], Sequence[bytes | Problem | None]]  # the photos that references name


class CleanSettings(Settings):
    """What a clean item is."""

    text_fields: tuple[str, ...] = ("title",)
    image_size: int = 48
    kind_field: str = ""
    trait_fields: tuple[str, ...] = ()
    fetch: FetchSettings = FetchSettings()


# --- the fields beside title and image -----------------------------------------------------------


def fields(layout: sources.Layout, data: str) -> pa.Schema:
    """Find names and types of the items' other fields in the first rows of each file, at most 1,000 files.

    A field is a whole number (int64), a number (double), true or false, or text; one that is not the same in
    all files becomes text.
    """
    kinds: dict[str, set[pa.DataType]] = {}
    for tab in layout.items:
        first = {unit["file"]: unit for unit in reversed(sources.units(tab, data))}
        for unit in list(first.values())[:: max(1, -(-len(first) // SAMPLED_FILES))]:
            chunk = next(sources.read(unit, tab, "item", SAMPLED_ROWS), None)
            for name, column in zip(*_columns(chunk), strict=True) if chunk else ():
                kinds.setdefault(name, set()).add(_kind(column, textual=unit["format"] in ("csv", "tsv")))
    return pa.schema([(name, _common(found)) for name, found in kinds.items()])


def _columns(chunk: sources.Chunk) -> tuple[list[str], list[pa.ChunkedArray]]:
    names = [n for n in chunk.table.column_names if n not in OWN and not pa.types.is_binary(chunk.table[n].type)]
    return names, [chunk.table[n] for n in names]


def _kind(column: pa.ChunkedArray, textual: bool) -> pa.DataType:
    kind = column.type
    if textual and pa.types.is_string(kind):
        return _parsed(column)
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    return kind if pa.types.is_boolean(kind) or pa.types.is_null(kind) else pa.string()


def _parsed(column: pa.ChunkedArray) -> pa.DataType:
    """The type that all of a column's words are written in; a number with a leading nought is a word."""
    known = column.filter(pc.greater(pc.utf8_length(pc.fill_null(column, "")), 0))
    if not len(known):
        return pa.null()
    for kind, form in NUMBERS.items():
        if pc.all(pc.match_substring_regex(known, form)).as_py():
            try:
                known.cast(kind)
            except pa.ArrowInvalid:
                continue
            return kind
    return pa.string()


def _common(kinds: set[pa.DataType]) -> pa.DataType:
    known = kinds - {pa.null()}
    if known <= {pa.int64(), pa.float64()} and len(known) == 2:
        return pa.float64()
    return known.pop() if len(known) == 1 else pa.string()


def schema(fields: pa.Schema) -> pa.Schema:
    """The columns of a part of clean items."""
    names = [(n, pa.string()) for n in ("item_id", "split", "title", "text")]
    other = pa.struct(list(fields)) if len(fields) else pa.struct([(NO_FIELD, pa.null())])
    bytes_ = [("image", pa.binary()), ("pixels", pa.binary())]
    return pa.schema([*names, ("fields", other), *bytes_, ("has_image", pa.bool_())])


# --- photos --------------------------------------------------------------------------------------


def rows_at_once(size: int) -> int:
    """How many photos are in memory at a time when each becomes `size` pixels a side."""
    return max(16, min(ROWS_AT_ONCE, BYTES_AT_ONCE // (3 * size**2)))


class Photos(NamedTuple):
    """The photos of n items: their bytes, the m that could be decoded, and what is wrong with others."""

    images: list[bytes | None]
    pixels: NDArray[np.uint8]  # (m, size, size, 3)
    has: NDArray[np.bool_]  # (n,), m of them true
    problems: dict[int, Problem]  # by the item's number

    @classmethod
    def decoded(cls, found: Sequence[bytes | Problem | None], size: int) -> "Photos":
        """Decode what was fetched for n items."""
        pixels, rows = np.empty((len(found), size, size, 3), dtype=np.uint8), list[int]()
        problems = {row: what for row, what in enumerate(found) if isinstance(what, Problem)}
        for row, image in enumerate(found):
            if isinstance(image, bytes):
                try:
                    pixels[len(rows)] = inputs.pixels(image, size)
                    rows.append(row)
                except DataError as error:
                    problems[row] = Problem(inputs.problem(error), str(error))
        has = np.zeros(len(found), dtype=np.bool_)
        has[rows] = True
        images = [
            image if there and isinstance(image, bytes) else None for image, there in zip(found, has, strict=True)
        ]
        return cls(images, pixels[: len(rows)], has, dict(sorted(problems.items())))


# --- one unit ------------------------------------------------------------------------------------


class Cleaner:
    """Cleans units of items of one catalogue."""

    def __init__(
        self, tab: Mapping[str, Any], settings: Mapping[str, Any], fields: pa.Schema, triplets: bool
    ) -> None:
        self._table, self._triplets = sources.Table.model_validate(tab), triplets
        self._settings, self._fields = CleanSettings.model_validate(settings), fields

    def clean(self, unit: sources.Unit, out: Path, number: int) -> dict[str, Any]:
        """Clean a unit into `out`/parts, registers and quarantine; returns what came of it.

        Written are parts of bounded size, `<number>-<part>.parquet`; for each its register rows, `.npy`; and
        what was set aside.
        """
        writer = tables.Parts(out / "parts", f"{number:06d}", schema(self._fields))
        tally, set_aside, names = Tally(), [], dict[str, int]()
        fetcher = Fetcher(unit["data"], self._settings.fetch)
        try:
            for chunk in self._read(unit):
                set_aside += chunk.bad
                if not chunk.table.num_rows:  # of broken lines alone: it has no columns
                    continue
                rows, photos, found = self.rows(chunk.table, unit["file"], fetcher.fetch)
                set_aside += found
                writer.write(rows, self._registered(rows, photos, names))
                _count(tally, rows)
        except DataError as error:
            raise error.of(unit["file"]) from error
        finally:
            fetcher.close()
        parts = writer.close()
        path = out / "quarantine" / f"items-{number:06d}.parquet"
        tables.write(path, table(set_aside))
        return {"parts": parts, "splits": list(names), "tally": tally.to_json(), "quarantined": len(set_aside)}

    def _read(self, unit: sources.Unit) -> Iterator[sources.Chunk]:
        rows = rows_at_once(self._settings.image_size)
        if not self._triplets:
            yield from sources.read(unit, self._table, "item", rows)
            return
        for chunk in sources.read_triplets(unit, self._table, rows):
            rows = chunk.table.filter(pc.equal(chunk.table["kind"], "item"))
            yield sources.Chunk(rows.select(["item_id", "title", "image", "split"]), chunk.bad)

    def rows(self, raw: pa.Table, file: str, fetch: Fetch) -> tuple[pa.Table, NDArray[np.uint8], list[Bad]]:
        """Make the clean rows of a chunk; returns the pixels of those with a photo, (m, size, size, 3), too."""
        raw, set_aside = self._usable(raw, file)
        ids = raw["item_id"].to_pylist()
        references = raw["image"].to_pylist() if "image" in raw.column_names else [None] * len(ids)
        photos = Photos.decoded(fetch(references), self._settings.image_size)
        broken = [bad("image", ids[row], file, *problem) for row, problem in photos.problems.items()]
        other, odd = self._others(raw, ids, file)
        split = words(raw, "split", file)
        split = pc.if_else(pc.equal(pc.fill_null(split, ""), ""), ALL, split)
        images = pa.array(photos.images, pa.binary()), tables.cells(photos.pixels, photos.has)
        columns = [raw["item_id"], split, raw["title"], raw["text"], other, *images, pa.array(photos.has)]
        return pa.table(columns, schema=schema(self._fields)), photos.pixels, [*set_aside, *broken, *odd]

    def _usable(self, raw: pa.Table, file: str) -> tuple[pa.Table, list[Bad]]:
        """Set aside items without a usable id or text; title and text of the others are clean."""
        missing = {*self._settings.text_fields} - {*raw.column_names, *self._fields.names}
        if missing:
            names = ", ".join(raw.column_names)
            raise DataError(
                f"columns {', '.join(sorted(missing))} in {file}", names, "see text_fields and columns"
            )
        parts = [texts(raw, name) for name in self._settings.text_fields]
        joined = [clean(" ".join(said)) for said in zip(*parts, strict=True)]
        titles = [clean(t) or x for t, x in zip(texts(raw, "title"), joined, strict=True)]
        keep, set_aside = [], []
        for item_id, text in zip(raw["item_id"].to_pylist(), joined, strict=True):
            problem = _problem(item_id, text)
            keep.append(not problem)
            if problem:
                set_aside.append(bad("item", item_id, file, *problem))
        cleaned = raw.drop_columns([n for n in ("title", "text") if n in raw.column_names])
        cleaned = cleaned.append_column("title", pa.array([t[:MAX_TEXT] for t in titles], pa.string()))
        if "text" in raw.column_names and "text" in self._fields.names:
            cleaned = cleaned.append_column(TEXT_FIELD, raw["text"])
        return cleaned.append_column("text", pa.array(joined, pa.string())).filter(
            pa.array(keep, pa.bool_())
        ), set_aside

    def _others(self, raw: pa.Table, ids: Sequence[str], file: str) -> tuple[pa.Array, list[Bad]]:
        """Make the other fields, each of its type; a value of another becomes null and is set aside."""
        columns, set_aside = [], []
        for field in self._fields:
            name = TEXT_FIELD if field.name == "text" else field.name
            values = raw[name].combine_chunks() if name in raw.column_names else pa.nulls(len(ids), field.type)
            column, odd = _typed(values, field.type)
            columns.append(column)
            for row in odd:
                message = f"{field.name} is {values[row].as_py()!r}, where the first rows have {field.type}"
                set_aside.append(bad("field", ids[row], file, "wrong_type", message))
        known = {*OWN, "text", TEXT_FIELD, *self._fields.names}
        for name in sorted(set(raw.column_names) - known) if len(ids) else ():
            if not pa.types.is_binary(raw[name].type):
                message = f"the column {name} stands in none of the first rows of the files"
                set_aside.append(bad("field", name, file, "unknown_column", message))
        if not columns:
            return pa.nulls(len(ids), pa.struct([(NO_FIELD, pa.null())])), set_aside
        return pa.StructArray.from_arrays(columns, fields=list(self._fields)), set_aside

    def _registered(self, rows: pa.Table, photos: NDArray[np.uint8], names: dict[str, int]) -> NDArray[np.void]:
        """Make the register rows of clean items; `names` numbers the splits met so far."""
        out = np.zeros(rows.num_rows, dtype=register.ROW)
        out["id"] = register.hashes(rows["item_id"].combine_chunks())
        out["title"] = register.hashes(pc.utf8_lower(rows["title"]).combine_chunks())
        numbers = [names.setdefault(name, len(names)) for name in rows["split"].to_pylist()]
        _check_names(names)
        out["split"] = numbers
        has = rows["has_image"].to_numpy()
        small = splits.thumbnails(photos)
        out["photo"][has], out["detail"][has] = splits.photo_hashes(small)
        out["colour"][has] = splits.mean_colours(small)
        fields = [other or {} for other in rows["fields"].to_pylist()]
        out["kind"] = _short([f.get(self._settings.kind_field) for f in fields])
        out["traits"] = _short([[f.get(n) for n in self._settings.trait_fields] for f in fields])
        out["content"] = _contents(rows, fields)
        return out


TEXT_FIELD = "their text"  # where a column called text waits while ours has its name


def texts(raw: pa.Table, name: str) -> list[str]:
    """List what a column says as text: numbers too, lists joined, nothing where there is none."""
    return list(map(_text, raw[name].to_pylist())) if name in raw.column_names else [""] * raw.num_rows


def text_of(item: Mapping[str, Any], text_fields: Sequence[str]) -> str:
    """Join what a clean item says in its title and other fields, as it was joined when it was cleaned."""
    said = {**(item.get("fields") or {}), "title": item["title"]}
    return clean(" ".join(_text(said.get(name)) for name in text_fields))


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def words(raw: pa.Table, name: str, file: str) -> pa.ChunkedArray | pa.Array:
    """Take a column of single words as text, nulls if there is none. Raises DataError when it holds lists."""
    if name not in raw.column_names:
        return pa.nulls(raw.num_rows, pa.string())
    try:
        return raw[name].cast(pa.string())
    except pa.ArrowException as error:
        raise DataError(f"text or numbers as {name} in {file}", str(raw[name].type), "mend the column") from error


def _problem(item_id: str | None, text: str) -> tuple[str, str] | None:
    if problem := id_problem(item_id):
        return problem
    if not text:
        return "no_text", "a title with a readable character is wanted"
    if len(text) > MAX_TEXT:
        return "text_too_long", f"a text of at most {MAX_TEXT:,} characters is wanted; this one has {len(text):,}"
    return None


def id_problem(found: str | None) -> tuple[str, str] | None:
    """Tell why an id cannot be used: a reason and a message; None if it can."""
    if found is None or not found.strip():
        return "no_id", "an id is wanted; none, or an empty one, found"
    if len(found) > MAX_ID:
        return "id_too_long", f"an id of at most {MAX_ID} characters is wanted; this one has {len(found):,}"
    if not found.isprintable():
        return "unprintable_id", f"an id of printable characters is wanted, not {found[:80]!r}"
    return None


def _typed(values: pa.Array, kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Cast a column; returns it, and the rows whose values cannot be cast and are null now."""
    odd: list[int] = []
    if pa.types.is_string(values.type) and not pa.types.is_string(kind):
        values = pc.if_else(pc.equal(pc.utf8_trim_whitespace(values), ""), None, values)
        if kind in NUMBERS:
            wrong = pc.fill_null(pc.invert(pc.match_substring_regex(values, NUMBERS[kind])), False)
            odd = np.flatnonzero(wrong.to_numpy(zero_copy_only=False)).tolist()
            values = pc.if_else(wrong, None, values)
    try:
        if pa.types.is_string(kind) and pa.types.is_nested(values.type):
            words = [None if v is None else json.dumps(v, default=str, sort_keys=True) for v in values.to_pylist()]
            return pa.array(words, pa.string()), odd
        return values.cast(kind), odd
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    made = []
    for row, value in enumerate(values.to_pylist()):
        try:
            made.append(pa.scalar(value).cast(kind).as_py())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError):
            made.append(None)
            odd.append(row)
    return pa.array(made, kind), sorted(odd)


def _short(values: Sequence[object]) -> NDArray[np.uint32]:
    """Hash values to 32 bits; 0 where there is nothing."""
    known = [v not in (None, "", []) for v in values]
    words = [json.dumps(v, default=str).casefold() for v in values]
    return np.where(known, register.hashes(words) >> np.uint64(32), 0).astype(np.uint32)


def _contents(rows: pa.Table, fields: Sequence[Mapping[str, Any]]) -> NDArray[np.uint32]:
    columns = [rows["title"].to_pylist(), rows["text"].to_pylist(), fields, rows["image"].to_pylist()]
    digests = []
    for title, text, other, image in zip(*columns, strict=True):
        digest = hashlib.blake2b(json.dumps([title, text, other], default=str).encode(), digest_size=4)
        digest.update(image or b"")
        digests.append(int.from_bytes(digest.digest(), "little"))
    return np.array(digests, dtype=np.uint32)


def _count(tally: Tally, rows: pa.Table) -> None:
    """Count what the overview shows of items."""
    tally.add("title_characters", pc.utf8_length(rows["title"]).to_numpy())
    tally.add("image_bytes", pc.binary_length(rows["image"].drop_null()).to_numpy())
    sizes = np.array([inputs.photo_size(i) for i in rows["image"].drop_null().to_pylist()]).reshape(-1, 2)
    tally.add("image_width", sizes[:, 0])
    tally.add("image_height", sizes[:, 1])
    tally.count("has_image", Counter("with photo" if h else "without" for h in rows["has_image"].to_pylist()))
    names = [f.name for f in rows["fields"].type]
    flat = dict(zip(names, rows["fields"].combine_chunks().flatten(), strict=True)) | {"image": rows["image"]}
    flat.pop(NO_FIELD, None)
    tally.count("cells", {name: rows.num_rows for name in flat})
    tally.count("missing", {name: column.null_count for name, column in flat.items() if column.null_count})


def finish(
    source: Path, start: int, out: Path, keep: NDArray[np.bool_], split: NDArray[np.uint8], names: Sequence[str]
) -> None:
    """Write a final part: the rows of the part `source` that are kept, each with its final split.

    `keep` and `split` (numbers of `names`) are those of the whole catalogue, the part's rows beginning at
    `start`. A part that stays as it is is linked.
    """
    with pq.ParquetFile(source) as file:
        here = slice(start, start + file.metadata.num_rows)
        mine, final = keep[here], np.array(names, dtype=object)[split[here]]
        if mine.all() and file.read(["split"])["split"].to_pylist() == final.tolist():
            tables.link(source, out)
            return
        at = 0
        with tables.opened(out, file.schema_arrow) as writer:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                here = slice(at, at := at + rows.num_rows)
                rows = rows.set_column(1, "split", pa.array(final[here], pa.string()))
                if (rows := rows.filter(pa.array(mine[here]))).num_rows:
                    writer.write_table(rows)


def names_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """All splits' names that units met, in order. Raises DataError when they are too many, or one is ours."""
    names = sorted({name for result in results for name in result["splits"]})
    _check_names(names)
    return names


def _check_names(names: Collection[str]) -> None:
    if len(names) > MAX_SPLITS:
        found = f"{len(names)} or more, as {', '.join(sorted(names)[:3])}"
        raise DataError(f"items in at most {MAX_SPLITS} splits", found, "name another column as split")
    if ours := sorted({splits.ASIDE, splits.NEW} & {*names}):
        raise DataError("no split called aside or new, which are made here", ", ".join(ours), "rename it")
