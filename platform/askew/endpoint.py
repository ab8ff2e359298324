"""The endpoint's HTTP side: its paths, what is refused before anything is asked, and how an error reads.

A request that is not understood gets a 4xx of the form {"error": {"code", "message", "param", "hint"}} before
anything behind it is asked. Knows nothing of Ray: what it asks is a `Searcher`.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from askew.errors import DataError
from askew.filters import Filter
from askew.messages import (
    MAX_ID,
    BatchRequest,
    BatchResponse,
    Coverage,
    DeleteRequest,
    Failure,
    Hit,
    Item,
    Problem,
    Refused,
    Release,
    SearchRequest,
    SearchResponse,
    SimilarRequest,
    UpsertRequest,
    Wanted,
    WriteResponse,
)

MAX_BODY_BYTES, BODY_TIMEOUT_S = 64 * 1024, 5.0
MAX_ITEMS_BYTES, ITEMS_TIMEOUT_S = 32 << 20, 30.0
PHOTOS = {
    b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif",
    b"\0\0\0": "image/avif",
}  # fmt: skip
HINTS = {
    400: "send one JSON object, encoded in UTF-8",
    403: "set `writes: true` in the endpoint's settings",
    404: "see /docs for the paths",
    405: "see /docs for the methods",
    408: "send the whole body at once",
    413: f"send at most {MAX_BODY_BYTES:,} bytes, or {MAX_ITEMS_BYTES:,} of items",
    415: "set the header content-type: application/json",
    422: "see /docs for the fields and their bounds",
    500: "report it with the header x-request-id",
    503: "try again after the seconds in the header Retry-After",
}


ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID)]


class UnavailableError(Exception):
    """Nothing that could answer answered in time."""


class MissingError(Exception):
    """There is no such product."""


class ForbiddenError(Exception):
    """This is not allowed here."""


class RefusedError(Exception):
    """A change does not fit the index."""


@dataclass(frozen=True)
class Ask:
    """What is asked of a searcher: the products that fit a text, or that are like one of an id."""

    query: str = ""
    like: str = ""
    k: int = 10
    where: Filter | None = None
    explain: bool = False
    fresh: bool = False  # asked of the shards, though the answer be known
    timeout_s: float | None = None  # the searcher's own
    request_id: str = ""


class Answer(NamedTuple):
    """The hits, best first, how many shards answered, the milliseconds of its parts, and what share is missing."""

    hits: list[dict[str, Any]]
    answered: int
    took: Mapping[str, float]
    missing: float = 0.0  # of the catalogue


class Searcher(Protocol):
    """What the endpoint asks."""

    async def search(self, ask: Ask) -> Answer:
        """Search. Raises UnavailableError; MissingError for no such product; DataError for a wrong filter."""

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        """Return a product and its photo, if it has one. Raises MissingError, UnavailableError."""

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """Add products; returns the change's number, how many it has, and what was refused.

        Raises ForbiddenError, RefusedError, UnavailableError.
        """

    async def delete(self, item_ids: Sequence[str]) -> int:
        """Delete products; returns the change's number. Raises as `upsert`."""

    @property
    def release(self) -> Release:
        """What is served."""


def endpoint(searcher: Searcher) -> FastAPI:
    """Make the HTTP application over a searcher."""
    failures: dict[int | str, dict[str, Any]] = {
        code: {"model": Failure} for code in (400, 403, 404, 408, 413, 415, 422, 503)
    }
    app = FastAPI(title="askew", description="Multimodal product search.", responses=failures)
    app.add_middleware(Bounds)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(UnavailableError, _on_unavailable)
    app.add_exception_handler(MissingError, _on_missing)
    app.add_exception_handler(ForbiddenError, _on_forbidden)
    app.add_exception_handler(RefusedError, _on_refused)
    app.add_exception_handler(DataError, _on_filter)
    app.add_exception_handler(Exception, _on_bug)

    _searches(app, searcher)
    _items(app, searcher)
    _changes(app, searcher)

    @app.get("/release")
    async def release() -> Release:
        """Tell which model version and index are served."""
        return searcher.release

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Tell that a search is answered by every shard now."""
        found = await searcher.search(Ask(query="ready", k=1, fresh=True))
        if found.answered < searcher.release.shards:
            raise UnavailableError(f"{found.answered} of {searcher.release.shards} shards answer")
        return {"status": "ready"}

    return app


def _searches(app: FastAPI, searcher: Searcher) -> None:
    async def answered(wanted: Wanted, ask: Ask) -> SearchResponse:
        started = time.perf_counter()
        found, release = await searcher.search(ask), searcher.release
        if wanted.require_full and found.answered < release.shards:
            raise UnavailableError(f"{found.answered} of {release.shards} shards answered, and all were required")
        return SearchResponse(
            hits=[_shown(hit, wanted) for hit in found.hits if _reaches(hit, wanted)],
            model=release.model,
            took_ms=round(1000 * (time.perf_counter() - started), 3),
            took={part: round(ms, 3) for part, ms in found.took.items()},
            coverage=Coverage(shards=release.shards, answered=found.answered, missing=round(found.missing, 4)),
            degraded=found.answered < release.shards,
            request_id=ask.request_id,
        )

    @app.post("/search", response_model_exclude_unset=True)
    async def search(request: SearchRequest, http: Request) -> SearchResponse:
        """Find the products that fit a query best."""
        return await answered(request, _ask(request, http, query=request.query, explain=request.explain))

    @app.post("/search/batch", response_model_exclude_unset=True)
    async def search_batch(request: BatchRequest, http: Request) -> BatchResponse:
        """Find the products that fit each of several queries best."""
        each = [answered(one, _ask(one, http, query=one.query, explain=one.explain)) for one in request.searches]
        return BatchResponse(answers=await asyncio.gather(*each))

    @app.post("/similar", response_model_exclude_unset=True)
    async def similar(request: SimilarRequest, http: Request) -> SearchResponse:
        """Find the products that are most like one."""
        return await answered(request, _ask(request, http, like=request.item_id))


def _items(app: FastAPI, searcher: Searcher) -> None:
    @app.get("/items/{item_id:path}/image", response_class=Response)
    async def image(item_id: ItemId) -> Response:
        """Send a product's photo."""
        _, photo = await searcher.item(item_id)
        kind = next((kind for start, kind in PHOTOS.items() if photo and photo.startswith(start)), None)
        if photo is None or kind is None:
            raise MissingError(f"product {item_id!r} has no photo")
        return Response(photo, media_type=kind, headers={"x-content-type-options": "nosniff"})

    @app.get("/items/{item_id:path}")
    async def item(item_id: ItemId) -> Item:
        """Show one product."""
        return Item(**(await searcher.item(item_id))[0])


def _changes(app: FastAPI, searcher: Searcher) -> None:
    @app.post("/items:upsert")
    async def upsert(request: UpsertRequest) -> WriteResponse:
        """Add products, or put them in the place of those of the same ids; what can't be used is told."""
        number, count, refused = await searcher.upsert([dict(item) for item in request.items])
        return WriteResponse(change=number, items=count, refused=[Refused(**one) for one in refused])

    @app.post("/items:delete")
    async def delete(request: DeleteRequest) -> WriteResponse:
        """Delete products; an id that is not there is passed over."""
        number = await searcher.delete(request.item_ids)
        return WriteResponse(change=number, items=len(request.item_ids), refused=[])


def _ask(wanted: Wanted, http: Request, **what: Any) -> Ask:
    request_id = http.headers.get("x-request-id") or uuid.uuid4().hex
    timeout_s = None if wanted.timeout_ms is None else wanted.timeout_ms / 1000
    return Ask(k=wanted.k, where=wanted.filter, timeout_s=timeout_s, request_id=request_id, **what)


def _reaches(hit: Mapping[str, Any], wanted: Wanted) -> bool:
    return wanted.min_score is None or bool(hit["score"] >= wanted.min_score)


def _shown(hit: Mapping[str, Any], wanted: Wanted) -> Hit:
    if wanted.fields is None:
        return Hit(**hit)
    kept = {name: value for name, value in hit["fields"].items() if name in wanted.fields}
    return Hit(**{**hit, "fields": kept})


class Bounds:
    """Refuses a body that is too large, too slow or no JSON, before anything parses it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body within the bounds, then pass it on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        items = scope["path"].startswith("/items:")
        most, within_s = (MAX_ITEMS_BYTES, ITEMS_TIMEOUT_S) if items else (MAX_BODY_BYTES, BODY_TIMEOUT_S)
        kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
        try:
            if kind != b"application/json":
                raise HTTPException(415, f"wanted content-type application/json; found {kind.decode('latin-1')!r}")
            body = await asyncio.wait_for(_body(receive, most), within_s)
        except TimeoutError:
            await _failed(408, f"the body did not arrive within {within_s:.0f} s")(scope, receive, send)
        except HTTPException as error:
            await _failed(error.status_code, error.detail)(scope, receive, send)
        else:
            messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self._app(scope, replay, send)


async def _body(receive: Receive, most: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client hung up")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most:
            raise HTTPException(413, f"the body has more than {most:,} bytes")
    return b"".join(parts)


CODES = {
    400: "bad_json", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 408: "body_too_slow",
    413: "body_too_large", 415: "wrong_content_type", 422: "invalid_field", 500: "internal", 503: "unavailable",
}  # fmt: skip


def _failed(status: int, message: str, param: str | None = None) -> JSONResponse:
    problem = Problem(
        code=CODES.get(status, "error"), message=message, param=param, hint=HINTS.get(status, "see /docs")
    )
    headers = {"retry-after": "1"} if status == 503 else {}
    if status in (408, 413, 500):  # the server closes the connection after these
        headers["connection"] = "close"
    return JSONResponse(Failure(error=problem).model_dump(), status, headers)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _failed(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})  # a 405 names the methods allowed
    return response


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _failed(400, f"the body is not JSON: {first['ctx']['error']}")
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    return _failed(422, first["msg"], param and param.encode("utf-8", "backslashreplace").decode())


async def _on_unavailable(request: Request, error: Exception) -> Response:
    return _failed(503, str(error))


async def _on_missing(request: Request, error: Exception) -> Response:
    return _failed(404, str(error), "item_id")


async def _on_forbidden(request: Request, error: Exception) -> Response:
    return _failed(403, str(error))


async def _on_refused(request: Request, error: Exception) -> Response:
    return _failed(422, str(error), "items")


async def _on_filter(request: Request, error: Exception) -> Response:
    return _failed(422, str(error), "filter")


async def _on_bug(request: Request, error: Exception) -> Response:
    return _failed(500, f"{type(error).__name__}")
