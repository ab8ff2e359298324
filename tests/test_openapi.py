"""The endpoint against its own description: whatever schemathesis makes of the OpenAPI page, it keeps to it."""

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hypothesis
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from askew import endpoint, refusals
from askew.endpoint import Answer, Ask
from askew.messages import Release, ReleaseResponse, Served

HIT = {"item_id": "7", "score": 0.5, "title": "Red mug", "fields": {"price": 4, "tags": ["mug"]}}


class Shop:
    """Answers everything, and knows one item."""

    busy = False

    release = ReleaseResponse(
        model=Served(name="towers", version="3"), model_key="m", index_key="i", items=9, shards=2, since="now"
    )

    async def search(self, ask: Ask) -> Answer:
        return Answer([HIT][: ask.k], 2, {"waiting": 0.0}, self.release)

    async def facets(self, where: Any, limit: int) -> tuple[list[dict[str, Any]], Release]:
        return [], self.release

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        if item_id != "7":
            raise refusals.MissingError(f"there is no product {item_id!r}")
        return {"item_id": "7", "title": "Red mug", "fields": {}, "has_image": True}, b"\xff\xd8\xff\xe0"

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        return 1, len(items), []

    async def delete(self, item_ids: Sequence[str]) -> int:
        return 2


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(endpoint.endpoint(Shop()), log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{listening.getsockname()[1]}/openapi.json")
    server.should_exit = True
    thread.join()


PATHS = [
    ("/search", "POST"), ("/search/batch", "POST"), ("/similar", "POST"), ("/items/{item_id}", "GET"),
    ("/items/{item_id}/image", "GET"), ("/facets", "POST"), ("/items:upsert", "POST"),
    ("/items:delete", "POST"), ("/release", "GET"), ("/healthz", "GET"), ("/readyz", "GET"),
]  # fmt: skip


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), PATHS)
def test_the_endpoint_keeps_to_its_description(described: Any, path: str, method: str, mode: Any) -> None:
    try:
        cases = described[path][method].as_strategy(generation_mode=mode)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=cases)
        def kept(case: Any) -> None:
            # a schema cannot say "a readable character", and takes 2.0 for a whole number
            case.call_and_validate(timeout=10, excluded_checks=[positive_data_acceptance])

        kept()
    except hypothesis.errors.Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # there is nothing that could be wrong in it


def test_every_path_is_tried(described: Any) -> None:
    found = {(op.ok().path, op.ok().method.upper()) for op in described.get_all_operations()}
    assert found == {(path.replace(":path", ""), method) for path, method in PATHS}
