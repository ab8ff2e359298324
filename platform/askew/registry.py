"""The border to MLflow: runs, their metrics and files, and the versions of a registered model.

A version is a model artifact's plain files below `model/` of the run that made it; they travel through the
tracking server, so a client needs its address and nothing else. Which version is served is an alias,
and moving it is promotion. Knows nothing of what a model is, beyond its manifest.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
import mlflow
import numpy as np
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from pydantic import ConfigDict

from askew import __version__, artifacts
from askew.config import Settings
from askew.errors import ArtifactError, RegistryError
from askew.versions import MODEL_KEY as MODEL_KEY
from askew.versions import Version as Version

CHAMPION, CHALLENGER = "champion", "challenger"
EXAMPLE = "input_example.json"
NAME = re.compile(r"[\w.-]+")
FILES = "model"  # where a version's files lie among its run's artifacts
ENVIRONMENT = {  # MLflow's client reads these at each request; by its own defaults a dead server holds it 245 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Run(Settings):
    """All that MLflow knows of a run, but its files; times are milliseconds since 1970."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    id: str
    experiment: str
    name: str
    status: str
    start: int | None
    end: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, list[tuple[float, int, int]]]  # value, time, step

    @property
    def model(self) -> str:
        """Where a version's files lie, of a model that was registered under this run."""
        return _source(self.id)


class RegisteredModel(Settings):
    """A registered model; its aliases with the versions that they are on."""

    name: str
    description: str
    tags: dict[str, str]
    aliases: dict[str, str]


class Registry:
    """An MLflow server: where runs are logged and models are registered."""

    def __init__(self, uri: str) -> None:
        """Raises RegistryError within 5 seconds when no MLflow server answers at `uri`."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        mlflow.set_telemetry_client()  # read from the environment at import, too early for the line above
        self.uri = _reach(uri)
        self._client = mlflow.MlflowClient(self.uri, self.uri)

    def start_run(self, experiment: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Start a run in the experiment, made if absent; returns the run's id."""
        with self._asked(f"a run {name!r} in experiment {experiment!r}"):
            run = self._client.create_run(self._experiment(experiment), tags=dict(tags), run_name=name)
            values = [mlflow.entities.Param(key, str(value)) for key, value in params.items()]
            self._client.log_batch(run.info.run_id, params=values)
            return str(run.info.run_id)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of a run at one step (names: letters, digits, `_-./` and blanks)."""
        now = time.time_ns() // 1_000_000
        values = [mlflow.entities.Metric(key, float(value), now, step) for key, value in metrics.items()]
        with self._asked(f"metrics logged to run {run_id}"):
            self._client.log_batch(run_id, metrics=values)

    def history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """Read a metric of a run: its steps and values, as they were logged."""
        with self._asked(f"metric {name!r} of run {run_id}"):
            return [(m.step, m.value) for m in self._client.get_metric_history(run_id, name)]

    def log_files(self, run_id: str, path: Path, to: str) -> None:
        """Copy a file, or a folder's files, below `to` of a run's artifacts."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        with self._asked(f"{path} logged to run {run_id}"):
            log(run_id, str(path), to)

    @contextmanager
    def watching(self, run_id: str, node: str) -> Iterator[None]:
        """Meanwhile log to a run what this machine does: processor, memory, disk, network, GPU."""
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def end_run(self, run_id: str, ok: bool = True) -> None:
        """Mark a run as finished, or as failed."""
        with self._asked(f"run {run_id} ended"):
            self._client.set_terminated(run_id, "FINISHED" if ok else "FAILED")

    def register(self, name: str, folder: Path, run_id: str, tags: Mapping[str, str]) -> Version:
        """Log a model artifact under a run and make it a new version of `name`, tagged with its key.

        Raises ArtifactError when the folder is no whole model.
        """
        manifest = artifacts.read(folder, "model")
        tags = {**tags, MODEL_KEY: manifest.key}
        self.log_files(run_id, folder, FILES)
        with tempfile.TemporaryDirectory() as work:
            _describe(Path(work), manifest.details.get("dim", -1))
            self.log_files(run_id, Path(work), FILES)
        with self._asked(f"a version of model {name!r}"):
            self._ensure_model(_checked(name))
            made = self._client.create_model_version(name, _source(run_id), run_id, tags, await_creation_for=0)
            return _version(made)

    def find(self, name: str, tags: Mapping[str, str]) -> Version | None:
        """Find the newest version that has all these tags; None when there is none."""
        fitting = [v for v in self._versions(name) if tags.items() <= v.tags.items()]
        return max(fitting, key=lambda v: int(v.version), default=None)

    def resolve(self, name: str, which: str) -> Version:
        """Look up a version by its number, such as "7", or by an alias, such as "champion".

        Raises RegistryError saying which versions and aliases there are.
        """
        with self._asked(f"model {name!r}"):
            model = self._model(_checked(name))
        aliases: dict[str, str] = dict(model.aliases) if model else {}
        versions = {v.version: v for v in self._versions(name)}
        number = aliases.get(which, which)
        if number in versions:
            return versions[number]
        found = _there(versions, aliases) if model else f"models {', '.join(self._names()) or 'none'}"
        wanted = f"version or alias {which!r} of model {name!r}"
        raise RegistryError(wanted, found, "train a model, or promote a version")

    def aliased(self, name: str, alias: str) -> Version | None:
        """Look up the version that an alias is on; None when it is on none."""
        with self._asked(f"alias {alias!r} of model {name!r}"):
            try:
                return _version(self._client.get_model_version_by_alias(_checked(name), alias))
            except mlflow.MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                return None

    def describe(self, version: Version, description: str) -> None:
        """Set the description of a version, which MLflow shows as Markdown."""
        with self._asked(f"the description of model {version.name!r} version {version.version}"):
            self._client.update_model_version(version.name, version.version, description)

    def download(self, version: Version, into: Path) -> Path:
        """Fetch a version's files into `into`, checked against their manifest; returns the model's folder.

        A folder that stands there already, and is whole, is used as it is. Any number of processes may do
        this at a time: each sees no folder or a whole one.
        """
        if kept := _kept(into, version.tags.get(MODEL_KEY)):
            return kept
        if version.source != _source(version.run_id):
            raise RegistryError(f"files at {_source(version.run_id)}", version.source, "register it with askew")
        into.mkdir(parents=True, exist_ok=True)
        with artifacts.scratch(into) as work:
            with self._asked(f"the files of model {version.name!r} version {version.version}"):
                folder = Path(self._client.download_artifacts(version.run_id, FILES, str(work)))
            key = artifacts.read(folder, "model").key
            if key != version.tags.get(MODEL_KEY, key):
                raise RegistryError(f"a model of key {version.tags[MODEL_KEY]}", key, "register it again")
            return _keep(folder, into, key)

    def file(self, version: Version, path: str, into: Path) -> Path | None:
        """Fetch one file of a version's run, such as "evaluation/report.json"; None when there is none."""
        parent = str(PurePosixPath(path).parent)
        with self._asked(f"{path} of model {version.name!r} version {version.version}"):
            found = self._client.list_artifacts(version.run_id, None if parent == "." else parent)
            if not any(file.path == path and not file.is_dir for file in found):
                return None
            into.mkdir(parents=True, exist_ok=True)
            return Path(self._client.download_artifacts(version.run_id, path, str(into)))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self._asked(f"tags of model {version.name!r} version {version.version}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(version.name, version.version, key, str(value))

    def promote(self, version: Version, alias: str = CHAMPION) -> None:
        """Point an alias at a version: the release that bears it is served next."""
        with self._asked(f"alias {alias!r} of model {version.name!r} at version {version.version}"):
            self._client.set_registered_model_alias(version.name, alias, version.version)

    def hook(self, name: str, url: str, events: Sequence[str], secret: str) -> None:
        """Have MLflow post its events to an address, signed; a webhook of that name is changed to this."""
        with self._asked(f"a webhook to {url}"):
            there = [one for one in self._client.list_webhooks() if one.name == name]
            if there:
                self._client.update_webhook(there[0].webhook_id, url=url, events=[*events], secret=secret)
            else:
                self._client.create_webhook(name, url, [*events], secret=secret)

    # --- all of it, to be kept elsewhere and made again ------------------------------------------

    def models(self) -> list[RegisteredModel]:
        """Read the registered models whose names askew could have given, by name."""
        with self._asked("the registered models"):
            names = [one.name for one in self._paged(self._client.search_registered_models)]
            found = [self._client.get_registered_model(name) for name in sorted(names) if NAME.fullmatch(name)]
        return [
            RegisteredModel(
                name=one.name, description=one.description or "", tags=dict(one.tags), aliases=dict(one.aliases)
            )
            for one in found
        ]  # fmt: skip

    def versions(self, name: str) -> list[Version]:
        """Read a model's versions, by number."""
        return sorted(self._versions(name), key=lambda version: int(version.version))

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[str]:
        """Find the runs of an experiment that have all these tags, by their ids."""
        with self._asked(f"the runs of experiment {experiment!r}"):
            if (found := self._client.get_experiment_by_name(experiment)) is None:
                return []
            asked = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
            return [one.info.run_id for one in self._paged(self._client.search_runs, [found.experiment_id], asked)]

    def run(self, run_id: str) -> Run | None:
        """Read a run, with every value of its metrics; None when there is no such run."""
        with self._asked(f"run {run_id}"):
            try:
                found = self._client.get_run(run_id)
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            histories = {name: self._client.get_metric_history(run_id, name) for name in found.data.metrics}
            experiment = self._client.get_experiment(found.info.experiment_id).name
        return Run(
            id=run_id, experiment=experiment, name=found.info.run_name or "", status=found.info.status,
            start=found.info.start_time, end=found.info.end_time, params=dict(found.data.params),
            tags=dict(found.data.tags),
            metrics={k: [(m.value, m.timestamp, m.step) for m in history] for k, history in histories.items()},
        )  # fmt: skip

    def files(self, run_id: str, under: str | None = None) -> list[str]:
        """List the paths of a run's files."""
        with self._asked(f"the files of run {run_id}"):
            found = list(self._client.list_artifacts(run_id, under))
        inner = [path for one in found if one.is_dir for path in self.files(run_id, one.path)]
        return sorted([one.path for one in found if not one.is_dir] + inner)

    def fetch(self, run_id: str, path: str, into: Path) -> Path:
        """Fetch one file of a run; returns where it is. Raises ArtifactError when this disk is full."""
        try:
            with self._asked(f"{path} of run {run_id}"):
                return Path(self._client.download_artifacts(run_id, path, str(into)))
        except RegistryError as error:
            if not artifacts.FULL.search(error.found):
                raise
            raise ArtifactError(
                f"room on the disk of {into}", "none left", "free some, and run it again"
            ) from error

    def make_run(self, run: Run, tags: Mapping[str, str]) -> str:
        """Make a run anew with these tags beside its own, without files or an end; returns its new id."""
        with self._asked(f"a run {run.name!r} in experiment {run.experiment!r}"):
            where, named = self._experiment(run.experiment), run.name or None
            made = self._client.create_run(where, run.start, {**run.tags, **tags}, named).info.run_id
            params = [mlflow.entities.Param(key, value) for key, value in run.params.items()]
            metrics = [
                mlflow.entities.Metric(key, *value) for key, history in run.metrics.items() for value in history
            ]
            for at in range(0, len(params), 100):
                self._client.log_batch(made, params=params[at : at + 100])
            for at in range(0, len(metrics), 1000):
                self._client.log_batch(made, metrics=metrics[at : at + 1000])
        return str(made)

    def finish_run(self, run: Run, made: str, tags: Mapping[str, str]) -> None:
        """End a run that was made anew as the other ended, and set these tags."""
        with self._asked(f"run {made} ended"):
            if run.status not in ("RUNNING", "SCHEDULED"):
                self._client.set_terminated(made, run.status, run.end)
            for name, value in tags.items():
                self._client.set_tag(made, name, value)

    def remove_run(self, run_id: str) -> None:
        """Mark a run as deleted."""
        with self._asked(f"run {run_id} deleted"):
            self._client.delete_run(run_id)

    def make_model(self, model: RegisteredModel) -> None:
        """Register a model without versions, unless there is one of this name."""
        with self._asked(f"a model {model.name!r}"):
            try:
                self._client.create_registered_model(_checked(model.name), model.tags, model.description)
            except mlflow.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def make_version(self, version: Version) -> str:
        """Register a version as this one is; returns the number that MLflow gave it."""
        with self._asked(f"a version of model {version.name!r}"):
            made = self._client.create_model_version(
                version.name, version.source, version.run_id or None, version.tags,
                description=version.description, await_creation_for=0,
            )  # fmt: skip
        return str(made.version)

    def remove_version(self, name: str, number: str) -> None:
        """Delete a version; its number is not given again."""
        with self._asked(f"version {number} of model {name!r} deleted"):
            self._client.delete_model_version(name, number)

    def _paged(self, ask: Callable[..., Any], *what: Any) -> Iterator[Any]:
        token: str | None = None
        while token != "":
            page = ask(*what, page_token=token)
            yield from page
            token = page.token or ""

    @contextmanager
    def _asked(self, wanted: str) -> Iterator[None]:
        try:
            yield
        except (mlflow.MlflowException, OSError) as error:  # requests' errors are OSErrors
            found = " ".join(str(error).split())[:300]
            raise RegistryError(wanted, found, f"look at the MLflow server at {self.uri}") from error

    def _experiment(self, name: str) -> str:
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)

    def _ensure_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _model(self, name: str) -> Any:
        try:
            return self._client.get_registered_model(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _names(self) -> list[str]:
        with self._asked("the registered models"):
            return sorted(model.name for model in self._client.search_registered_models())

    def _versions(self, name: str) -> list[Version]:
        with self._asked(f"the versions of model {name!r}"):
            asked = self._paged(self._client.search_model_versions, f"name = '{_checked(name)}'")
            return [_version(v) for v in asked]


def _describe(folder: Path, dim: int) -> None:
    """Write what MLflow shows of a model and loads it by: signature, example, and our loader (no pickle)."""
    query = mlflow.types.ColSpec("string", "query")
    vectors = mlflow.types.TensorSpec(np.dtype(np.float32), (-1, dim))
    signature = mlflow.models.ModelSignature(mlflow.types.Schema([query]), mlflow.types.Schema([vectors]))
    model = mlflow.models.Model(artifact_path=FILES, signature=signature)
    model.add_flavor("python_function", loader_module="askew.pyfunc", python_version="3.11")
    model.add_flavor("askew", version=__version__)
    example = {"columns": ["query"], "data": [["red striped mug"]]}
    (folder / EXAMPLE).write_text(json.dumps(example), encoding="utf-8")
    model.saved_input_example_info = {"artifact_path": EXAMPLE, "type": "dataframe", "pandas_orient": "split"}
    model.save(str(folder / "MLmodel"))


def _reach(uri: str) -> str:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each probe is noise in a job's log
    uri = uri.rstrip("/")
    wanted, do = f"an MLflow server at {uri!r}", "start one, or set MLFLOW_TRACKING_URI to the address of one"
    if not uri.startswith(("http://", "https://")):
        raise RegistryError(wanted, "no http address", do)
    try:
        httpx.get(f"{uri}/health", timeout=4).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RegistryError(wanted, f"{type(error).__name__}: {error}", do) from error
    return uri


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RegistryError("a model's name of letters, digits and ._-", repr(name), "give it another name")
    return name


def _source(run_id: str) -> str:
    return f"runs:/{run_id}/{FILES}"


def _there(versions: Mapping[str, Version], aliases: Mapping[str, str]) -> str:
    numbers = ", ".join(sorted(versions, key=int)) or "none"
    return f"versions {numbers}; aliases {', '.join(f'{a} (version {v})' for a, v in aliases.items()) or 'none'}"


def _version(found: Any) -> Version:
    return Version(
        name=found.name, version=str(found.version), run_id=found.run_id or "",
        source=found.source, tags=dict(found.tags), description=found.description or "",
    )  # fmt: skip


def _kept(into: Path, key: str | None) -> Path | None:
    """The folder of the model with this key when it stands in `into` and is whole."""
    if key is None:
        return None
    folder = artifacts.place(into, "model", key)
    try:
        return folder if artifacts.read(folder, "model").key == key else None
    except ArtifactError:
        return None


def _keep(folder: Path, into: Path, key: str) -> Path:
    """Move a checked folder to its place, unless another process was faster."""
    final = artifacts.place(into, "model", key)
    if _kept(into, key):
        return final
    shutil.rmtree(final, ignore_errors=True)
    try:
        return folder.replace(final)
    except OSError:
        if _kept(into, key):
            return final
        raise
