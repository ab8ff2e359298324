"""Deployments: what runs in the replicas of the endpoint. Plain classes, which `serving` wraps for Ray Serve.

Shapes: B queries, D dimensions, K hits.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from askew import ann, telemetry
from askew.compiled import CompiledEncoder
from askew.errors import ArtifactError
from askew.live import Follower
from askew.models import Model
from askew.replicas import Wired


class Encoder(Wired):
    """Query texts to vectors."""

    answers = ("encode",)

    def __init__(self, model: str, *, gpu: bool = False) -> None:
        """Compile the query tower. Raises ArtifactError when it differs from the trained one: never ready then."""
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._encoder = CompiledEncoder(Model.load(Path(model), "cuda" if gpu else "cpu"))

    async def encode(self, queries: list[str], request_ids: list[str]) -> NDArray[np.float32]:
        """Encode B queries to (B, D)."""
        started = time.perf_counter()
        vectors = self._encoder.queries(queries)
        telemetry.log.debug(
            "encoded in %.1f ms", 1000 * (time.perf_counter() - started), extra={"request_ids": request_ids}
        )
        return vectors


class ShardServer(Wired):
    """Vectors to the best items of some segments, and of what changed since."""

    answers = ("search",)

    def __init__(
        self, index: str, number: int, num_shards: int, release: str, follow_every_s: float, *, gpu: bool = False
    ) -> None:
        ann.threads(1)
        self._follower = Follower(Path(index), number, num_shards, release, gpu=gpu)
        self._every_s, self._followed = follow_every_s, time.monotonic()
        self._tags = {"shard": str(number)}
        self._tell()

    async def search(
        self, vectors: NDArray[np.float32], k: int, wheres: list[str], request_ids: list[str]
    ) -> tuple[int, list[bytes]]:
        """Find the k best hits for each of B vectors that pass its filter, "" being none.

        Returns the last change that is in them, and answers as `shards.merge` takes them, one for all vectors of
        the same filter.
        """
        started = time.perf_counter()
        await self._follow()
        shard, found = self._follower.shard, []
        for where in dict.fromkeys(wheres):
            rows = np.array([row for row, one in enumerate(wheres) if one == where])
            hits = shard.search(vectors[rows], k, json.loads(where) if where else None)
            found.append(shard.answer(hits, rows, len(vectors)))
        ms = 1000 * (time.perf_counter() - started)
        telemetry.SHARD_MS.observe(ms, self._tags)
        telemetry.log.debug("searched in %.1f ms", ms, extra={"request_ids": request_ids})
        return self._follower.last, found

    async def item(self, item_id: str) -> tuple[dict[str, Any], NDArray[np.float32]] | None:
        """Return an item's record and its vector, if it is here."""
        await self._follow()
        return self._follower.shard.item(item_id)

    async def _follow(self) -> None:
        """Take in changes, where some time has passed; open the shard anew if the log has gone on without it."""
        if time.monotonic() - self._followed < self._every_s:
            return
        self._followed = time.monotonic()
        try:
            self._follower.follow()
        except ArtifactError as error:
            telemetry.log.warning("%s; the shard is opened anew", error)
            self._follower = await asyncio.to_thread(self._follower.reopened)
        self._tell()

    def _tell(self) -> None:
        telemetry.SHARD_ITEMS.set(self._follower.shard.size, self._tags)
        telemetry.CHANGE.set(self._follower.last, self._tags)
