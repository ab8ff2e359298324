"""Deployments: what runs in the replicas of the endpoint. Plain classes, which `serving` wraps for Ray Serve.

Each holds the releases that it is told to hold, and is asked by a release's key.
Shapes: B queries, D dimensions, K hits.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from askew import ann, shards, telemetry
from askew.errors import ArtifactError
from askew.facets import Counts
from askew.hits import Packed
from askew.holding import Holder
from askew.live import Follower
from askew.releases import Release
from askew.replicas import Replicas, Wired

NICENESS = 10  # of what nobody waits for: where all processors are busy it gets a tenth of one


class Encoder(Wired):
    """Query texts to vectors."""

    answers = ("encode",)

    async def __init__(  # type: ignore[misc]
        self, switch: DeploymentHandle, report_every_s: float, *, gpu: bool = False
    ) -> None:
        """Compile the query tower. Raises when it differs from the trained one: never ready then."""
        import torch  # here, as whatever brings it: no shard or ingress has to load it

        from askew.compiled import CompiledEncoder
        from askew.models import Model

        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

        def compiled(release: Release) -> CompiledEncoder:
            return CompiledEncoder(Model.load(Path(release.model), "cuda" if gpu else "cpu"))

        self._held = Holder("encoder", compiled, _report(switch), report_every_s)
        await self._held.start()

    async def encode(self, key: str, queries: list[str], request_ids: list[str]) -> NDArray[np.float32]:
        """Encode B queries to (B, D). Raises NotHeldError."""
        started = time.perf_counter()
        vectors = self._held[key].queries(queries)
        ms = 1000 * (time.perf_counter() - started)
        telemetry.log.debug("encoded in %.1f ms", ms, extra={"request_ids": request_ids})
        return vectors


class ShardServer(Wired):
    """Vectors to the best items of some segments, and of what changed since."""

    answers = ("search", "exact", "items", "facets")

    async def __init__(  # type: ignore[misc]
        self,
        switch: DeploymentHandle,
        report_every_s: float,
        number: int,
        num_shards: int,
        follow_every_s: float,
        *,
        gpu: bool = False,
    ) -> None:
        """Open shard `number` of `num_shards`. Raises ArtifactError when a file of it is damaged: never ready."""
        ann.threads(1)
        self._behind = ThreadPoolExecutor(1, "behind", initializer=_behind)
        self._number, self._num_shards, self._every_s, self._gpu = number, num_shards, follow_every_s, gpu
        self._tags = {"shard": str(number)}
        self._held = Holder(f"shard-{number}", self._opened, _report(switch), report_every_s)
        await self._held.start()

    def _opened(self, release: Release) -> "Following":
        follower = Follower(Path(release.index), self._number, self._num_shards, release.identity, gpu=self._gpu)
        return Following(follower, self._every_s, self._tags)

    async def search(
        self, key: str, vectors: NDArray[np.float32], k: int, wheres: list[str], request_ids: list[str]
    ) -> tuple[int, list[Packed]]:
        """Find the k best hits for each of B vectors that pass its filter, "" being none.

        Returns the last change that is in them, and answers as `hits.merge` takes them, one for all vectors of
        the same filter. Raises NotHeldError.
        """
        started = time.perf_counter()
        follower, found = await self._held[key].follow(), []
        for where in dict.fromkeys(wheres):
            rows = np.array([row for row, one in enumerate(wheres) if one == where])
            hits = follower.shard.search(vectors[rows], k, json.loads(where) if where else None)
            found.append(follower.shard.answer(hits, rows, len(vectors)))
        ms = 1000 * (time.perf_counter() - started)
        telemetry.SHARD_MS.observe(ms, **self._tags)
        telemetry.log.debug("searched in %.1f ms", ms, extra={"request_ids": request_ids})
        return follower.last, found

    async def exact(self, key: str, vector: NDArray[np.float32], k: int, where: str) -> Packed:
        """Find the k best hits for a vector (1, D) by scoring every item, behind what is being answered.

        Raises NotHeldError.
        """
        shard = (await self._held[key].follow()).shard
        filter_ = json.loads(where) if where else None

        def searched() -> Packed:
            return shard.answer(shard.search(vector, k, filter_, exact=True))

        return await asyncio.get_running_loop().run_in_executor(self._behind, searched)

    async def items(self, key: str, item_ids: Sequence[str]) -> tuple[bytes, NDArray[np.float32]]:
        """Return those of some items that are here: N records as an Arrow stream, and vectors (N, D).

        Raises NotHeldError.
        """
        shard = (await self._held[key].follow()).shard
        found = [one for item_id in item_ids if (one := shard.item(item_id))]
        vectors = np.stack([vector for _, vector in found]) if found else np.empty((0, shard.dim), np.float32)
        return shards.streamed([record for record, _ in found]), vectors

    async def facets(self, key: str, where: str) -> Counts:
        """Count the values of the fields of the items that pass a filter, "" being none. Raises NotHeldError."""
        shard = (await self._held[key].follow()).shard
        return await asyncio.to_thread(shard.facets, json.loads(where) if where else None)


class Following:
    """A shard of a release, which takes in changes as it is searched."""

    def __init__(self, follower: Follower, every_s: float, tags: dict[str, str]) -> None:
        self._follower, self._every_s, self._tags = follower, every_s, tags
        self._followed = time.monotonic()
        self._tell()

    async def follow(self) -> Follower:
        """Take in changes, where some time has passed; open the shard anew if the log has gone on without it.

        Where what is on disk is damaged, what was taken in before is searched on; a new replica would not start.
        """
        if time.monotonic() - self._followed >= self._every_s:
            self._followed = time.monotonic()
            try:
                self._follower.follow()
            except ArtifactError as error:
                telemetry.warner.warn("follow", f"{error}; the shard is opened anew")
                try:
                    self._follower = await asyncio.to_thread(self._follower.reopened)
                except ArtifactError as damage:
                    telemetry.warner.warn("damage", f"no change is taken in any more: {damage}")
            self._tell()
        return self._follower

    def _tell(self) -> None:
        telemetry.SHARD_ITEMS.set(self._follower.shard.size, self._tags)
        telemetry.CHANGE.set(self._follower.last, self._tags)


class ItemsServer:
    """Items that come and go, and what scores are made of."""

    async def __init__(self, switch: DeploymentHandle, report_every_s: float) -> None:  # type: ignore[misc]
        from askew.items import Items

        def opened(release: Release) -> Items:
            return Items(release.model, release.index, release.identity)

        self._held = Holder("items", opened, _report(switch), report_every_s)
        await self._held.start()

    def upsert(self, key: str, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """See `Items.upsert`. Raises NotHeldError."""
        return self._held[key].upsert(items)

    def delete(self, key: str, item_ids: Sequence[str]) -> int:
        """See `Items.delete`. Raises NotHeldError."""
        return self._held[key].delete(item_ids)

    def explain(self, key: str, query: str, items: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
        """See `Items.explain`. Raises NotHeldError."""
        return self._held[key].explain(query, items)


def _behind() -> None:
    """Have a thread leave the processors to all others; on Linux, where each has a niceness of its own."""
    ann.threads(1)  # OpenMP counts for each thread that calls it
    if sys.platform == "linux":
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(own, NICENESS))


def _report(switch: DeploymentHandle) -> Any:
    return Replicas(switch.address.remote, every_s=60).method("report")  # of the switch there is one
