"""Serve: one autoscaled endpoint over a release, by Ray Serve: ingress → query encoder → one deployment a shard.

A release is a model version and the index that it built; one that does not fit together is refused before
anything is served.
"""

import os
import tempfile
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from ray import serve

from askew import artifacts, messages
from askew.config import Settings
from askew.deployments import Encoder, ShardServer
from askew.errors import ArtifactError, ConfigError
from askew.ingress import Ingress, IngressSettings
from askew.items import Items
from askew.registry import CHAMPION, Registry, Version
from askew.segments import Plan


class Scaling(Settings):
    """How many replicas a deployment has, and when there are more."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=1.5, gt=0)  # an ingress replica has max_calls at each, at most

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class Deployment(Settings):
    """What each deployment takes and how it scales."""

    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)  # of a shard: it is searched there, if FAISS has its kind on GPUs
    max_ongoing_requests: int = Field(default=64, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    scaling: Scaling = Scaling()

    def options(self, name: str) -> dict[str, Any]:
        """The options of Ray Serve."""
        return {
            "name": name,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "max_replicas_per_node": self.max_replicas_per_node,
            "autoscaling_config": self.scaling.model_dump(),
            "health_check_period_s": 2,
            "health_check_timeout_s": 10,
        }


class ServingSettings(IngressSettings):
    """The `args` of an application in `serve_configs/*.yaml`."""

    model: str
    version: str = CHAMPION
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    cache: Path | None = None
    num_shards: int = Field(default=2, ge=1)
    follow_every_s: float = Field(default=0.5, gt=0)  # a shard takes in changes at a search, at most so often
    ingress: Deployment = Deployment(
        max_ongoing_requests=512, max_queued_requests=512, scaling=Scaling(target_ongoing_requests=64)
    )
    encoder: Deployment = Deployment()
    shard: Deployment = Deployment()
    items: Deployment = Deployment(scaling=Scaling(max_replicas=1))  # writes and explains; always one
    mark: str = ""  # Serve builds an application anew when its args differ: any other mark does it


def build(settings: ServingSettings) -> serve.Application:
    """Build the application of a release (called by `serve deploy`).

    Raises RegistryError, ArtifactError or ConfigError when there is no release, or none that fits together.
    """
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    cache = settings.cache or Path(tempfile.gettempdir()) / f"askew-models-{os.getuid()}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    model = registry.download(version, cache)
    plan, release = find_release(version, settings.num_shards)
    encoder = serve.deployment(Encoder).options(**settings.encoder.options("encoder"))
    shards = [
        serve.deployment(ShardServer)
        .options(**settings.shard.options(f"shard-{number}"))
        .bind(
            str(plan.folder),
            number,
            settings.num_shards,
            plan.release,
            settings.follow_every_s,
            gpu=settings.shard.num_gpus > 0,
        )
        for number in range(settings.num_shards)
    ]
    one = settings.items.model_copy(update={"scaling": Scaling(max_replicas=1)})
    items = serve.deployment(Items).options(**one.options("items"))
    ingress = serve.deployment(serve.ingress()(Ingress)).options(**settings.ingress.options("ingress"))
    return ingress.bind(
        settings.model_dump(include=set(IngressSettings.model_fields)), release.model_dump(),
        plan.schema.serialize().to_pybytes(), sizes(plan, settings.num_shards),
        encoder.bind(str(model), gpu=settings.encoder.num_gpus > 0),
        items.bind(str(model), str(plan.folder), plan.release), *shards,
    )  # fmt: skip


def sizes(plan: Plan, num_shards: int) -> list[int]:
    """How many items each shard has, without what changed since the index was built."""
    of = {one["name"]: int(one["items"]) for one in plan.details["segments"]}
    return [sum(of[name] for name in plan.share(number, num_shards)) for number in range(num_shards)]


def find_release(version: Version, num_shards: int) -> tuple[Plan, messages.Release]:
    """Find a version's index, and the release that both make."""
    folder = version.index
    manifest = artifacts.read(folder, "index", verify=False)
    if (made_by := manifest.inputs["model"]) != (key := version.tags.get("askew.model_key", "")):
        raise ArtifactError(
            f"an index made by model {key[:12]}", f"one made by {made_by[:12]}", "run the index stage"
        )
    plan = Plan.read(folder, version.tags.get("askew.release"))
    if num_shards > len(plan.segments):
        raise ConfigError(
            f"at most {len(plan.segments)} shards, one a segment", str(num_shards), "lower num_shards"
        )
    release = messages.Release(
        model=messages.Served(name=version.name, version=version.version),
        model_key=key, index_key=manifest.key, items=manifest.counts["items"], shards=num_shards,
    )  # fmt: skip
    return plan, release
