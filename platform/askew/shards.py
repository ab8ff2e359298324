"""Shards: some segments of an index searched as one, with changes on top.

A pure class without a cluster: a batch of query vectors in, the best items out, of all its segments, of those
items alone that pass a filter and were not deleted since. Items that were added since lie in memory and are
searched exactly. Knows nothing of models, or of where changes come from.
Shapes: B queries, N items, D dimensions, K hits.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from askew import facets, filters, segments
from askew.ann import Effort, Index, Mask, Rows, Vectors
from askew.facets import Counts
from askew.filters import Filter
from askew.hits import Hit, Packed, Shown, merge, packed, shown
from askew.register import hashes
from askew.segments import Plan

SHOWN = ["item_id", "title", "fields"]
EXACT_BELOW = 20_000  # so few vectors are scored one by one sooner than an index is searched for them
EXACT_AT_ONCE = 50_000  # vectors that are unpacked at a time
KEPT_MASKS, KEPT_SHOWN = 32, 20_000
NO_ROWS: Rows = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Found:
    """The best rows of a shard for B queries: scores (B, K) descending and rows (B, K), ties by item id."""

    scores: Vectors
    rows: Rows


class Part:
    """An index and its items in one order, of which some may have been deleted."""

    def __init__(self, index: Index, items: pa.Table, start: int = 0) -> None:
        self.index, self.items, self.start = index, items, start
        self._alive: Mask | None = None
        # of the items alone: a cycle through this would keep the index in memory until all garbage is looked for
        self._passing = functools.lru_cache(KEPT_MASKS)(lambda where: filters.mask(json.loads(where), items))

    @property
    def num_alive(self) -> int:
        """How many items are not deleted."""
        return self.items.num_rows if self._alive is None else int(self._alive.sum())

    @property
    def dead(self) -> Rows:
        """The rows that are deleted."""
        return NO_ROWS if self._alive is None else np.flatnonzero(~self._alive)

    def delete(self, rows: Rows) -> None:
        """Let rows not be found any more."""
        if len(rows):
            self._alive = np.ones(self.items.num_rows, dtype=np.bool_) if self._alive is None else self._alive
            self._alive[rows] = False

    def mask(self, where: str) -> Mask | None:
        """Tell which items a search may find, by a filter in canonical form, "" being none; None: all of them."""
        if not where:
            return self._alive
        passing: Mask = self._passing(where)
        return passing if self._alive is None else passing & self._alive

    def rows_of(self, item_ids: Sequence[str]) -> Rows:
        """Find the rows at which items stand, of those that do."""
        order, known = self._places
        wanted = hashes(item_ids)
        first, last = (np.searchsorted(known, wanted, side=side) for side in ("left", "right"))
        rows = [order[a:b] for a, b in zip(first, last, strict=True)]
        found = np.concatenate([NO_ROWS, *rows])
        names = self.items["item_id"].take(pa.array(found))
        there: Mask = pc.is_in(names, value_set=pa.array(item_ids, pa.string())).to_numpy().astype(np.bool_)
        return found[there]

    @functools.cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """The items, a batch for each segment's file."""
        return [batch for batch in self.items.to_batches() if batch.num_rows]

    @functools.cached_property
    def _places(self) -> tuple[Rows, NDArray[np.uint64]]:
        known = np.concatenate([hashes(chunk) for chunk in self.items["item_id"].chunks])
        order = np.argsort(known, kind="stable")
        return order, known[order]

    def search(self, queries: Vectors, k: int, where: str, effort: Effort | None) -> Found:
        """Find the best items for B queries, all of equal score to the last among them if the index is exact.

        Without an effort every item is scored.
        """
        mask = self.mask(where)
        there = self.items.num_rows if mask is None else int(np.count_nonzero(mask))
        k = min(k, there)
        if not k:
            return Found(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        design = self.index.design
        if effort is None or (mask is not None and there <= EXACT_BELOW):
            found = self._among(queries, k, self._passed(mask))
        elif design.exact:
            found = Found(*self.index.search(queries, k, effort, mask))
        else:
            wider = effort if mask is None else effort.wider(self.items.num_rows / there, design)
            found = Found(*self.index.search(queries, k, wider, mask))
            short = found.rows[:, -1] < 0
            if short.any():
                rest = self._among(queries[short], k, self._passed(mask))
                found.scores[short], found.rows[short] = rest.scores[:, :k], rest.rows[:, :k]
        return Found(found.scores, found.rows + self.start) if self.start else found

    def _passed(self, mask: Mask | None) -> Rows:
        return np.arange(self.items.num_rows) if mask is None else np.flatnonzero(mask)

    def _among(self, queries: Vectors, k: int, rows: Rows) -> Found:
        """Find the best among some rows by scoring them all."""
        starts = range(0, len(rows), EXACT_AT_ONCE)
        found = [self.index.among(queries, k, rows[at : at + EXACT_AT_ONCE]) for at in starts]
        scores, places = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        order = np.lexsort((places, -scores), axis=1)
        return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1))


class Shard:
    """Some segments of one index, searched as one."""

    def __init__(
        self, plan: Plan, names: Sequence[str] | None = None, *, verify: bool = True, gpu: bool = False
    ) -> None:
        """Open segments of an index, all of them by default; every file is checked first.

        With `gpu` it is searched on the GPU that this process sees, where FAISS has its kind there.

        Raises ArtifactError when a file is missing, altered, or of another index, design or release.
        """
        self.plan = plan
        self._parts: list[Part] = []
        for name in plan.segments if names is None else names:
            segment = plan.open(name, verify=verify)
            self._append(segment.index(), segment.items(), plan.dead.get(name, NO_ROWS))
        self._added: Part | None = None
        self._shown: dict[int, Shown] = {}  # by row, of which what is shown never changes
        for part in self._parts if gpu else ():
            part.index.accelerate()
        self._share = min(1.0, sum(part.items.num_rows for part in self._parts) / max(plan.size, 1))
        if self._parts:
            segments.refuse_doubles(self._alive_ids(), str(plan.folder))

    def _append(self, index: Index, items: pa.Table, dead: Rows) -> None:
        """Take a segment over: joined to those before it, or, of graphs, beside them."""
        if self._parts and index.design.kind != "hnsw":
            last = self._parts[-1]
            dead = np.concatenate([last.dead, dead + last.items.num_rows])
            last.index.join(index)
            self._parts[-1] = Part(last.index, pa.concat_tables([last.items, items]))
        else:
            start = self._parts[-1].start + self._parts[-1].items.num_rows if self._parts else 0
            self._parts.append(Part(index, items, start))
        self._parts[-1].delete(dead)

    def _alive_ids(self) -> pa.ChunkedArray:
        columns = []
        for part in self._parts:
            alive, ids = part.mask(""), part.items["item_id"]
            columns += (ids if alive is None else ids.filter(pa.array(alive))).chunks
        return pa.chunked_array(columns, pa.string())

    @property
    def dim(self) -> int:
        """The vectors' width."""
        return self.plan.design.dim

    @property
    def size(self) -> int:
        """Number of items that can be found."""
        return sum(part.num_alive for part in self._every)

    @property
    def item_ids(self) -> pa.ChunkedArray:
        """The ids of all rows, deleted ones too."""
        chunks = [chunk for part in self._every for chunk in part.items["item_id"].chunks]
        return pa.chunked_array(chunks, pa.string())

    @property
    def _every(self) -> list[Part]:
        return self._parts if self._added is None else [*self._parts, self._added]

    # --- changes ---------------------------------------------------------------------------------

    def delete(self, item_ids: Sequence[str]) -> None:
        """Let items not be found any more; an id that is not here is passed over."""
        for part in self._every:
            part.delete(part.rows_of(item_ids))

    def upsert(self, vectors: Vectors, items: pa.Table) -> None:
        """Add N items with their vectors (N, D), in the place of those of the same ids; all in memory."""
        self.delete(items["item_id"].to_pylist())
        if not items.num_rows:
            return
        start = sum(part.items.num_rows for part in self._parts)
        before = self._added or Part(Index.flat(self.dim), items.slice(0, 0), start)
        before.index.add(vectors)
        self._added = Part(before.index, pa.concat_tables([before.items, items]).combine_chunks(), start)
        self._added.delete(before.dead)

    # --- searching -------------------------------------------------------------------------------

    def search(
        self,
        queries: Vectors,
        k: int,
        where: Filter | None = None,
        effort: Effort | None = None,
        *,
        exact: bool = False,
    ) -> Found:
        """Find for (B, D) queries the K items of greatest inner product that pass a filter; equal scores by id.

        By the index's own effort, or another; or every item is scored, by its vector as the index holds it.
        K is min(k, how many pass): whatever the effort, k come back where k exist. Raises ValueError for queries
        that are not finite or not of this index's width, DataError for a filter that does not fit the fields.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not np.isfinite(queries).all():
            raise ValueError(f"queries must be finite and of shape (B, {self.dim}), not {queries.shape}")
        conditions = "" if where is None else filters.canonical(where)
        spent = None if exact else (effort or self.plan.effort).of_share(self._share)
        found = [part.search(queries, k, conditions, spent) for part in self._every]
        if len(found) == 1:
            return self._first(found[0], k)
        scores = np.concatenate([np.empty((len(queries), 0), np.float32), *(one.scores for one in found)], axis=1)
        rows = np.concatenate([np.empty((len(queries), 0), np.int64), *(one.rows for one in found)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        return self._first(Found(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)), k)

    def _first(self, found: Found, k: int) -> Found:
        """The first k of what is sorted by score, equal scores put in the order of their ids."""
        scores, rows = found.scores, found.rows
        equal = scores[:, 1:] == scores[:, :-1]
        if equal.any():
            some = np.flatnonzero(equal.any(axis=1))
            tied = np.zeros((len(some), rows.shape[1]), dtype=np.bool_)
            tied[:, 1:] |= equal[some]
            tied[:, :-1] |= equal[some]
            distinct, place = np.unique(rows[some][tied], return_inverse=True)
            ids = np.zeros(tied.shape, dtype=np.int64)
            names, order = self._taken(["item_id"], distinct)
            ranks = np.empty(len(distinct), np.int64)
            ranks[order] = pc.rank(names["item_id"]).to_numpy()
            ids[tied] = ranks[place]
            order = np.lexsort((ids, -scores[some]), axis=1)
            rows = rows.copy()
            rows[some] = np.take_along_axis(rows[some], order, 1)  # equal scores stay as they are
        return Found(scores[:, :k], rows[:, :k])

    # --- showing ---------------------------------------------------------------------------------

    def item(self, item_id: str) -> tuple[dict[str, Any], Vectors] | None:
        """Return an item's record with its photo, and its vector (D,); None if it is not here or was deleted."""
        for part in reversed(self._every):
            alive = part.mask("")
            rows = [row for row in part.rows_of([item_id]) if alive is None or alive[row]]
            if rows:
                record: dict[str, Any] = part.items.slice(rows[-1], 1).to_pylist()[0]
                return record, part.index.vectors(np.array(rows[-1:]))[0]
        return None

    def facets(self, where: Filter | None = None) -> Counts:
        """Count the values of the fields of the items that pass a filter. Raises DataError as `search`."""
        conditions = "" if where is None else filters.canonical(where)
        return facets.count((part.items, part.mask(conditions)) for part in self._every)

    def hits(self, found: Found) -> list[list[Hit]]:
        """Fetch item_id, score, title and display fields of found rows, a list for each query."""
        return merge([self.answer(found)], found.rows.shape[1])

    def answer(self, found: Found, queries: Rows | None = None, total: int | None = None) -> Packed:
        """Fetch the same as `merge` takes it, of all queries, to be sent elsewhere.

        Where a shard answers some of `total` queries, `queries` (B,) are their numbers.
        """
        num, k = found.rows.shape
        of = np.repeat(np.arange(num) if queries is None else queries, k)
        return packed(self._items(found.rows.ravel()), found.scores.ravel(), of, num if total is None else total)

    def _items(self, rows: Rows) -> list[Shown]:
        """What is shown of rows, in their order; of those that were wanted before from memory."""
        if len(self._shown) > KEPT_SHOWN:
            self._shown = {}
        known, wanted = self._shown, rows.tolist()
        if missing := [*{row: None for row in wanted if row not in known}]:
            table, order = self._taken(SHOWN, fresh := np.array(missing))
            known |= zip(fresh[order].tolist(), shown(table), strict=True)
        return [known[row] for row in wanted]

    def _taken(self, columns: list[str], rows: Rows) -> tuple[pa.Table, Rows]:
        """Fetch rows from the chunks that hold them, and in their order; returns which row is where.

        Table.take would copy every chunk together first.
        """
        batches = [batch for part in self._every for batch in part.batches]
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        chunk = np.searchsorted(starts, rows, side="right") - 1
        order = np.argsort(chunk, kind="stable")
        found = [batches[n].select(columns).take(pa.array(rows[chunk == n] - starts[n])) for n in np.unique(chunk)]
        return pa.Table.from_batches(found), order


# --- what is sent elsewhere ----------------------------------------------------------------------


def streamed(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Make an Arrow stream of items' records."""
    return _stream(pa.Table.from_pylist([*records]))


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def records(stream: bytes) -> list[dict[str, Any]]:
    """Read the records that `streamed` wrote."""
    found: list[dict[str, Any]] = pa.ipc.open_stream(pa.BufferReader(stream)).read_all().to_pylist()
    return found
