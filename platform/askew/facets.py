"""Facets: which values the fields of items have, and how many items have each.

Of text and of yes or no the values that most items have, of numbers the least and the greatest. Each shard counts
its own, and the counts are added. Knows nothing of searches.
Shapes: N items.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

KEPT = 1000  # values of a field that a shard tells; of one that has more, counts of the rarest may be missed
Counts = dict[str, dict[str, Any]]  # of each field: its kind, how many items have it, and what they have


def count(parts: Iterable[tuple[pa.Table, NDArray[np.bool_] | None]]) -> Counts:
    """Count the values of each field of tables of N items; a mask (N,) tells which of the items count."""
    found: list[Counts] = []
    for items, mask in parts:
        fields = items["fields"] if "fields" in items.column_names else None
        if fields is None or not pa.types.is_struct(fields.type):
            continue
        kept = fields if mask is None else fields.filter(pa.array(mask))
        found.append({field.name: _counted(pc.struct_field(kept, field.name)) for field in fields.type})
    return added(found)


def added(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> Counts:
    """Add counts of several tables or shards; a field whose kind differs between them is as the first has it."""
    names = list(dict.fromkeys(name for one in found for name in one))
    return {name: _sum([one[name] for one in found if name in one]) for name in names}


def shown(counts: Counts, limit: int) -> list[dict[str, Any]]:
    """Tell of each field its kind, how many items have it, and its `limit` most frequent values or its range."""
    told = []
    for name, one in counts.items():
        values = sorted(one["values"].items(), key=lambda pair: (-pair[1], str(pair[0])))[:limit]
        about = {"name": name, "kind": one["kind"], "items": one["items"], "distinct": one["distinct"]}
        told.append(
            {
                **about,
                "values": [{"value": value, "items": items} for value, items in values],
                "least": one["least"],
                "greatest": one["greatest"],
            }
        )
    return told


def _counted(column: pa.ChunkedArray) -> dict[str, Any]:
    kind = column.type
    about: dict[str, Any] = {
        "kind": "other", "items": len(column) - column.null_count, "distinct": 0, "values": {}, "least": None,
        "greatest": None,
    }  # fmt: skip
    if pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = pc.value_counts(column.drop_null())
        order = np.argsort(-values.field("counts").to_numpy(), kind="stable")[:KEPT]
        some = values.take(pa.array(order)).to_pylist()
        about |= {"kind": "boolean" if pa.types.is_boolean(kind) else "text", "distinct": len(values)}
        about["values"] = {one["values"]: one["counts"] for one in some}
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        ends = pc.min_max(column).as_py()
        about |= {"kind": "number", "least": ends["min"], "greatest": ends["max"]}
    return about


def _sum(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = each[0]
    alike = [one for one in each if one["kind"] == first["kind"]]
    values: Counter[Any] = Counter()
    for one in alike:
        values.update(one["values"])
    return {
        "kind": first["kind"],
        "items": sum(one["items"] for one in alike),
        "distinct": max(len(values), *(one["distinct"] for one in alike)),
        "values": dict(values),
        "least": min((one["least"] for one in alike if one["least"] is not None), default=None),
        "greatest": max((one["greatest"] for one in alike if one["greatest"] is not None), default=None),
    }
