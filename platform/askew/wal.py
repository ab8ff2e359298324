"""A write-ahead log: changes in the order in which they were acknowledged, on disk before anyone is told so.

Files of frames, each with its length, its number and a checksum. One process writes, under a lock; any number read
along. A frame that a crash cut short was never acknowledged, and is cut off. Knows nothing of what changes mean.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

from askew import artifacts
from askew.errors import ArtifactError

HEAD = struct.Struct("<4sIQI")  # mark, length of the content, number, checksum of length, number and content
MARK = b"askL"  # its last letter is the format's
MAX_CONTENT = 256 << 20
SUFFIX = ".wal"
ZEROS = 16  # so many never end a change: an Arrow stream has fewer


class Entry(NamedTuple):
    """An acknowledged change: its number, from 1 on without a gap, and its content."""

    number: int
    content: bytes


class Log:
    """The writing end."""

    def __init__(self, folder: Path) -> None:
        """Open or start the log in `folder`, and cut off what a crash left half written.

        Raises ArtifactError when another process writes it, or when it is damaged before its end.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ArtifactError(
                f"{folder} for this process alone", "another that writes it", "let that one write"
            ) from error
        try:
            self._open(self._recovered())
        except BaseException:
            self._lock.close()
            raise

    def _recovered(self) -> Path:
        """Find the last change, and the file that the next goes to."""
        folder, paths = self._folder, _files(self._folder)
        self.last = _first(paths[0]) - 1 if paths else 0
        for path in paths:
            end = 0
            for entry, after in _frames(path, 0):
                self.last, end = _following(entry, self.last, folder), after
            if path.stat().st_size > end:
                _refuse_damage(path, end, self.last + 1, last=path == paths[-1])
                os.truncate(path, end)
                artifacts.sync(path)
        return paths[-1] if paths else self._name(self.last + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, number: int) -> Path:
        return self._folder / f"{number:020d}{SUFFIX}"

    def _open(self, path: Path) -> None:
        self._stream = path.open("ab", buffering=0)
        artifacts.sync(self._folder)

    def append(self, content: bytes) -> int:
        """Write a change and wait until the disk has it; returns its number.

        Raises ArtifactError when it is too large, OSError when the disk refuses it; nothing of it stays then.
        """
        if len(content) > MAX_CONTENT:
            raise ArtifactError(
                f"a change of at most {MAX_CONTENT:,} bytes", f"{len(content):,}", "send fewer items"
            )
        number, end = self.last + 1, os.fstat(self._stream.fileno()).st_size  # `tell` counts what was cut off too
        frame = _frame(number, content)
        try:
            if self._stream.write(frame) != len(frame):
                raise OSError(f"{self._stream.name} took a part of a change alone")
            os.fsync(self._stream.fileno())
        except BaseException:
            os.truncate(self._stream.name, end)
            raise
        self.last = number
        return number

    def turn(self) -> int:
        """Begin a new file; returns the number of the last change in those before it."""
        if self._stream.tell():
            self._stream.close()
            self._open(self._name(self.last + 1))
        return self.last

    def forget(self, upto: int) -> None:
        """Remove the files of which no change is later than `upto`."""
        paths = _files(self._folder)
        for path, after in pairwise(paths):
            if _first(after) <= upto + 1:
                path.unlink()
        artifacts.sync(self._folder)

    def close(self) -> None:
        """Let another process write."""
        self._stream.close()
        self._lock.close()


class Tail:
    """A reading end, which follows the log as it grows."""

    def __init__(self, folder: Path, after: int) -> None:
        """Follow the log in `folder` from the change that comes after number `after`."""
        self._folder, self.last = folder, after
        self._path: Path | None = None
        self._at = 0

    def read(self) -> Iterator[Entry]:
        """Yield what was acknowledged since the last call.

        Raises ArtifactError when changes in between are gone, so that the reader must start from the state that
        took them up; or when one is damaged.
        """
        paths = _files(self._folder)
        if paths and _first(paths[0]) > self.last + 1:
            found = f"none before {_first(paths[0])}"
            raise ArtifactError(f"change {self.last + 1} in {self._folder}", found, "read the newer state")
        for number, path in enumerate(paths):
            if number + 1 < len(paths) and _first(paths[number + 1]) <= self.last + 1:
                continue
            if path != self._path:
                self._path, self._at = path, 0
            for entry, end in _frames(path, self._at):
                self._at = end
                if entry.number > self.last:
                    self.last = _following(entry, self.last, self._folder)
                    yield entry
            with suppress(FileNotFoundError):  # a compaction has taken it up meanwhile
                if path.stat().st_size > self._at:
                    _refuse_damage(path, self._at, self.last + 1, last=path == paths[-1])

    def refuse_damage(self) -> None:
        """Raise ArtifactError when what `read` stopped at was acknowledged, for whole changes come after it."""
        if paths := _files(self._folder):
            if _first(paths[-1]) > self.last + 1:
                found = f"none before {_first(paths[-1])}"
                raise ArtifactError(f"change {self.last + 1} in {self._folder}", found, "restore it from a copy")
            _refuse_damage(paths[-1], self._at if paths[-1] == self._path else 0, self.last + 1, last=True)


def copy(folder: Path, after: int, to: Path) -> int:
    """Write what was acknowledged after number `after` as a log of its own, while another process may write on.

    Returns the last change's number. Raises ArtifactError when changes after it are gone, or damaged.
    """
    to.mkdir(parents=True)
    tail, damaged = Tail(folder, after), True
    with (to / f"{after + 1:020d}{SUFFIX}").open("xb") as stream:
        while damaged:
            before = tail.last
            try:
                for entry in tail.read():
                    stream.write(_frame(*entry))
                tail.refuse_damage()
                damaged = False
            except FileNotFoundError as error:
                raise ArtifactError(f"the file {error.filename}", "none", "read the newer state") from error
            except ArtifactError:
                if tail.last == before:  # else it was a change that was being written
                    raise
        stream.flush()
        os.fsync(stream.fileno())
    return tail.last


def _frame(number: int, content: bytes) -> bytes:
    return HEAD.pack(MARK, len(content), number, _checksum(number, content)) + content


def _following(entry: Entry, last: int, folder: Path) -> int:
    if entry.number != last + 1:
        raise ArtifactError(f"change {last + 1} in {folder}", str(entry.number), "restore the log from a copy")
    return entry.number


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _first(path: Path) -> int:
    return int(path.stem)


def _checksum(number: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<QI", number, len(content))))


def _frames(path: Path, start: int) -> Iterator[tuple[Entry, int]]:
    """Read whole frames from an offset on, each with where it ends; stop at the first that is not whole."""
    with path.open("rb") as stream:
        stream.seek(start)
        while len(head := stream.read(HEAD.size)) == HEAD.size:
            mark, length, number, checksum = HEAD.unpack(head)
            _refuse_format(path, mark)
            if mark != MARK or length > MAX_CONTENT:
                return
            content = stream.read(length)
            if len(content) < length or _checksum(number, content) != checksum:
                return
            yield Entry(number, content), stream.tell()


def _refuse_format(path: Path, mark: bytes) -> None:
    """Tell changes of another format from damage, which would be cut off."""
    if mark[:3] == MARK[:3] and mark[3:].isalpha() and mark != MARK:
        do = "open it with the version of askew that wrote it, and compact it there"
        raise ArtifactError(f"changes of format {MARK[3:].decode()} in {path}", f"format {mark[3:].decode()}", do)


def _refuse_damage(path: Path, end: int, number: int, *, last: bool) -> None:
    """Tell a frame that a crash cut short, or that is being written, from damage to what was acknowledged."""
    with path.open("rb") as stream:
        stream.seek(end)
        rest = stream.read()
    if next(_frames(path, end), None):  # it was being written
        return
    whole_after = rest.find(MARK, 1)
    while whole_after >= 0:
        if next(_frames(path, end + whole_after), None):
            break
        whole_after = rest.find(MARK, whole_after + 1)
    if whole_after >= 0 or not last or _is_all_there(rest, number):
        do = "restore it from a copy; what is damaged, and what follows, was acknowledged"
        raise ArtifactError(f"whole changes in {path}", f"damage at byte {end:,}", do)


def _is_all_there(rest: bytes, number: int) -> bool:
    """Whether of a damaged frame no byte is missing: one that was cut short is shorter than it says.

    After a crash a file may end in zeros, which the system put where it had not yet written.
    """
    if len(rest) < HEAD.size or not rest[-ZEROS:].strip(b"\0"):
        return False
    mark, length, _, checksum = HEAD.unpack_from(rest)
    content = rest[HEAD.size :]
    return bool(mark == MARK and length <= len(content)) or bool(checksum == _checksum(number, content))
