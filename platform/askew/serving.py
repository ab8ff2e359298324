"""Serve: one autoscaled endpoint, by Ray Serve: ingress → query encoder → one deployment a shard.

What is served is a release; beside them stands the switch, which follows the alias in MLflow to the next one. A
release that does not fit together is refused before anything is served.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from ray import serve

from askew import artifacts, keys, releases
from askew.config import Settings
from askew.deployments import Encoder, ItemsServer, ShardServer
from askew.errors import ConfigError, RegistryError
from askew.ingress import Ingress, IngressSettings
from askew.keys import KeyFile
from askew.registry import CHAMPION, Registry
from askew.releases import Release
from askew.switching import Switch, SwitchSettings, Watched
from askew.watchdog import WatchdogSettings


class Scaling(Settings):
    """How many replicas a deployment has, and when there are more."""

    min_replicas: int = Field(default=1, ge=1)  # that are always there
    max_replicas: int = Field(default=2, ge=1)  # that there are under load
    target_ongoing_requests: float = Field(default=1.5, gt=0)  # an ingress replica has max_calls at each, at most

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class Deployment(Settings):
    """What each deployment takes and how it scales."""

    num_cpus: float = Field(default=0.1, ge=0)  # that Ray sets aside for a replica
    num_gpus: float = Field(default=0, ge=0)  # of a shard: it is searched there, if FAISS has its kind on GPUs
    max_ongoing_requests: int = Field(default=64, ge=1)  # calls under way in a replica
    max_queued_requests: int = Field(default=256, ge=1)  # calls that wait for one
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)  # 1: a machine may be lost
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
    switch: SwitchSettings = SwitchSettings()
    watchdog: WatchdogSettings = WatchdogSettings()  # over the proxies
    ingress: Deployment = Deployment(
        max_ongoing_requests=512, max_queued_requests=512, scaling=Scaling(target_ongoing_requests=64)
    )  # takes requests, and merges what shards find
    encoder: Deployment = Deployment()
    shard: Deployment = Deployment()
    items: Deployment = Deployment(scaling=Scaling(max_replicas=1))  # writes and explains; always one
    mark: str = ""  # Serve builds an application anew when its args differ: any other mark does it

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.writes and self.keys is None and not self.open_writes:
            raise ValueError(
                "writes: true lets whoever reaches the port change the catalogue; name a file of keys (keys: …), "
                "or say that it shall be so (open_writes: true)"
            )
        return self


def build(settings: ServingSettings) -> serve.Application:
    """Build the application (called by `serve deploy`).

    Raises RegistryError, ArtifactError or ConfigError when there is no release, none that fits together, or no
    keys where they are wanted.
    """
    if settings.keys:
        _check(keys.read(settings.keys), settings)
    cache = settings.cache or Path(tempfile.gettempdir()) / f"askew-models-{os.getuid()}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = settings.model_dump(mode="json")
    watched = Watched(
        settings.tracking_uri, settings.model, settings.version, str(cache), settings.num_shards,
        deployed=artifacts.key("endpoint", content, {}),
    )  # fmt: skip
    one = settings.items.model_copy(update={"scaling": Scaling(max_replicas=1)})
    switch = serve.deployment(Switch).options(**one.options("switch")).bind(
        settings.switch.model_dump(mode="json"), [*watched],
        first(settings, cache).model_dump(), watches=not settings.version.isdecimal(),
        watchdog=settings.watchdog.model_dump(mode="json"),
    )  # fmt: skip
    every_s = settings.report_every_s
    encoder = serve.deployment(Encoder).options(**settings.encoder.options("encoder"))
    shard = functools.partial(serve.deployment(ShardServer).options, **settings.shard.options("shard"))
    shards = [
        shard(name=f"shard-{number}").bind(
            switch, every_s, number, settings.num_shards, settings.follow_every_s,
            gpu=settings.shard.num_gpus > 0,
        )
        for number in range(settings.num_shards)
    ]  # fmt: skip
    items = serve.deployment(ItemsServer).options(**one.options("items"))
    ingress = serve.deployment(serve.ingress()(Ingress)).options(**settings.ingress.options("ingress"))
    return ingress.bind(
        settings.model_dump(include=set(IngressSettings.model_fields)), switch,
        encoder.bind(switch, every_s, gpu=settings.encoder.num_gpus > 0), items.bind(switch, every_s), *shards,
    )  # fmt: skip


def _check(file: KeyFile, settings: ServingSettings) -> None:
    held = {scope for key in file.keys for scope in key.scopes}
    for scope in keys.SCOPES:
        if scope not in held and (scope != "write" or settings.writes):
            add = f"askew keys add … --scope {scope} --file {settings.keys}"
            do = f"{add}, or writes: false" if scope == "write" else add
            raise ConfigError(f"a key with the scope {scope} in {settings.keys}", "none", do)


def first(settings: ServingSettings, cache: Path) -> Release:
    """Find the release that an endpoint starts with: what it served last, else that of the alias.

    The alias may be on a version that was refused, or that nobody has judged yet: the switch sees to it. Where the
    endpoint serves a version by its number, or never served before, there is nothing to keep. Without MLflow, what
    was served last is all there is.
    """
    kept = releases.remembered(
        releases.memory(cache, settings.tracking_uri, settings.model, settings.switch.endpoint)
    )
    now = kept.now if kept and kept.now.there and len(kept.now.sizes) == settings.num_shards else None
    try:
        registry = Registry(settings.tracking_uri)
    except RegistryError as error:
        if now is None:
            raise
        print(f"askew: warning: {error}; version {now.version}, which was served last, is served", flush=True)
        return now
    if now and not settings.version.isdecimal() and _is_there(registry, now):
        return now
    version = registry.resolve(settings.model, settings.version)
    return releases.find(version, settings.num_shards, registry.download(version, cache))


def _is_there(registry: Registry, release: Release) -> bool:
    """Whether MLflow has the version of a release still."""
    try:
        return release.is_of(registry.resolve(release.name, release.version))
    except RegistryError:
        return False
