"""Training batches: which query meets which item at which step, and their tensors.

An epoch shows every training query once, with one of its positives. What step s of a run holds depends
on the seed and s alone: not on the number of workers, nor on where the run was interrupted. Pixels and
tokens are memory-mapped, so no worker holds the catalogue. Knows nothing of towers or clusters.
Shapes: B pairs of a batch, N items, L tokens, S image side.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from askew import artifacts, tables
from askew.errors import ArtifactError
from askew.inputs import Tokens

Rows = NDArray[np.int64]
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Batch:
    """The tensors of B queries and N items: the B positives, then the negatives if there are any."""

    queries_BL: NDArray[np.int64]
    titles_NL: NDArray[np.int64]
    pixels_NSS3: NDArray[np.uint8]
    has_image_N: NDArray[np.bool_]


class Triplets:
    """A triplets artifact's training split, laid out for random access by `lay_out`."""

    def __init__(self, layout: Path) -> None:
        self._arrays = {p.stem: np.load(p, mmap_mode="r", allow_pickle=False) for p in layout.glob("*.npy")}
        self.num_queries = len(self._arrays["queries"])
        self.num_items = len(self._arrays["titles"])
        self.num_pairs = len(self._arrays["positives"])

    def rows(self, seed: int, start: int, stop: int) -> tuple[Rows, Rows, Rows]:
        """Choose the (query, positive, negative) rows of the run's examples `start` to `stop`."""
        epochs, places = np.divmod(np.arange(start, stop), self.num_queries)
        queries, draws = np.empty_like(places), np.empty(len(places))
        for epoch in np.unique(epochs):
            random = np.random.default_rng((seed, int(epoch)))
            order, draw = random.permutation(self.num_queries), random.random(self.num_queries)
            here = epochs == epoch
            queries[here], draws[here] = order[places[here]], draw[places[here]]
        first, last = self._arrays["first"][queries], self._arrays["first"][queries + 1]
        pairs = first + (draws * (last - first)).astype(np.int64)
        return queries, self._arrays["positives"][pairs], self._arrays["negatives"][pairs]

    def batch(self, queries: Rows, items: Rows) -> Batch:
        """Gather the tensors of B queries and N items."""
        a = self._arrays
        return Batch(
            _trimmed(a["queries"][queries]),
            _trimmed(a["titles"][items]),
            a["pixels"][items],
            a["has_image"][items],
        )

    def known(self, queries: Rows, items: Rows) -> NDArray[np.bool_]:
        """Tell for each of B queries and N items whether the item is a known positive: (B, N)."""
        keys = self._arrays["keys"]
        wanted = queries[:, None] * self.num_items + items[None, :]
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found: NDArray[np.bool_] = keys[at] == wanted
        return found


def lay_out(folder: Path, split: str, tokens: Tokens, lengths: tuple[int, int], root: Path) -> Path:
    """Lay the split of a triplets artifact out as arrays in an artifact "layout"; done once, then found.

    `lengths` are the most tokens of a query and of a title. Raises ArtifactError when there are no pairs.
    """
    manifest = artifacts.read(folder, "triplets", verify=False)
    settings = {"split": split, "lengths": list(lengths), "tokens": tokens.digest}
    inputs = {"triplets": manifest.key}
    place = artifacts.place(root, "layout", artifacts.key("layout", settings, inputs))
    try:
        artifacts.read(place, "layout", verify=False)
    except ArtifactError:
        artifacts.read(folder, "triplets")
        with artifacts.draft(root, "layout", settings, inputs) as draft:
            ids = _lay_out_items(folder, split, tokens, lengths[1], manifest.details["image_size"], draft.folder)
            _lay_out_pairs(folder, tokens, lengths[0], ids, draft.folder)
    return place


def _lay_out_items(folder: Path, split: str, tokens: Tokens, length: int, size: int, out: Path) -> pa.Array:
    items = ds.dataset(folder / "items", format="parquet")
    wanted = ds.field("split") == split
    n = items.count_rows(filter=wanted)
    titles = open_memmap(out / "titles.npy", "w+", np.int64, (n, length))
    pixels = open_memmap(out / "pixels.npy", "w+", np.uint8, (n, size, size, 3))
    has_image = open_memmap(out / "has_image.npy", "w+", np.bool_, (n,))
    ids, at = [], 0
    columns = ["item_id", "text", "pixels", "has_image"]
    for batch in items.to_batches(columns=columns, filter=wanted, batch_size=ROWS_AT_ONCE):
        rows = slice(at, at := at + batch.num_rows)
        encoded = tokens.ids(batch["text"].to_pylist(), length)
        titles[rows] = 0
        titles[rows, : encoded.shape[1]] = encoded
        pixels[rows] = tables.pixels(batch["pixels"], size)
        has_image[rows] = batch["has_image"].to_numpy(zero_copy_only=False)
        ids.append(batch["item_id"])
    if not n:
        raise ArtifactError(f"items of split {split!r} in {folder}", "none", "prepare a catalogue that has them")
    return pa.concat_arrays(ids)


def _lay_out_pairs(folder: Path, tokens: Tokens, length: int, ids: pa.Array, out: Path) -> None:
    pairs = pq.read_table(folder / "pairs").sort_by([("query_id", "ascending"), ("item_id", "ascending")])
    if not pairs.num_rows:
        raise ArtifactError(f"training pairs in {folder}", "none", "prepare judgments that have positives")
    query_ids = pairs["query_id"].combine_chunks()
    firsts = np.flatnonzero(np.r_[True, np.asarray(pc.not_equal(query_ids[1:], query_ids[:-1]))])
    rows = np.cumsum(np.isin(np.arange(len(query_ids)), firsts)) - 1
    positives = _numbers(pairs["item_id"].combine_chunks(), ids)
    negatives = _first_negatives(pairs["negatives"].combine_chunks(), ids)
    texts = pairs["query"].combine_chunks().take(pa.array(firsts)).to_pylist()
    np.save(out / "first.npy", np.r_[firsts, len(query_ids)].astype(np.int64))
    np.save(out / "queries.npy", tokens.ids(texts, length))
    np.save(out / "positives.npy", positives)
    np.save(out / "negatives.npy", negatives)
    np.save(out / "keys.npy", np.sort(rows * len(ids) + positives))


def _trimmed(tokens_NL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cut columns that are padding in every row, so that a short batch costs little."""
    longest = max(1, int((tokens_NL != 0).sum(1).max(initial=1)))
    return np.ascontiguousarray(tokens_NL[:, :longest])


def _numbers(item_ids: pa.Array, ids: pa.Array) -> Rows:
    numbers: Rows = pc.index_in(item_ids, value_set=ids).to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def _first_negatives(lists: pa.ListArray, ids: pa.Array) -> Rows:
    """The number of each pair's first negative; a pair without any gets the item that has its own number."""
    firsts, there = lists.offsets.to_numpy()[:-1], pc.list_value_length(lists).to_numpy() > 0
    chosen = np.arange(len(lists), dtype=np.int64) % len(ids)
    chosen[there] = _numbers(lists.values.field("item_id").take(pa.array(firsts[there])), ids)
    return chosen
