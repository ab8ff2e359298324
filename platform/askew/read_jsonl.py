"""JSON lines to Arrow: in blocks, and a block that Arrow cannot read line by line.

Knows nothing of what the keys mean.
"""

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from askew import streams
from askew.records import Bad
from askew.streams import EXACT, Block, Chunk, Place

BOM = b"\xef\xbb\xbf"
MAX_DEPTH = 32  # of nested values


def read(place: Place, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
    """Read the lines that begin in bytes [start, stop), as `streams.blocks` has it.

    Set aside: broken_line, invalid_utf8, not_an_object, too_deep and line_too_long, each with its byte offset.
    """
    with place.open() as stream:
        for block in streams.blocks(stream, start, sys.maxsize if stop is None else stop):
            table, bad = _block(place, block)
            if block.too_long is not None:
                message = f"a line of more than {streams.MAX_LINE_BYTES:,} bytes"
                bad.append(place.bad(f"byte {block.too_long}", "line_too_long", message))
            yield from place.chunks(table, bad)


def _block(place: Place, block: Block) -> Chunk:
    if block.offset == 0:
        block = block._replace(data=block.data.removeprefix(BOM))
    table = _at_once(block.data)
    return _by_line(place, block) if table is None else Chunk(table, [])


def _at_once(data: bytes) -> pa.Table | None:
    """Parse a block with Arrow; None when something in it needs a look line by line."""
    if not data.strip():
        return pa.table({})
    try:
        data.decode()
        table = _parse(data)
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    num_objects = sum(1 for line in data.split(b"\n") if line.lstrip().startswith(b"{"))
    return table if table.num_rows == num_objects and not _inexact(table) else None


def _parse(data: bytes) -> pa.Table:
    """Parse a block; text that looks like a time stays text."""
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    table = pyarrow.json.read_json(io.BytesIO(data), read_options=options)
    fields = [field.with_type(_timeless(field.type)) for field in table.schema]
    if fields == list(table.schema):
        return table
    how = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields))
    return pyarrow.json.read_json(io.BytesIO(data), read_options=options, parse_options=how)


def _timeless(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_timeless(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_timeless(field.type)) for field in kind])
    return kind


def _inexact(table: pa.Table) -> bool:
    """Whether a column of floats may hold integers that lost digits."""
    floats = [c for c in table.columns if pa.types.is_floating(c.type)]
    return any(pc.any(pc.greater_equal(pc.abs(column), EXACT)).as_py() for column in floats)


def _by_line(place: Place, block: Block) -> Chunk:
    rows: list[dict[str, Any]] = []
    bad: list[Bad] = []
    at = block.offset
    for line in block.data.split(b"\n"):
        if line.strip():
            row = _row(line)
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad.append(place.bad(f"byte {at}", *row))
        at += len(line) + 1
    return Chunk(streams.table(rows), bad)


def _row(line: bytes) -> dict[str, Any] | tuple[str, str]:
    """Parse one line to an object, or to the reason and the message why it is none."""
    try:
        row = json.loads(line.decode(), strict=False)
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeError as error:
        return "invalid_utf8", f"the line is no UTF-8 ({error.reason if hasattr(error, 'reason') else error})"
    except (ValueError, RecursionError) as error:
        return "broken_line", f"the line is no JSON ({error})"
    if not isinstance(row, dict):
        return "not_an_object", f"the line is a {type(row).__name__}, not an object"
    return ("too_deep", f"values nested more than {MAX_DEPTH} deep") if _deep(row, MAX_DEPTH) else row


def _deep(value: Any, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_deep(v, left - 1) for v in inner)
