"""Hits: what a shard found, as it is sent, and what all of them found together.

An item is the same JSON all the way from a shard, which writes it once, to who asked: nobody between need read it.
Knows nothing of indexes.
Shapes: H hits.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

# queries: how many were asked; query, score: (H,) of each hit; ids, shown: those of its item
Packed = dict[str, Any]


class Shown(NamedTuple):
    """An item as it is shown: its id, and all of it as a JSON object."""

    item_id: str
    content: bytes


class Hit(Mapping[str, Any]):
    """An item that was found: what is shown of it, read when more is asked for than its id, and its score."""

    __slots__ = ("_content", "_read", "item_id", "score")

    def __init__(self, item_id: str, content: bytes, score: float) -> None:
        self.item_id, self.score = item_id, score
        self._content, self._read = content, dict[str, Any]()

    @property
    def json(self) -> bytes:
        """All of it as a JSON object."""
        return b'%b,"score":%a}' % (self._content[:-1], self.score)

    @property
    def _whole(self) -> dict[str, Any]:
        self._read = self._read or {**from_json(self._content), "score": self.score}
        return self._read

    def __getitem__(self, name: str) -> Any:
        return self.item_id if name == "item_id" else self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def __repr__(self) -> str:
        return repr(self._whole)


def shown(items: pa.Table) -> list[Shown]:
    """Take from items what is shown of them: all columns, and of the fields those that have a type."""
    structs = [column for column in items.schema if pa.types.is_struct(column.type)]
    typed = {of.name: [field.name for field in of.type if not pa.types.is_null(field.type)] for of in structs}
    rows = items.to_pylist()
    for row in rows:
        row |= {name: {field: (row[name] or {}).get(field) for field in fields} for name, fields in typed.items()}
    return [Shown(row["item_id"], to_json(row)) for row in rows]


def packed(
    items: Sequence[Shown], scores: NDArray[np.float32], query: NDArray[np.int64], num_queries: int
) -> Packed:
    """Make an answer of H hits: their items, their scores and the number of the query that each is for."""
    ids, contents = [one.item_id for one in items], [one.content for one in items]
    return {"queries": num_queries, "query": query, "score": scores, "ids": ids, "shown": contents}


def merge(answers: Sequence[Packed], k: int) -> list[list[Hit]]:
    """Merge answers to each query's k best hits, equal scores by item id; of an item twice, the better."""
    hits: list[list[Hit]] = [[] for _ in range(answers[0]["queries"])]
    query, score = (np.concatenate([answer[name] for answer in answers]) for name in ("query", "score"))
    if not len(query) or not k:
        return hits
    ids, contents = ([*itertools.chain(*(answer[name] for answer in answers))] for name in ("ids", "shown"))
    kept = _first(_best_first(query, score, ids), query, ids, k)
    for place, of, value in zip(kept, query[kept].tolist(), score[kept].tolist(), strict=True):
        hits[of].append(Hit(ids[place], contents[place], value))
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
