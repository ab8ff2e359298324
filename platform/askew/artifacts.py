"""Artifacts on disk: a folder that is whole or absent, with a manifest of checksums.

A folder is written under a temporary name, synced, and renamed; its manifest is part of it. Its name
carries its key, a hash over the settings and the keys of what it was made from, so that making the
same thing again finds it done. Knows nothing of what the files mean.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from pydantic import ValidationError

from askew import __version__
from askew.config import Settings
from askew.errors import ArtifactError, AskewError

MANIFEST, WORK = "manifest.json", "work"
GONE = ".work"  # what the folder for work is called while it is removed
SCRATCH, HELD = ".scratch-", "held"
YOUNG_S = 5.0  # one that is younger may not be held yet
FORMAT = 1
MAX_NAME = 255  # bytes of a part of a path
SEAL = re.compile(r'("sum": ?")("\s*}\s*)$')
FULL = re.compile(r"No space left on device|Disk quota exceeded|requested and \d+ written")


class File(Settings):
    """One file of an artifact: size in bytes and sha256 in hex."""

    bytes: int
    sha256: str


class Manifest(Settings):
    """What an artifact is, what it was made from, and the checksums of its files."""

    format: int
    kind: str
    key: str
    askew: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, int]
    details: dict[str, Any]
    files: dict[str, File]
    sum: str = ""  # of the manifest's own text, this being empty


class Draft:
    """An artifact while it is being written: a folder to fill, counts and details to state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.details: dict[str, Any] = {}


def key(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash what determines an artifact: its kind, its settings, its inputs, askew's version. 64 hex digits."""
    made_of = {"kind": kind, "settings": settings, "inputs": inputs, "format": FORMAT, "askew": __version__}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def place(root: Path, kind: str, key: str) -> Path:
    """Name the folder of the artifact with this key below `root`."""
    return root / f"{kind}-{key[:12]}"


@contextmanager
def draft(
    root: Path, kind: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, resume: bool = False
) -> Iterator[Draft]:
    """Write an artifact: fill the draft's folder; on leaving, it is sealed and appears whole under its name.

    An exception leaves nothing under the final name. It removes the temporary folder too, unless `resume` is
    set: then the folder stays, also after a kill, and the next draft of this key finds in it what is done.
    What stands below its folder `work` does not become part of the artifact. Raises ArtifactError when
    another process is at work on it, or the disk is full.
    """
    digest = key(kind, settings, inputs)
    final = place(root, kind, digest)
    root.mkdir(parents=True, exist_ok=True)
    work = Draft(root / f".{final.name}.{'draft' if resume else os.getpid()}")
    for stale in () if resume else root.glob(f".{final.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    work.folder.mkdir(mode=0o700, exist_ok=resume)
    done = False
    try:
        with room(work.folder), alone(work.folder) if resume else nullcontext():
            shutil.rmtree(work.folder / GONE, ignore_errors=True)
            yield work
            manifest = Manifest(
                format=FORMAT, kind=kind, key=digest, askew=__version__,
                settings=dict(settings), inputs=dict(inputs),
                counts=work.counts, details=work.details, files=_checksums(work.folder),
            )  # fmt: skip
            _remove_work(work.folder)
            _publish(work.folder, final, manifest)
            done = True
    finally:
        if done or not resume:
            shutil.rmtree(work.folder, ignore_errors=True)


@contextmanager
def part(folder: Path, kind: str, inputs: Mapping[str, str]) -> Iterator[Draft]:
    """Write an artifact inside another's draft: fill the draft's folder; on leaving, it is sealed as `folder`.

    Its key is a hash over its content, so that the whole can name it. What stood there before, such as what a
    worker left that died, is replaced.
    """
    work = Draft(folder.with_name(f".{folder.name}.{os.getpid()}"))
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale)
    work.folder.mkdir(parents=True)
    try:
        yield work
        files = _checksums(work.folder)
        digest = key(kind, {"files": {name: file.sha256 for name, file in files.items()}} | work.details, inputs)
        manifest = Manifest(
            format=FORMAT, kind=kind, key=digest, askew=__version__, settings={}, inputs=dict(inputs),
            counts=work.counts, details=work.details, files=files,
        )  # fmt: skip
        _publish(work.folder, folder, manifest)
    finally:
        shutil.rmtree(work.folder, ignore_errors=True)


def _remove_work(draft: Path) -> None:
    """Remove the folder for work as if at once: half of it, after a kill, would tell of work that is not there."""
    if (draft / WORK).exists():
        (draft / WORK).replace(draft / GONE)
        shutil.rmtree(draft / GONE, ignore_errors=True)


def _publish(draft: Path, final: Path, manifest: Manifest) -> None:
    """Seal a folder and give it its name."""
    write_text(draft / MANIFEST, sealed(manifest.model_dump_json(indent=1)))
    sync(draft)
    if final.exists():
        shutil.rmtree(final)
    draft.replace(final)
    sync(final.parent)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Raise ArtifactError in the place of an error by which system, NumPy or FAISS say that a disk is full."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, AskewError) or not FULL.search(str(error)):
            raise
        do = "free some, and run it again: what is done stays done"
        raise ArtifactError(f"room on the disk of {folder}", "none left", do) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder that is filled against a second process; the lock goes with its holder, however it ends."""
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            do = "wait for it, or stop it"
            raise ArtifactError(f"{folder} for this run alone", "another process at work in it", do) from error
        yield


@contextmanager
def scratch(within: Path) -> Iterator[Path]:
    """Have a folder in another one for a while; what processes left of theirs that were killed is removed."""
    for left in within.glob(f"{SCRATCH}*"):
        with suppress(ArtifactError, OSError):
            if time.time() - left.stat().st_mtime > YOUNG_S:
                with alone(left / HELD):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=within, prefix=SCRATCH) as folder, alone(Path(folder) / HELD):
        yield Path(folder)


def read(folder: Path, kind: str, *, verify: bool = True) -> Manifest:
    """Read the manifest of the artifact in `folder` and check every file against it.

    Raises ArtifactError naming the file when the folder is missing, of another kind or format, or altered.
    """
    manifest = _manifest(folder / MANIFEST, f"an artifact of kind {kind!r}")
    if manifest.kind != kind:
        raise ArtifactError(f"kind {kind!r}", f"kind {manifest.kind!r} in {folder}", "name another folder")
    if verify:
        _check_all(folder, manifest)
    return manifest


def _check_all(folder: Path, manifest: Manifest) -> None:
    """Check every file of an artifact, and of its parts."""
    for name, file in manifest.files.items():
        check(folder / name, file)
        if name.endswith(f"/{MANIFEST}"):
            _check_all((folder / name).parent, _manifest(folder / name, f"a part of {folder}"))


def _manifest(path: Path, wanted: str) -> Manifest:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(wanted, f"no {path}", "run the stage that makes it") from None
    refuse_format(path, content, FORMAT, "make it again with this version of askew")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(
            f"a manifest in {path}", f"{error.error_count()} errors in it", "make it again"
        ) from None
    check_seal(path, content, manifest.sum, "make it again")
    if astray := [name for name in manifest.files if not inside(name)]:
        raise ArtifactError(f"files inside of {path.parent}", repr(astray[0]), "make the artifact again")
    return manifest


def inside(name: str) -> bool:
    """Whether a name is of something below the folder that it is taken from, of a length that paths may have."""
    path = PurePosixPath(name)
    long = any(len(part.encode("utf-8", "replace")) > MAX_NAME for part in path.parts)
    return bool(path.parts) and not (path.is_absolute() or ".." in path.parts or "\0" in name or long)


def refuse_format(path: Path, content: bytes, known: int, do: str, unsaid: int | None = None) -> None:
    """Raise ArtifactError when a JSON object states another `format` than the one that is known.

    One that states none is of the format `unsaid`, if there is such a one. What is no JSON object passes: its
    reader refuses it.
    """
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(told, dict) and (found := told.get("format", unsaid)) != known:
        by = f", written by askew {told['askew']}" if "askew" in told else ""
        raise ArtifactError(f"format {known} in {path}", f"format {found}{by}", do)


def contents(folder: Path) -> dict[str, str]:
    """Name all files of an artifact with their sha256 as its manifests state them; nothing is checked.

    Raises ArtifactError when a manifest cannot be read.
    """
    manifest = _manifest(folder / MANIFEST, f"an artifact in {folder}")
    stated = {name: file.sha256 for name, file in manifest.files.items()}
    for name in [name for name in stated if name.endswith(f"/{MANIFEST}")]:
        part = name.removesuffix(f"/{MANIFEST}")
        inner = contents(folder / part)
        stated |= {f"{part}/{one}": sum_ for one, sum_ in inner.items() if one != MANIFEST}
    return {MANIFEST: sha256(folder / MANIFEST), **stated}


def check(path: Path, file: File) -> None:
    """Check one file's size and sha256. Raises ArtifactError naming it."""
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"the file {path}", "none", "make the artifact again")
    if path.stat().st_size != file.bytes or sha256(path) != file.sha256:
        raise ArtifactError(f"{path} as its manifest states it", "other content", "make the artifact again")


def sealed(text: str) -> str:
    """Put its sha256 into the text of a JSON object that ends with an empty "sum"."""
    return SEAL.sub(rf"\g<1>{hashlib.sha256(text.encode()).hexdigest()}\g<2>", text)


def check_seal(path: Path, content: bytes, found: str, do: str) -> None:
    """Check what `sealed` wrote against the sum that was found in it; what has none is from before there were any.

    Raises ArtifactError naming the file.
    """
    if found and hashlib.sha256(content.replace(found.encode(), b"", 1)).hexdigest() != found:
        raise ArtifactError(f"{path} as it was written", "other content", do)


def sha256(path: Path) -> str:
    """Hash a file's content, as hex, in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new and nothing between."""
    with written(path) as stream:
        stream.write(text)


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """Write a file as `write_text` does, bit by bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _checksums(folder: Path) -> dict[str, File]:
    """Sync and hash all files but those of work; of a part, which has a manifest of its own, that alone."""
    files = {}
    sealed = {path.parent for path in folder.rglob(MANIFEST)} - {folder}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.relative_to(folder).parts[0] in (WORK, MANIFEST):
            continue
        if path.parent in sealed and path.name != MANIFEST:
            continue
        sync(path)
        files[path.relative_to(folder).as_posix()] = File(bytes=path.stat().st_size, sha256=sha256(path))
    return files


def sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
