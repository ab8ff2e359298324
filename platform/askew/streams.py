"""A file, or a range of it, as a stream of bytes: local or remote, compressed or not.

Also what the readers of all formats share: chunks, blocks of whole lines and tables made of rows. Knows
nothing of any format nor of what the columns mean.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from askew.errors import DataError
from askew.records import Bad, bad

BLOCK_BYTES, MAX_LINE_BYTES, MAX_CHUNK_BYTES = 4 << 20, 5_000_000, 64 << 20
EXACT = 2**53  # from here on a float64 no longer tells neighbouring integers apart


class Chunk(NamedTuple):
    """Some rows, and what was set aside while they were read; without rows, `table` may lack columns too."""

    table: pa.Table
    bad: list[Bad]


class Place(NamedTuple):
    """A file below the data folder, read as records of one kind, at most `rows` at a time."""

    data: str
    file: str
    kind: str
    rows: int = 4096

    @property
    def path(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path on it."""
        fs, root = url_to_fs(self.data)
        return fs, f"{root.rstrip('/')}/{self.file}"

    @contextmanager
    def open(self, raw: bool = False) -> Iterator[IO[bytes]]:
        """Open for reading, decompressed unless `raw`. Raises DataError, also later, when it cannot be read."""
        fs, path = self.path
        try:
            with fs.open(path, "rb") as file:
                if raw:
                    yield file
                elif path.endswith(".gz"):
                    with gzip.GzipFile(fileobj=file) as unpacked:
                        yield io.BufferedReader(unpacked, 1 << 20)
                else:
                    yield io.BufferedReader(file, 1 << 20)
        except (OSError, EOFError, zlib.error) as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> DataError:
        """Make the error of a file that is truncated, corrupt or cannot be opened."""
        found = " ".join(f"{type(error).__name__}: {error}".split())
        return DataError(f"a whole file {self.file}", found, "copy or make the file again")

    def bad(self, where: str, reason: str, message: str, record_id: object = "") -> Bad:
        """Make the record of what is set aside at `where` in this file."""
        return bad(self.kind, record_id, f"{self.file}:{where}" if where else self.file, reason, message)

    def chunks(self, table: pa.Table, set_aside: list[Bad]) -> Iterator[Chunk]:
        """Cut a table into chunks of at most `rows` rows; what was set aside goes with the first."""
        for start in range(0, max(table.num_rows, 1 if set_aside else 0), self.rows):
            rows = min(self.rows, table.num_rows - start)  # Arrow believes any length of a table without columns
            yield Chunk(table.slice(start, rows), [] if start else set_aside)


class Block(NamedTuple):
    """Whole lines from `offset` on; `too_long` is the offset of a line after them that was skipped."""

    offset: int
    data: bytes
    too_long: int | None


def blocks(stream: IO[bytes], start: int, stop: int) -> Iterator[Block]:
    """Cut the lines that begin in bytes [start, stop) into blocks of a few megabytes.

    The first line is the one after the first line end at or after `start` - 1, the last the one that holds
    byte `stop` - 1: ranges that share their borders give each line once.
    """
    at = start
    if start:
        stream.seek(start - 1)
        at += _skip_line(stream) - 1
    while at < stop and (data := stream.read(min(BLOCK_BYTES, stop - at))):
        if not data.endswith(b"\n"):
            data += stream.readline(MAX_LINE_BYTES)
        size, last = len(data), data.rfind(b"\n", 0, len(data) - 1) + 1
        if size - last <= MAX_LINE_BYTES:
            yield Block(at, data, None)
        else:
            size += 0 if data.endswith(b"\n") else _skip_line(stream)
            yield Block(at, data[:last], at + last)
        at += size


def _skip_line(stream: IO[bytes]) -> int:
    size = 0
    while piece := stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Make a table of rows with any keys; a column of values that do not agree becomes text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return pa.table({"": pa.nulls(len(rows))}).select([])
    return pa.table({name: _array([row.get(name) for row in rows]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)
