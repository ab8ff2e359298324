import asyncio
import copy
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fakes import EXPLANATION, FACET, HIT, ITEM, PHOTOS, FakeSearcher, run, serving

from askew import keys, messages, talk
from askew.client import AsyncClient, Client
from askew.endpoint import Ask
from askew.errors import AskewError, ConfigError, EndpointError, UnreachableError
from askew.refusals import ForbiddenError, MissingError, UnavailableError

Asks = Callable[..., Any]


class Shop(FakeSearcher):
    """Knows a product of every id, takes its time, and fails as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.failures, self.takes_s = 0, 0.0

    async def search(self, ask: Ask) -> Any:
        found = await super().search(ask)
        await asyncio.sleep(self.takes_s)
        if self.failures:
            self.failures -= 1
            raise UnavailableError("no shard answered")
        return found

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        self.calls.append((item_id, 0))
        if self.error:
            raise self.error
        return {**ITEM, "item_id": item_id}, photo_of(item_id)

    async def delete(self, item_ids: Sequence[str]) -> int:
        await super().delete(item_ids)
        if self.failures:
            self.failures -= 1
            raise UnavailableError("nobody writes")
        return 18


def photo_of(item_id: str) -> bytes:
    return b"\xff\xd8\xff" + item_id.encode()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Shop, str]]:
    shop = Shop()
    with serving(shop) as url:
        yield shop, url


@pytest.fixture
def shop(served: tuple[Shop, str]) -> Shop:
    served[0].__init__()  # type: ignore[misc]
    return served[0]


@pytest.fixture
def url(served: tuple[Shop, str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return served[1]


@pytest.fixture(params=[Client, AsyncClient])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asks]]:
    """Makes a client of either kind, whose methods are called by their names, and closes it in the end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    clients: list[Any] = []

    def make(url: str, **terms: Any) -> Asks:
        client = request.param(url, **terms)
        clients.append(client)
        return lambda method, *given, **how: done(getattr(client, method)(*given, **how))

    yield make
    for client in clients:
        done(client.aclose() if isinstance(client, AsyncClient) else client.close())


def done(answer: Any) -> Any:
    return run(answer) if inspect.isawaitable(answer) else answer


@pytest.fixture
def ask(made: Callable[..., Asks], url: str, shop: Shop) -> Asks:
    return made(url)


# --- every method --------------------------------------------------------------------------------


def test_a_search_says_all_that_it_may(ask: Asks, shop: Shop) -> None:
    where = {"price": {"lt": 20}, "not": {"brand": ["Acme", None]}}
    found = ask(
        "search", "größe 👍🏽", k=3, filter=where, fields=["price"], min_score=-0.5, explain=True, timeout_ms=1500,
        require_full=True, image_weight=0.25, version="2", request_id="7f",
    )  # fmt: skip
    how = {"explain": True, "image_weight": 0.25, "version": "2", "timeout_s": 1.5, "request_id": "7f"}
    assert shop.asks == [Ask("größe 👍🏽", k=3, where=where, **how)]
    assert isinstance(found, messages.SearchResponse)
    [hit] = found.hits
    assert (hit.score, hit.fields, hit.explanation) == (0.5, {"price": 4}, messages.Explanation(**EXPLANATION))
    assert (found.request_id, found.model.version, found.degraded) == ("7f", "3", False)


def test_what_is_left_out_is_the_endpoints_own(ask: Asks, shop: Shop) -> None:
    assert ask("search", "mug").hits[0] == messages.Hit(**HIT)
    [asked] = shop.asks
    assert asked == Ask("mug", request_id=asked.request_id)
    assert len(asked.request_id) == 32  # one was made up


def test_several_searches_share_what_is_said_of_all(ask: Asks, shop: Shop) -> None:
    answers = ask("search_batch", ["mug", {"query": "cup", "k": 2}], k=5, request_id="b")
    assert [type(answer) for answer in answers] == [messages.SearchResponse] * 2
    assert sorted(shop.calls) == [("cup", 2), ("mug", 5)]
    assert {asked.request_id for asked in shop.asks} == {"b"}


def test_what_is_like_a_product_is_found(ask: Asks, shop: Shop) -> None:
    found = ask("similar", "a/b ü?", k=2, filter={"price": 4})
    assert isinstance(found, messages.SearchResponse)
    assert [(asked.like, asked.k, asked.where) for asked in shop.asks] == [("a/b ü?", 2, {"price": 4})]


def test_a_product_and_its_photo_are_fetched(ask: Asks) -> None:
    assert ask("item", "7") == messages.Item(**ITEM)
    assert ask("image", "7", request_id="i") == photo_of("7")


def test_what_the_fields_hold_is_told(ask: Asks, shop: Shop) -> None:
    assert ask("facets") == messages.FacetsResponse(model=shop.release.model, fields=[messages.Facet(**FACET)])
    assert shop.written == [None, 20]
    ask("facets", filter={"price": {"lt": 5}}, limit=7)
    assert shop.written == [{"price": {"lt": 5}}, 7]


def test_products_are_written_with_their_photos(ask: Asks, shop: Shop) -> None:
    items = [{"item_id": "1", "title": "Mug", "image": PHOTOS["png"]}, {"item_id": "2", "title": "Cup"}]
    written = ask("upsert", items)
    assert written == messages.WriteResponse(change=17, items=2, refused=[messages.Refused(
        item_id="7", reason="empty", message="the image has no bytes")])  # fmt: skip
    assert [(i["item_id"], i["image"]) for i in shop.written] == [("1", PHOTOS["png"]), ("2", None)]
    assert items[0]["image"] == PHOTOS["png"]  # what was given is left as it was


def test_products_are_deleted(ask: Asks, shop: Shop) -> None:
    assert ask("delete", (str(n) for n in range(3))) == messages.WriteResponse(change=18, items=3, refused=[])
    assert shop.written == ["0", "1", "2"]


def test_the_release_is_told(ask: Asks, shop: Shop) -> None:
    assert ask("release") == shop.release


def test_who_is_ill_is_not_ready(ask: Asks, made: Callable[..., Asks], shop: Shop) -> None:
    assert (ask("healthy"), ask("ready")) == (True, True)
    shop.answered = 1
    assert (ask("healthy"), ask("ready")) == (True, False)
    assert len(shop.calls) == 2  # whoever waits for readiness asks again by himself
    nobody = made("http://127.0.0.1:1")
    assert (nobody("healthy"), nobody("ready")) == (False, False)


def test_clients_are_closed_by_with(url: str, shop: Shop) -> None:
    async def both() -> None:
        async with AsyncClient(url) as asked:
            await asyncio.gather(*(asked.search(f"mug {n}") for n in range(20)))
        with pytest.raises(RuntimeError, match="closed"):
            await asked.release()

    asyncio.run(both())
    assert len(shop.calls) == 20
    with Client(url) as client:
        client.release()
    with pytest.raises(RuntimeError, match="closed"):
        client.release()


# --- ids -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(served: tuple[Shop, str]) -> Iterator[Client]:
    with Client(served[1]) as client:
        yield client


PRINTABLE = st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" /?#%.\\:;@&=+'\"")
IDS = st.text(PRINTABLE, min_size=1, max_size=40).filter(lambda found: bool(found.strip()))


@settings(deadline=None, max_examples=200)
@given(IDS)
@example(".")
@example("..")
@example("../x")
@example("../../release")
@example("/")
@example("a//b/")
@example("%2F%25%")
@example("a?b#c")
@example(" a b ")
@example("größe/👍🏽")
@example("image")
@example("a/image/b")
@example("a/image")
@example("ü" * messages.MAX_ID)
def test_any_id_comes_back(served: tuple[Shop, str], kept: Client, item_id: str) -> None:
    assert kept.image(item_id) == photo_of(item_id)
    kept.similar(item_id)
    assert served[0].calls[-1] == (item_id, 10)
    kept.delete([item_id])
    assert served[0].written == [item_id]
    if item_id.endswith("/image"):
        with pytest.raises(ConfigError, match="which reads like another's photo"):
            kept.item(item_id)
    else:
        assert kept.item(item_id).item_id == item_id


# --- what goes wrong -----------------------------------------------------------------------------


def test_an_error_tells_what_the_endpoint_said(ask: Asks, shop: Shop) -> None:
    with pytest.raises(EndpointError) as caught:
        ask("search", "mug", k=101, request_id="7f")
    error = caught.value
    assert (error.status, error.code, error.param, error.request_id) == (422, "invalid_field", "k", "7f")
    assert (error.message, error.hint) == (
        "Input should be less than or equal to 100", "see /docs for the fields and their bounds",
    )  # fmt: skip
    assert str(error).startswith("wanted an answer to POST http://127.0.0.1:")
    assert "found 422 Input should be less than or equal to 100 (k); see /docs" in str(error)
    assert isinstance(error, AskewError)
    again = copy.copy(error)  # as one process passes it to another
    assert (str(again), again.status, again.param) == (str(error), 422, "k")
    assert shop.calls == []


@pytest.mark.parametrize(
    ("method", "given", "error", "status", "code"),
    [
        ("item", "7", MissingError("there is no product '7'"), 404, "not_found"),
        (
            "upsert",
            [{"item_id": "7", "title": "Mug"}],
            ForbiddenError("no changes", "set writes"),
            403,
            "forbidden",
        ),
        ("upsert", [{"item_id": "7"}], None, 422, "invalid_field"),
        ("search", "mug", ValueError("a bug"), 500, "internal"),
    ],
)
def test_what_cannot_be_mended_is_asked_once(
    ask: Asks, shop: Shop, method: str, given: Any, error: Exception | None, status: int, code: str
) -> None:
    shop.error = error
    with pytest.raises(EndpointError) as caught:
        ask(method, given)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert len(shop.calls) <= 1


def test_a_misspelt_field_is_told_by_the_endpoint(ask: Asks) -> None:
    with pytest.raises(EndpointError, match=r"\(filtr\)"):
        ask("search", "mug", filtr={})


def test_nobody_there_is_told_with_what_to_do(made: Callable[..., Asks]) -> None:
    ask = made("http://127.0.0.1:1", retries=1)
    with pytest.raises(
        UnreachableError,
        match=r"^wanted an askew endpoint at http://127.0.0.1:1; found ConnectError .* \(attempt 2\); start it",
    ) as caught:
        ask("search", "mug")
    assert (caught.value.code, caught.value.status) == ("unreachable", 0)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:x"])
def test_a_url_of_nothing_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="URL of an askew endpoint"):
        Client(url)


# --- what is tried again -------------------------------------------------------------------------


def test_a_503_is_tried_again_when_the_endpoint_says(ask: Asks, shop: Shop) -> None:
    shop.failures = 1
    started = time.monotonic()
    assert ask("search", "mug").hits
    assert time.monotonic() - started >= 1  # Retry-After
    assert len(shop.asks) == 2
    assert len({asked.request_id for asked in shop.asks}) == 1


def test_a_change_is_tried_again(ask: Asks, shop: Shop) -> None:
    shop.failures = 1
    assert ask("delete", ["7"]).change == 18
    assert shop.failures == 0


def test_only_so_often(made: Callable[..., Asks], url: str, shop: Shop) -> None:
    shop.failures = 9
    with pytest.raises(EndpointError, match="503 no shard answered") as caught:
        made(url, retries=1)("search", "mug")
    assert (caught.value.status, caught.value.code) == (503, "unavailable")
    assert len(shop.calls) == 2


def test_a_retry_has_what_is_left_of_a_searchs_time(ask: Asks, shop: Shop) -> None:
    shop.failures = 1
    ask("search", "mug", timeout_ms=3000)
    first, second = (asked.timeout_s or 0 for asked in shop.asks)
    assert first == 3
    assert 0 < second <= 2


@pytest.mark.parametrize(("terms", "how"), [({"timeout_s": 0.9}, {}), ({}, {"timeout_ms": 900})])
def test_nothing_is_tried_past_the_deadline(
    made: Callable[..., Asks], url: str, shop: Shop, terms: dict[str, Any], how: dict[str, Any]
) -> None:
    shop.failures = 9
    ask, started = made(url, **terms), time.monotonic()
    with pytest.raises(EndpointError, match="503"):
        ask("search", "mug", **how)
    assert time.monotonic() - started < 0.9  # it does not even wait
    assert len(shop.calls) == 1


def test_who_is_late_is_not_waited_for(made: Callable[..., Asks], url: str, shop: Shop) -> None:
    shop.takes_s = 2
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"answers within 0.3 s; found ReadTimeout .*; give it more time"):
        made(url, timeout_s=0.3)("search", "mug")
    assert time.monotonic() - started < 1.5
    assert len(shop.calls) == 1


class Scripted(ThreadingHTTPServer):
    """Answers each request with the next of its answers (status, headers, body), the last one for ever."""

    daemon_threads = True

    def __init__(self, *answers: tuple[int, Mapping[str, str], bytes] | None) -> None:
        super().__init__(("127.0.0.1", 0), Reader)
        self.answers, self.seen, self.connections = list(answers), list[Mapping[str, str]](), set[Any]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.shutdown()
        self.server_close()


class Reader(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # head and body in one packet: nobody waits for the second

    def do_POST(self) -> None:
        server: Any = self.server
        self.rfile.read(int(self.headers["content-length"]))
        server.seen.append(self.headers)
        server.connections.add(self.client_address)
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self.close_connection = answer is None
        if answer is not None:
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *told: object) -> None:
        pass


GOOD = (200, {}, messages.WriteResponse(change=1, items=1, refused=[]).model_dump_json().encode())


def test_a_connection_that_breaks_is_made_again(made: Callable[..., Asks]) -> None:
    with Scripted(None, (503, {"retry-after": "soon"}, b"proxy"), GOOD) as server:
        assert made(server.url)("delete", ["7"]).change == 1
    assert len(server.seen) == 3


def test_a_connection_is_kept(made: Callable[..., Asks]) -> None:
    with Scripted(GOOD) as server:
        ask = made(server.url + "/", api_key="k-1")
        for _ in range(5):
            ask("delete", ["7"])
    assert len(server.connections) == 1
    assert {seen["authorization"] for seen in server.seen} == {"Bearer k-1"}
    assert len({seen["x-request-id"] for seen in server.seen}) == 5


def test_without_a_key_none_is_sent(made: Callable[..., Asks]) -> None:
    with Scripted(GOOD) as server:
        made(server.url)("delete", ["7"])
    assert "authorization" not in server.seen[0]


def test_who_asked_too_often_comes_again_when_told_and_not_otherwise(made: Callable[..., Asks]) -> None:
    told = messages.Failure(error=messages.Problem(code="too_many_requests", message="m", param=None, hint="h"))
    body = told.model_dump_json().encode()
    with Scripted((429, {"retry-after": "1"}, body), GOOD) as server:
        started = time.monotonic()
        assert made(server.url)("delete", ["7"]).change == 1
        assert time.monotonic() - started >= 1
    for headers in ({}, {"retry-after": "60"}, {"retry-after": "soon"}):
        with Scripted((429, headers, body)) as server:
            with pytest.raises(EndpointError, match="429 m; h") as caught:
                made(server.url)("delete", ["7"])
            assert (caught.value.status, caught.value.code) == (429, "too_many_requests")
            assert len(server.seen) == 1


@pytest.mark.parametrize(("status", "code"), [(401, "unauthorized"), (403, "forbidden")])
def test_who_is_not_let_in_does_not_knock_again(
    made: Callable[..., Asks], tmp_path: Path, status: int, code: str
) -> None:
    file, fake = tmp_path / "keys.yaml", Shop()
    key = keys.add(file, "shop", ["search"])
    with serving(fake, keys=keys.Keys(file, print)) as url:
        ask = made(url, api_key=key if status == 403 else None)
        with pytest.raises(EndpointError) as caught:
            ask("delete", ["7"])
        assert (caught.value.status, caught.value.code) == (status, code)
        if status == 403:
            assert ask("search", "mug").hits
    assert key not in str(caught.value)


@pytest.mark.parametrize("status", [200, 502])
def test_another_server_is_no_endpoint(made: Callable[..., Asks], status: int) -> None:
    with Scripted((status, {}, b"<html>It works!")) as server:
        with pytest.raises(EndpointError, match=rf"found {status} .*'<html>It works!'.*; name an askew endpoint"):
            made(server.url)("search", "mug")
        assert len(server.seen) == 1


@pytest.mark.parametrize("answer", [None, (503, {}, b"{}")], ids=["broken connection", "503"])
def test_a_dead_endpoint_is_not_hammered(
    made: Callable[..., Asks], monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(talk, "PAUSE_S", 0.001)
    calls = 100
    with Scripted(answer) as server:
        ask = made(server.url)
        for _ in range(calls):
            with pytest.raises(EndpointError):
                ask("delete", ["7"])
    # the reserve, and a fifth; without a budget it would be four times as many
    assert calls + talk.RESERVE <= len(server.seen) <= calls + talk.RESERVE + talk.SHARE * calls


def test_a_budget_is_earned_again() -> None:
    budget = talk.Budget()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(6):
        budget.earn()
    assert (budget.spend(), budget.spend()) == (True, False)
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]


# --- what it needs -------------------------------------------------------------------------------

LIGHT = """
import sys
for name in ("ray", "torch", "mlflow", "transformers", "faiss", "numpy", "pyarrow", "pandas", "fastapi"):
    sys.modules[name] = None
from askew.client import AsyncClient, Client
with Client(sys.argv[1]) as client:
    print(client.search("mug").hits[0].title)
"""


def test_a_client_needs_none_of_what_serves(url: str, shop: Shop) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", LIGHT, url]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("Red mug\n", "")
