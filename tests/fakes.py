"""What parts see of the others, without a cluster: handles, a switch and a searcher that do as they are told."""

import asyncio
import functools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import uvicorn
from pydantic_core import to_json
from ray.util.metrics import Metric

from askew import endpoint, messages, refusals, telemetry
from askew.endpoint import Answer, Ask
from askew.hits import Hit
from askew.keys import Keys
from askew.releases import Release
from askew.tallies import Spread, Tally
from askew.wire import Listener

SCHEMA = pa.schema([("item_id", pa.string()), ("fields", pa.struct([("colour", pa.string())]))])
HIT: dict[str, Any] = {"item_id": "7", "score": 0.5, "title": "Red mug", "fields": {"price": 4, "tags": ["mug"]}}
ITEM = {"item_id": "7", "title": "Red mug", "fields": {"price": 4}, "has_image": True}
PHOTOS = {
    "jpeg": b"\xff\xd8\xff\xe0rest",
    "png": b"\x89PNGrest",
    "none": None,
    "page": b"<html>",
    "a/b c?": b"GIF89a",
}
EXPLANATION = {"text": 0.4, "image": None, "fused": 0.5, "without_image": 0.4}
FACET = {
    "name": "colour", "kind": "text", "items": 9, "distinct": 2, "least": None, "greatest": None,
    "values": [{"value": "red", "items": 7}, {"value": "blue", "items": 2}],
}  # fmt: skip
run = asyncio.Runner().run  # one loop: connections outlive a search


def handle(*, wired: Mapping[str, Any] | None = None, **methods: Any) -> Any:
    """What a deployment's handle looks like: methods that it calls, and where others are answered."""
    if wired is not None:
        methods["address"] = functools.partial(Listener(wired).address, "127.0.0.1")
    return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})


def release(schema: pa.Schema = SCHEMA, sizes: Sequence[int] = (7, 3), **how: Any) -> Release:
    about = {"name": "shop", "version": "3", "model": "m", "index": "i", "identity": "release"}
    keys = {"model_key": "m", "index_key": "i", "sizes": sizes, "schema_": schema.serialize().to_pybytes()}
    return Release.model_validate(about | keys | how)


class FakeSwitch:
    """Tells what is live and what is held, as it is set."""

    def __init__(self, *releases: Release) -> None:
        self.releases, self.live, self.reports = list(releases), releases[0].key, dict[str, Any]()
        self.shadow, self.looks = "", 0

    async def look(self) -> None:
        self.looks += 1

    async def report(self, kind: str, who: str, held: Any, failed: Any, seen: Any) -> dict[str, Any]:
        self.reports[kind] = (held, failed, seen)
        told = {"since": "now", "previous": None, "candidate": None, "note": ""}
        return {
            "serve": self.live,
            "shadow": self.shadow,
            "hold": [one.model_dump() for one in self.releases],
            "told": told,
        }


def deployed(kind: Any, switch: FakeSwitch, *given: Any, first: Any = None, **how: Any) -> Any:
    """What a replica has, as Serve makes it."""
    one, wired = kind.__new__(kind), handle(wired={"report": switch.report, "look": switch.look})
    run(one.__init__(*([first] if first else []), wired, *given, **how))
    return one


class FakeSearcher:
    """Two shards that answer as told, and what they were asked."""

    busy = False

    release = messages.ReleaseResponse(
        model=messages.Served(name="towers", version="3"), model_key="m", index_key="i", items=9, shards=2,
        since="2026-11-26T00:00:00Z",
    )  # fmt: skip

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.asks: list[Ask] = []
        self.answered = self.release.shards
        self.error: Exception | None = None
        self.written: list[Any] = []

    async def search(self, ask: Ask) -> Answer:
        self.calls.append((ask.query or ask.like, ask.k))
        self.asks.append(ask)
        if self.error:
            raise self.error
        content = to_json({name: value for name, value in HIT.items() if name != "score"})
        hit: Mapping[str, Any] = Hit(HIT["item_id"], content, HIT["score"])
        if ask.explain:
            hit = {**hit, "explanation": EXPLANATION}
        missing = 0.25 * (2 - self.answered)
        return Answer(
            [hit], self.answered, {"waiting": 0.1, "encoding": 0.2, "searching": 0.3004}, self.release, missing
        )

    async def facets(self, where: Any, limit: int) -> tuple[list[dict[str, Any]], messages.Release]:
        self.written = [where, limit]
        if self.error:
            raise self.error
        return [FACET], self.release

    async def look(self) -> None:
        self.calls.append(("look", 0))

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        self.calls.append((item_id, 0))
        if self.error:
            raise self.error
        if item_id not in PHOTOS:
            raise refusals.MissingError(f"there is no product {item_id!r}")
        return {**ITEM, "item_id": item_id, "split": "val", "image": PHOTOS[item_id]}, PHOTOS[item_id]

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        self.written = list(items)
        if self.error:
            raise self.error
        return 17, len(items), [{"item_id": "7", "reason": "empty", "message": "the image has no bytes"}]

    async def delete(self, item_ids: Sequence[str]) -> int:
        self.written = list(item_ids)
        if self.error:
            raise self.error
        return 18


@contextmanager
def serving(searcher: Any, hook_secret: str = "", keys: Keys | None = None) -> Iterator[str]:
    """The endpoint over a searcher, on a port of its own; its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(endpoint.endpoint(searcher, hook_secret, keys), log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def dashboard(told: Callable[[str], object]) -> Iterator[int]:
    """What stands for Ray's dashboard: tells as JSON what stands at a path; its port."""

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(told(self.path)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def measured() -> dict[str, Sequence[str]]:
    """The names that each thing has which the endpoint counts or times, as Prometheus sees them."""
    kept = {name: one for name, one in vars(telemetry).items() if isinstance(one, Metric | Tally | Spread)}
    return {
        name: [f"ray_{each}" for each in ([one._name] if isinstance(one, Metric) else one.names)]
        for name, one in kept.items()
    }
