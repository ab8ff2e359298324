"""Records that cannot be used: each is set aside with where it stood and why, and counted.

Knows nothing of where records come from.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

MAX_MESSAGE, MAX_ID = 300, 512


class Bad(NamedTuple):
    """A record that was set aside.

    `kind` is item, image, query, judgment, click or triplet; `source` the file (and line or row); `reason` a
    short code that stays the same over versions; `message` a sentence for people.
    """

    kind: str
    id: str
    source: str
    reason: str
    message: str


SCHEMA = pa.schema([(name, pa.string()) for name in Bad._fields])


def bad(kind: str, record_id: object, source: str, reason: str, message: str) -> Bad:
    """Make a record of what was set aside, its id and message cut to a length that a table can show."""
    shown = "" if record_id is None else _utf8(str(record_id))[:MAX_ID]
    return Bad(kind, shown, _utf8(source), reason, _utf8(message)[:MAX_MESSAGE])


def _utf8(text: str) -> str:
    """Text without halves of surrogate pairs, as a name on disk may hold them."""
    return text.encode("utf-8", "replace").decode()


def table(records: Iterable[Bad]) -> pa.Table:
    """Make the quarantine's table."""
    return pa.Table.from_pylist([record._asdict() for record in records], SCHEMA)
