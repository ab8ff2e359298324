"""Hits: what a shard found, as it is sent, and what all of them found together.

An item goes as bytes of MessagePack: a shard makes them once, and of all that is sent the best alone are read.
Knows nothing of indexes.
Shapes: H hits.
"""

import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# queries: how many were asked; query, score: (H,) of each hit; ids, shown: those of its item
Packed = dict[str, Any]
ARRAY = struct.Struct(">BI")  # how MessagePack begins an array: 0xDD, and of how many


class Shown(NamedTuple):
    """An item as it is shown: its id, and all of it as bytes."""

    item_id: str
    content: bytes


def shown(items: pa.Table) -> list[Shown]:
    """Take from items what is shown of them: all columns, and of the fields those that have a type."""
    structs = [column for column in items.schema if pa.types.is_struct(column.type)]
    typed = {of.name: [field.name for field in of.type if not pa.types.is_null(field.type)] for of in structs}
    rows = items.to_pylist()
    for row in rows:
        row |= {name: {field: (row[name] or {}).get(field) for field in fields} for name, fields in typed.items()}
    return [Shown(row["item_id"], msgpack.packb(row)) for row in rows]


def packed(
    items: Sequence[Shown], scores: NDArray[np.float32], query: NDArray[np.int64], num_queries: int
) -> Packed:
    """Make an answer of H hits: their items, their scores and the number of the query that each is for."""
    ids, contents = [one.item_id for one in items], [one.content for one in items]
    return {"queries": num_queries, "query": query, "score": scores, "ids": ids, "shown": contents}


def merge(answers: Sequence[Packed], k: int) -> list[list[dict[str, Any]]]:
    """Merge answers to each query's k best hits, equal scores by item id; of an item twice, the better."""
    hits: list[list[dict[str, Any]]] = [[] for _ in range(answers[0]["queries"])]
    query, score = (np.concatenate([answer[name] for answer in answers]) for name in ("query", "score"))
    if not len(query) or not k:
        return hits
    ids, contents = ([*itertools.chain(*(answer[name] for answer in answers))] for name in ("ids", "shown"))
    kept = _first(_best_first(query, score, ids), query, ids, k)
    read = msgpack.unpackb(ARRAY.pack(0xDD, len(kept)) + b"".join([contents[place] for place in kept]))
    for of, hit, value in zip(query[kept].tolist(), read, score[kept].tolist(), strict=True):
        hit["score"] = value
        hits[of].append(hit)
    return hits


def _best_first(query: NDArray[np.int64], score: NDArray[np.float32], ids: Sequence[str]) -> NDArray[np.int64]:
    """The hits in the order of their queries, each query's from the best, equal scores by id."""
    order = np.lexsort((-score, query))
    same_query, same_score = (np.diff(of[order]) == 0 for of in (query, score))
    if not (same_query & same_score).any():
        return order
    rank = {item_id: place for place, item_id in enumerate(sorted(set(ids)))}
    return np.lexsort((np.array([rank[item_id] for item_id in ids]), -score, query))


def _first(order: NDArray[np.int64], query: NDArray[np.int64], ids: Sequence[str], k: int) -> list[int]:
    """The first k of each query's hits in an order; of an item twice, the first."""
    new = np.flatnonzero(np.diff(query[order])) + 1
    places, kept = order.tolist(), list[int]()
    for start, end in itertools.pairwise([0, *new.tolist(), len(places)]):
        first: dict[str, int] = {}
        for place in places[start:end]:
            first.setdefault(ids[place], place)
            if len(first) == k:
                break
        kept += first.values()
    return kept
