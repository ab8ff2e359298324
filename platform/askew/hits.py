"""Hits: what a shard found, as it is sent, and what all of them found together.

Columns of plain values, which MessagePack holds: for so few, there and back by Arrow costs more than all else that
is done with them. Knows nothing of indexes.
Shapes: H hits.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Packed = dict[str, Any]  # queries: how many were asked; query, score: (H,) of each hit; items: columns of H values


def packed(items: pa.Table, scores: NDArray[np.float32], query: NDArray[np.int64], num_queries: int) -> Packed:
    """Make an answer of H hits: their items, their scores and the number of the query that each is for."""
    columns = {name: _values(items[name]) for name in items.column_names}
    return {"queries": num_queries, "query": query, "score": scores, "items": columns}


def merge(answers: Sequence[Packed], k: int) -> list[list[dict[str, Any]]]:
    """Merge answers to each query's k best hits, equal scores by item id; of an item twice, the better."""
    hits: list[list[dict[str, Any]]] = [[] for _ in range(answers[0]["queries"])]
    answers = [answer for answer in answers if len(answer["query"])]
    if not answers or not k:
        return hits
    query, score = (np.concatenate([answer[name] for answer in answers]) for name in ("query", "score"))
    items = _joined([answer["items"] for answer in answers])
    kept = _first(_best_first(query, score, items["item_id"]), query, items["item_id"], k)
    found = _taken({**items, "score": score.tolist()}, kept)
    for of, hit in zip(query[kept].tolist(), found, strict=True):
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


def _values(column: pa.ChunkedArray) -> Any:
    """A column's values; of a struct, those of each of its fields that have a type."""
    if not pa.types.is_struct(column.type):
        return column.to_pylist()
    fields = zip(column.type, column.flatten(), strict=True)
    return {field.name: of.to_pylist() for field, of in fields if not pa.types.is_null(field.type)}


def _joined(parts: Sequence[Any]) -> Any:
    """Columns of several answers, each one after the other."""
    if not isinstance(parts[0], Mapping):
        return [*itertools.chain(*parts)]
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _taken(values: Any, places: Sequence[int]) -> list[Any]:
    """The values of a column at some places; of several columns together, a dict for each place."""
    if not isinstance(values, Mapping):
        return [values[place] for place in places]
    if not values:
        return [{} for _ in places]
    names = tuple(values)
    rows = zip(*(_taken(of, places) for of in values.values()), strict=True)
    return [dict(zip(names, row, strict=False)) for row in rows]
