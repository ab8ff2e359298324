"""Pipeline: all stages in one job, from a catalogue to a version that bears an alias.

A stage finds done what it did before, by the content of its settings and inputs, so a pipeline that was killed
and is run again goes on where it was. Knows of a stage what it takes and makes, and nothing of how.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from askew import tables
from askew.config import Settings
from askew.errors import RegistryError
from askew.evaluation import EvaluateSettings, evaluate
from askew.indexing import IndexSettings, index
from askew.recipes import TrainSettings
from askew.registry import CHALLENGER, Registry
from askew.training import train
from askew.triplets import PrepareSettings, prepare

KEYS = "askew.pipeline"  # the tag that holds the keys of all that a version belongs to
NOT_YET = "not made yet"
GIVEN = {  # at the top, once for all blocks
    "prepare": ("data", "root", "tracking_uri"),
    **dict.fromkeys(("train", "index", "evaluate"), ("model", "root", "tracking_uri")),
}
MADE = {  # by the stages before
    "prepare": (), "train": ("triplets",), "index": ("triplets", "version"),
    "evaluate": ("triplets", "version", "index"),
}  # fmt: skip
ALIKE = (("prepare.image_size", "train.towers.image_size"), ("prepare.train_split", "train.train_split"))


class PipelineSettings(Settings):
    """Settings of the pipeline (`jobs/pipeline.yaml`): what all stages share, and a block for each."""

    data: str  # a folder, or a URL that fsspec knows
    root: Path
    model: str = Field(pattern=r"^[\w.-]+$")
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    promote: Literal["challenger", "champion"] = "challenger"
    prepare: PrepareSettings
    train: TrainSettings
    index: IndexSettings
    evaluate: EvaluateSettings

    @model_validator(mode="before")
    @classmethod
    def _passed_down(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Complete each block by what is given at the top, and by what holds the place of what will be made."""
        blocks = {}
        for name in GIVEN:
            block = values.get(name) or {}
            if not isinstance(block, Mapping):
                continue  # which is then refused by name
            if twice := [f"{name}.{key}" for key in (*GIVEN[name], *MADE[name]) if key in block]:
                raise ValueError(f"{', '.join(twice)}: given at the top, or made by a stage before; take it out")
            given = {key: values[key] for key in GIVEN[name] if key in values}
            blocks[name] = {**block, **given, **dict.fromkeys(MADE[name], NOT_YET)}
        return {**values, **blocks}

    @model_validator(mode="after")
    def _fitting(self) -> "PipelineSettings":
        """Refuse now what a stage would refuse only after the ones before it."""
        for pair in ALIKE:
            one, other = (attrgetter(name)(self) for name in pair)
            if one != other:
                raise ValueError(f"{pair[0]} {one} and {pair[1]} {other} must be the same")
        if self.evaluate.text != tables.TEXT:
            raise ValueError(f"evaluate.text {self.evaluate.text}: the index is one of {tables.TEXT}")
        mined = self.prepare.negatives
        if mined.model == self.model and mined.version in (CHALLENGER, self.promote):
            moves = f"prepare.negatives.version {mined.version}: the pipeline moves this alias"
            raise ValueError(f"{moves}, and would begin anew; name a version by its number")
        return self


def run(settings: PipelineSettings) -> dict[str, Any]:
    """Run all stages, of which each skips what is done, and set the alias on the version that came out.

    Raises ConfigError or RegistryError before the first stage when a checkpoint or MLflow is not there, and later
    what a stage raises.
    """
    settings.train.towers.read()
    registry, stages = Registry(settings.tracking_uri), dict[str, dict[str, Any]]()
    told = functools.partial(_told, stages)
    triplets = told("prepare", prepare, settings.prepare)
    made: dict[str, Any] = {"triplets": Path(triplets["artifact"])}
    model = told("train", train, settings.train.model_copy(update=made))
    made["version"] = model["version"]
    built = told("index", index, settings.index.model_copy(update=made))
    made["index"] = Path(built["artifact"])
    found = told("evaluate", evaluate, settings.evaluate.model_copy(update=made))
    keys = {"triplets": triplets["key"], "model": model["key"], "index": built["key"], "evaluation": found["key"]}
    told("promote", _promote, registry, settings, model["version"], keys)
    return {
        "model": settings.model, "version": model["version"], "alias": settings.promote, "keys": keys,
        "release": built["release"], "metrics": found["metrics"], "rows": found["rows"], "stages": stages,
        "skipped": all(stage["skipped"] for stage in stages.values()),
    }  # fmt: skip


def _told(
    stages: dict[str, dict[str, Any]], name: str, stage: Callable[..., dict[str, Any]], *arguments: object
) -> dict[str, Any]:
    """Run a stage with a line before and one after it, and note what it took; returns its result."""
    print(f"askew: stage {name}: started", flush=True)
    started = time.monotonic()
    result = stage(*arguments)
    seconds = round(time.monotonic() - started, 1)
    how = "skipped, was done before" if result["skipped"] else "done"
    print(f"askew: stage {name}: {how}, {seconds} s", flush=True)
    kept = {key: result[key] for key in ("artifact", "rows", "skipped") if key in result}
    stages[name] = kept | {"seconds": seconds}
    return result


def _promote(registry: Registry, settings: PipelineSettings, number: str, keys: dict[str, str]) -> dict[str, Any]:
    """Tag the version and set the alias: in this order, so that who finds the alias finds the tag."""
    version, tag = registry.resolve(settings.model, number), json.dumps(keys)
    skipped = version.tags.get(KEYS) == tag and _bearer(registry, settings) == version.version
    if not skipped:
        registry.tag(version, {KEYS: tag})
        registry.promote(version, settings.promote)
    return {"rows": 1, "skipped": skipped}


def _bearer(registry: Registry, settings: PipelineSettings) -> str | None:
    """The version that bears the alias now."""
    try:
        return registry.resolve(settings.model, settings.promote).version
    except RegistryError:
        return None
