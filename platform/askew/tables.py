"""Tables on disk: Parquet parts, written with checksums and streamed in order.

Knows nothing of what the columns mean.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew.errors import ArtifactError


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
    """Write a Parquet file with page checksums, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


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
