"""The endpoint's HTTP side: what a request may be, what an answer looks like, and how an error reads.

A request that is not understood gets a 4xx of the form {"error": {"code", "message", "param", "hint"}} before
anything behind it is asked. Knows nothing of Ray: what it asks is a `Searcher`.
"""

import asyncio
import time
import uuid
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from askew.inputs import clean

MAX_QUERY, MAX_K, MAX_BODY_BYTES, BODY_TIMEOUT_S = 512, 100, 64 * 1024, 5.0
HINTS = {
    400: "send one JSON object, encoded in UTF-8",
    404: "see /docs for the paths",
    405: "see /docs for the methods",
    408: "send the whole body at once",
    413: f"send at most {MAX_BODY_BYTES:,} bytes",
    415: "set the header content-type: application/json",
    422: "see /docs for the fields and their bounds",
    500: "report it with the header x-request-id",
    503: "try again after the seconds in the header Retry-After",
}


def _readable(query: str) -> str:
    if not clean(query):
        raise ValueError("the query holds no readable character")
    return query


class SearchRequest(BaseModel):
    """What to search for."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"query": "red striped mug", "k": 5}]}
    )

    query: Annotated[str, Field(max_length=MAX_QUERY), AfterValidator(_readable)]
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10


class Hit(BaseModel):
    """One product found."""

    item_id: str
    score: float = Field(description="cosine of query and product, −1 to 1")
    title: str
    fields: dict[str, Any]


class Served(BaseModel):
    """The model version that answers."""

    name: str
    version: str


class Coverage(BaseModel):
    """How many shards were asked and how many answered in time."""

    shards: int
    answered: int


class SearchResponse(BaseModel):
    """The products found, best first."""

    hits: list[Hit]
    model: Served
    took_ms: float
    coverage: Coverage
    degraded: bool = Field(description="true when a shard did not answer, so that products may be missing")
    request_id: str = Field(description="the header x-request-id of the request and of the answer")


class Release(BaseModel):
    """What is served: a model version and the index that it built."""

    model: Served
    model_key: str
    index_key: str
    items: int
    shards: int


class Problem(BaseModel):
    """What was wrong with a request, and what to do."""

    code: str
    message: str
    param: str | None
    hint: str


class Failure(BaseModel):
    """The body of every answer that is no success."""

    error: Problem


class UnavailableError(Exception):
    """Nothing that could answer answered in time."""


class Searcher(Protocol):
    """What the endpoint asks."""

    async def search(self, query: str, k: int) -> tuple[list[dict[str, Any]], int]:
        """Return the hits, best first, and how many shards answered. Raises UnavailableError."""

    @property
    def release(self) -> Release:
        """What is served."""


def endpoint(searcher: Searcher) -> FastAPI:
    """Make the HTTP application over a searcher."""
    failures: dict[int | str, dict[str, Any]] = {c: {"model": Failure} for c in (400, 408, 413, 415, 422, 503)}
    app = FastAPI(title="askew", description="Multimodal product search.", responses=failures)
    app.add_middleware(Bounds)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(UnavailableError, _on_unavailable)
    app.add_exception_handler(Exception, _on_bug)

    @app.post("/search")
    async def search(request: SearchRequest, http: Request) -> SearchResponse:
        """Find the products that fit a query best."""
        started = time.perf_counter()
        hits, answered = await searcher.search(request.query, request.k)
        release = searcher.release
        return SearchResponse(
            hits=[Hit(**hit) for hit in hits],
            model=release.model,
            took_ms=round(1000 * (time.perf_counter() - started), 3),
            coverage=Coverage(shards=release.shards, answered=answered),
            degraded=answered < release.shards,
            request_id=http.headers.get("x-request-id") or uuid.uuid4().hex,
        )

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
        _, answered = await searcher.search("ready", 1)
        if answered < searcher.release.shards:
            raise UnavailableError(f"{answered} of {searcher.release.shards} shards answer")
        return {"status": "ready"}

    return app


class Bounds:
    """Refuses a body that is too large, too slow or no JSON, before anything parses it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body within the bounds, then pass it on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        kind = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip().lower()
        try:
            if kind != b"application/json":
                raise HTTPException(415, f"wanted content-type application/json; found {kind.decode('latin-1')!r}")
            body = await asyncio.wait_for(_body(receive), BODY_TIMEOUT_S)
        except TimeoutError:
            await _failed(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s")(scope, receive, send)
        except HTTPException as error:
            await _failed(error.status_code, error.detail)(scope, receive, send)
        else:
            messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self._app(scope, replay, send)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "the client hung up")
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    return body


CODES = {
    400: "bad_json", 404: "not_found", 405: "method_not_allowed", 408: "body_too_slow", 413: "body_too_large",
    415: "wrong_content_type", 422: "invalid_field", 500: "internal", 503: "unavailable",
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


async def _on_bug(request: Request, error: Exception) -> Response:
    return _failed(500, f"{type(error).__name__}")
