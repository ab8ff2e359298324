"""Filters: which items a search may find, by their fields, as JSON says it.

    {"colour": "blue", "price": {"gte": 10, "lt": 50}, "not": {"brand": ["Acme", "Apex"]}}

Keys beside each other must all hold. A value is equal to the field's, a list holds it, an object bounds it
(`gt`, `gte`, `lt`, `lte`); null means that the item has none. `and` and `or` take lists of filters, `not` takes
one. A field that an item lacks fulfils no condition but null. Knows nothing of vectors.
Shapes: N items.
"""

import json
import operator
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from askew.errors import DataError

Mask = NDArray[np.bool_]
Filter = Mapping[str, Any]

OWN = ("item_id", "has_image")  # columns of items that can be asked for beside their fields
BOUNDS = {"gt": pc.greater, "gte": pc.greater_equal, "lt": pc.less, "lte": pc.less_equal}
MAX_DEPTH, MAX_CONDITIONS, MAX_VALUES = 8, 64, 1000
DO = "mend the filter"


def canonical(where: Filter) -> str:
    """Write a filter as one string, the same for the same filter."""
    return json.dumps(where, sort_keys=True, separators=(",", ":"))


def check(where: Any, schema: pa.Schema) -> None:
    """Refuse a filter that is malformed, too large, or on a field that the items lack or of another type.

    Raises DataError.
    """
    _conditions(where, schema, 1)


def mask(where: Filter, items: pa.Table) -> Mask:
    """Tell for each of N items whether it fulfils the filter. Raises DataError as `check` does."""
    check(where, items.schema)
    return _all(where, items)


def _all(where: Filter, items: pa.Table) -> Mask:
    held = [_holds(key, value, items) for key, value in where.items()]
    return reduce(operator.and_, held, np.ones(items.num_rows, dtype=np.bool_))


def _holds(key: str, value: Any, items: pa.Table) -> Mask:
    if key == "not":
        return ~_all(value, items)
    if key == "and":
        return _all_of([_all(one, items) for one in value])
    if key == "or":
        return reduce(operator.or_, [_all(one, items) for one in value])
    column = _column(key, items)
    if value is None:
        return _mask(pc.is_null(column))
    if isinstance(value, dict):
        return _all_of([_mask(BOUNDS[name](column, _scalar(bound))) for name, bound in value.items()])
    values = value if isinstance(value, list) else [value]
    held = [pc.is_null(column)] if None in values else []
    if there := [v for v in values if v is not None]:
        held.append(pc.is_in(column, value_set=_like(there, column.type)))
    return reduce(operator.or_, [_mask(one) for one in held])


def _all_of(masks: list[Mask]) -> Mask:
    return reduce(operator.and_, masks)


def _column(name: str, items: pa.Table) -> pa.ChunkedArray:
    return items[name] if name in OWN else pc.struct_field(items["fields"], name)


def _scalar(bound: Any) -> pa.Scalar:
    return pa.scalar(float(bound) if isinstance(bound, int) and abs(bound) >= 1 << 53 else bound)


def _like(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as the column's type has them; a number that it cannot hold equals none of it."""
    if pa.types.is_integer(kind):
        least = 0 if pa.types.is_unsigned_integer(kind) else -(1 << (kind.bit_width - 1))
        above = least + (1 << kind.bit_width)
        return pa.array([int(v) for v in values if v == int(v) and least <= v < above], kind)
    return pa.array([float(v) for v in values] if pa.types.is_floating(kind) else values, kind)


def _mask(holds: pa.ChunkedArray) -> Mask:
    found: Mask = pc.fill_null(holds, False).to_numpy()
    return found


# --- what is refused -----------------------------------------------------------------------------


def _conditions(where: Any, schema: pa.Schema, depth: int) -> int:
    """Check a filter; returns how many conditions it has."""
    if not isinstance(where, dict) or not where:
        raise DataError("a filter: an object of conditions", _told(where), DO)
    if depth > MAX_DEPTH:
        raise DataError(f"a filter of at most {MAX_DEPTH} levels", "a deeper one", DO)
    count = 0
    for key, value in where.items():
        if key in ("and", "or"):
            if not isinstance(value, list) or not value:
                raise DataError(f"a list of filters in {key!r}", _told(value), DO)
            count += sum(_conditions(one, schema, depth + 1) for one in value)
        elif key == "not":
            count += _conditions(value, schema, depth + 1)
        else:
            _field(key, value, schema)
            count += 1
    if count > MAX_CONDITIONS:
        raise DataError(f"a filter of at most {MAX_CONDITIONS} conditions", str(count), DO)
    return count


def _field(name: str, value: Any, schema: pa.Schema) -> None:
    kinds = {own: schema.field(own).type for own in OWN if own in schema.names}
    if "fields" in schema.names:
        kinds |= {field.name: field.type for field in schema.field("fields").type}
    if name not in kinds:
        raise DataError(f"a filter on one of {', '.join(sorted(kinds))}", repr(name), DO)
    fits, wanted = _kind(kinds[name])
    if isinstance(value, dict):
        _bounded(name, value, wanted, fits)
    elif isinstance(value, list):
        if not 1 <= len(value) <= MAX_VALUES:
            raise DataError(f"1 to {MAX_VALUES} values of {name!r}", str(len(value)), DO)
        for one in value:
            _value(name, one, wanted, fits)
    else:
        _value(name, value, wanted, fits)


def _bounded(name: str, bounds: Mapping[str, Any], wanted: str, fits: Callable[[Any], bool]) -> None:
    if not bounds or set(bounds) - set(BOUNDS):
        raise DataError(f"bounds of {name!r} among {', '.join(BOUNDS)}", _told(bounds), DO)
    if wanted == "true or false":
        raise DataError(f"{wanted} for {name!r}", "bounds", DO)
    for bound in bounds.values():
        if bound is None:
            raise DataError(f"a bound of {name!r} that is {wanted}", "null", DO)
        _value(name, bound, wanted, fits)


def _value(name: str, value: Any, wanted: str, fits: Callable[[Any], bool]) -> None:
    if value is not None and not fits(value):
        raise DataError(f"{wanted} for {name!r}", _told(value), DO)


def _kind(kind: pa.DataType) -> tuple[Callable[[Any], bool], str]:
    if pa.types.is_boolean(kind):
        return lambda value: isinstance(value, bool), "true or false"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _is_number, "a number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _is_text, "a string"
    return lambda value: False, f"nothing, for no filter compares {kind}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_text(value: Any) -> bool:
    """Whether it is a string, and no half of a surrogate pair in it, which JSON may name and UTF-8 cannot."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def _told(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "…"
