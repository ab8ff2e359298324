"""Slices: kinds of queries that are looked at apart, told from the triplets that they belong to.

Knows nothing of models or measures.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from askew import tables
from askew.metrics import Qrels

ROWS_AT_ONCE = 8192
SAID, HARDLY = 0.9, 1 / 3  # shares of a query's words that stand in its items' texts
HEAD, TORSO = 0.2, 0.5  # the most trained-on fifth of the queries, and those above the middle
Labels = dict[str, list[str]]  # dimension → the label of each query


@dataclass
class Item:
    """What slices must know of an item that is right for a query."""

    words: frozenset[str]
    has_image: bool
    kind: str


def labels(
    triplets: Path, queries: pa.Table, qrels: Qrels, least: int, text: str = tables.TEXT, kind_field: str = ""
) -> Labels:
    """Label queries (columns query_id, query, split, segment) by each dimension.

    segment     as the data names it
    query       "seen": the training asked it word for word, or "new"
    popularity  "head", "torso", "tail" of the queries by their training pairs; "never" for those without any
    kind        what most of the query's relevant items are, where triplets know a kind
    photos      whether relevant items lack a photo
    titles      how many of the query's words stand in its relevant items' texts: a title's quality, as asked

    An item counts as relevant from grade `least` on. A dimension in which all are alike is left out.
    """
    ids, texts = (queries[name].to_pylist() for name in ("query_id", "query"))
    right = {q: [i for i, grade in qrels.get(q, {}).items() if grade >= least] for q in ids}
    items = _items(triplets, {i for each in right.values() for i in each}, text, kind_field)
    known = [[items[i] for i in right[q] if i in items] for q in ids]
    counts = _trained_pairs(triplets, texts)
    found: Labels = {
        "segment": [segment or "none" for segment in queries["segment"].to_pylist()],
        "query": ["seen" if count else "new" for count in counts],
        "popularity": _popularity(counts),
        "photos": ["some missing" if any(not i.has_image for i in each) else "all there" for each in known],
        "titles": [_told(query, each) for query, each in zip(texts, known, strict=True)],
    }
    if kind_field:
        found["kind"] = [_most(item.kind for item in each) for each in known]
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def _items(triplets: Path, wanted: set[str], text: str, kind_field: str) -> dict[str, Item]:
    ids, found = pa.array(sorted(wanted), pa.string()), dict[str, Item]()
    columns = ["item_id", "has_image", *tables.columns_of(text), *([f"fields.{kind_field}"] if kind_field else [])]
    for batch in tables.batches(tables.parts(triplets / "items"), list(dict.fromkeys(columns)), ROWS_AT_ONCE):
        rows = batch.filter(pc.is_in(batch["item_id"], value_set=ids))
        kinds = pc.struct_field(rows["fields"], kind_field).to_pylist() if kind_field else [""] * len(rows)
        parts = (rows["item_id"], tables.told(rows, text), rows["has_image"])
        whole = zip(*(part.to_pylist() for part in parts), kinds, strict=True)
        found |= {i: Item(frozenset(_words(t)), has, str(kind or "")) for i, t, has, kind in whole}
    return found


def _trained_pairs(triplets: Path, texts: Sequence[str]) -> list[int]:
    """Count the training pairs of each text."""
    wanted, counts = pa.array(sorted(set(texts)), pa.string()), Counter[str]()
    for path in tables.parts(triplets / "pairs"):
        asked = pq.read_table(path, columns=["query"])["query"]
        found = pc.value_counts(asked.filter(pc.is_in(asked, value_set=wanted)))
        counts.update({one["values"]: one["counts"] for one in found.to_pylist()})
    return [counts[text] for text in texts]


def _popularity(counts: Sequence[int]) -> list[str]:
    some = np.array([count for count in counts if count])
    if not len(some):
        return ["never"] * len(counts)
    head, torso = np.quantile(some, [1 - HEAD, 1 - TORSO], method="higher")
    return [
        "never" if not count else "head" if count >= head else "torso" if count >= torso else "tail"
        for count in counts
    ]


def _words(text: str) -> list[str]:
    """Words in lower case without a plural's s."""
    return [word.removesuffix("s") for word in re.findall(r"\w+", text.lower())]


def _told(query: str, items: Sequence[Item]) -> str:
    words = _words(query)
    if not words or not items:
        return "unknown"
    share = np.mean([[word in item.words for word in words] for item in items])
    return "say it" if share >= SAID else "say some" if share >= HARDLY else "say little"


def _most(kinds: Iterable[str]) -> str:
    counts: Mapping[str, int] = Counter(kinds)
    return max(sorted(counts), key=lambda kind: counts[kind], default="") or "unknown"
