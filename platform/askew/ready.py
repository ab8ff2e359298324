"""Ready triplets, in the three forms in which they are published, become items, queries and judgments.

    sentence-transformers   anchor (or query), positive, and any number of columns negative…
    Tevatron                query_id, query, positive_passages, negative_passages: lists of docid, title, text
    labelled pairs          query, title, image (a path or a URL), label 1 or 0

Works on Arrow tables; knows nothing of files.
"""

import pyarrow as pa
import pyarrow.compute as pc

from askew import columns
from askew.errors import DataError
from askew.records import Bad, bad
from askew.streams import Chunk

POSITIVE, NEGATIVE = 1, 0
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "item_id", "query_id", "title", "text", "image", "query")]
    + [("grade", pa.int64()), ("split", pa.string())]
)


def tagged(table: pa.Table, file: str) -> Chunk:
    """Make rows of kind item, query and judgment (SCHEMA), each once: positives are graded 1, negatives 0.

    An id that is not given is made of the text (`columns.hashed`). Set aside: empty_query, no_positive,
    empty_item and not_a_label. Raises DataError when the columns are of none of the three forms.
    """
    names = set(table.column_names)
    if not table.num_rows:
        return Chunk(SCHEMA.empty_table(), [])
    table = _whole(table, "anchor" if "anchor" in names else "query", file)
    if "positive_passages" in names:
        pairs, set_aside = _passages(table, file)
    elif {"title", "label"} <= names:
        pairs, set_aside = _labelled(table, file)
    elif "positive" in names:
        pairs, set_aside = _columns(table, file)
    else:
        wanted = f"anchor and positive; query and positive_passages; or query, title and label, in {file}"
        raise DataError(wanted, ", ".join(table.column_names), "name them under columns")
    return _rows(pairs, set_aside, file)


def _whole(table: pa.Table, query: str, file: str) -> pa.Table:
    """Give each row query, query_id and split."""
    columns.present({query}, table.column_names, file)
    texts = columns.text(table[query])
    ids = columns.text(table["query_id"]) if "query_id" in table.column_names else columns.hashed(texts)
    nothing = pa.nulls(table.num_rows, pa.string())
    split = columns.text(table["split"]) if "split" in table.column_names else nothing
    rest = {name: table[name] for name in table.column_names if name not in (query, "query", "query_id", "split")}
    return pa.table({"query": texts, "query_id": ids, "split": split, **rest})


def _pairs(rows: pa.Table, grade: int | pa.Array, **item: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Make pairs of a query and an item: one a row, with the item's id, title, text and image if known."""
    nothing = pa.nulls(rows.num_rows, pa.string())
    given = {name: columns.text(item[name]) if name in item else nothing for name in SCHEMA.names[3:6]}
    full = [pc.fill_null(column, "") for column in given.values()]
    told = pc.utf8_trim_whitespace(pc.binary_join_element_wise(*full, "\n"))
    made = columns.hashed(pc.if_else(pc.equal(told, ""), None, told))
    ids = pc.coalesce(columns.text(item["item_id"]), made) if "item_id" in item else made
    grades = pa.repeat(pa.scalar(grade, pa.int64()), rows.num_rows) if isinstance(grade, int) else grade
    asked = {name: rows[name] for name in ("query_id", "query", "split")}
    return pa.table({**asked, "item_id": ids, **given, "grade": grades})


def _columns(table: pa.Table, file: str) -> Chunk:
    empty = pc.equal(pc.fill_null(pc.utf8_trim_whitespace(columns.text(table["positive"])), ""), "")
    set_aside = _bad(table.filter(empty), file, "no_positive", "the row has no positive")
    table = table.filter(pc.invert(empty))
    pairs = [_pairs(table, POSITIVE, title=table["positive"])]
    for name in table.column_names:
        if name.startswith("negative"):
            rows = table.filter(pc.is_valid(table[name]))
            pairs.append(_pairs(rows, NEGATIVE, title=rows[name]))
    return Chunk(pa.concat_tables(pairs), set_aside)


def _labelled(table: pa.Table, file: str) -> Chunk:
    labels = columns.text(table["label"])
    right = pc.is_in(labels, value_set=pa.array(["0", "1"]))
    set_aside = _bad(table.filter(pc.invert(right)), file, "not_a_label", "the label is neither 0 nor 1")
    rows = table.filter(right)
    item = {name: rows[name] for name in ("item_id", "title", "text", "image") if name in rows.column_names}
    return Chunk(_pairs(rows, columns.text(rows["label"]).cast(pa.int64()), **item), set_aside)


def _passages(table: pa.Table, file: str) -> Chunk:
    num = pc.fill_null(_lengths(table, "positive_passages"), 0)
    set_aside = _bad(table.filter(pc.equal(num, 0)), file, "no_positive", "the row has no positive passage")
    table = table.filter(pc.greater(num, 0))
    pairs = [_flattened(table, "positive_passages", POSITIVE)]
    if "negative_passages" in table.column_names:
        pairs.append(_flattened(table, "negative_passages", NEGATIVE))
    return Chunk(pa.concat_tables(pairs), set_aside)


def _lengths(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.int32())
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        raise DataError(f"a list of passages as {name}", str(column.type), "mend the file")
    return pc.list_value_length(column)


def _flattened(table: pa.Table, name: str, grade: int) -> pa.Table:
    """Make a pair of each passage in a column of lists."""
    column = table[name].combine_chunks()
    _lengths(table, name)
    if pa.types.is_null(column.type) or pa.types.is_null(column.type.value_type):
        return _pairs(table.slice(0, 0), grade)
    passages = pc.list_flatten(column)
    if not pa.types.is_struct(passages.type):
        raise DataError(f"objects with title and text in {name}", str(passages.type), "mend the file")
    rows = table.select(["query_id", "query", "split"]).take(pc.list_parent_indices(column))
    fields = {field.name for field in passages.type}
    names = {"item_id": "docid", "title": "title", "text": "text"}
    item = {ours: pc.struct_field(passages, theirs) for ours, theirs in names.items() if theirs in fields}
    return _pairs(rows, grade, **item)


def _rows(pairs: pa.Table, set_aside: list[Bad], file: str) -> Chunk:
    """Take pairs apart into queries, items and judgments, each once."""
    empty = pc.equal(pc.fill_null(pc.utf8_trim_whitespace(pairs["query"]), ""), "")
    set_aside = set_aside + _bad(pairs.filter(empty), file, "empty_query", "the row has no query")
    pairs = pairs.filter(pc.invert(empty))
    nameless = pc.is_null(pairs["item_id"])
    set_aside += _bad(pairs.filter(nameless), file, "empty_item", "an item of the row has no id and no text")
    pairs = pairs.filter(pc.invert(nameless))
    kinds = {
        "query": ("query_id", "query", "split"),
        "item": ("item_id", "title", "text", "image", "split"),
        "judgment": ("query_id", "item_id", "grade", "split"),
    }
    return Chunk(pa.concat_tables([_once(pairs, kind, names) for kind, names in kinds.items()]), set_aside)


def _once(pairs: pa.Table, kind: str, names: tuple[str, ...]) -> pa.Table:
    rows = pairs.select(names).group_by(list(names), use_threads=False).aggregate([])
    given = {"kind": pa.repeat(kind, rows.num_rows)} | {name: rows[name] for name in names}
    return pa.table(
        [given.get(field.name, pa.nulls(rows.num_rows, field.type)) for field in SCHEMA], schema=SCHEMA
    )


def _bad(rows: pa.Table, file: str, reason: str, message: str) -> list[Bad]:
    return [bad("triplet", query_id or "", file, reason, message) for query_id in rows["query_id"].to_pylist()]
