"""Searching in one release: the encoder and all shards behind; what they answer in time, merged.

Queries that come while others are under way go on together, in one call to the encoder and one to each shard. What
is asked again within seconds is answered from memory, as long as nothing changed. Each call names the release, so
that no answer is of two.
Shapes: B queries, D dimensions, K hits.
"""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from cachetools import LRUCache, TTLCache
from numpy.typing import NDArray
from opentelemetry.context import Context, attach, get_current
from pydantic import Field

from askew import facets, filters, telemetry
from askew.calls import AwayError, Caller
from askew.coalescing import Coalescer, FullError
from askew.config import Settings
from askew.endpoint import Answer, Ask
from askew.hits import Hit, Packed, merge
from askew.refusals import MissingError, UnavailableError
from askew.releases import Release
from askew.shards import records

EXPLAINED = 24  # the first so many hits
WEIGHED = 100  # so many hits are put into another order, where photo and text are weighed
EXACT_WITHIN_S = 30.0
KEPT_FACETS, FACETS_S = 1000, 10.0
NONE: NDArray[np.float32] = np.empty((0, 0), np.float32)
Key = tuple[str, int, str]  # a query, how many hits, its filter in canonical form


class SearchSettings(Settings):
    """How long it waits, how much at once, and what it keeps in memory."""

    timeout_s: float = Field(default=2.0, gt=0)  # past it, what the other shards have is a degraded answer
    max_batch: int = Field(default=64, ge=1)  # queries that the ingress sends on together
    max_calls: int = Field(default=2, ge=1)  # such batches under way at once, from each of its replicas
    min_batch: int = Field(default=32, ge=1)  # beside one under way the next goes with so many, or as many,
    max_wait_ms: float = Field(default=20, ge=0)  # or once a query has waited so long for them;
    gather_ms: float = Field(default=4, ge=0)  # beside none one goes at once; some, or one just after, so late
    max_waiting: int = Field(default=256, ge=1)  # queries that wait there; further ones get a 503
    cached_queries: int = Field(default=10_000, ge=0)  # whose vectors each replica of the ingress keeps
    cached_results: int = Field(default=10_000, ge=0)  # searches whose hits it keeps,
    cached_results_s: float = Field(default=10.0, gt=0)  # for so long, unless an item is changed before


@dataclass(frozen=True)
class Parts:
    """What is called: the encoder, what explains, and of each shard what searches and what tells of its items."""

    encode: Caller[NDArray[np.float32]]
    explain: Caller[list[dict[str, float | None]]]
    search: Sequence[Caller[tuple[int, list[Packed]]]]
    exact: Sequence[Caller[Packed]]
    items: Sequence[Caller[tuple[bytes, NDArray[np.float32]]]]
    facets: Sequence[Caller[facets.Counts]]


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


class Search:
    """Searches in a release."""

    def __init__(self, settings: SearchSettings, release: Release, parts: Parts) -> None:
        self._settings, self.release, self._parts = settings, release, parts
        self.told = release.told
        self._schema = pa.ipc.read_schema(pa.BufferReader(release.schema_))
        self._vectors: LRUCache[str, NDArray[np.float32]] = LRUCache(settings.cached_queries)
        self._results: TTLCache[Key, Answer] = TTLCache(settings.cached_results, settings.cached_results_s)
        self._facets: TTLCache[str, facets.Counts] = TTLCache(KEPT_FACETS, FACETS_S)
        self._change = -1
        self._together = Coalescer(
            self._answered, common=(UnavailableError,), max_batch=settings.max_batch,
            max_calls=settings.max_calls, max_waiting=settings.max_waiting,
            min_batch=settings.min_batch, max_wait_s=settings.max_wait_ms / 1000,
            gather_s=settings.gather_ms / 1000,
        )  # fmt: skip

    @property
    def full(self) -> bool:
        """Whether another search would be refused."""
        return self._together.full

    async def search(self, ask: Ask) -> Answer:
        """Search for a text, or for what is like an item, with what else waits.

        Raises UnavailableError when there is no answer in time, or when so many wait that there would be none;
        DataError for a filter that does not fit the items' fields; MissingError when the item is not there.
        """
        started, where = time.perf_counter(), self._checked(ask.where)
        key = (ask.query, ask.k, where)
        plain = bool(ask.query) and not ask.explain and ask.image_weight is None
        keeps = plain and not ask.fresh and self._settings.cached_results > 0
        kept = self._results.get(key) if keeps else None
        if keeps:
            telemetry.CACHED.add(1, cache="results", found="no" if kept is None else "yes")
        if kept is not None:
            return kept._replace(took={"cached": 1000 * (time.perf_counter() - started)})
        timeout_s = ask.timeout_s or 2 * self._settings.timeout_s  # to wait, and to be done
        try:
            async with asyncio.timeout(timeout_s):
                vector = (await self.found(ask.like))[1] if ask.like else None
                wider = ask if ask.image_weight is None else replace(ask, k=WEIGHED)
                answer, change = await self._together.ask(Question(wider, where, vector, get_current()))
                hits: Sequence[Mapping[str, Any]] = [hit for hit in answer.hits if hit["item_id"] != ask.like]
                hits = hits[: wider.k]
                if ask.image_weight is not None:
                    hits = weighed(await self._explained(ask.query, hits), ask.image_weight)[: ask.k]
                elif ask.explain:
                    hits = [*await self._explained(ask.query, hits[:EXPLAINED]), *hits[EXPLAINED:]]
        except FullError as error:
            raise UnavailableError(f"too many searches at once: {error}") from error
        except TimeoutError as error:
            raise UnavailableError(f"no answer within {timeout_s:g} s") from error
        waited = 1000 * (time.perf_counter() - started) - sum(answer.took.values())
        answer = answer._replace(hits=hits, took={"waiting": waited, **answer.took})
        if keeps and answer.answered == len(self._parts.search):
            self._keep(key, answer, change)
        return answer

    def _keep(self, key: Key, answer: Answer, change: int) -> None:
        """Keep an answer of all shards, unless it is from before a change that is known."""
        self.forget(change)
        if change == self._change:
            self._results[key] = answer

    def forget(self, change: int) -> None:
        """Let go of what was kept from before a change."""
        if change > self._change:
            self._results.clear()
            self._facets.clear()
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
        vectors = await self._vectors_of(asked, deadline)
        times.append(time.perf_counter())
        k = max(question.ask.k + bool(question.ask.like) for question in asked)
        wheres = [question.where for question in asked]
        ids = [question.ask.request_id for question in asked]
        calls = (
            caller.ask(self.release.key, vectors, k, wheres, ids, deadline=deadline)
            for caller in self._parts.search
        )
        found = await asyncio.gather(*calls, return_exceptions=True)
        for number, one in enumerate(found):
            if isinstance(one, BaseException):
                telemetry.MISSED.add(1, shard=str(number))
                told = f"shard-{number} did not answer: {type(one).__name__} {one}"
                telemetry.warner.warn(f"shard-{number}", told, request_ids=ids)
        answers = [one for one in found if not isinstance(one, BaseException)]
        if not answers:
            raise UnavailableError("no shard answered")
        merged = merge([part for _, parts in answers for part in parts], k)
        times.append(time.perf_counter())
        encoding, searching = (1000 * (after - before) for before, after in itertools.pairwise(times))
        took = {"encoding": encoding, "searching": searching}
        for part, ms in took.items():
            telemetry.SEARCH_MS.observe(ms, part=part)
        lost = sum(n for n, one in zip(self.release.sizes, found, strict=True) if isinstance(one, BaseException))
        missing, change = lost / max(sum(self.release.sizes), 1), min(change for change, _ in answers)
        return [Found(Answer(hits, len(answers), took, self.told, missing), change) for hits in merged]

    async def _vectors_of(self, asked: Sequence[Question], deadline: float) -> NDArray[np.float32]:
        """The vectors of B questions, (B, D)."""
        queries = [question.ask.query for question in asked if question.vector is None]
        try:
            ids = [question.ask.request_id for question in asked]
            encoded = await self._encoded(queries, ids, deadline) if queries else NONE
        except (TimeoutError, AwayError) as error:
            raise UnavailableError("the query encoder did not answer in time") from error
        except Exception as error:
            if len(queries) > 1:  # which of them it was, is found out by asking each alone
                raise
            raise UnavailableError(f"the query encoder did not answer ({type(error).__name__})") from error
        if len(encoded) == len(asked):
            return encoded
        rest = iter(encoded)
        return np.stack([next(rest) if one.vector is None else one.vector for one in asked])

    async def _encoded(self, queries: Sequence[str], ids: Sequence[str], deadline: float) -> NDArray[np.float32]:
        """Encode B queries to (B, D), those alone whose vectors are not kept; each of them once."""
        known = {query: self._vectors.get(query) for query in queries}
        unknown = [query for query, vector in known.items() if vector is None]
        for found, count in (("yes", len(known) - len(unknown)), ("no", len(unknown))):
            telemetry.CACHED.add(count, cache="vectors", found=found)
        if unknown:
            vectors = await self._parts.encode.ask(self.release.key, unknown, ids, deadline=deadline)
            fresh = dict(zip(unknown, vectors, strict=True))
            if self._vectors.maxsize:
                self._vectors.update(fresh)
            if unknown == queries:
                return vectors
            known |= fresh
        return np.stack([vector for query in queries if (vector := known[query]) is not None])

    def _checked(self, where: filters.Filter | None) -> str:
        """A filter in canonical form, "" being none. Raises DataError when it does not fit the items' fields."""
        if where is None:
            return ""
        filters.check(where, self._schema)
        return filters.canonical(where)

    async def _explained(self, query: str, hits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Hits with what their scores are made of; one that was deleted meanwhile is left out."""
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        found = await self._items([hit["item_id"] for hit in hits], deadline)
        hits = [hit for hit in hits if hit["item_id"] in found]
        items = [found[hit["item_id"]][0] for hit in hits]
        try:
            ask = self._parts.explain.ask(self.release.key, query, items, deadline=deadline)
            told = await ask if items else []
        except Exception as error:
            raise UnavailableError(f"what explains hits did not answer ({type(error).__name__})") from error
        return [{**hit, "explanation": one} for hit, one in zip(hits, told, strict=True)]

    async def exact(self, ask: Ask) -> list[Hit]:
        """Search for a text by scoring every item. Raises whatever a part that does not answer raises."""
        deadline, where = asyncio.get_running_loop().time() + EXACT_WITHIN_S, self._checked(ask.where)
        vector = await self._encoded([ask.query], [ask.request_id], deadline)
        calls = (one.ask(self.release.key, vector, ask.k, where, deadline=deadline) for one in self._parts.exact)
        return merge(await asyncio.gather(*calls), ask.k)[0]

    async def found(self, item_id: str) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Find the record and the vector of an item. Raises MissingError, UnavailableError."""
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        if item_id not in (found := await self._items([item_id], deadline)):
            raise MissingError(f"there is no product {item_id!r}")
        return found[item_id]

    async def _items(
        self, item_ids: Sequence[str], deadline: float
    ) -> dict[str, tuple[dict[str, Any], NDArray[np.float32]]]:
        """Find the records and vectors of items, of those that there are. Raises UnavailableError."""
        calls = (one.ask(self.release.key, item_ids, deadline=deadline) for one in self._parts.items)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        found: dict[str, tuple[dict[str, Any], NDArray[np.float32]]] = {}
        for one in answers:
            if not isinstance(one, BaseException):
                stream, vectors = one
                found |= {
                    record["item_id"]: (record, v) for record, v in zip(records(stream), vectors, strict=True)
                }
        if len(found) < len({*item_ids}) and any(isinstance(one, BaseException) for one in answers):
            raise UnavailableError("a shard that may have it did not answer")
        return found

    async def facets(self, where: filters.Filter | None, limit: int) -> list[dict[str, Any]]:
        """Tell the fields of the items that pass a filter, as `facets.shown`; what was counted is kept a while.

        Raises DataError for a filter that does not fit the fields, UnavailableError when a shard does not answer.
        """
        conditions = self._checked(where)
        if (counts := self._facets.get(conditions)) is None:
            deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
            calls = (one.ask(self.release.key, conditions, deadline=deadline) for one in self._parts.facets)
            try:
                counts = facets.added(await asyncio.gather(*calls))
            except Exception as error:
                raise UnavailableError(f"a shard did not count its items ({type(error).__name__})") from error
            self._facets[conditions] = counts
        return facets.shown(counts, limit)


def weighed(hits: Sequence[Mapping[str, Any]], image_weight: float) -> list[dict[str, Any]]:
    """Put explained hits into the order of their new score: the weighed mean of the cosines of text and photo.

    Without a photo, or with a model that has none, the photo's cosine counts as 0; ties by item id.
    """
    scored = []
    for hit in hits:
        told = hit["explanation"]
        score = (1 - image_weight) * (told.get("text") or 0.0) + image_weight * (told.get("image") or 0.0)
        scored.append({**hit, "score": score})
    return sorted(scored, key=lambda hit: (-hit["score"], hit["item_id"]))
