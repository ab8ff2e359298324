"""Serve: one autoscaled endpoint over a release, by Ray Serve: ingress → query encoder → one deployment a shard.

A release is a model version and the index that it built; one that does not fit together is refused before
anything is served. The deployments are plain classes, wrapped once in `build`.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
import torch
from cachetools import LRUCache
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import Field, model_validator
from ray import serve
from ray.serve.handle import DeploymentHandle

from askew import ann, artifacts, endpoint
from askew.coalescing import Coalescer, FullError
from askew.config import Settings
from askew.errors import ArtifactError, ConfigError
from askew.live import Follower
from askew.models import Model
from askew.registry import CHAMPION, Registry, Version
from askew.segments import Plan
from askew.shards import merge


class Scaling(Settings):
    """How many replicas a deployment has, and when there are more."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=8, gt=0)

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
    scaling: Scaling = Scaling()

    def options(self, name: str) -> dict[str, Any]:
        """The options of Ray Serve."""
        return {
            "name": name,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "autoscaling_config": self.scaling.model_dump(),
            "health_check_period_s": 2,
            "health_check_timeout_s": 10,
        }


class ServingSettings(Settings):
    """The `args` of an application in `serve_configs/*.yaml`."""

    model: str
    version: str = CHAMPION
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    cache: Path | None = None
    num_shards: int = Field(default=2, ge=1)
    timeout_s: float = Field(default=2.0, gt=0)
    max_batch: int = Field(default=64, ge=1)  # queries that the ingress sends on together
    max_calls: int = Field(default=2, ge=1)  # such batches under way at once, from each of its replicas
    max_waiting: int = Field(default=256, ge=1)  # queries that wait there; further ones get a 503
    cached_queries: int = Field(default=10_000, ge=0)  # whose vectors each replica of the ingress keeps
    follow_every_s: float = Field(default=0.5, gt=0)  # a shard takes in changes at a search, at most so often
    ingress: Deployment = Deployment()
    encoder: Deployment = Deployment()
    shard: Deployment = Deployment()
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
    encoder = serve.deployment(Encoder).options(**settings.encoder.options("encoder")).bind(str(model))
    shards = [
        serve.deployment(ShardServer)
        .options(**settings.shard.options(f"shard-{number}"))
        .bind(str(plan.folder), number, settings.num_shards, plan.release, settings.follow_every_s)
        for number in range(settings.num_shards)
    ]
    ingress = serve.deployment(serve.ingress()(Ingress)).options(**settings.ingress.options("ingress"))
    return ingress.bind(
        release.model_dump(), settings.timeout_s, encoder, *shards, cached_queries=settings.cached_queries,
        max_batch=settings.max_batch, max_calls=settings.max_calls, max_waiting=settings.max_waiting,
    )  # fmt: skip


def find_release(version: Version, num_shards: int) -> tuple[Plan, endpoint.Release]:
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
    release = endpoint.Release(
        model=endpoint.Served(name=version.name, version=version.version),
        model_key=key, index_key=manifest.key, items=manifest.counts["items"], shards=num_shards,
    )  # fmt: skip
    return plan, release


class Encoder:
    """Query texts to vectors."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self._model = Model.load(Path(model))

    async def encode(self, queries: list[str]) -> NDArray[np.float32]:
        """Encode B queries to (B, D)."""
        return self._model.queries(queries)


class ShardServer:
    """Vectors to the best items of some segments, and of what changed since."""

    def __init__(self, index: str, number: int, num_shards: int, release: str, follow_every_s: float) -> None:
        ann.threads(1)
        self._follower = Follower(Path(index), number, num_shards, release, gpu=bool(ray.get_gpu_ids()))
        self._every_s, self._followed = follow_every_s, time.monotonic()

    async def search(self, vectors: NDArray[np.float32], k: int) -> bytes:
        """Find the k best hits for each of B vectors, as `shards.merge` takes them."""
        await self._follow()
        shard = self._follower.shard
        return shard.answer(shard.search(vectors, k))

    async def _follow(self) -> None:
        """Take in changes, where some time has passed; open the shard anew if the log has gone on without it."""
        if time.monotonic() - self._followed < self._every_s:
            return
        self._followed = time.monotonic()
        try:
            self._follower.follow()
        except ArtifactError as error:
            print(f"askew: warning: {error}; the shard is opened anew", flush=True)
            self._follower = await asyncio.to_thread(self._follower.reopened)


class Ingress:
    """HTTP in, the encoder and all shards behind; what they answer within the timeout, merged.

    Queries that come while others are under way go on together, in one call to the encoder and one to each shard.
    """

    def __init__(
        self,
        release: dict[str, Any],
        timeout_s: float,
        encoder: DeploymentHandle,
        *shards: DeploymentHandle,
        cached_queries: int = 0,
        **bounds: int,
    ) -> None:
        self._release = endpoint.Release.model_validate(release)
        self._timeout_s, self._encoder, self._shards = timeout_s, encoder, shards
        self._vectors: LRUCache[str, NDArray[np.float32]] = LRUCache(cached_queries)
        self._together = Coalescer(self._answered, common=(endpoint.UnavailableError,), **bounds)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return endpoint.endpoint(self)

    @property
    def release(self) -> endpoint.Release:
        """What is served."""
        return self._release

    async def search(self, query: str, k: int) -> tuple[list[dict[str, Any]], int]:
        """Search for one query: hits, and the number of shards that answered.

        Raises UnavailableError when there is no answer in time, or when so many wait that there would be none.
        """
        try:
            async with asyncio.timeout(2 * self._timeout_s):  # of waiting, and of the batch
                return await self._together.ask((query, k))
        except FullError as error:
            raise endpoint.UnavailableError(f"too many searches at once: {error}") from error
        except TimeoutError as error:
            raise endpoint.UnavailableError(f"no answer within {2 * self._timeout_s:g} s") from error

    async def _answered(self, asked: Sequence[tuple[str, int]]) -> list[tuple[list[dict[str, Any]], int]]:
        """Answer queries, each with its k, that came together."""
        queries, depths = zip(*asked, strict=True)
        hits, answered = await self.search_batch(queries, max(depths))
        return [(found[:k], answered) for found, k in zip(hits, depths, strict=True)]

    async def search_batch(self, queries: Sequence[str], k: int) -> tuple[list[list[dict[str, Any]]], int]:
        """Search for B queries at once: their hits, and the number of shards that answered."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                vectors = await self._encoded(queries)
        except TimeoutError as error:
            raise endpoint.UnavailableError("the query encoder did not answer in time") from error
        except Exception as error:
            if len(queries) > 1:  # which of them it was, is found out by asking each alone
                raise
            raise endpoint.UnavailableError(
                f"the query encoder did not answer ({type(error).__name__})"
            ) from error
        found = await asyncio.gather(*(self._ask(shard, vectors, k, deadline) for shard in self._shards))
        answers = [answer for answer in found if answer is not None]
        if not answers:
            raise endpoint.UnavailableError("no shard answered")
        return merge(answers, k), len(answers)

    async def _encoded(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Encode B queries to (B, D), those alone whose vectors are not kept; each of them once."""
        known = {query: self._vectors.get(query) for query in queries}
        if unknown := [query for query, vector in known.items() if vector is None]:
            fresh = dict(zip(unknown, await self._encoder.encode.remote(unknown), strict=True))
            known |= fresh
            if self._vectors.maxsize:
                self._vectors.update(fresh)
        return np.stack([vector for query in queries if (vector := known[query]) is not None])

    @staticmethod
    async def _ask(shard: DeploymentHandle, vectors: NDArray[np.float32], k: int, deadline: float) -> bytes | None:
        try:
            async with asyncio.timeout_at(deadline):
                answer: bytes = await shard.search.remote(vectors, k)
                return answer
        except Exception as error:
            print(f"askew: warning: {shard.deployment_name} did not answer: {type(error).__name__}", flush=True)
            return None
