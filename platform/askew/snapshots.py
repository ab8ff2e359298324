"""Snapshots: copies of many files in a folder that is whole or absent, with the checksums of all of them.

A snapshot is filled under a hidden name and renamed when the disk has it; killed, it goes on with what it had. A
file of the same content as one of the snapshot before is a hard link to that one, and takes no room. `SHA256SUMS`
is as sha256sum writes it, so that a copy can be checked without askew. Knows nothing of what the files mean.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from askew import artifacts
from askew.errors import ArtifactError

SUMS, WORK = "SHA256SUMS", ".work"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
OUTSIDE = r"(^|/)\.{0,2}(/|$)"  # of a name that leads out of its folder, or has other spellings
CHUNK = 1 << 20


class Snapshot:
    """A snapshot while it is being made."""

    def __init__(self, folder: Path, before: Path | None = None, *, links: bool = True) -> None:
        """Fill `folder`; what `before` has, or was taken already, is linked from there, unless `links` is off."""
        self.folder, self.work, self._links = folder, folder / WORK, links
        self._sums: dict[str, str] = {}
        self._there = {sum_: before / name for name, sum_ in sums(before).items()} if before else {}
        self.copied = 0  # bytes
        self.told: list[str] = []  # what a person should know of
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def has(self, name: str, sum_: str) -> bool:
        """Tell whether a file of this sum can be had without copying it; if so, it is taken under `name`."""
        if self._sums.get(name) == sum_:
            return True
        target = self.folder / name
        if not (target.is_file() and artifacts.sha256(target) == sum_) and not self._linked(sum_, target):
            return False
        self._note(name, sum_)
        return True

    def take(self, name: str, source: Path, sum_: str | None = None) -> None:
        """Copy a file under `name`. Raises ArtifactError when it is gone, or not of this sum, if one is given."""
        if sum_ and self.has(name, sum_):
            return
        part = self.work / "part"
        try:
            found = copied(source, part)
        except FileNotFoundError:
            raise ArtifactError(
                f"the file {source}", "none", "make the artifact again, or remove its folder"
            ) from None
        if sum_ not in (None, found):
            do = "make the artifact again, or remove its folder"
            raise ArtifactError(f"{source} as its manifest states it", "other content", do)
        if not self._linked(found, self.folder / name):
            self.copied += part.stat().st_size
            part.replace(_room_for(self.folder / name))
        self._note(name, found)

    def write(self, name: str, text: str) -> None:
        """Make a file of this text."""
        (path := self.work / "text").write_text(text, encoding="utf-8")
        self.take(name, path)

    def forget(self, under: str) -> None:
        """Leave out what was taken below `under`."""
        self._sums = {name: sum_ for name, sum_ in self._sums.items() if not name.startswith(f"{under}/")}

    def _linked(self, sum_: str, target: Path) -> bool:
        if not self._links or (source := self._there.get(sum_)) is None:
            return False
        link = self.work / "link"
        link.unlink(missing_ok=True)
        try:
            os.link(source, link)
        except OSError:  # it is gone, or here files have one name only
            return False
        link.replace(_room_for(target))
        link.unlink(missing_ok=True)  # of one file already, replacing does nothing
        return True

    def _note(self, name: str, sum_: str) -> None:
        if not LINE.fullmatch(f"{sum_}  {name}") or "\\" in name:
            raise ArtifactError("a file's name on one line", repr(name), "rename it")
        self._sums[name] = sum_
        self._there.setdefault(sum_, self.folder / name)

    def seal(self) -> None:
        """Write the sums, and close it."""
        self.write(SUMS, "".join(f"{sum_}  {name}\n" for name, sum_ in sorted(self._sums.items())))
        self.close()

    def close(self) -> None:
        """Remove what was not taken, and have the disk take all names."""
        shutil.rmtree(self.work)
        for name, path in listed(self.folder).items():
            if name not in self._sums:
                path.unlink()
        for folder in [path for path in self.folder.rglob("*") if path.is_dir()]:
            artifacts.sync(folder)
        artifacts.sync(self.folder)


@contextmanager
def draft(to: Path) -> Iterator[Snapshot]:
    """Make a snapshot below `to`; on leaving, it appears as `backup-<UTC>`, and the draft's `folder` is its name.

    After an error, or a kill, what was copied stays in a hidden folder, and the next draft finds it. Raises
    ArtifactError when another process is at it, or the disk is full.
    """
    hidden = to / ".backup.draft"
    hidden.mkdir(mode=0o700, parents=True, exist_ok=True)
    with artifacts.room(to), artifacts.alone(hidden):
        before = newest(to)
        try:
            made = Snapshot(hidden, before)
        except ArtifactError as error:  # a new one is what helps
            made = Snapshot(hidden)
            made.told.append(f"nothing is linked to {before}: {error}")
        yield made
        made.seal()
        made.folder = to / f"backup-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z"
        hidden.replace(made.folder)
        artifacts.sync(to)


def newest(to: Path) -> Path | None:
    """Find the last snapshot below a folder."""
    return max((path.parent for path in to.glob(f"backup-*/{SUMS}")), default=None)


def sums(folder: Path) -> dict[str, str]:
    """Read a snapshot's sums, by the files' names. Raises ArtifactError when there are none, or damaged ones."""
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"a backup's checksums in {path}", str(error), "take another backup") from None
    found = [LINE.fullmatch(line) for line in lines[:-1]]
    names = [one[2] for one in found if one]
    if lines[-1] or len(set(names)) < len(found) or any(re.search(OUTSIDE, name) for name in names):
        raise ArtifactError(f"a line for each file in {path}", "damage", "take another backup")
    return {one[2]: one[1] for one in found if one}


def verify(folder: Path) -> dict[str, str]:
    """Read all of a snapshot against its sums, and return them. Raises ArtifactError naming the file."""
    stated, do = sums(folder), "take another backup"
    for name, sum_ in stated.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise ArtifactError(f"the file {path}", "none", do)
        if artifacts.sha256(path) != sum_:
            raise ArtifactError(f"{path} as SHA256SUMS states it", "other content", do)
    if more := listed(folder).keys() - stated.keys() - {SUMS}:
        raise ArtifactError(f"no file but those of {folder / SUMS}", f"{folder / min(more)}", do)
    return stated


def listed(folder: Path) -> dict[str, Path]:
    """Find all files below a folder, by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}


def copied(source: Path, target: Path) -> str:
    """Copy a file's content, have the disk take it, and return its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(CHUNK):
            digest.update(chunk)
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())
    return digest.hexdigest()


def _room_for(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
