"""Client: asks a search endpoint over HTTP, and reads what it answers as the endpoint's own messages.

    with Client("http://127.0.0.1:8000") as shop:
        for hit in shop.search("red striped mug", k=5, filter={"price": {"lt": 20}}).hits:
            print(hit.score, hit.title)

`Client` waits, `AsyncClient` is awaited; what both say is in `talk`. Knows nothing of models, indexes or Ray, and
imports none of them.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack

import httpx

from askew import talk
from askew.errors import EndpointError
from askew.messages import FacetsResponse, Item, ReleaseResponse, SearchResponse, WriteResponse
from askew.talk import Call, Came, Talk, Terms

T = TypeVar("T")


class Sent(TypedDict, total=False):
    """What every call may have."""

    request_id: str | None  # the header x-request-id, by which logs and traces tell of it; made up by default


class Similar(Sent, total=False):
    """Which products are wanted, and what of them: the fields of the endpoint's requests, by their names."""

    k: int
    filter: Mapping[str, Any] | None
    fields: Sequence[str] | None
    min_score: float | None
    timeout_ms: int | None  # the endpoint answers with what it has by then, and nothing is tried again after it
    version: str | None  # another one than is live, of those that `release` says are held
    require_full: bool


class Search(Similar, total=False):
    """What a search may have beside its query."""

    explain: bool
    image_weight: float | None  # of the photo against the text, 0 to 1


class Client:
    """Asks an endpoint, and waits for its answers; threads may share one.

    `timeout_s` bounds a call with all its attempts. What fails raises EndpointError, or its UnreachableError.
    """

    def __init__(self, url: str, *, timeout_s: float = 10, retries: int = 3, api_key: str | None = None) -> None:
        self._terms, self._http = Terms.of(url, timeout_s, retries, api_key), httpx.Client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def search(self, query: str, **how: Unpack[Search]) -> SearchResponse:
        """Find the products that fit a query best."""
        return self._say(talk.search(query, **how))

    def search_batch(
        self, searches: Iterable[str | Mapping[str, Any]], **how: Unpack[Search]
    ) -> list[SearchResponse]:
        """Make several searches at once: queries, or objects with fields of their own; `how` counts for all."""
        return self._say(talk.batch(searches, **how))

    def similar(self, item_id: str, **how: Unpack[Similar]) -> SearchResponse:
        """Find the products that are most like one."""
        return self._say(talk.similar(item_id, **how))

    def item(self, item_id: str, **sent: Unpack[Sent]) -> Item:
        """Fetch one product. Raises ConfigError for an id that ends in /image."""
        return self._say(talk.item(item_id, **sent))

    def image(self, item_id: str, **sent: Unpack[Sent]) -> bytes:
        """Fetch a product's photo, as it was given."""
        return self._say(talk.image(item_id, **sent))

    def facets(
        self, *, filter: Mapping[str, Any] | None = None, limit: int = 20, **sent: Unpack[Sent]
    ) -> FacetsResponse:
        """Tell the fields of the products that pass a filter: their most frequent values, or their range."""
        return self._say(talk.facets(filter=filter, limit=limit, **sent))

    def upsert(self, items: Iterable[Mapping[str, Any]], **sent: Unpack[Sent]) -> WriteResponse:
        """Add products (item_id, title, fields, image as bytes), in the place of those of the same ids."""
        return self._say(talk.upsert(items, **sent))

    def delete(self, item_ids: Iterable[str], **sent: Unpack[Sent]) -> WriteResponse:
        """Delete products; an id that is not there is passed over."""
        return self._say(talk.delete(item_ids, **sent))

    def release(self, **sent: Unpack[Sent]) -> ReleaseResponse:
        """Tell which model version and index are served."""
        return self._say(talk.release(**sent))

    def healthy(self) -> bool:
        """Tell whether the endpoint's process lives; tries once."""
        return self._says(talk.HEALTHY)

    def ready(self) -> bool:
        """Tell whether every shard answers now; tries once."""
        return self._says(talk.READY)

    def _says(self, call: Call[bytes]) -> bool:
        try:
            self._say(call)
        except EndpointError:
            return False
        return True

    def _say(self, call: Call[T]) -> T:
        said = Talk(call, self._terms)
        while True:
            try:
                came: Came = self._http.send(said.request())
            except httpx.RequestError as error:
                came = error
            if (wait_s := said.wait_s(came)) is None:
                return said.answer(came)
            time.sleep(wait_s)


class AsyncClient:
    """Asks an endpoint in one event loop: as `Client`, each method to be awaited.

    `timeout_s` bounds a call with all its attempts. What fails raises EndpointError, or its UnreachableError.
    """

    def __init__(self, url: str, *, timeout_s: float = 10, retries: int = 3, api_key: str | None = None) -> None:
        self._terms, self._http = Terms.of(url, timeout_s, retries, api_key), httpx.AsyncClient()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def search(self, query: str, **how: Unpack[Search]) -> SearchResponse:
        """Find the products that fit a query best."""
        return await self._say(talk.search(query, **how))

    async def search_batch(
        self, searches: Iterable[str | Mapping[str, Any]], **how: Unpack[Search]
    ) -> list[SearchResponse]:
        """Make several searches at once: queries, or objects with fields of their own; `how` counts for all."""
        return await self._say(talk.batch(searches, **how))

    async def similar(self, item_id: str, **how: Unpack[Similar]) -> SearchResponse:
        """Find the products that are most like one."""
        return await self._say(talk.similar(item_id, **how))

    async def item(self, item_id: str, **sent: Unpack[Sent]) -> Item:
        """Fetch one product. Raises ConfigError for an id that ends in /image."""
        return await self._say(talk.item(item_id, **sent))

    async def image(self, item_id: str, **sent: Unpack[Sent]) -> bytes:
        """Fetch a product's photo, as it was given."""
        return await self._say(talk.image(item_id, **sent))

    async def facets(
        self, *, filter: Mapping[str, Any] | None = None, limit: int = 20, **sent: Unpack[Sent]
    ) -> FacetsResponse:
        """Tell the fields of the products that pass a filter: their most frequent values, or their range."""
        return await self._say(talk.facets(filter=filter, limit=limit, **sent))

    async def upsert(self, items: Iterable[Mapping[str, Any]], **sent: Unpack[Sent]) -> WriteResponse:
        """Add products (item_id, title, fields, image as bytes), in the place of those of the same ids."""
        return await self._say(talk.upsert(items, **sent))

    async def delete(self, item_ids: Iterable[str], **sent: Unpack[Sent]) -> WriteResponse:
        """Delete products; an id that is not there is passed over."""
        return await self._say(talk.delete(item_ids, **sent))

    async def release(self, **sent: Unpack[Sent]) -> ReleaseResponse:
        """Tell which model version and index are served."""
        return await self._say(talk.release(**sent))

    async def healthy(self) -> bool:
        """Tell whether the endpoint's process lives; tries once."""
        return await self._says(talk.HEALTHY)

    async def ready(self) -> bool:
        """Tell whether every shard answers now; tries once."""
        return await self._says(talk.READY)

    async def _says(self, call: Call[bytes]) -> bool:
        try:
            await self._say(call)
        except EndpointError:
            return False
        return True

    async def _say(self, call: Call[T]) -> T:
        said = Talk(call, self._terms)
        while True:
            try:
                came: Came = await self._http.send(said.request())
            except httpx.RequestError as error:
                came = error
            if (wait_s := said.wait_s(came)) is None:
                return said.answer(came)
            await asyncio.sleep(wait_s)
