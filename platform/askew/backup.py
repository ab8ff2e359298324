"""Backup and restore: artifacts, changes to indexes, and what MLflow knows of the models, as one folder.

A backup is taken while everything runs. What points at others is copied before them: first MLflow, then the root.
Of an index that is being written it has all that was acknowledged when it was copied. Restored elsewhere, versions
name the indexes' new places. Knows of no endpoint: one that starts after a restore follows the alias.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from askew import __version__, artifacts, live, registered, releases, snapshots, wal
from askew.config import Settings
from askew.errors import ArtifactError, ConfigError
from askew.registry import Registry, Version
from askew.snapshots import Snapshot

ABOUT, ARTIFACTS, MLFLOW, FORMAT = "backup.json", "artifacts", "mlflow", 1
OVERTAKEN = 20  # times that compactions may overtake the copy of one index
Files = Mapping[str, str]  # their sha256 by their names


class About(Settings):
    """What `backup.json` says."""

    format: int
    askew: str
    created: str
    root: str
    counts: dict[str, int]


# --- backup --------------------------------------------------------------------------------------


def backup(root: Path, tracking_uri: str, to: Path, models: Sequence[str] = ()) -> dict[str, Any]:
    """Copy the artifacts in `root`, and what MLflow knows of models, into a new folder below `to`.

    The models are those of these names, or all that askew registered. Returns its path, counts, the bytes that
    were copied, and what a person should know of. Raises ArtifactError when a file is damaged or the disk is full,
    RegistryError when MLflow does not answer: then there is no new backup, and the next goes on where it was.
    """
    root, to = root.absolute(), to.absolute()
    _refuse_inside(root, to)
    registry = Registry(tracking_uri)
    with snapshots.draft(to) as draft:
        _take_artifacts(draft, root, "model-*")  # so that MLflow need not be asked for the same files
        known = registered.save(registry, draft, models)
        kept = _take_artifacts(draft, root)
        changes = sum(_take_changes(draft, folder) for folder in kept if live.place(folder).is_dir())
        versions = [version for model in known.models for version in model.versions]
        counts = {
            "artifacts": len(kept), "changes": changes, "models": len(known.models),
            "versions": len(versions), "runs": len(known.runs),
        }  # fmt: skip
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = About(format=FORMAT, askew=__version__, created=created, root=str(root), counts=counts)
        draft.write(ABOUT, told.model_dump_json(indent=1))
    missing = _missing(versions, {folder.name for folder in kept}, set(known.runs))
    return {"backup": str(draft.folder), **counts, "copied_bytes": draft.copied, "told": [*draft.told, *missing]}


def _take_artifacts(draft: Snapshot, root: Path, names: str = "[!.]*") -> list[Path]:
    """Copy the artifacts of these names; returns their folders."""
    folders = [path.parent for path in sorted(root.glob(f"{names}/{artifacts.MANIFEST}"))]
    for folder in folders:
        for name, sum_ in artifacts.contents(folder).items():
            draft.take(f"{ARTIFACTS}/{folder.name}/{name}", folder / name, sum_)
    return folders


def _refuse_inside(root: Path, to: Path) -> None:
    if not root.is_dir():
        raise ConfigError(f"a folder of artifacts at {root}", "none", "name the root")
    if to.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"a folder for backups outside of {root}", str(to), "choose another, best another disk")


def _missing(versions: list[Version], there: set[str], runs: set[str]) -> Iterator[str]:
    """Tell what versions name that is not in the backup."""
    for version in versions:
        index, of = version.tags.get(releases.INDEX), f"{version.name} version {version.version}"
        if index and Path(index).name not in there:
            yield f"the index of {of} is not in the root: {index}"
        if version.run_id and version.run_id not in runs:
            yield f"the run of {of} is not in MLflow any more: {version.run_id}"


def _take_changes(draft: Snapshot, index: Path) -> int:
    """Copy the changes to an index as they are now; returns the last one's number.

    A compaction meanwhile may take files away: then it is done again with the state that came after.
    """
    under, folder = f"{ARTIFACTS}/{live.place(index).name}", live.place(index)
    for tries in range(OVERTAKEN):
        state = live.state(index)
        draft.forget(under)
        try:
            for name, sum_ in live.contents(index, state).items():
                draft.take(f"{under}/{name}", folder / name, sum_)
            return _take_log(draft, folder, state, under)
        except ArtifactError:
            if tries + 1 == OVERTAKEN or live.state(index) == state:
                raise
    raise AssertionError("the last try returns or raises")


def _take_log(draft: Snapshot, folder: Path, state: live.State, under: str) -> int:
    """Copy what the segments do not hold yet, and the state that names them."""
    last = state.upto
    if (folder / live.LOG).is_dir():
        log = draft.work / f"log-{time.monotonic_ns()}"
        last = wal.copy(folder / live.LOG, state.upto, log)
        for path in log.iterdir():
            draft.take(f"{under}/{live.LOG}/{path.name}", path)
            path.unlink()
    draft.write(f"{under}/{live.STATE}", state.written())
    return last


# --- restore -------------------------------------------------------------------------------------


def restore(from_: Path, root: Path, tracking_uri: str, only: str = "") -> dict[str, Any]:
    """Put back a backup, or the last one below a folder, into `root` and MLflow.

    Or `only` "artifacts", or "mlflow". Everything is checked before anything is written, and what is there already
    is left alone: killed, it may be run again. Raises ArtifactError naming a file that is damaged, and when the
    root has a folder of the same name and other content; RegistryError when MLflow has other versions under the
    same numbers.
    """
    if only not in ("", ARTIFACTS, MLFLOW):
        raise ConfigError(f"{ARTIFACTS} or {MLFLOW} as the only part", repr(only), "choose one, or neither")
    folder, root = located(from_), root.absolute()
    wanted, models = _by_folder(snapshots.verify(folder)), registered.read(folder)
    registry = None if only == ARTIFACTS else Registry(tracking_uri)
    root.mkdir(parents=True, exist_ok=True)
    told: list[str] = []
    with artifacts.alone(root / ".restore"), artifacts.room(root):
        put: dict[str, Files] = {} if only == MLFLOW else _lacking(wanted, root, folder / ARTIFACTS)
        if registry:
            registered.refuse(registry, models)
        for where, files in put.items():
            _put(folder / ARTIFACTS / where, root / where, files)
        if registry:
            where_to = partial(_moved, root=root, there=wanted, told=told)
            told += registered.load(registry, folder, models, where_to)
    return {"backup": str(folder), "root": str(root), **about(folder).counts, "put": len(put), "told": told}


def verify(from_: Path) -> dict[str, Any]:
    """Read a backup, or the last one below a folder, against its sums. Raises ArtifactError naming the file."""
    folder = located(from_)
    return {"backup": str(folder), "files": len(snapshots.verify(folder)), "told": []}


def _lacking(wanted: Mapping[str, Files], root: Path, source: Path) -> dict[str, Files]:
    """The folders that are not in the root, changes before their index: whoever finds the index finds them."""
    lacking = {name: of for name, of in wanted.items() if not _is_there(root / name, of, source / name)}
    return dict(sorted(lacking.items(), key=lambda one: (not one[0].endswith(live.SUFFIX), one[0])))


def _by_folder(sums: Files) -> dict[str, Files]:
    """The sums of artifacts and changes, by their folders and the files in them."""
    found: dict[str, dict[str, str]] = {}
    for name, sum_ in sums.items():
        if name.startswith(f"{ARTIFACTS}/"):
            _, where, inner = name.split("/", 2)
            found.setdefault(where, {})[inner] = sum_
    return {**found}


def located(from_: Path) -> Path:
    """Find a backup: the folder itself, or the last one below it. Raises ArtifactError when there is none."""
    folder = from_ if (from_ / snapshots.SUMS).is_file() else snapshots.newest(from_)
    if folder is None:
        raise ArtifactError(f"a backup in {from_}", "none", "name the folder of one, or of several")
    about(folder)
    return folder


def about(folder: Path) -> About:
    """Read what a backup says of itself. Raises ArtifactError when it is of another format."""
    path = folder / ABOUT
    try:
        content = path.read_bytes()
        artifacts.refuse_format(path, content, FORMAT, "restore it with the version of askew that wrote it")
        return About.model_validate_json(content)
    except (OSError, ValidationError) as error:
        found = f"{error.error_count()} errors in it" if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"what a backup says in {path}", found, "take another backup") from None


def _is_there(folder: Path, files: Files, source: Path) -> bool:
    """Whether a folder stands there as in the backup. Raises ArtifactError when there is another."""
    if not folder.exists():
        return False
    found, other = snapshots.listed(folder), []
    if folder.suffix == live.SUFFIX:  # its log may be cut into other files, and a former state's may be there
        other += [] if live.same(folder, source) else ["log of changes"]
        files = {
            name: sum_ for name, sum_ in files.items() if name.partition("/")[0] not in (live.LOG, live.STATE)
        }
        found = {name: path for name, path in found.items() if name in files}
    other += sorted(found.keys() ^ files.keys())
    other += [name for name in found.keys() & files.keys() if artifacts.sha256(found[name]) != files[name]]
    if other:
        do = "move the folder away, or restore into another root"
        raise ArtifactError(f"{folder} as in the backup, or none", f"another {other[0]}", do)
    return True


def _put(source: Path, target: Path, files: Files) -> None:
    """Copy a folder under a hidden name, check it again, and give it its name."""
    hidden = Snapshot(target.with_name(f".{target.name}.restore"), links=False)
    for name, sum_ in files.items():
        hidden.take(name, source / name, sum_)
    hidden.close()
    hidden.folder.replace(target)
    artifacts.sync(target.parent)


def _moved(
    version: Version, old: Version | None, root: Path, there: Mapping[str, object], told: list[str]
) -> dict[str, str]:
    """The tags of a version that name a folder: in the new root now, if the backup has it.

    A version that MLflow has already, and whose index is where it was, may be served from there: it stays, and
    that is told.
    """
    place = Path(version.tags.get(releases.INDEX, ""))
    if place.name not in there or place == root / place.name:
        return {}
    if old and old.tags.get(releases.INDEX) == str(place) and place.is_dir():
        told.append(f"the index of {version.name} version {version.version} is still at {place}: left there")
        return {}
    return {releases.INDEX: str(root / place.name)}
