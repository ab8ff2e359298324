"""From a shop's columns to ours: names, ids as text, grades as numbers.

Knows nothing of files and formats, nor of what makes a record good.
"""

import hashlib
import string
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from askew.errors import DataError
from askew.records import bad
from askew.streams import EXACT, Chunk

IDS = ("item_id", "query_id")
INTEGER = r"^[+-]?[0-9]{1,18}(\.0*)?$"


def sources(meaning: str) -> set[str]:
    """List their columns that a meaning reads: `name`, `#name`, or `=text with {name}`; `@…` reads none."""
    if meaning.startswith("="):
        return {field for _, field, _, _ in string.Formatter().parse(meaning[1:]) if field}
    return set() if meaning.startswith("@") else {meaning.removeprefix("#")}


def needed(meanings: Mapping[str, str], also: Collection[str], ours: Collection[str]) -> set[str]:
    """List their columns that are needed to make `ours`, and those in `also`."""
    return set(also).union(*(sources(meanings.get(name, name)) for name in ours))


def named(table: pa.Table, meanings: Mapping[str, str], folder: str, file: str) -> pa.Table:
    """Make our columns of theirs; a column that is not there is null, one with no meaning keeps its name."""
    columns = {ours: _meant(table, meaning, folder, file) for ours, meaning in meanings.items()}
    used = set[str]().union(*map(sources, (m for m in meanings.values() if m[:1] not in "#=")), columns)
    rest = {name: table[name] for name in table.column_names if name not in used}
    return pa.table(columns | rest) if columns or rest else table


def _meant(table: pa.Table, meaning: str, folder: str, file: str) -> pa.ChunkedArray | pa.Array:
    if meaning.startswith("@"):
        return pa.repeat({"@folder": folder, "@file": file}[meaning], table.num_rows)
    if meaning.startswith("="):
        return _filled(table, meaning[1:])
    if meaning.startswith("#"):
        return hashed(text(_column(table, meaning[1:])))
    return _column(table, meaning)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    return table[name] if name in table.column_names else pa.nulls(table.num_rows)


def _filled(table: pa.Table, template: str) -> pa.Array:
    """Put the values of the named columns into a template; null where one of them is."""
    parts = [pa.repeat("", table.num_rows)]
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(pa.repeat(literal, table.num_rows))
        if field:
            parts.append(text(_column(table, field)))
    return pc.binary_join_element_wise(*parts, "")


def text(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Turn a column of text or numbers into text; a whole float loses its `.0`. Raises DataError for others."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        words = array.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            "a column of text or numbers", f"{array.type}", "name the columns as they are meant"
        ) from error
    return pc.replace_substring_regex(words, r"\.0$", "") if pa.types.is_floating(array.type) else words


def hashed(texts: pa.Array) -> pa.Array:
    """Make an id of each text: `t` and the first 16 hex digits of its SHA-256."""
    distinct = texts.dictionary_encode()
    ids = [
        None if t is None else "t" + hashlib.sha256(t.encode()).hexdigest()[:16]
        for t in distinct.dictionary.to_pylist()
    ]
    return pa.array(ids, pa.string()).take(distinct.indices)


def identified(table: pa.Table, kind: str, file: str) -> Chunk:
    """Turn item_id and query_id into text; rows whose id is a float with a fraction, or too large, are set aside.

    An integer and a whole float (1 and 1.0) give the same text. Raises DataError when ids are of another type.
    """
    set_aside = []
    for name in IDS:
        if name in table.column_names:
            ids, wrong = _ids(table[name].combine_chunks(), name, file)
            shown = table[name].filter(wrong).to_pylist()
            message = f"{name} is a number that is not whole, or too large to be exact"
            set_aside += [bad(kind, value, file, "not_an_id", message) for value in shown]
            table = table.set_column(table.column_names.index(name), name, ids)
            table = table.filter(pc.invert(wrong)) if shown else table
    return Chunk(table, set_aside)


def _ids(ids: pa.Array, name: str, file: str) -> tuple[pa.Array, pa.Array]:
    right = pa.array(np.zeros(len(ids), dtype=bool))
    if pa.types.is_floating(ids.type):
        ids = ids.cast(pa.float64())
        whole = pc.and_(pc.equal(pc.floor(ids), ids), pc.less(pc.abs(ids), EXACT))
        wrong = pc.fill_null(pc.invert(whole), False)
        return pc.if_else(whole, ids, None).cast(pa.int64()).cast(pa.string()), wrong
    if pa.types.is_boolean(ids.type) or pa.types.is_nested(ids.type) or pa.types.is_temporal(ids.type):
        raise DataError(f"text or integers as {name} in {file}", str(ids.type), f"name another column as {name}")
    try:
        return ids.cast(pa.string()), right
    except pa.ArrowException as error:
        raise DataError(f"text or integers as {name} in {file}", str(error), "mend the ids") from error


def distinct(table: pa.Table, name: str) -> pa.Table:
    """Keep the first row of each value of a column."""
    codes = pc.fill_null(table[name].combine_chunks().dictionary_encode().indices, -1)
    _, first = np.unique(codes.to_numpy(zero_copy_only=False), return_index=True)
    return table.take(np.sort(first))


def where(table: pa.Table, wanted: Mapping[str, str]) -> pa.Table:
    """Keep the rows that hold the wanted values, compared as text."""
    for name, value in wanted.items():
        table = table.filter(pc.equal(text(_column(table, name)), value))
    return table


def joined(table: pa.Table, key: str, other: pa.Table) -> pa.Table:
    """Add the columns of `other` that `table` lacks, by a key; null where it has none, its first row counts."""
    at = pc.index_in(text(table[key]), value_set=text(other[key]))
    for name in other.column_names:
        if name not in table.column_names:
            table = table.append_column(name, other[name].combine_chunks().take(at))
    return table


def present(wanted: Iterable[str], found: Collection[str], file: str) -> None:
    """Raise DataError when a wanted column is not among those found."""
    if missing := sorted(set(wanted) - set(found)):
        listed = ", ".join(sorted(found)) or "none"
        raise DataError(f"columns {', '.join(missing)} in {file}", listed, "name them under columns")


def graded(table: pa.Table, grades: Mapping[str, int], file: str = "") -> Chunk:
    """Turn the column grade into int64: a name by `grades`, else a whole number.

    Set aside: no_grade (null or empty), unknown_grade and not_an_integer.
    """
    texts = pc.utf8_trim_whitespace(text(table["grade"]))
    names = pa.array(list(grades), pa.string())
    by_name = pa.array(list(grades.values()), pa.int64()).take(pc.index_in(texts, value_set=names))
    digits = pc.replace_substring_regex(texts, r"^\+|\.0*$", "")
    number = pc.if_else(pc.match_substring_regex(texts, INTEGER), digits, None).cast(pa.int64())
    grade = pc.coalesce(by_name, number)
    table = table.set_column(table.column_names.index("grade"), "grade", grade)
    wrong = pc.is_null(grade)
    rows = zip(*(table[n].filter(wrong).to_pylist() for n in IDS), texts.filter(wrong).to_pylist(), strict=True)
    set_aside = [bad("judgment", f"{query}/{item}", file, *_why(found, grades)) for item, query, found in rows]
    return Chunk(table.filter(pc.invert(wrong)), set_aside)


def _why(found: str | None, grades: Mapping[str, int]) -> tuple[str, str]:
    if not found:
        return "no_grade", "the judgment has no grade"
    if grades:
        return "unknown_grade", f"the grade {found!r} is none of {', '.join(grades)}"
    return "not_an_integer", f"the grade {found!r} is no whole number; name grades of words under grades"


def filled(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Add the named columns that a table lacks, of nulls."""
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    return table
