"""Deployments: what runs in the replicas of the endpoint. Plain classes, which `serving` wraps for Ray Serve.

Shapes: B queries, D dimensions, K hits.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from cachetools import LRUCache
from fastapi import FastAPI
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from askew import ann, endpoint, filters, messages
from askew.coalescing import Coalescer, FullError
from askew.endpoint import Answer, Ask, MissingError, UnavailableError
from askew.errors import ArtifactError
from askew.live import Follower
from askew.models import Model
from askew.shards import merge

Question = tuple[Ask, NDArray[np.float32] | None]  # with the vector, where it is known


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

    async def search(self, vectors: NDArray[np.float32], k: int, wheres: list[str]) -> list[bytes]:
        """Find the k best hits for each of B vectors that pass its filter, "" being none.

        Returns answers as `shards.merge` takes them, one for all vectors of the same filter.
        """
        await self._follow()
        shard, found = self._follower.shard, []
        for where in dict.fromkeys(wheres):
            rows = np.array([row for row, one in enumerate(wheres) if one == where])
            hits = shard.search(vectors[rows], k, json.loads(where) if where else None)
            found.append(shard.answer(hits, rows, len(vectors)))
        return found

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
            print(f"askew: warning: {error}; the shard is opened anew", flush=True)
            self._follower = await asyncio.to_thread(self._follower.reopened)


class Ingress:
    """HTTP in, the encoder and all shards behind; what they answer within the timeout, merged.

    Queries that come while others are under way go on together, in one call to the encoder and one to each shard.
    """

    def __init__(
        self,
        release: dict[str, Any],
        schema: bytes,
        timeout_s: float,
        encoder: DeploymentHandle,
        *shards: DeploymentHandle,
        cached_queries: int = 0,
        **bounds: int,
    ) -> None:
        self._schema = pa.ipc.read_schema(pa.BufferReader(schema))
        self._release = messages.Release.model_validate(release)
        self._timeout_s, self._encoder, self._shards = timeout_s, encoder, shards
        self._vectors: LRUCache[str, NDArray[np.float32]] = LRUCache(cached_queries)
        self._together = Coalescer(self._answered, common=(UnavailableError,), **bounds)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return endpoint.endpoint(self)

    @property
    def release(self) -> messages.Release:
        """What is served."""
        return self._release

    async def search(self, ask: Ask) -> Answer:
        """Search for a text, or for what is like an item, with what else waits.

        Raises UnavailableError when there is no answer in time, or when so many wait that there would be none;
        DataError for a filter that does not fit the items' fields; MissingError when the item is not there.
        """
        started, timeout_s = time.perf_counter(), ask.timeout_s or 2 * self._timeout_s  # to wait, and to be done
        if ask.where is not None:
            filters.check(ask.where, self._schema)
        try:
            async with asyncio.timeout(timeout_s):
                vector = (await self._found(ask.like))[1] if ask.like else None
                hits, answered, took = await self._together.ask((ask, vector))
        except FullError as error:
            raise UnavailableError(f"too many searches at once: {error}") from error
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {timeout_s:g} s") from error
        hits = [hit for hit in hits if hit["item_id"] != ask.like]
        waited = 1000 * (time.perf_counter() - started) - sum(took.values())
        return Answer(hits[: ask.k], answered, {"waiting": waited, **took})

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        """Return a product, and its photo if it has one. Raises MissingError, UnavailableError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                record, _ = await self._found(item_id)
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {self._timeout_s:g} s") from error
        return record, record.get("image")

    async def _found(self, item_id: str) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Find the record and the vector of an item."""
        asked = (shard.item.remote(item_id) for shard in self._shards)
        found = await asyncio.gather(*map(_awaited, asked), return_exceptions=True)
        for one in found:
            if isinstance(one, tuple):
                return one
        if any(isinstance(one, Exception) for one in found):
            raise UnavailableError("a shard that may have it did not answer")
        raise MissingError(f"there is no product {item_id!r}")

    async def _answered(self, asked: Sequence[Question]) -> list[Answer]:
        """Answer questions that came together: one call to the encoder, and one to each shard.

        Each gets as many hits as any of them wants.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        times = [time.perf_counter()]
        vectors = await self._vectors_of(asked, deadline)
        times.append(time.perf_counter())
        k = max(ask.k + bool(ask.like) for ask, _ in asked)
        wheres = ["" if ask.where is None else filters.canonical(ask.where) for ask, _ in asked]
        found = await asyncio.gather(*(self._ask(shard, vectors, k, wheres, deadline) for shard in self._shards))
        answers = [answer for answer in found if answer is not None]
        if not answers:
            raise UnavailableError("no shard answered")
        merged = merge([part for answer in answers for part in answer], k)
        times.append(time.perf_counter())
        took = dict(zip(("encoding", "searching"), (1000 * np.diff(times)).tolist(), strict=True))
        return [Answer(hits, len(answers), took) for hits in merged]

    async def _vectors_of(self, asked: Sequence[Question], deadline: float) -> NDArray[np.float32]:
        """The vectors of B questions, (B, D)."""
        queries = [ask.query for ask, vector in asked if vector is None]
        try:
            async with asyncio.timeout_at(deadline):
                encoded = iter(await self._encoded(queries) if queries else ())
        except TimeoutError as error:
            raise UnavailableError("the query encoder did not answer in time") from error
        except Exception as error:
            if len(queries) > 1:  # which of them it was, is found out by asking each alone
                raise
            raise UnavailableError(f"the query encoder did not answer ({type(error).__name__})") from error
        return np.stack([next(encoded) if vector is None else vector for _, vector in asked])

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
    async def _ask(
        shard: DeploymentHandle, vectors: NDArray[np.float32], k: int, wheres: list[str], deadline: float
    ) -> list[bytes] | None:
        try:
            async with asyncio.timeout_at(deadline):
                answer: list[bytes] = await shard.search.remote(vectors, k, wheres)
                return answer
        except Exception as error:
            print(f"askew: warning: {shard.deployment_name} did not answer: {type(error).__name__}", flush=True)
            return None


async def _awaited(response: Awaitable[Any]) -> Any:
    return await response
