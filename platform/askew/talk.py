"""Talk: what a client of the endpoint sends, what it tries again, and what an answer means. It does no I/O.

A call is one request and how its answer is read; a talk is a call in its attempts; terms and budget say how many
those may be. Knows nothing of who sends and waits: that is the client.
"""

import base64
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from askew import __version__
from askew.errors import ConfigError, EndpointError, UnreachableError
from askew.messages import (
    BatchResponse,
    FacetsResponse,
    Failure,
    Item,
    Problem,
    ReleaseResponse,
    SearchResponse,
    WriteResponse,
)

T = TypeVar("T")
Came = httpx.Response | httpx.RequestError
LOST = (httpx.NetworkError, httpx.RemoteProtocolError)  # no connection, or a broken one
RESERVE, SHARE = 10.0, 0.2  # retries at first, and for each call: Finagle's budget has the same fifth
PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
START = "start it (make demo, or serve deploy serve_configs/search.yaml), or name another"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call: what is sent where, and how its answer is read."""

    path: str
    read: Callable[[bytes], T]
    body: Mapping[str, Any] | None = None  # none: a GET
    request_id: str | None = None
    repeated: bool = True


def search(query: str, request_id: str | None = None, **how: Any) -> Call[SearchResponse]:
    """Ask what fits a query; `how` are the other fields of a search."""
    return Call("/search", SearchResponse.model_validate_json, {"query": query, **how}, request_id)


def batch(
    searches: Iterable[str | Mapping[str, Any]], request_id: str | None = None, **how: Any
) -> Call[list[SearchResponse]]:
    """Ask several searches at once: queries, or searches with fields of their own; `how` are those of all."""
    each = [{**how, **({"query": one} if isinstance(one, str) else one)} for one in searches]
    return Call("/search/batch", _answers, {"searches": each}, request_id)


def _answers(content: bytes) -> list[SearchResponse]:
    return BatchResponse.model_validate_json(content).answers


def similar(item_id: str, request_id: str | None = None, **how: Any) -> Call[SearchResponse]:
    """Ask what is like a product."""
    return Call("/similar", SearchResponse.model_validate_json, {"item_id": item_id, **how}, request_id)


def item(item_id: str, request_id: str | None = None) -> Call[Item]:
    """Ask for a product. Raises ConfigError for an id that no path can name."""
    if item_id.endswith("/image"):
        raise ConfigError("an id that a path can name", f"{item_id!r}, which reads like another's photo", "search")
    return Call(_path(item_id), Item.model_validate_json, request_id=request_id)


def image(item_id: str, request_id: str | None = None) -> Call[bytes]:
    """Ask for a product's photo."""
    return Call(_path(item_id) + "/image", bytes, request_id=request_id)


def _path(item_id: str) -> str:
    return "/items/" + quote(item_id, safe="").replace(".", "%2E")  # or `..` would be taken for the folder above


def facets(request_id: str | None = None, **how: Any) -> Call[FacetsResponse]:
    """Ask what the fields of products hold; `how` are a filter, and how many values of each field to tell."""
    return Call("/facets", FacetsResponse.model_validate_json, how, request_id)


def upsert(items: Iterable[Mapping[str, Any]], request_id: str | None = None) -> Call[WriteResponse]:
    """Add products, or put them in the place of those of the same ids; a photo is bytes, or base64."""
    body = {"items": [_sent(item) for item in items]}
    return Call("/items:upsert", WriteResponse.model_validate_json, body, request_id)


def _sent(product: Mapping[str, Any]) -> dict[str, Any]:
    photo = product.get("image")
    return {**product, "image": base64.b64encode(photo).decode() if isinstance(photo, bytes) else photo}


def delete(item_ids: Iterable[str], request_id: str | None = None) -> Call[WriteResponse]:
    """Delete products."""
    return Call("/items:delete", WriteResponse.model_validate_json, {"item_ids": list(item_ids)}, request_id)


def release(request_id: str | None = None) -> Call[ReleaseResponse]:
    """Ask what is served."""
    return Call("/release", ReleaseResponse.model_validate_json, request_id=request_id)


HEALTHY, READY = (Call(path, bytes, repeated=False) for path in ("/healthz", "/readyz"))


# --- what becomes of it --------------------------------------------------------------------------


class Budget:
    """How often a client may try again: a few times, and once more for every five calls.

    So an endpoint that is down gets a fifth more requests than it was sent, and not several times as many.
    """

    def __init__(self) -> None:
        self._left, self._lock = RESERVE, threading.Lock()

    def earn(self) -> None:
        """Count a call."""
        with self._lock:
            self._left = min(RESERVE, self._left + SHARE)

    def spend(self) -> bool:
        """Take one retry, if one is left."""
        with self._lock:
            left = self._left >= 1
            self._left -= left
        return left


@dataclass(frozen=True)
class Terms:
    """Whom a client asks, and how long and how often it tries."""

    url: str
    timeout_s: float
    retries: int
    headers: Mapping[str, str]
    budget: Budget

    @classmethod
    def of(cls, url: str, timeout_s: float, retries: int, api_key: str | None) -> Self:
        """Check what a client is made with. Raises ConfigError."""
        try:
            whole = httpx.URL(url)
        except httpx.InvalidURL:
            whole = httpx.URL()
        if whole.scheme not in ("http", "https") or not whole.host:
            raise ConfigError("the URL of an askew endpoint", repr(url), "name one like http://127.0.0.1:8000")
        headers = {"accept": "application/json, image/*", "user-agent": f"askew/{__version__}"}
        key = {"authorization": f"Bearer {api_key}"} if api_key else {}
        return cls(url.rstrip("/"), timeout_s, retries, headers | key, Budget())


class Talk(Generic[T]):
    """One call in its attempts: what is sent next, and what becomes of what came."""

    def __init__(self, call: Call[T], terms: Terms) -> None:
        self._call, self._terms, self._tried = call, terms, 0
        self._started = time.monotonic()
        self._method, self._url = "GET" if call.body is None else "POST", terms.url + call.path
        self._request_id = call.request_id or uuid.uuid4().hex  # one for all attempts
        self._own_s = ((call.body or {}).get("timeout_ms") or 1000 * terms.timeout_s) / 1000
        terms.budget.earn()

    def request(self) -> httpx.Request:
        """Make the next attempt's request, which has what is left of the time."""
        self._tried += 1
        gone_s = time.monotonic() - self._started
        headers, body, content = {**self._terms.headers, "x-request-id": self._request_id}, self._call.body, None
        if body is not None:
            if body.get("timeout_ms") and self._tried > 1:
                body = {**body, "timeout_ms": max(1, round(body["timeout_ms"] - 1000 * gone_s))}
            headers["content-type"], content = "application/json", json.dumps(body).encode()
        timeout = httpx.Timeout(max(0.001, self._terms.timeout_s - gone_s)).as_dict()
        return httpx.Request(
            self._method, self._url, headers=headers, content=content, extensions={"timeout": timeout}
        )

    def wait_s(self, came: Came) -> float | None:
        """Tell how many seconds to wait before the next attempt; None if there is none to be."""
        status = came.status_code if isinstance(came, httpx.Response) else 0
        after = came.headers.get("retry-after", "") if isinstance(came, httpx.Response) else ""
        failed = isinstance(came, LOST) or status == 503 or (status == 429 and after.isdecimal())
        if not failed or not self._call.repeated or self._tried > self._terms.retries:
            return None
        wait_s = random.uniform(0, min(LONGEST_PAUSE_S, PAUSE_S * 2**self._tried))
        wait_s += int(after) if after.isdecimal() else 0
        late = time.monotonic() - self._started + wait_s >= min(self._own_s, self._terms.timeout_s)
        return None if late or not self._terms.budget.spend() else wait_s

    def answer(self, came: Came) -> T:
        """Read the answer. Raises EndpointError, or UnreachableError where nothing came."""
        if not isinstance(came, httpx.Response):
            raise self._unreachable(came) from came
        if not came.is_success:
            raise self._refused(came)
        try:
            return self._call.read(came.content)
        except ValidationError as error:
            raise self._refused(came) from error

    def _unreachable(self, error: httpx.RequestError) -> UnreachableError:
        wanted, found = f"an askew endpoint at {self._terms.url}", f"{type(error).__name__} {error}".strip()
        found, do = f"{found} (attempt {self._tried})", START
        if isinstance(error, httpx.TimeoutException):
            wanted += f" that answers within {self._terms.timeout_s:g} s"
            do = "give it more time (timeout_s), or see its /readyz"
        return UnreachableError(wanted, found, do, code="unreachable", request_id=self._request_id)

    def _refused(self, came: httpx.Response) -> EndpointError:
        try:
            told = Failure.model_validate_json(came.content).error
        except ValidationError:
            said = f"{came.reason_phrase}, and {came.text[:80]!r}, which no askew endpoint of this version says"
            told = Problem(code="not_askew", message=said, param=None, hint="name an askew endpoint")
        wanted = f"an answer to {self._method} {self._url}"
        found = f"{came.status_code} {told.message}" + (f" ({told.param})" if told.param else "")
        return EndpointError(
            wanted, found, told.hint, code=told.code, message=told.message, param=told.param,
            status=came.status_code, request_id=self._request_id,
        )  # fmt: skip
