"""The endpoint's HTTP side: its paths. Knows nothing of Ray: what it asks is a `Searcher`."""

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from askew import admission, hooks, page, refusals
from askew.filters import Filter
from askew.hits import Hit
from askew.keys import Keys
from askew.messages import (
    MAX_ID,
    BatchRequest,
    BatchResponse,
    DeleteRequest,
    Facet,
    FacetsRequest,
    FacetsResponse,
    Failure,
    Item,
    Refused,
    Release,
    ReleaseResponse,
    SearchRequest,
    SearchResponse,
    SimilarRequest,
    UpsertRequest,
    Wanted,
    WriteResponse,
)
from askew.refusals import ForbiddenError, MissingError, UnavailableError

PHOTOS = {
    b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif",
    b"\0\0\0": "image/avif",
}  # fmt: skip
ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ID)]
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@,-]{1,128}")


@dataclass(frozen=True)
class Ask:
    """What is asked of a searcher: the products that fit a text, or that are like one of an id."""

    query: str = ""
    like: str = ""
    k: int = 10
    where: Filter | None = None
    explain: bool = False
    image_weight: float | None = None  # of the photo, against the text; None: as the model fuses them
    version: str = ""  # another one than is live, of those in memory
    fresh: bool = False  # asked of the shards, though the answer be known
    canary: bool = False  # asked to see whether there is an answer: it counts in no figures
    timeout_s: float | None = None  # the searcher's own
    request_id: str = ""


class Answer(NamedTuple):
    """The hits, best first, how many shards answered, the milliseconds of its parts, and what share is missing."""

    hits: Sequence[Mapping[str, Any]]
    answered: int
    took: Mapping[str, float]
    release: Release
    missing: float = 0.0  # of the catalogue


class Searcher(Protocol):
    """What the endpoint asks."""

    async def search(self, ask: Ask) -> Answer:
        """Search. Raises UnavailableError; MissingError for no such product; DataError for a wrong filter."""

    async def facets(self, where: Filter | None, limit: int) -> tuple[list[dict[str, Any]], Release]:
        """Tell the fields of the items that pass a filter. Raises DataError, UnavailableError."""

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        """Return a product and its photo, if it has one. Raises MissingError, UnavailableError."""

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """Add products; returns the change's number, how many it has, and what was refused.

        Raises ForbiddenError, RefusedError, UnavailableError.
        """

    async def delete(self, item_ids: Sequence[str]) -> int:
        """Delete products; returns the change's number. Raises as `upsert`."""

    async def look(self) -> None:
        """See at once whether the alias was moved. Raises UnavailableError."""

    @property
    def release(self) -> ReleaseResponse:
        """What is served, and what becomes of what shall be."""

    @property
    def busy(self) -> bool:
        """Whether so many searches wait that another one would be refused."""


def endpoint(searcher: Searcher, hook_secret: str = "", keys: Keys | None = None) -> FastAPI:
    """Make the HTTP application over a searcher.

    Without a secret it takes no webhooks; without keys it asks nobody who he is.
    """
    codes = (400, 403, 404, 408, 413, 415, 422, 503) + ((401, 429) if keys else ())
    failures: dict[int | str, dict[str, Any]] = {code: {"model": Failure} for code in codes}
    app = FastAPI(
        title="askew", description="Multimodal product search.", responses=failures,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # Serve and `telemetry` have their own
    )  # fmt: skip
    routes = dict[str, Route]()
    app.add_middleware(Direct, routes=routes)
    refusals.add_to(app, lambda: searcher.busy)  # before it
    if keys:  # before that: who may not ask is told so first
        app.add_middleware(admission.Admission, keys=keys)
        admission.describe(app)

    page.add_to(app)
    _searches(app, routes, searcher)
    _items(app, searcher)
    _facets(app, searcher)
    _changes(app, searcher)

    @app.get("/release")
    async def release() -> ReleaseResponse:
        """Tell which model version and index are served, and what becomes of the one that shall be."""
        return searcher.release

    @app.post("/hooks/mlflow", include_in_schema=False)
    async def hook(http: Request) -> dict[str, str]:
        """Take MLflow's word that an alias was moved, signed with the secret that both know."""
        if not hooks.authentic(hook_secret, http.headers, await http.body()):
            raise ForbiddenError("not signed by MLflow's webhook", f"set {hooks.SECRET} for the endpoint")
        await searcher.look()
        return {"status": "ok"}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Tell that the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(timeout_ms: Annotated[int | None, Query(ge=1, le=60_000)] = None) -> dict[str, str]:
        """Tell that a search is answered by every shard now."""
        timeout_s = None if timeout_ms is None else timeout_ms / 1000
        found = await searcher.search(Ask(query="ready", k=1, fresh=True, canary=True, timeout_s=timeout_s))
        if found.answered < found.release.shards:
            raise UnavailableError(f"{found.answered} of {found.release.shards} shards answer")
        return {"status": "ready"}

    # Serve looks up the route of each request, from the first on
    app.router.routes.sort(key=lambda one: getattr(one, "path", "") not in routes)
    return app


class Route(NamedTuple):
    """What answers the requests of a path: its body's model, and the answer to a body, as JSON."""

    body: type[BaseModel]
    answer: Callable[[Any, Request], Awaitable[bytes]]


class Direct:
    """Answers what is asked most before FastAPI's routing: Pydantic reads the body.

    FastAPI has the same paths for its pages of documentation alone.
    """

    def __init__(self, app: ASGIApp, routes: Mapping[str, Route]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a POST to one of the routes; pass on all else."""
        posted = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"].removeprefix(scope.get("root_path", ""))) if posted else None
        if route is None:
            await self._app(scope, receive, send)
            return
        http = Request(scope, receive)
        try:
            response = await self._answered(route, http)
        except Exception as error:
            response = await refusals.answer(http, error)
        await response(scope, receive, send)

    async def _answered(self, route: Route, http: Request) -> Response:
        try:
            wanted = route.body.model_validate_json(await http.body())
        except ValidationError as error:
            raise RequestValidationError([
                {**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)
            ]) from None  # fmt: skip
        return Response(await route.answer(wanted, http), media_type="application/json")


def _searches(app: FastAPI, routes: dict[str, Route], searcher: Searcher) -> None:
    async def answered(wanted: Wanted, ask: Ask) -> bytes:
        started = time.perf_counter()
        found = await searcher.search(ask)
        release = found.release
        if wanted.require_full and found.answered < release.shards:
            raise UnavailableError(f"{found.answered} of {release.shards} shards answered, and all were required")
        hits = [_shown(hit, wanted) for hit in found.hits if _reaches(hit, wanted)]
        about = to_json({
            "model": release.model,
            "took_ms": round(1000 * (time.perf_counter() - started), 3),
            "took": {part: round(ms, 3) for part, ms in found.took.items()},
            "coverage": {
                "shards": release.shards, "answered": found.answered, "missing": round(found.missing, 4),
            },
            "degraded": found.answered < release.shards,
            "request_id": ask.request_id,
        })  # fmt: skip
        return b'{"hits":[%b],%b' % (b",".join(hits), about[1:])

    async def search(request: SearchRequest, http: Request) -> bytes:
        """Find the products that fit a query best."""
        return await answered(request, _of_text(request, http))

    async def search_batch(request: BatchRequest, http: Request) -> bytes:
        """Find the products that fit each of several queries best."""
        admission.owe(http.scope, len(request.searches) - 1)
        each = [answered(one, _of_text(one, http)) for one in request.searches]
        return b'{"answers":[%b]}' % b",".join(await asyncio.gather(*each))

    async def similar(request: SimilarRequest, http: Request) -> bytes:
        """Find the products that are most like one."""
        return await answered(request, _ask(request, http, like=request.item_id))

    routes["/search"] = Route(SearchRequest, search)
    routes["/search/batch"] = Route(BatchRequest, search_batch)
    routes["/similar"] = Route(SimilarRequest, similar)
    for path, route in routes.items():
        model = BatchResponse if route.body is BatchRequest else SearchResponse
        app.add_api_route(path, route.answer, methods=["POST"], response_model=model)


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


def _facets(app: FastAPI, searcher: Searcher) -> None:
    @app.post("/facets")
    async def facets(request: FacetsRequest) -> FacetsResponse:
        """Tell the fields of the products that pass a filter: their most frequent values, or their range."""
        fields, release = await searcher.facets(request.filter, request.limit)
        return FacetsResponse(model=release.model, fields=[Facet(**one) for one in fields])


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
    sent = dict(http.scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex  # it goes to logs
    timeout_s = None if wanted.timeout_ms is None else wanted.timeout_ms / 1000
    what |= {"version": wanted.version or "", "timeout_s": timeout_s, "request_id": request_id}
    return Ask(k=wanted.k, where=wanted.filter, **what)


def _of_text(wanted: SearchRequest, http: Request) -> Ask:
    how = {"explain": wanted.explain, "image_weight": wanted.image_weight}
    return _ask(wanted, http, query=wanted.query, **how)


def _reaches(hit: Mapping[str, Any], wanted: Wanted) -> bool:
    return wanted.min_score is None or bool(hit["score"] >= wanted.min_score)


def _shown(hit: Mapping[str, Any], wanted: Wanted) -> bytes:
    """A hit as JSON, with those alone of its item's fields that are wanted."""
    if wanted.fields is not None:
        fields = {name: value for name, value in hit["fields"].items() if name in wanted.fields}
        return to_json({**hit, "fields": fields})
    return hit.json if isinstance(hit, Hit) else to_json(hit)
