"""Registered: all that MLflow knows of askew's models, as plain files, and made again from them elsewhere.

Of each model its versions with tags, descriptions and aliases; their runs, and those of its releases' history,
with params, tags, metrics and files. MLflow gives runs ids of its own, so that those are mapped; a version keeps
its number. What MLflow has already is never changed: the same version is left as it is, another one is refused
before anything is made. Knows nothing of the folders that tags name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from askew import artifacts
from askew.config import Settings
from askew.errors import ArtifactError, RegistryError
from askew.registry import FILES, MODEL_KEY, RegisteredModel, Registry, Run, Version
from askew.snapshots import Snapshot

MODELS, RUNS, RUN = "mlflow/models.json", "mlflow/runs", "run.json"
RESTORING, RESTORED = "askew.restoring", "askew.restored_from"  # a run's tags: the id that it had
PLACEHOLDER = "askew.placeholder"  # a version's tag: it only takes up a number
Moved = Callable[[Version, Version | None], Mapping[str, str]]  # a version, and what MLflow has of it already
EMPTY = "restore into an MLflow that has no such model"


class Known(Settings):
    """A registered model with its versions, by number."""

    model: RegisteredModel
    versions: tuple[Version, ...]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name


class Models(Settings):
    """What `mlflow/models.json` says; runs are listed beside it."""

    models: tuple[Known, ...]
    runs: tuple[str, ...]


# --- out of MLflow -------------------------------------------------------------------------------


def save(registry: Registry, snapshot: Snapshot, names: Sequence[str] = ()) -> Models:
    """Take what MLflow knows of the models of these names, or of all that askew registered, into a snapshot.

    What points at others is read before them, so that all of it is there. Raises RegistryError when there is no
    model of a name.
    """
    found = [model for model in registry.models() if not names or model.name in names]
    if lacking := set(names) - {model.name for model in found}:
        raise RegistryError(f"a model {min(lacking)!r} in {registry.uri}", "none", "name another")
    known = [Known(model=model, versions=tuple(registry.versions(model.name))) for model in found]
    known = [one for one in known if names or any(MODEL_KEY in version.tags for version in one.versions)]
    ids = {version.run_id: None for one in known for version in one.versions if version.run_id}
    ids |= {run: None for one in known for run in registry.runs(f"{one.name}-releases", {})}
    runs = [run_id for run_id in ids if _save_run(registry, run_id, snapshot)]
    models = Models(models=tuple(known), runs=tuple(runs))
    snapshot.write(MODELS, models.model_dump_json(indent=1))
    return models


def _save_run(registry: Registry, run_id: str, snapshot: Snapshot) -> bool:
    """Take a run and its files; tells whether there is such a run."""
    if (run := registry.run(run_id)) is None:
        return False
    place = f"{RUNS}/{run_id}"
    snapshot.write(f"{place}/{RUN}", run.model_dump_json(indent=1))
    paths = registry.files(run_id)
    stated = _stated(registry, run_id, snapshot) if f"{FILES}/{artifacts.MANIFEST}" in paths else {}
    for path in paths:
        name, sum_ = f"{place}/files/{path}", stated.get(path)
        if not (sum_ and snapshot.has(name, sum_)):
            snapshot.take(name, registry.fetch(run_id, path, snapshot.work), sum_)
    return True


def _stated(registry: Registry, run_id: str, snapshot: Snapshot) -> dict[str, str]:
    """The sums of a model's files, as its manifest states them: what is there already need not be fetched."""
    manifest = registry.fetch(run_id, f"{FILES}/{artifacts.MANIFEST}", snapshot.work)
    try:
        return {f"{FILES}/{name}": sum_ for name, sum_ in artifacts.contents(manifest.parent).items()}
    except ArtifactError as error:
        raise error.of(f"run {run_id}") from error


# --- into MLflow ---------------------------------------------------------------------------------


def read(folder: Path) -> Models:
    """Read what a snapshot holds."""
    return Models.model_validate_json((folder / MODELS).read_bytes())


def refuse(registry: Registry, models: Models) -> None:
    """Raise RegistryError when MLflow has other versions under these numbers, or no room for them."""
    for known in models.models:
        there = {one.version: one for one in registry.versions(known.name)} if _has(registry, known.name) else {}
        last = max(map(int, there), default=0)
        for version in known.versions:
            wanted = f"version {version.version} of model {known.name!r} in {registry.uri} as in the backup"
            if (other := there.get(version.version)) is None:
                if int(version.version) < last:
                    raise RegistryError(wanted, f"none, but a version {last}", EMPTY)
            elif not _same(registry, version, other):
                key = other.tags.get(MODEL_KEY, "")[:12]
                raise RegistryError(wanted, f"another, of model key {key or 'none'}", EMPTY)


def load(registry: Registry, folder: Path, models: Models, moved: Moved) -> list[str]:
    """Make all of it in an MLflow; `moved` gives the tags of a version that are others now.

    What is there already stays as it is. Returns what a person should know of.
    """
    runs = {run_id: _load_run(registry, folder / RUNS / run_id) for run_id in models.runs}
    told = []
    for known in models.models:
        lost = [version for version in known.versions if version.run_id and version.run_id not in runs]
        whole = known.model_copy(update={"versions": tuple(v for v in known.versions if v not in lost)})
        registry.make_model(known.model)
        _load_versions(registry, whole, runs, moved)
        told += [
            f"version {version.version} of {known.name} is not made again: its run is gone" for version in lost
        ]
        told += _load_aliases(registry, whole)
    return told


def _load_run(registry: Registry, folder: Path) -> str:
    """Make a run, unless it is there; one that was left half made is made anew. Returns its id."""
    run = Run.model_validate_json((folder / RUN).read_bytes())
    if registry.run(run.id) is not None:
        return run.id
    if done := registry.runs(run.experiment, {RESTORED: run.id}):
        return done[0]
    for half in registry.runs(run.experiment, {RESTORING: run.id}):
        registry.remove_run(half)
    made = registry.make_run(run, {RESTORING: run.id})
    for path in sorted((folder / "files").iterdir()) if (folder / "files").is_dir() else ():
        registry.log_files(made, path, path.name if path.is_dir() else "")
    registry.finish_run(run, made, {RESTORED: run.id})
    return made


def _load_versions(registry: Registry, known: Known, runs: Mapping[str, str], moved: Moved) -> None:
    """Make a model's versions in order; numbers that are missing are taken up, and given back at the end."""
    there = {one.version: one for one in registry.versions(known.name)}
    taken = [number for number, one in there.items() if PLACEHOLDER in one.tags]
    last = max(map(int, there), default=0)
    for version in known.versions:
        if (old := there.get(version.version)) is not None:
            tags = moved(version, old)
            registry.tag(old, {k: v for k, v in tags.items() if old.tags.get(k) == version.tags[k] != v})
            continue
        made = _remade(version, runs, moved(version, None))
        for number in range(last + 1, int(version.version)):
            _make(registry, made.model_copy(update={"version": str(number), "tags": {PLACEHOLDER: "1"}}))
            taken.append(str(number))
        _make(registry, made)
        last = int(version.version)
    for given in taken:
        registry.remove_version(known.name, given)


def _remade(version: Version, runs: Mapping[str, str], moved: Mapping[str, str]) -> Version:
    """A version as it is to be: of the run that took its run's place."""
    run = runs.get(version.run_id, version.run_id)
    source = version.source
    if PurePosixPath(source.removeprefix("runs:/")).parts[:1] == (version.run_id,):
        source = source.replace(version.run_id, run, 1)
    return version.model_copy(update={"run_id": run, "source": source, "tags": {**version.tags, **moved}})


def _make(registry: Registry, version: Version) -> None:
    """Make a version, which must get its number."""
    if (number := registry.make_version(version)) != version.version:
        registry.remove_version(version.name, number)
        wanted = f"version {version.version} as the next of model {version.name!r}"
        raise RegistryError(wanted, f"version {number}: it had more once", EMPTY)


def _load_aliases(registry: Registry, known: Known) -> Iterator[str]:
    """Set aliases that are on nothing; tells of those that are on another version."""
    numbers = {version.version: version for version in known.versions}
    for alias, number in known.model.aliases.items():
        if number not in numbers:
            yield f"alias {alias!r} of {known.name} was on version {number}, which is gone"
        elif (found := registry.aliased(known.name, alias)) is None:
            registry.promote(numbers[number], alias)
        elif found.version != number:
            yield f"alias {alias!r} of {known.name} is on version {found.version}, and was on {number}: left there"


def _same(registry: Registry, version: Version, other: Version) -> bool:
    """Whether a version in MLflow is that of the backup, or one that was made from it."""
    if version.tags.get(MODEL_KEY) != other.tags.get(MODEL_KEY):
        return False
    if version.run_id == other.run_id:
        return True
    run = registry.run(other.run_id)
    return run is not None and run.tags.get(RESTORED) == version.run_id


def _has(registry: Registry, name: str) -> bool:
    return any(model.name == name for model in registry.models())
