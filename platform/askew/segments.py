"""Segments: the vectors and display fields of an index in immutable folders, and the search over some of them.

A segment folder holds `vectors.faiss` (inner product, exact) and `items.arrow` (Arrow IPC, memory-mapped) in
the same row order; both open without askew. There are more segments than shards, so that the number of
serving shards changes without a rebuild. Knows nothing of models or clusters.
Shapes: B queries, N items, D dimensions, K hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from askew import artifacts
from askew.errors import ArtifactError

VECTORS, ITEMS = "vectors.faiss", "items.arrow"
COLUMNS = ("item_id", "split", "title", "fields", "image", "has_image")
BLAS_FROM_BATCH = 8  # FAISS 1.15 scans row by row below a threshold that counts queries × dimensions
Vectors = NDArray[np.float32]


def write(folder: Path, vectors: Vectors, items: pa.Table) -> None:
    """Write (N, D) vectors and their N items as a segment folder (of an artifact's draft).

    Raises ArtifactError when a vector is not finite, or when rows do not match.
    """
    if len(vectors) != items.num_rows or not len(vectors):
        raise ArtifactError(
            "a vector for each of one or more items", f"{len(vectors)} for {items.num_rows}", "report it"
        )
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        bad = items["item_id"].filter(pa.array(~finite)).to_pylist()
        raise ArtifactError(
            "finite vectors", f"{len(bad)} that are not, of items {bad[:5]}", "train the model again"
        )
    folder.mkdir(parents=True, exist_ok=True)  # a worker that died may have left a part of it
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    faiss.write_index(index, str(folder / VECTORS))
    with pa.OSFile(str(folder / ITEMS), "wb") as sink, pa.ipc.new_file(sink, items.schema) as writer:
        writer.write_table(items.combine_chunks())


@dataclass(frozen=True)
class Found:
    """The best rows of a shard for B queries: scores (B, K) descending and rows (B, K), ties by item id."""

    scores: Vectors
    rows: NDArray[np.int64]


class Shard:
    """Some segments of one index, searched as one."""

    def __init__(self, folder: Path, names: Sequence[str], *, verify: bool = True) -> None:
        """Open segments of the index in `folder`; every file is checked against the manifest first."""
        manifest = artifacts.read(folder, "index", verify=False)
        self.dim = int(manifest.details["dim"])
        if verify:
            for name, file in manifest.files.items():
                if name.split("/")[0] in names:
                    artifacts.check(folder / name, file)
        self._indexes = [_open(folder / name / VECTORS, self.dim) for name in names]
        self._tables = [_map(folder / name / ITEMS) for name in names]
        sizes = [table.num_rows for table in self._tables]
        if sizes != [index.ntotal for index in self._indexes]:
            raise ArtifactError(f"as many vectors as items in {folder}", "other numbers", "build the index again")
        self._starts = np.cumsum([0, *sizes])
        self._items = pa.concat_tables(self._tables)
        self.item_ids = np.asarray(self._items["item_id"].to_pylist(), dtype=np.str_)
        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM_BATCH * self.dim

    @property
    def size(self) -> int:
        """Number of items."""
        return int(self._starts[-1])

    def search(self, queries: Vectors, k: int) -> Found:
        """Find the K = min(k, size) items of greatest inner product for (B, D) queries; equal scores by item id.

        Raises ValueError for queries that are not finite or not of this index's width.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not np.isfinite(queries).all():
            raise ValueError(f"queries must be finite and of shape (B, {self.dim}), not {queries.shape}")
        k = min(k, self.size)
        parts = [_top(index, queries, k) for index in self._indexes]
        scores = np.concatenate([scores for scores, _ in parts], axis=1)
        rows = np.concatenate([rows + at for (_, rows), at in zip(parts, self._starts, strict=False)], axis=1)
        order = np.lexsort((self.item_ids[rows], -scores), axis=1)[:, :k]
        return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))

    def hits(self, found: Found) -> list[list[dict[str, Any]]]:
        """Fetch item_id, score, title and display fields of found rows, a list for each query."""
        wanted = self._items.select(["item_id", "title", "fields"])
        answers = []
        for scores, rows in zip(found.scores, found.rows, strict=True):
            records = wanted.take(pa.array(rows)).to_pylist()
            answers.append([{**r, "score": float(s)} for r, s in zip(records, scores, strict=True)])
        return answers


def merge(answers: Sequence[Sequence[dict[str, Any]]], k: int) -> list[dict[str, Any]]:
    """Merge shards' hits for one query to the k best, equal scores by item id."""
    every = [hit for answer in answers for hit in answer]
    return sorted(every, key=lambda hit: (-hit["score"], hit["item_id"]))[:k]


def assigned(names: Sequence[str], shard: int, num_shards: int) -> list[str]:
    """Name the segments that shard number `shard` of `num_shards` serves."""
    return list(names[shard::num_shards])


def _top(index: Any, queries: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
    """Search one segment, and wider until no score equal to the k-th is left out."""
    k, depth = min(k, index.ntotal), min(k + 1, index.ntotal)
    while True:
        scores, rows = index.search(queries, depth)
        if depth == index.ntotal or (scores[:, depth - 1] < scores[:, k - 1]).all():
            return scores, rows
        depth = min(2 * depth, index.ntotal)


def _open(path: Path, dim: int) -> Any:
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(f"a FAISS index in {path}", str(error)[:200], "build the index again") from error
    if index.d != dim or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ArtifactError(
            f"inner product over {dim} dimensions in {path}", f"{index.d}", "build the index again"
        )
    return index


def _map(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"an Arrow file in {path}", str(error), "build the index again") from error
