"""Parquet to Arrow by row groups, in batches of bounded size.

Knows nothing of what the columns mean.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from askew.records import Bad
from askew.streams import MAX_CHUNK_BYTES, Chunk, Place


def read(place: Place, start: int, stop: int, columns: Collection[str] | None = None) -> Iterator[Chunk]:
    """Read row groups [start, stop), first the columns without rows, then at most MAX_CHUNK_BYTES at a time.

    The bound is kept by the size of the average row. Set aside: invalid_utf8. Raises DataError when the file
    is truncated or corrupt.
    """
    with opened(place) as file:
        groups = [file.metadata.row_group(group) for group in range(start, stop)]
        num_rows = sum(group.num_rows for group in groups)
        row_bytes = sum(group.total_byte_size for group in groups) // max(num_rows, 1) + 1
        size = min(place.rows, max(1, MAX_CHUNK_BYTES // row_bytes))
        names = [n for n in file.schema_arrow.names if columns is None or n in columns]
        yield Chunk(file.schema_arrow.empty_table().select(names), [])
        for batch in file.iter_batches(size, list(range(start, stop)), names, use_threads=False):
            yield _plain(place, pa.Table.from_batches([batch]))


def row_group_bytes(place: Place) -> list[int]:
    """Tell the size of each row group, uncompressed."""
    with opened(place) as file:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


@contextmanager
def opened(place: Place) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Raises DataError, also later, when it is truncated or corrupt."""
    try:
        with place.open(raw=True) as stream:
            yield pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except pa.ArrowException as error:
        raise place.unreadable(error) from error


def _plain(place: Place, table: pa.Table) -> Chunk:
    """Give all text the one type string, and set aside the rows where it is no UTF-8.

    An image that Hugging Face's datasets wrote, a struct of bytes and path, becomes its bytes.
    """
    columns, broken = {}, pa.array([False] * table.num_rows, pa.bool_())
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if any(
            is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        ):
            column, wrong = _text(column.cast(kind).combine_chunks())
            broken = pc.or_(broken, wrong)
        elif pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
            column = pc.struct_field(column, "bytes")
        columns[name] = column
    bad = [_bad(place) for _ in range(pc.sum(broken).as_py() or 0)]
    return Chunk(pa.table(columns).filter(pc.invert(broken)) if bad else pa.table(columns), bad)


def _text(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), pa.array([False] * len(raw))
    except pa.ArrowInvalid:
        values = [None if v is None else v.decode(errors="replace") for v in raw.to_pylist()]
        wrong = [v is not None and v.encode() != b for v, b in zip(values, raw.to_pylist(), strict=True)]
        return pa.array(values, pa.string()), pa.array(wrong)


def _bad(place: Place) -> Bad:
    return place.bad("", "invalid_utf8", "a value of the row is no UTF-8")
