"""Stages by name: each run by its settings file, here or as a job of a cluster.

A stage's module is imported when it is run. Knows nothing of how progress is shown.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from askew import checkout, config, following, jobs
from askew.config import Settings
from askew.errors import ConfigError, MachineError


class Stage(NamedTuple):
    """Where a stage is found, and the settings file that it has by default, below `jobs/`."""

    module: str
    function: str
    settings: str  # module:class
    file: str


STAGES = {
    "prepare": Stage("askew.triplets", "prepare", "askew.triplets:PrepareSettings", "prepare.yaml"),
    "train": Stage("askew.training", "train", "askew.recipes:TrainSettings", "train.data.yaml"),
    "index": Stage("askew.indexing", "index", "askew.indexing:IndexSettings", "index.yaml"),
    "evaluate": Stage("askew.evaluation", "evaluate", "askew.evaluation:EvaluateSettings", "evaluate.yaml"),
    "promote": Stage("askew.promotion", "promote", "askew.promotion:PromoteSettings", "promote.yaml"),
    "pipeline": Stage("askew.pipeline", "run", "askew.pipeline:PipelineSettings", "pipeline.yaml"),
    "update": Stage("askew.updating", "update", "askew.updating:UpdateSettings", "update.yaml"),
}


class Order(NamedTuple):
    """A stage to be run: its settings file and the changes to it."""

    name: str
    file: Path
    changes: Sequence[str]


def order(name: str, words: Sequence[str]) -> Order:
    """Read what a person wrote after a stage's name: `[settings.yaml] [dotted.key=value ...]`.

    Without a file it is the one below `jobs/` of the checkout. Raises ConfigError.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError("one settings file, then changes as dotted.key=value", " ".join(files), "take one out")
    file = Path(files[0]) if files else checkout.find() / "jobs" / STAGES[name].file
    if not file.is_file():
        raise ConfigError(f"a settings file of {name}", f"none at {file}", "check the path")
    return Order(name, file, [word for word in words if "=" in word])


def settings(wanted: Order) -> Settings:
    """Read the settings that an order comes to. Raises ConfigError naming what does not fit."""
    module, _, kind = STAGES[wanted.name].settings.partition(":")
    made: Settings = config.load(_of(module, kind), wanted.file, wanted.changes)
    return made


def run(name: str, wanted: Settings, on_line: Callable[[str], None]) -> dict[str, Any]:
    """Run a stage in this process and a Ray of its own, or the one that RAY_ADDRESS names; returns its result.

    Whatever is printed meanwhile is given to `on_line`.
    """
    stage = _of(STAGES[name].module, STAGES[name].function)
    with contextlib.redirect_stdout(following.Lines(on_line)):
        return dict(stage(wanted))


def submit(wanted: Order, address: str, job: str, on_line: Callable[[str], None]) -> dict[str, Any]:
    """Run a stage as a job of the cluster with this dashboard, and follow it; returns its result.

    What travels with it is the checkout, so the settings file must lie there. Raises StageError with the last
    words of a job that fails, MachineError when there is no cluster.
    """
    root = checkout.find(wanted.file.absolute().parent)
    if not wanted.file.absolute().is_relative_to(root):
        wanted_file = f"a settings file in {root}, which travels with the job"
        raise ConfigError(wanted_file, str(wanted.file), "copy it there")
    jobs.listed(address)
    file = wanted.file.absolute().relative_to(root)
    command = ["python", f"jobs/{wanted.name}.py", str(file), *wanted.changes]
    with jobs.environment_file(root) as runtime_env:
        lines = jobs.submit(address, job, command, root, os.environ, runtime_env, on_line)
    return jobs.outcome(address, wanted.name, job, lines, f"read ray job logs --address {address} {job}")


def _of(module: str, name: str) -> Any:
    """A stage's part. Raises MachineError when a package that it needs cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MachineError(f"the packages that {module} needs", f"{error}", "look by: askew doctor") from error
