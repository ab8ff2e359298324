"""The ingress: HTTP in, the encoder and all shards behind; what they answer in time, merged.

Queries that come while others are under way go on together, in one call to the encoder and one to each shard. What
is asked again within seconds is answered from memory, as long as nothing changed.
Shapes: B queries, D dimensions, K hits.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache, TTLCache
from fastapi import FastAPI
from numpy.typing import NDArray
from opentelemetry.context import Context, attach, get_current
from pydantic import Field
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from askew import endpoint, filters, messages, telemetry
from askew.calls import AwayError, Caller
from askew.coalescing import Coalescer, FullError
from askew.config import Settings
from askew.endpoint import Answer, Ask
from askew.errors import ArtifactError, DataError
from askew.refusals import ForbiddenError, MissingError, RefusedError, UnavailableError
from askew.replicas import Replicas
from askew.shards import merge
from askew.wire import GoneError

EXPLAINED = 10  # the first so many hits
Key = tuple[str, int, str]  # a query, how many hits, its filter in canonical form


class Question(NamedTuple):
    """What is asked together with others: the vector is that of an item, if it is known before."""

    ask: Ask
    where: str
    vector: NDArray[np.float32] | None
    trace: Context  # OpenTelemetry's, of the request


class Found(NamedTuple):
    """What came of a question: its answer, and the last change that all shards had taken in."""

    answer: Answer
    change: int


class IngressSettings(Settings):
    """How long it waits, how much at once, and what it keeps in memory."""

    timeout_s: float = Field(default=2.0, gt=0)  # past it, what the other shards have is a degraded answer
    write_timeout_s: float = Field(default=30.0, gt=0)
    writes: bool = False  # whether items can be upserted and deleted by whoever reaches the endpoint
    max_batch: int = Field(default=64, ge=1)  # queries that the ingress sends on together
    max_calls: int = Field(default=2, ge=1)  # such batches under way at once, from each of its replicas
    max_waiting: int = Field(default=256, ge=1)  # queries that wait there; further ones get a 503
    cached_queries: int = Field(default=10_000, ge=0)  # whose vectors each replica of the ingress keeps
    cached_results: int = Field(default=10_000, ge=0)  # searches whose hits it keeps,
    cached_results_s: float = Field(default=10.0, gt=0)  # for so long, unless an item is changed before
    hedge_after_ms: float | None = Field(default=None, gt=0)  # ask a second replica of a shard after so long


class Ingress:
    """What the endpoint asks: a `Searcher` over deployments."""

    def __init__(
        self,
        settings: dict[str, Any],
        release: dict[str, Any],
        schema: bytes,
        sizes: Sequence[int],
        encoder: DeploymentHandle,
        items: DeploymentHandle,
        *shards: DeploymentHandle,
    ) -> None:
        """Take the items' schema, how many of them each shard has, and the deployments' handles."""
        self._settings = settings_ = IngressSettings.model_validate(settings)
        self._schema = pa.ipc.read_schema(pa.BufferReader(schema))
        self._release, self._sizes = messages.Release.model_validate(release), sizes
        again = (GoneError, RayActorError)
        hedge = None if settings_.hedge_after_ms is None else settings_.hedge_after_ms / 1000
        self._encode = Caller(Replicas(encoder.address.remote).method("encode"), again=again)
        self._search = [
            Caller(
                Replicas(shard.address.remote).method("search"), again=again, hedge_after_s=hedge,
                on_hedge=functools.partial(telemetry.add, telemetry.HEDGED, 1, shard=str(number)),
            )
            for number, shard in enumerate(shards)
        ]  # fmt: skip
        self._item = [Caller(_by_handle(shard.item), again=again) for shard in shards]
        self._items, self._warner = items, telemetry.Warner()
        self._vectors: LRUCache[str, NDArray[np.float32]] = LRUCache(settings_.cached_queries)
        self._results: TTLCache[Key, Answer] = TTLCache(settings_.cached_results, settings_.cached_results_s)
        self._change = -1
        served = self._release.model
        self._tags = {"model": served.name, "version": served.version, "index": self._release.index_key[:12]}
        self._together = Coalescer(
            self._answered, common=(UnavailableError,), max_batch=settings_.max_batch,
            max_calls=settings_.max_calls, max_waiting=settings_.max_waiting,
        )  # fmt: skip

    def __serve_build_asgi_app__(self) -> FastAPI:
        return endpoint.endpoint(self)

    @property
    def release(self) -> messages.Release:
        """What is served."""
        return self._release

    @property
    def busy(self) -> bool:
        """Whether so many searches wait that another one would be refused."""
        if full := self._together.full:
            telemetry.add(telemetry.SEARCHES, 1, outcome="unavailable")
        return full

    # --- searching -------------------------------------------------------------------------------

    async def search(self, ask: Ask) -> Answer:
        """Search for a text, or for what is like an item, with what else waits.

        Raises UnavailableError when there is no answer in time, or when so many wait that there would be none;
        DataError for a filter that does not fit the items' fields; MissingError when the item is not there.
        """
        started = time.perf_counter()
        try:
            answer = await self._searched(ask, started)
        except UnavailableError as error:
            telemetry.add(telemetry.SEARCHES, 1, outcome="unavailable")
            self._warner.warn(
                "unavailable", f"unavailable: {error}; {error.__cause__!r}", request_id=ask.request_id
            )
            raise
        except (DataError, MissingError):
            telemetry.add(telemetry.SEARCHES, 1, outcome="refused")
            raise
        degraded = answer.answered < len(self._search)
        outcome = "degraded" if degraded else "cached" if "cached" in answer.took else "full"
        telemetry.add(telemetry.SEARCHES, 1, outcome=outcome)
        telemetry.SEARCH_MS.observe(1000 * (time.perf_counter() - started), {"part": "all"})
        return answer

    async def _searched(self, ask: Ask, started: float) -> Answer:
        where = ""
        if ask.where is not None:
            filters.check(ask.where, self._schema)
            where = filters.canonical(ask.where)
        key = (ask.query, ask.k, where)
        keeps = bool(ask.query) and not ask.explain and not ask.fresh and self._settings.cached_results > 0
        kept = self._results.get(key) if keeps else None
        if keeps:
            telemetry.add(telemetry.CACHED, 1, cache="results", found="no" if kept is None else "yes")
        if kept is not None:
            return kept._replace(took={"cached": 1000 * (time.perf_counter() - started)})
        timeout_s = ask.timeout_s or 2 * self._settings.timeout_s  # to wait, and to be done
        try:
            async with asyncio.timeout(timeout_s):
                vector = (await self._found(ask.like))[1] if ask.like else None
                answer, change = await self._together.ask(Question(ask, where, vector, get_current()))
                hits = [hit for hit in answer.hits if hit["item_id"] != ask.like][: ask.k]
                if ask.explain:
                    hits = await self._explained(ask.query, hits)
        except FullError as error:
            raise UnavailableError(f"too many searches at once: {error}") from error
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {timeout_s:g} s") from error
        waited = 1000 * (time.perf_counter() - started) - sum(answer.took.values())
        answer = answer._replace(hits=hits, took={"waiting": waited, **answer.took})
        if keeps and answer.answered == len(self._search):
            self._keep(key, answer, change)
        return answer

    def _keep(self, key: Key, answer: Answer, change: int) -> None:
        """Keep an answer of all shards, unless it is from before a change that is known."""
        self._forget(change)
        if change == self._change:
            self._results[key] = answer

    def _forget(self, change: int) -> None:
        """Let go of what was kept from before a change."""
        if change > self._change:
            self._results.clear()
            self._change = change

    async def _answered(self, asked: Sequence[Question]) -> list[Found]:
        """Answer questions that came together: one call to the encoder, and one to each shard.

        Each gets as many hits as any of them wants. In traces the calls stand under the first request.
        """
        attach(asked[0].trace)
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        times = [time.perf_counter()]
        telemetry.BATCH.observe(len(asked))
        telemetry.WAITING.set(self._together.waiting)
        telemetry.RELEASE.set(1, self._tags)  # again and again: Ray forgets a gauge that nobody sets
        vectors = await self._vectors_of(asked, deadline)
        times.append(time.perf_counter())
        k = max(question.ask.k + bool(question.ask.like) for question in asked)
        wheres = [question.where for question in asked]
        ids = [question.ask.request_id for question in asked]
        calls = (caller.ask(vectors, k, wheres, ids, deadline=deadline) for caller in self._search)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for number, one in enumerate(found):
            if isinstance(one, BaseException):
                telemetry.add(telemetry.MISSED, 1, shard=str(number))
                told = f"shard-{number} did not answer: {type(one).__name__} {one}"
                self._warner.warn(f"shard-{number}", told, request_ids=ids)
        answers = [one for one in found if not isinstance(one, BaseException)]
        if not answers:
            raise UnavailableError("no shard answered")
        merged = merge([part for _, parts in answers for part in parts], k)
        times.append(time.perf_counter())
        took = dict(zip(("encoding", "searching"), (1000 * np.diff(times)).tolist(), strict=True))
        for part, ms in took.items():
            telemetry.SEARCH_MS.observe(ms, {"part": part})
        lost = sum(n for n, one in zip(self._sizes, found, strict=True) if isinstance(one, BaseException))
        missing, change = lost / max(sum(self._sizes), 1), min(change for change, _ in answers)
        return [Found(Answer(hits, len(answers), took, missing), change) for hits in merged]

    async def _vectors_of(self, asked: Sequence[Question], deadline: float) -> NDArray[np.float32]:
        """The vectors of B questions, (B, D)."""
        queries = [question.ask.query for question in asked if question.vector is None]
        try:
            ids = [question.ask.request_id for question in asked]
            encoded = iter(await self._encoded(queries, ids, deadline) if queries else ())
        except (TimeoutError, AwayError) as error:
            raise UnavailableError("the query encoder did not answer in time") from error
        except Exception as error:
            if len(queries) > 1:  # which of them it was, is found out by asking each alone
                raise
            raise UnavailableError(f"the query encoder did not answer ({type(error).__name__})") from error
        return np.stack([next(encoded) if one.vector is None else one.vector for one in asked])

    async def _encoded(self, queries: Sequence[str], ids: Sequence[str], deadline: float) -> NDArray[np.float32]:
        """Encode B queries to (B, D), those alone whose vectors are not kept; each of them once."""
        known = {query: self._vectors.get(query) for query in queries}
        unknown = [query for query, vector in known.items() if vector is None]
        for found, count in (("yes", len(known) - len(unknown)), ("no", len(unknown))):
            telemetry.add(telemetry.CACHED, count, cache="vectors", found=found)
        if unknown:
            fresh = dict(zip(unknown, await self._encode.ask(unknown, ids, deadline=deadline), strict=True))
            known |= fresh
            if self._vectors.maxsize:
                self._vectors.update(fresh)
        return np.stack([vector for query in queries if (vector := known[query]) is not None])

    async def _explained(self, query: str, hits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Hits with what their score is made of, the first few."""
        found = await asyncio.gather(*(self._found(hit["item_id"]) for hit in hits[:EXPLAINED]))
        records = [record for record, _ in found]
        try:
            told = await self._items.explain.remote(query, records) if records else []
        except Exception as error:
            raise UnavailableError(f"what explains hits did not answer ({type(error).__name__})") from error
        return [
            {**hit, "explanation": told[place] if place < len(told) else None} for place, hit in enumerate(hits)
        ]

    # --- items -----------------------------------------------------------------------------------

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        """Return a product, and its photo if it has one. Raises MissingError, UnavailableError."""
        record, _ = await self._found(item_id)
        return record, record.get("image")

    async def _found(self, item_id: str) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Find the record and the vector of an item."""
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        calls = (caller.ask(item_id, deadline=deadline) for caller in self._item)
        found = await asyncio.gather(*calls, return_exceptions=True)
        for one in found:
            if isinstance(one, tuple):
                return one
        if any(isinstance(one, BaseException) for one in found):
            raise UnavailableError("a shard that may have it did not answer")
        raise MissingError(f"there is no product {item_id!r}")

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """Add products or put them in others' place; see `items.Items.upsert`. Raises UnavailableError."""
        changed: tuple[int, int, list[dict[str, str]]] = await self._write(self._items.upsert, items)
        self._forget(changed[0])
        telemetry.add(telemetry.WRITTEN, changed[1], what="upserted")
        telemetry.add(telemetry.WRITTEN, len(changed[2]), what="refused")
        return changed

    async def delete(self, item_ids: Sequence[str]) -> int:
        """Delete products; returns the change's number. Raises UnavailableError."""
        number: int = await self._write(self._items.delete, item_ids)
        self._forget(number)
        telemetry.add(telemetry.WRITTEN, len(item_ids), what="deleted")
        return number

    async def _write(self, method: DeploymentHandle, what: Any) -> Any:
        if not self._settings.writes:
            raise ForbiddenError("this endpoint takes no changes")
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                return await method.remote(what)
        except TimeoutError as error:
            raise UnavailableError(f"not written within {self._settings.write_timeout_s:g} s") from error
        except ArtifactError as error:
            raise RefusedError(str(error)) from error
        except Exception as error:
            raise UnavailableError(f"what writes did not answer ({type(error).__name__})") from error


def _by_handle(method: DeploymentHandle) -> Callable[..., Awaitable[Any]]:
    """A method that is called by Ray Serve's handle: what is rare, and may hold anything."""

    async def call(*what: Any, deadline: float) -> Any:
        return await method.remote(*what)

    return call
