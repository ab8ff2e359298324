"""Tables on disk: Parquet parts, written with checksums and streamed in order.

Knows nothing of what the columns mean.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew.errors import ArtifactError

ROWS_A_PART, BYTES_A_PART = 50_000, 256 << 20
TEXT = "text"  # the column of items that towers and BM25 read


def parts(folder: Path) -> list[Path]:
    """List a folder's Parquet parts in order."""
    return sorted(folder.glob("*.parquet"))


def batches(paths: Sequence[Path], columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """Stream the named columns of Parquet parts, in order, at most `size` rows at a time."""
    for path in paths:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=size, columns=list(columns))


def rows(
    paths: Sequence[Path], columns: Sequence[str], size: int, start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Stream the rows from `start` to `stop` of Parquet parts counted through in order."""
    at = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            if start < at + file.metadata.num_rows and at < stop:
                for batch in file.iter_batches(batch_size=size, columns=list(columns)):
                    first, last = max(start - at, 0), min(stop - at, batch.num_rows)
                    if first < last:
                        yield batch.slice(first, last - first)
                    at += batch.num_rows
            else:
                at += file.metadata.num_rows


def column(paths: Sequence[Path], name: str) -> pa.ChunkedArray:
    """Read one column of all parts, in order."""
    return pa.chunked_array([c for p in paths for c in pq.read_table(p, columns=[name])[name].chunks])


def write(path: Path, table: pa.Table) -> None:
    """Write a Parquet file with page checksums, whole or not at all; its folder is made if need be."""
    with opened(path, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def opened(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write a Parquet file by row groups, with page checksums; it appears under its name when it is whole.

    Columns of bytes (photos, pixels) get neither dictionaries nor statistics, and photos are not compressed
    again: it would only take time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    words = [field.name for field in schema if not pa.types.is_binary(field.type)]
    packed = {field.name: "none" if field.name == "image" else "zstd" for field in schema}
    options: dict[str, Any] = {"compression": packed, "use_dictionary": words, "write_statistics": words}
    with pq.ParquetWriter(temporary, schema, write_page_checksum=True, **options) as writer:
        yield writer
    temporary.replace(path)


def link(source: Path, path: Path) -> None:
    """Let a file stand at a second place as well, without a copy where the file system can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


class Parts:
    """Writes rows to Parquet parts of bounded size, each with an array beside it (`.npy`) of as many rows."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._made: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._arrays: list[NDArray[Any]] = []
        self._rows = self._bytes = 0

    def write(self, rows: pa.Table, beside: NDArray[Any]) -> None:
        """Append rows as one row group."""
        if not rows.num_rows:
            return
        path = self._folder / f"{self._name}-{len(self._made):03d}.parquet"
        if self._writer is None:
            self._writer = self._stack.enter_context(opened(path, self._schema))
        self._writer.write_table(rows)
        self._arrays.append(beside)
        self._rows, self._bytes = self._rows + rows.num_rows, self._bytes + rows.nbytes
        if self._rows >= ROWS_A_PART or self._bytes >= BYTES_A_PART:
            self._seal(path)

    def _seal(self, path: Path) -> None:
        self._stack.close()
        np.save(path.with_suffix(".npy"), np.concatenate(self._arrays))
        self._made.append({"path": str(path), "rows": self._rows})
        self._writer, self._arrays, self._rows, self._bytes = None, [], 0, 0

    def close(self) -> list[dict[str, Any]]:
        """End the last part; returns path and number of rows of each."""
        if self._writer is not None:
            self._seal(self._folder / f"{self._name}-{len(self._made):03d}.parquet")
        return self._made


def cells(photos: NDArray[np.uint8], has: NDArray[np.bool_]) -> pa.Array:
    """Turn m photos, (m, size, size, 3), into n binary cells, null where `has`, (n,), is false, without a copy."""
    offsets = np.r_[0, np.cumsum(has)].astype(np.int32) * np.int32(photos[:1].nbytes)
    valid = np.packbits(has, bitorder="little")
    buffers = [pa.py_buffer(part) for part in (valid, offsets, np.ascontiguousarray(photos))]
    return pa.Array.from_buffers(pa.binary(), len(has), buffers)


def told(rows: pa.RecordBatch, name: str) -> pa.Array:
    """The text of items, or a field that stands for it; where that says nothing, the text."""
    if name == TEXT:
        return rows[TEXT]
    words = pc.fill_null(pc.struct_field(rows["fields"], name).cast(pa.string()), "")
    return pc.if_else(pc.equal(words, ""), rows[TEXT], words)


def columns_of(name: str) -> list[str]:
    """The columns of items' parts that `told` reads."""
    return [TEXT] if name == TEXT else [TEXT, f"fields.{name}"]


def pixels(column: pa.Array, size: int) -> NDArray[np.uint8]:
    """Turn n binary cells of size·size·3 bytes into (n, size, size, 3); a null cell becomes nought.

    Raises ArtifactError when the photos are of another size.
    """
    blank = bytes(size * size * 3)
    rows = [cell or blank for cell in column.to_pylist()]
    if found := {len(row) for row in rows} - {len(blank)}:
        side = math.isqrt(min(found) // 3)
        do = "use the model with triplets of its own image_size"
        raise ArtifactError(
            f"photos of {size} × {size} pixels, as the model was trained on", f"{side} × {side}", do
        )
    cells = b"".join(rows)
    return np.frombuffer(cells, dtype=np.uint8).reshape(len(column), size, size, 3)
