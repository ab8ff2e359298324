"""WebDataset tar files to Arrow: the members of one key, which lie side by side, become one row.

`key.jpg` (png, webp …) is the image, `key.json` gives columns, `key.txt` the title, any other text a column
of its extension's name. Read as a stream: nothing is unpacked to disk. Knows nothing of what columns mean.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from askew import streams
from askew.records import Bad, bad
from askew.streams import MAX_CHUNK_BYTES, Chunk, Place

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif")
MAX_MEMBER_BYTES = 50_000_000


def read(place: Place) -> Iterator[Chunk]:
    """Read a tar file, compressed or not, as rows of item_id, image, title and the JSON's keys.

    Set aside: unsafe_name, not_a_file, too_large, invalid_utf8, broken_json, unknown_member and
    more_than_one_image. Raises DataError when the file is truncated or no tar file.
    """
    with place.open(raw=True) as stream:
        try:
            yield from _chunks(place, stream)
        except tarfile.TarError as error:
            raise place.unreadable(error) from error


def _chunks(place: Place, stream: IO[bytes]) -> Iterator[Chunk]:
    rows: list[dict[str, Any]] = []
    set_aside: list[Bad] = []
    size = 0
    for key, members in _keys(stream, place, set_aside):
        row = _row(place, key, members, set_aside)
        if row is not None:
            rows.append(row)
        size += sum(len(data) for data in members.values())
        if len(rows) >= place.rows or size > MAX_CHUNK_BYTES:
            yield Chunk(streams.table(rows), set_aside)
            rows, set_aside, size = [], [], 0
    if rows or set_aside:
        yield Chunk(streams.table(rows) if rows else pa.table({}), set_aside)


def _keys(stream: IO[bytes], place: Place, set_aside: list[Bad]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group neighbouring members by key (the name up to the first dot of its last part)."""
    key, members = "", dict[str, bytes]()
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it remembers every member
            if member.isdir():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if posixpath.join(folder, stem) != key and members:
                yield key, members
                members = {}
            key = posixpath.join(folder, stem)
            if problem := _problem(member):
                set_aside.append(bad(place.kind, key, f"{place.file}:{member.name}", *problem))
            else:
                file = archive.extractfile(member)
                assert file is not None
                members[ending.lower()] = file.read()
    if members:
        yield key, members


def _problem(member: tarfile.TarInfo) -> tuple[str, str] | None:
    if not member.isreg():
        return "not_a_file", "a link or a device, not a file"
    if any("\ud800" <= c <= "\udfff" for c in member.name):
        return "invalid_utf8", "a name that is no UTF-8"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe_name", "a name that leads out of the archive"
    if member.size > MAX_MEMBER_BYTES:
        return "too_large", f"{member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
    return None


def _row(place: Place, key: str, members: dict[str, bytes], set_aside: list[Bad]) -> dict[str, Any] | None:
    """Make the row of a key; None when its JSON is broken."""
    row: dict[str, Any] = {"item_id": key}
    try:
        told = json.loads(members.pop("json", b"{}"))
        if not isinstance(told, dict):
            raise ValueError(f"a {type(told).__name__}, not an object")
        json.dumps(told, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        set_aside.append(place.bad(key, "broken_json", f"the member {key}.json is no JSON object ({error})", key))
        return None
    images = [ending for ending in members if ending.rpartition(".")[2] in IMAGES]
    for ending in [ending for ending in members if ending not in images]:
        _add_text(place, key, ending, members[ending], row, set_aside)
    row |= told
    if images:
        row["image"] = members[images[0]]
    message = "only the first image is taken"
    set_aside += [place.bad(f"{key}.{ending}", "more_than_one_image", message, key) for ending in images[1:]]
    return row


def _add_text(place: Place, key: str, ending: str, data: bytes, row: dict[str, Any], set_aside: list[Bad]) -> None:
    try:
        row["title" if ending == "txt" else ending] = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        message = "neither an image, JSON nor text in UTF-8"
        set_aside.append(place.bad(f"{key}.{ending}", "unknown_member", message, key))
