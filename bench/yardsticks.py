"""The yardsticks of `bench/serve.py`: what a good engineer writes in an afternoon, to lay the endpoint beside.

    single      FastAPI and FAISS in one process, one query at a time
    batching    the same, where all that comes while a batch is searched makes up the next
    textbook    Ray Serve composed as its documentation does: ingress → encoder → one deployment a shard, and a
                request makes one call at each hop

All take and give the JSON of /search, encode by the same model, and search the same FAISS files with the same
effort by one thread. Their items are dicts in memory.

    python bench/yardsticks.py batching MODEL INDEX --port 8000
"""

import asyncio
import functools
import gc
import heapq
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from fastapi import FastAPI, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from pydantic_core import to_json
from ray import serve
from ray.serve.handle import DeploymentHandle

from askew import ann
from askew.compiled import CompiledEncoder
from askew.config import Settings
from askew.models import Model
from askew.segments import Plan

MAX_BATCH = 64
Vectors = NDArray[np.float32]
Encode = Callable[[list[str]], Vectors]


class Search(BaseModel):
    """What to search for."""

    query: str = Field(min_length=1, max_length=512)
    k: int = Field(default=10, ge=1, le=100)


class Hit(BaseModel):
    """One product found."""

    item_id: str
    score: float
    title: str
    fields: dict[str, Any]


class Found(BaseModel):
    """The products found, best first."""

    hits: list[Hit]
    took_ms: float
    degraded: bool = False


def encoder(model: Path) -> Encode:
    """Load the query encoder of a model, compiled as the endpoint has it, to run on one thread."""
    torch.set_num_threads(1)
    compiled, one = CompiledEncoder(Model.load(model)), threading.Lock()

    def encode(queries: list[str]) -> Vectors:
        with one:
            return compiled.queries(queries)

    return encode


class Catalogue:
    """The vectors and items of an index, or of a shard of it: the segments joined in one FAISS index."""

    def __init__(self, folder: Path, number: int = 0, num_shards: int = 1) -> None:
        faiss.omp_set_num_threads(1)
        plan = Plan.read(folder)
        segments = [plan.open(name, verify=False) for name in plan.share(number, num_shards)]
        index, *others = [segment.index() for segment in segments]
        for other in others:
            index.join(other)
        self._index, effort = index._index, plan.effort.of_share(index.size / plan.size)
        self._params = functools.cache(lambda k: index._params(k, effort, ann._Selector(None)))
        columns = ["item_id", "title", "fields"]
        self._items = [item for one in segments for item in one.items().select(columns).to_pylist()]
        gc.freeze()  # so many objects took the collector a third of a second each time

    def search(self, vectors: Vectors, k: int) -> list[list[dict[str, Any]]]:
        """Find the k best items for each of B vectors."""
        scores, rows = self._index.search(vectors, k, params=self._params(k))
        return [
            [{**self._items[row], "score": score} for score, row in zip(*found, strict=True)]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]


# --- in one process ------------------------------------------------------------------------------


def single(catalogue: Catalogue, encode: Encode) -> FastAPI:
    """Answer each request by itself, in FastAPI's threads."""
    app = FastAPI()

    @app.post("/search")
    def search(wanted: Search) -> Found:
        started = time.perf_counter()
        [hits] = catalogue.search(encode([wanted.query]), wanted.k)
        return Found(hits=[Hit(**hit) for hit in hits], took_ms=1000 * (time.perf_counter() - started))

    return app


class Drain:
    """Answers in batches: whatever waits when one is done is the next."""

    def __init__(self, work: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._work, self._thread = work, ThreadPoolExecutor(1)
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._draining: asyncio.Task[None] | None = None

    async def ask(self, question: Any) -> Any:
        """Ask one question."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                found = await loop.run_in_executor(self._thread, self._work, [question for question, _ in batch])
            except Exception as error:
                found = [error] * len(batch)
            for (_, answer), one in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_exception(one) if isinstance(one, Exception) else answer.set_result(one)


def batching(catalogue: Catalogue, encode: Encode) -> FastAPI:
    """Answer requests that come together in one batch, in a thread beside the event loop."""

    def work(batch: Sequence[Search]) -> list[list[dict[str, Any]]]:
        found = catalogue.search(encode([wanted.query for wanted in batch]), max(wanted.k for wanted in batch))
        return [hits[: wanted.k] for hits, wanted in zip(found, batch, strict=True)]

    app, drain = FastAPI(), Drain(work)

    @app.post("/search")
    async def search(wanted: Search) -> Response:
        started = time.perf_counter()
        hits = await drain.ask(wanted)
        found = {"hits": hits, "took_ms": 1000 * (time.perf_counter() - started), "degraded": False}
        return Response(to_json(found), media_type="application/json")

    return app


# --- Ray Serve's textbook ------------------------------------------------------------------------

app = FastAPI()


@serve.deployment(max_ongoing_requests=64)
class Encoder:
    """Query to vector."""

    def __init__(self, model: str) -> None:
        self._encode = encoder(Path(model))

    def encode(self, query: str) -> Vectors:
        """Encode one query."""
        return self._encode([query])


@serve.deployment(max_ongoing_requests=64)
class Shard:
    """Vector to hits."""

    def __init__(self, index: str, number: int, num_shards: int) -> None:
        self._catalogue = Catalogue(Path(index), number, num_shards)

    def search(self, vector: Vectors, k: int) -> list[dict[str, Any]]:
        """Find the k best of this shard."""
        return self._catalogue.search(vector, k)[0]


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(app)
class Ingress:
    """HTTP in; the encoder, then all shards."""

    def __init__(self, encoder: DeploymentHandle, *shards: DeploymentHandle) -> None:
        self._encoder, self._shards = encoder, shards

    @app.post("/search")
    async def search(self, wanted: Search) -> Found:
        """Find the products that fit a query best."""
        started = time.perf_counter()
        vector = await self._encoder.encode.remote(wanted.query)
        found = await asyncio.gather(*(shard.search.remote(vector, wanted.k) for shard in self._shards))
        hits = heapq.nlargest(wanted.k, (hit for one in found for hit in one), key=lambda hit: hit["score"])
        return Found(hits=[Hit(**hit) for hit in hits], took_ms=1000 * (time.perf_counter() - started))


class TextbookSettings(Settings):
    """The `args` of the textbook's application."""

    model: str
    index: str
    num_shards: int = 2
    mark: str = ""


def textbook(settings: TextbookSettings) -> serve.Application:
    """Compose it (called by `serve deploy`)."""
    numbers = range(settings.num_shards)
    shards = [Shard.options(name=f"shard-{n}").bind(settings.index, n, settings.num_shards) for n in numbers]
    return Ingress.bind(Encoder.bind(settings.model), *shards)


if __name__ == "__main__":
    import typer
    import uvicorn

    def main(kind: Literal["single", "batching"], model: Path, index: Path, port: int = 8000) -> None:
        """Serve a model and its index from this process."""
        made = {"single": single, "batching": batching}[kind](Catalogue(index), encoder(model))
        uvicorn.run(made, port=port, log_level="warning", access_log=False)

    typer.run(main)
