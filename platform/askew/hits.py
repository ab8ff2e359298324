"""Hits: what a shard found, as it is sent, and what all of them found together.

An item is the same JSON all the way from a shard, which writes it once, to who asked: nobody between need read it.
Knows nothing of indexes.
Shapes: H hits.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

# queries: how many were asked; query, score, ids, shown: of each of H hits the query's number, its score, its item
Packed = dict[str, Any]


class Shown(NamedTuple):
    """An item as it is shown: its id, and all of it as a JSON object."""

    item_id: str
    content: bytes


class Hit(Mapping[str, Any]):
    """An item that was found: what is shown of it, read when more is asked for than its id, and its score."""

    __slots__ = ("_content", "_read", "item_id", "score")
    _read: dict[str, Any] | None

    def __init__(self, item_id: str, content: bytes, score: float) -> None:
        self.item_id, self.score = item_id, score
        self._content, self._read = content, None

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
    return {
        "queries": num_queries, "query": query.tolist(), "score": scores.tolist(), "ids": ids, "shown": contents,
    }  # fmt: skip


def merge(answers: Sequence[Packed], k: int) -> list[list[Hit]]:
    """Merge answers to each query's k best hits, equal scores by item id; of an item twice, the better.

    Item by item: of so few for each query that arrays take longer.
    """
    found: list[list[tuple[float, str, bytes]]] = [[] for _ in range(answers[0]["queries"])]
    for answer in answers:
        every = zip(answer["query"], answer["score"], answer["ids"], answer["shown"], strict=True)
        for query, score, item_id, content in every:
            found[query].append((-score, item_id, content))
    return [_first(sorted(one), k) for one in found]


def _first(ranked: Sequence[tuple[float, str, bytes]], k: int) -> list[Hit]:
    """The first k of a query's hits from the best; of an item twice, the first."""
    hits: dict[str, Hit] = {}
    for negative, item_id, content in ranked:
        if len(hits) == k:
            break
        if item_id not in hits:
            hits[item_id] = Hit(item_id, content, -negative)
    return [*hits.values()]
