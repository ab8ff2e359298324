"""Candidates: the items of some splits that queries are ranked over, streamed from triplets in bounded memory.

Knows nothing of queries, models or measures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew import tables


@dataclass
class Candidates:
    """The items that queries are ranked over, numbered in the order of their ids.

    `rows[i]` is the number of the i-th of them in the order of the parts.
    """

    paths: list[Path]
    splits: pa.Array
    item_ids: list[str] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, triplets: Path, splits: Sequence[str]) -> "Candidates":
        """Number the items of these splits."""
        wanted = pa.array(list(splits), pa.string())
        paths, ids = [], [pa.array([], pa.string())]
        for path in tables.parts(triplets / "items"):
            table = pq.read_table(path, columns=["item_id", "split"])
            kept = table.filter(pc.is_in(table["split"], value_set=wanted))["item_id"]
            if len(kept):
                paths.append(path)
                ids += kept.chunks
        unsorted = pa.chunked_array(ids)
        order = pc.sort_indices(unsorted).to_numpy()
        rows = np.empty(len(order), dtype=np.int64)
        rows[order] = np.arange(len(order))
        return cls(paths, wanted, unsorted.take(pa.array(order)).to_pylist(), rows)

    def batches(self, columns: Sequence[str], size: int) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
        """Stream the items' columns with their rows, in bounded memory."""
        start = 0
        for batch in tables.batches(self.paths, [*columns, "split"], size):
            kept = batch.filter(pc.is_in(batch["split"], value_set=self.splits))
            if len(kept):
                yield self.rows[start : start + len(kept)], kept
            start += len(kept)

    def others(self, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        """Stream the columns in batches as `batches` does, each item's being another's: the one half the way on.

        A control for what a column adds: as far as items stand by kind, an item is given another kind's.
        """
        half, counts = len(self.item_ids) // 2, [len(rows) for rows, _ in self.batches([], size)]
        rest = pa.table({})
        late = self._from(columns, size, half)
        for count in counts:
            while rest.num_rows < count:
                more = pa.Table.from_batches([next(late)])
                rest = pa.concat_tables([rest, more]) if rest.num_rows else more
            yield rest.slice(0, count).combine_chunks().to_batches()[0]
            rest = rest.slice(count)

    def _from(self, columns: Sequence[str], size: int, start: int) -> Iterator[pa.RecordBatch]:
        """Stream all items' columns from the `start`-th on, and then those before it."""
        left = start
        for _, batch in self.batches(columns, size):
            if len(batch) > left:
                yield batch.slice(left)
            left = max(0, left - len(batch))
        left = start
        for _, batch in self.batches(columns, size):
            if left:
                yield batch.slice(0, min(left, len(batch)))
            left -= min(left, len(batch))
