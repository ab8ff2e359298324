"""Who is let in, over HTTP: every path with every kind of key."""

import http.client
import json
import logging
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from tests.fakes import FakeSearcher, serving

from askew import admission, endpoint, keys, refusals
from askew.keys import Keys

SECRET = "what both know"
HOOK = "/hooks/mlflow"
OPEN = {"/", "/page/style.css", "/page/script.js", "/healthz", "/readyz", "/docs", "/openapi.json", HOOK}
SEARCH = {
    "/search", "/search/batch", "/similar", "/facets", "/items/{item_id:path}", "/items/{item_id:path}/image",
    "/release",
}  # fmt: skip
WRITE = {"/items:upsert", "/items:delete"}
BODIES: dict[str, Any] = {
    "/search": {"query": "mug"}, "/search/batch": {"searches": [{"query": "mug"}]},
    "/similar": {"item_id": "jpeg"}, "/facets": {}, "/items:upsert": {"items": [{"item_id": "a", "title": "b"}]},
    "/items:delete": {"item_ids": ["a"]}, HOOK: {},
}  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The keys of an endpoint, and their file."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    now = datetime.now(UTC)
    return SimpleNamespace(
        file=file,
        search=keys.add(file, "shop", ["search"]),
        write=keys.add(file, "stock", ["write"]),
        both=keys.add(file, "both", ["search", "write"], expires=now + timedelta(days=1)),
        expired=keys.add(file, "former", ["search", "write"], expires=now - timedelta(seconds=1)),
    )


@pytest.fixture(scope="module")
def served(shown: SimpleNamespace) -> Iterator[tuple[FakeSearcher, httpx.Client]]:
    fake = FakeSearcher()
    with (
        serving(fake, SECRET, Keys(shown.file, print)) as url,
        httpx.Client(base_url=url, timeout=10, trust_env=False) as client,
    ):
        yield fake, client


@pytest.fixture
def searcher(served: tuple[FakeSearcher, httpx.Client]) -> FakeSearcher:
    served[0].__init__()  # type: ignore[misc]
    return served[0]


@pytest.fixture
def client(served: tuple[FakeSearcher, httpx.Client]) -> httpx.Client:
    return served[1]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(client: httpx.Client, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    body, at = BODIES.get(path), path.replace("{item_id:path}", "jpeg")
    return client.request("GET" if body is None else "POST", at, json=body, headers=headers)


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found = dict(answer.json()["error"])
    assert (list(found), found["code"]) == (["code", "message", "param", "hint"], refusals.CODES[status])
    return found


def test_every_path_is_one_of_those_below() -> None:
    app = endpoint.endpoint(FakeSearcher())  # type: ignore[arg-type]
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)} | {"/docs", "/openapi.json"}
    assert paths == OPEN | SEARCH | WRITE


@pytest.mark.parametrize("path", sorted(OPEN - {HOOK}))
def test_what_is_open_wants_no_key(client: httpx.Client, path: str) -> None:
    assert ask(client, path).status_code == 200


def test_the_webhook_has_a_signature_of_its_own(client: httpx.Client, shown: SimpleNamespace) -> None:
    for headers in ({}, bearer(shown.both)):
        assert problem(ask(client, HOOK, headers), 403)["message"] == "not signed by MLflow's webhook"


@pytest.mark.parametrize("path", sorted(SEARCH | WRITE))
def test_without_a_key_that_counts_nothing_is_asked(
    client: httpx.Client, searcher: FakeSearcher, shown: SimpleNamespace, path: str
) -> None:
    answer = ask(client, path)
    assert problem(answer, 401)["message"] == "this endpoint wants a key, and none was sent"
    assert answer.headers["www-authenticate"] == 'Bearer realm="askew"'
    told = {"x": "no such key", shown.search + "x": "no such key", shown.expired: "the key former has expired"}
    for key, message in told.items():
        answer = ask(client, path, bearer(key))
        assert problem(answer, 401)["message"] == message
        assert answer.headers["www-authenticate"] == 'Bearer realm="askew", error="invalid_token"'
        assert key == "x" or key not in answer.text
    assert (searcher.calls, searcher.written) == ([], [])


@pytest.mark.parametrize("path", sorted(SEARCH | WRITE))
def test_a_key_is_good_for_its_scopes_alone(client: httpx.Client, shown: SimpleNamespace, path: str) -> None:
    wrong, right, scope = (
        (shown.search, shown.write, "write") if path in WRITE else (shown.write, shown.search, "search")
    )
    answer = ask(client, path, bearer(wrong))
    assert problem(answer, 403)["message"].endswith(f"has no scope {scope}")
    assert f'error="insufficient_scope", scope="{scope}"' in answer.headers["www-authenticate"]
    assert ask(client, path, bearer(right)).status_code == 200
    assert ask(client, path, bearer(shown.both)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "{}"}, {"authorization": "Basic {}"}, {"authorization": "Bearer"},
        {"authorization": "Bearer{}"}, {"x-api-key": "{}"}, {"cookie": "key={}"},
    ],
)  # fmt: skip
def test_a_key_in_any_other_place_is_none(
    client: httpx.Client, shown: SimpleNamespace, headers: dict[str, str]
) -> None:
    sent = {name: value.format(shown.search) for name, value in headers.items()}
    assert ask(client, "/release", sent).status_code == 401
    assert client.get("/release", params={"key": shown.search, "access_token": shown.search}).status_code == 401


def test_the_scheme_is_written_in_any_case(client: httpx.Client, shown: SimpleNamespace) -> None:
    assert ask(client, "/release", {"authorization": f"bEARER  {shown.search}"}).status_code == 200


@pytest.mark.parametrize("key", [b"\xff\xfe", b"a" * 60_000, b"\x80askew_", "größe".encode()])
def test_a_key_of_any_bytes_is_no_key(client: httpx.Client, key: bytes) -> None:
    assert client.get("/release", headers={b"authorization": b"Bearer " + key}).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/absent", "//search", "/search/", "/SEARCH", "/page/../search", "/healthz/../items:upsert",
     "/items%3Aupsert", "/%2Fitems:upsert", "/redoc", "/docs/oauth2-redirect"],
)  # fmt: skip
def test_a_path_that_is_written_otherwise_gains_nothing(
    client: httpx.Client, searcher: FakeSearcher, shown: SimpleNamespace, path: str
) -> None:
    def status(headers: dict[str, str]) -> int:
        with closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)) as raw:
            body = json.dumps(BODIES["/items:upsert"])
            raw.request("POST", path, body, {"content-type": "application/json", **headers})
            return raw.getresponse().status

    assert status(bearer(shown.search)) in (403, 404, 405, 307)
    assert status({}) in (401, 404)
    assert (searcher.calls, searcher.written) == ([], [])


def test_a_large_body_without_a_key_is_answered_and_not_held(
    client: httpx.Client, searcher: FakeSearcher, shown: SimpleNamespace
) -> None:
    tracemalloc.start()
    try:
        pieces = (bytes(1 << 16) for _ in range(1024))  # 64 MiB, twice of what is read from who may write
        answer = client.post("/items:upsert", content=pieces, headers={"content-type": "application/json"})
        assert problem(answer, 401)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert ask(client, "/release", bearer(shown.search)).status_code == 200


def test_a_busy_endpoint_tells_its_load_to_nobody_without_a_key(
    client: httpx.Client, searcher: FakeSearcher, shown: SimpleNamespace
) -> None:
    searcher.busy = True
    try:
        assert problem(ask(client, "/search"), 401)
        assert problem(ask(client, "/search", bearer(shown.search)), 503)
    finally:
        searcher.busy = False


def test_below_a_prefix_the_paths_want_the_same() -> None:
    for root in ("", "/shop", "/items:"):
        for path, wanted in {"/": None, "/healthz": None, "/search": "search", "/items:upsert": "write"}.items():
            scope = {"type": "http", "path": root + path, "root_path": root}
            assert admission.needed(admission._path(scope)) == wanted


# --- how often -----------------------------------------------------------------------------------


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[tuple[httpx.Client, FakeSearcher]]:
    """An endpoint, asked by a key of four requests at once, and one more every four seconds."""
    file, fake = tmp_path / "keys.yaml", FakeSearcher()
    key = keys.add(file, "shop", ["search"], rate=0.25, burst=4)
    with (
        serving(fake, keys=Keys(file, print)) as url,
        httpx.Client(base_url=url, timeout=10, trust_env=False, headers=bearer(key)) as client,
    ):
        yield client, fake


def test_more_than_a_keys_rate_is_told_when_to_come_again(limited: tuple[httpx.Client, FakeSearcher]) -> None:
    client, fake = limited
    assert [ask(client, "/search").status_code for _ in range(4)] == [200] * 4
    answer = ask(client, "/search")
    assert problem(answer, 429)["message"] == "more than 0.25 requests a second by the key shop"
    assert answer.headers["retry-after"] == "4"
    assert len(fake.calls) == 4
    assert client.get("/healthz").status_code == 200


def test_a_batch_counts_as_its_searches(limited: tuple[httpx.Client, FakeSearcher]) -> None:
    client, fake = limited
    answer = client.post("/search/batch", json={"searches": [{"query": "mug"}] * 10})
    assert answer.status_code == 200  # it is not known before
    assert int(ask(client, "/search").headers["retry-after"]) > 25  # seven more are owed
    assert len(fake.calls) == 10


# --- rotation, and what is told ------------------------------------------------------------------


def test_a_key_that_is_taken_out_counts_no_more_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "EVERY_S", 0.05)
    file = tmp_path / "keys.yaml"
    old = keys.add(file, "old", ["search"])
    with serving(FakeSearcher(), keys=Keys(file, print)) as url:

        def status(key: str) -> int:
            time.sleep(0.06)
            return httpx.get(f"{url}/release", headers=bearer(key), trust_env=False).status_code

        assert status(old) == 200
        new = keys.add(file, "new", ["search"])
        assert (status(old), status(new)) == (200, 200)
        keys.remove(file, "old")
        assert (status(old), status(new)) == (401, 200)
        keys.remove(file, "new")
        assert status(new) == 401


def test_the_page_of_the_docs_tells_which_paths_want_a_key(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    [(name, scheme)] = schema["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    told = {path: next(iter(methods.values())) for path, methods in schema["paths"].items()}
    guarded = {path for path, operation in told.items() if operation.get("security") == [{name: []}]}
    assert guarded == {path.replace(":path", "") for path in SEARCH | WRITE}
    assert "Wants a key of the scope `write`." in told["/items:upsert"]["description"]
    for status in ("401", "403", "429"):
        assert told["/search"]["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith(
            "/Failure"
        )


def test_without_keys_nothing_is_wanted_and_none_is_told_of() -> None:
    with serving(FakeSearcher()) as url, closing(httpx.Client(base_url=url, trust_env=False)) as client:
        for path in sorted(SEARCH | WRITE):
            assert ask(client, path).status_code == 200
        schema = client.get("/openapi.json").json()
    assert "securitySchemes" not in schema["components"]
    assert "401" not in json.dumps(schema["paths"]["/search"]["post"]["responses"])


def test_no_key_is_written_to_a_log(
    client: httpx.Client, searcher: FakeSearcher, shown: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    searcher.error = RuntimeError("a bug")
    for key in (shown.search, shown.expired, shown.search + "x"):
        for path in ("/search", "/items:upsert"):
            ask(client, path, bearer(key))
    told = [str(vars(record)) for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any("a bug" in one for one in told)
    assert not [one for one in told if shown.search[:20] in one or shown.expired[:20] in one]
