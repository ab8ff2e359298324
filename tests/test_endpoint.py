import base64
import http.client
import json
import re
import select
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.webhooks import delivery
from tests.fakes import EXPLANATION, FACET, HIT, ITEM, PHOTOS, FakeSearcher, serving

from askew import refusals
from askew.endpoint import Ask
from askew.errors import DataError

SECRET = "what both know"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeSearcher, httpx.Client]]:
    fake = FakeSearcher()
    with serving(fake, SECRET) as url, httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        yield fake, client


@pytest.fixture(autouse=True)
def searcher(served: tuple[FakeSearcher, httpx.Client]) -> FakeSearcher:
    fake, _ = served
    fake.__init__()  # type: ignore[misc]
    return fake


@pytest.fixture(scope="module")
def client(served: tuple[FakeSearcher, httpx.Client]) -> httpx.Client:
    return served[1]


def asking(**fields: object) -> bytes:
    return json.dumps({"query": "red mug"} | fields).encode()


def post(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/search", content=body, headers=JSON)


def dripping(client: httpx.Client) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
    connection.putrequest("POST", "/search")
    for name, value in (JSON | {"content-length": "1000"}).items():
        connection.putheader(name, value)
    connection.endheaders(b"{")
    return connection


def problem(answer: httpx.Response, status: int, hint: str = "") -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    [(name, found)] = answer.json().items()
    assert (name, list(found)) == ("error", ["code", "message", "param", "hint"])
    assert found["code"] == refusals.CODES[status]
    assert found["message"]
    assert found["hint"] == (hint or refusals.HINTS[status])
    return dict(found)


def test_a_search_is_answered(client: httpx.Client, searcher: FakeSearcher) -> None:
    response = client.post("/search", content=asking(k=3), headers=JSON | {"x-request-id": "7f"})
    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("request_id") == "7f"
    assert answer.pop("took_ms") >= 0
    assert answer == {
        "hits": [HIT],
        "took": {"waiting": 0.1, "encoding": 0.2, "searching": 0.3},
        "model": {"name": "towers", "version": "3"},
        "coverage": {"shards": 2, "answered": 2, "missing": 0.0},
        "degraded": False,
    }
    assert searcher.calls == [("red mug", 3)]


@pytest.mark.parametrize(
    ("body", "call"),
    [
        pytest.param(asking(), ("red mug", 10), id="default k"),
        pytest.param(asking(k=1), ("red mug", 1), id="least k"),
        pytest.param(asking(k=100), ("red mug", 100), id="most k"),
        pytest.param(asking(query="a" * 512), ("a" * 512, 10), id="longest query"),
        pytest.param(asking(query="größe 👍🏽\n"), ("größe 👍🏽\n", 10), id="any script"),
        pytest.param(asking().ljust(64 * 1024), ("red mug", 10), id="largest body"),
    ],
)
def test_what_is_within_the_bounds_is_asked_as_it_came(
    client: httpx.Client, searcher: FakeSearcher, body: bytes, call: tuple[str, int]
) -> None:
    assert post(client, body).status_code == 200
    assert searcher.calls == [call]


def test_a_filter_and_a_time_are_passed_on(client: httpx.Client, searcher: FakeSearcher) -> None:
    where = {"price": {"lt": 20}, "not": {"brand": ["Acme", None]}}
    assert post(client, asking(filter=where, timeout_ms=1500)).status_code == 200
    assert [replace(ask, request_id="") for ask in searcher.asks] == [Ask("red mug", where=where, timeout_s=1.5)]


@pytest.mark.parametrize(
    ("wanted", "hits"),
    [
        ({"fields": ["tags", "absent"]}, [HIT | {"fields": {"tags": ["mug"]}}]),
        ({"fields": []}, [HIT | {"fields": {}}]),
        ({"min_score": 0.5}, [HIT]),
        ({"min_score": 0.51}, []),
        ({"min_score": -1}, [HIT]),
    ],
)
def test_what_is_wanted_of_the_hits_is_sent(client: httpx.Client, wanted: dict[str, Any], hits: list[Any]) -> None:
    assert post(client, asking(**wanted)).json()["hits"] == hits


def test_who_requires_all_shards_gets_no_less(client: httpx.Client, searcher: FakeSearcher) -> None:
    assert post(client, asking(require_full=True)).json()["degraded"] is False
    searcher.answered = 1
    response = post(client, asking(require_full=True))
    assert problem(response, 503)["message"] == "1 of 2 shards answered, and all were required"


def test_several_searches_are_answered_in_their_order(client: httpx.Client, searcher: FakeSearcher) -> None:
    body = {"searches": [{"query": f"mug {n}", "k": n} for n in range(1, 65)]}
    answers = client.post("/search/batch", json=body).json()["answers"]
    assert [answer["hits"] for answer in answers] == [[HIT]] * 64
    assert searcher.calls == [(f"mug {n}", n) for n in range(1, 65)]


@pytest.mark.parametrize(
    ("searches", "param"),
    [
        ([], "searches"),
        ([{"query": "mug"}] * 65, "searches"),
        ([{"query": "mug"}, {"query": ""}], "searches.1.query"),
    ],
)
def test_a_batch_of_none_of_too_many_or_with_a_wrong_one_is_refused(
    client: httpx.Client, searcher: FakeSearcher, searches: list[Any], param: str
) -> None:
    assert problem(client.post("/search/batch", json={"searches": searches}), 422)["param"] == param
    assert searcher.calls == []


def test_what_is_like_an_item_is_searched_for(client: httpx.Client, searcher: FakeSearcher) -> None:
    body = {"item_id": "größe/7", "k": 4, "filter": {"colour": "red"}}
    assert client.post("/similar", json=body).json()["hits"] == [HIT]
    wanted = Ask(like="größe/7", k=4, where={"colour": "red"})
    assert [replace(ask, request_id="") for ask in searcher.asks] == [wanted]
    searcher.error = refusals.MissingError("there is no product 'x'")
    assert problem(client.post("/similar", json={"item_id": "x"}), 404)["param"] == "item_id"


def test_an_item_is_shown(client: httpx.Client) -> None:
    assert client.get("/items/jpeg").json() == ITEM | {"item_id": "jpeg"}
    assert client.get("/items/a%2Fb%20c%3F").json()["item_id"] == "a/b c?"
    assert problem(client.get("/items/absent"), 404)["message"] == "there is no product 'absent'"
    assert problem(client.get("/items/" + 513 * "a"), 422)["param"] == "item_id"


def test_the_photo_of_an_item_is_sent_as_what_it_is(client: httpx.Client) -> None:
    for name, kind in {"jpeg": "image/jpeg", "png": "image/png", "a/b c?": "image/gif"}.items():
        response = client.get(f"/items/{quote(name, safe='')}/image")
        assert (response.content, response.headers["content-type"]) == (PHOTOS[name], kind)
        assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("none", "page", "absent"):
        assert problem(client.get(f"/items/{name}/image"), 404)["param"] == "item_id"


def test_a_filter_that_does_not_fit_the_fields_is_refused_in_its_words(
    client: httpx.Client, searcher: FakeSearcher
) -> None:
    searcher.error = DataError("a filter on one of colour, price", "'color'", "mend the filter")
    found = problem(post(client, asking(filter={"color": "red"})), 422)
    assert (found["param"], "wanted a filter on one of colour, price; found 'color'" in found["message"]) == (
        "filter",
        True,
    )


def test_a_shard_that_did_not_answer_degrades_a_search(client: httpx.Client, searcher: FakeSearcher) -> None:
    searcher.answered = 1
    response = post(client, asking())
    assert response.status_code == 200
    answer = response.json()
    assert answer["degraded"] is True
    assert answer["coverage"] == {"shards": 2, "answered": 1, "missing": 0.25}
    assert answer["hits"] == [HIT]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        pytest.param(b'{"query": "red mug"', 400, None, id="cut off"),
        pytest.param(b"query=mug", 400, None, id="form"),
        pytest.param(b'{"query": "red\xffmug"}', 400, None, id="invalid UTF-8"),
        pytest.param(b"[" * 60_000, 400, None, id="nested"),
        pytest.param(b"[" * 30_000 + b"]" * 30_000, 400, None, id="nested and closed"),
        pytest.param(b'{"query":' * 900 + b"1" + b"}" * 900, 400, None, id="nested objects"),
        pytest.param(b"[" * 100_000, 413, None, id="nested and too large"),
        pytest.param(asking(k=0)[:-2] + b"9" * 5000 + b"}", 400, None, id="k of more digits than Python reads"),
        pytest.param(b"", 400, None, id="empty body"),
        pytest.param(b"null", 422, None, id="null"),
        pytest.param(b"[]", 422, None, id="list"),
        pytest.param(b"5", 422, None, id="number"),
        pytest.param(b'"mug"', 422, None, id="string"),
        pytest.param(b"NaN", 422, None, id="NaN"),
        pytest.param(b"{}", 422, "query", id="no query"),
        pytest.param(b'{"query": NaN}', 422, "query", id="NaN as query"),
        pytest.param(b'{"query": -Infinity}', 422, "query", id="infinity as query"),
        pytest.param(b'{"query": "\xed\xa0\x80"}', 400, None, id="encoded surrogate"),
        pytest.param(asking(size=5), 422, "size", id="unknown field"),
        pytest.param(asking(größe=5), 422, "größe", id="unknown field in any script"),
        pytest.param(asking(**{"\ud800": 5}), 400, None, id="unreadable field"),
        *(
            pytest.param(asking(query=query), 422, "query", id=f"query {name}")
            for name, query in {
                "empty": "", "blank": " \t\u3000", "NUL": "\0\0", "too long": "a" * 513, "null": None,
                "number": 5, "list": ["mug"],
            }.items()
        ),
        pytest.param(asking(query="\ud800"), 400, None, id="surrogate"),
        pytest.param(asking(query="red \udfff mug"), 400, None, id="surrogate in words"),
        *(
            pytest.param(asking(k=k), 422, "k", id=f"k {k!r}")
            for k in [0, -1, 101, 10**30, 1.5, 1.0, "5", True, None, [5], float("nan"), float("inf")]
        ),
        *(
            pytest.param(asking(**{name: value}), 422, name, id=f"{name} {value!r}")
            for name, values in {
                "filter": ["red", ["red"], 5], "fields": ["price", ["a"] * 65], "min_score": ["1", float("nan")],
                "timeout_ms": [0, -5, 60_001, 1.5], "require_full": ["yes", 1],
            }.items()
            for value in values
        ),
    ],
)  # fmt: skip
def test_a_body_that_is_not_understood_is_refused(
    client: httpx.Client, searcher: FakeSearcher, body: bytes, status: int, param: str | None
) -> None:
    response = post(client, body)
    assert problem(response, status)["param"] == param
    assert response.elapsed.total_seconds() < 2
    assert searcher.calls == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [64 * 1024 + 1, 4 * 1024 * 1024])
def test_a_body_that_is_too_large_is_refused(
    client: httpx.Client, searcher: FakeSearcher, size: int, chunked: bool
) -> None:
    body = asking().ljust(size)
    pieces = (body[start : start + 8192] for start in range(0, size, 8192))
    response = client.post("/search", content=pieces if chunked else body, headers=JSON)
    assert ("content-length" in response.request.headers) is not chunked
    assert problem(response, 413)["param"] is None
    assert response.headers["connection"] == "close"
    assert searcher.calls == []


def test_a_body_that_drips_is_refused(
    client: httpx.Client, searcher: FakeSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "BODY_TIMEOUT_S", 0.3)
    with closing(dripping(client)) as connection:
        drops = 0
        while drops < 100 and not select.select([connection.sock], [], [], 0.05)[0]:
            connection.send(b" ")
            drops += 1
        found = connection.getresponse()
        answer = httpx.Response(found.status, headers=found.getheaders(), content=found.read())
    assert problem(answer, 408)["param"] is None
    assert answer.headers["connection"] == "close"
    assert 0 < drops < 100
    assert searcher.calls == []


def test_a_client_that_hangs_up_is_not_searched_for(client: httpx.Client, searcher: FakeSearcher) -> None:
    dripping(client).close()
    assert post(client, asking()).status_code == 200
    assert searcher.calls == [("red mug", 10)]


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "json", "\xff"])
def test_another_content_type_is_refused(client: httpx.Client, searcher: FakeSearcher, kind: str | None) -> None:
    headers = {} if kind is None else {b"content-type": kind.encode("latin-1")}
    response = client.post("/search", content=asking(), headers=headers)
    assert problem(response, 415)["param"] is None
    assert searcher.calls == []


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_a_content_type_may_be_written_in_any_way(client: httpx.Client, kind: str) -> None:
    assert client.post("/search", content=asking(), headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_path_that_is_not_there(client: httpx.Client, searcher: FakeSearcher, method: str) -> None:
    assert problem(client.request(method, "/absent", headers=JSON), 404)["param"] is None
    assert searcher.calls == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/search", "POST"),
        ("PUT", "/search", "POST"),
        ("DELETE", "/readyz", "GET"),
        ("POST", "/release", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(
    client: httpx.Client, searcher: FakeSearcher, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path, headers=JSON)
    assert problem(response, 405)["param"] is None
    assert response.headers["allow"] == allowed
    assert searcher.calls == []


@pytest.mark.parametrize(("method", "path"), [("POST", "/search"), ("GET", "/readyz")])
def test_what_is_unavailable_is_to_be_tried_again(
    client: httpx.Client, searcher: FakeSearcher, method: str, path: str
) -> None:
    searcher.error = refusals.UnavailableError("no shard answered")
    response = client.request(method, path, content=asking(), headers=JSON)
    assert problem(response, 503)["message"] == "no shard answered"
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(("method", "path"), [("POST", "/search"), ("GET", "/readyz")])
def test_a_bug_is_told_without_its_details(
    client: httpx.Client, searcher: FakeSearcher, method: str, path: str
) -> None:
    searcher.error = RuntimeError("password in /etc/secret")
    response = client.request(method, path, content=asking(), headers=JSON)
    assert problem(response, 500)["message"] == "RuntimeError"
    assert response.headers["connection"] == "close"
    assert "secret" not in response.text + str(response.headers)


def test_ready_is_what_every_shard_answers(client: httpx.Client, searcher: FakeSearcher) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    searcher.answered = 1
    response = client.get("/readyz")
    assert problem(response, 503)["message"] == "1 of 2 shards answer"
    assert "retry-after" in response.headers


def test_healthy_is_also_what_cannot_search(client: httpx.Client, searcher: FakeSearcher) -> None:
    searcher.error = refusals.UnavailableError("no shard answered")
    response = client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert searcher.calls == []


def test_the_release_is_told(client: httpx.Client, searcher: FakeSearcher) -> None:
    assert client.get("/release").json() == searcher.release.model_dump()
    assert searcher.calls == []


def test_the_docs_tell_the_form_of_a_failure(client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    answers = client.get("/openapi.json").json()["paths"]["/search"]["post"]["responses"]
    for status in ("400", "408", "413", "415", "422", "503"):
        assert answers[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Failure")


TEXTS = st.text(st.characters(exclude_categories=()))  # surrogates too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8)
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "query": VALUES | TEXTS,
        "k": VALUES | st.integers(-1, 101),
        "größe": VALUES,
        "filter": VALUES,
        "fields": VALUES,
        "min_score": VALUES,
        "timeout_ms": VALUES,
        "require_full": VALUES,
    },
)


@settings(max_examples=200, deadline=None)
@given((VALUES | NEAR).map(lambda value: json.dumps(value).encode()) | st.binary())
def test_any_body_is_searched_for_or_refused(served: tuple[FakeSearcher, httpx.Client], body: bytes) -> None:
    fake, client = served
    fake.calls.clear()
    response = post(client, body)
    if response.status_code != 200:
        problem(response, 400 if response.status_code == 400 else 422)
    assert len(fake.calls) == (response.status_code == 200)


def test_scores_are_explained_when_that_is_asked(client: httpx.Client, searcher: FakeSearcher) -> None:
    [hit] = post(client, asking(explain=True)).json()["hits"]
    assert hit["explanation"] == EXPLANATION
    [hit] = post(client, asking()).json()["hits"]
    assert "explanation" not in hit
    assert [ask.explain for ask in searcher.asks] == [True, False]


def test_a_canary_says_how_long_it_waits_and_counts_in_no_figures(
    client: httpx.Client, searcher: FakeSearcher
) -> None:
    assert client.get("/readyz", params={"timeout_ms": 250}).status_code == 200
    [ask] = searcher.asks
    assert (ask.timeout_s, ask.canary, ask.k) == (0.25, True, 1)
    assert client.get("/readyz", params={"timeout_ms": 0}).status_code == 422
    client.post("/search", json={"query": "mug"})
    assert not searcher.asks[-1].canary


def test_whether_it_is_ready_is_asked_anew(client: httpx.Client, searcher: FakeSearcher) -> None:
    assert client.get("/readyz").status_code == 200
    assert searcher.asks[0].fresh


MUG = {"item_id": "n1", "title": "Red mug", "fields": {"price": 4}, "image": base64.b64encode(b"photo").decode()}


def test_items_are_upserted_and_deleted(client: httpx.Client, searcher: FakeSearcher) -> None:
    response = client.post("/items:upsert", json={"items": [MUG, {"item_id": "n2", "title": ""}]})
    assert (response.status_code, response.json()) == (
        200,
        {
            "change": 17, "items": 2,
            "refused": [{"item_id": "7", "reason": "empty", "message": "the image has no bytes"}],
        },
    )  # fmt: skip
    assert searcher.written == [
        {**MUG, "image": b"photo"}, {"item_id": "n2", "title": "", "fields": {}, "image": None},
    ]  # fmt: skip
    response = client.post("/items:delete", json={"item_ids": ["n1", "n2"]})
    assert (response.json(), searcher.written) == ({"change": 18, "items": 2, "refused": []}, ["n1", "n2"])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": []}, "items"), ({}, "items"), ({"items": [MUG] * 65}, "items"), ({"items": MUG}, "items"),
        ({"items": [MUG | {"item_id": ""}]}, "items.0.item_id"), ({"items": [{"item_id": "a"}]}, "items.0.title"),
        ({"items": [MUG | {"image": "no base64!"}]}, "items.0.image"), ({"items": [MUG | {"x": 1}]}, "items.0.x"),
        ({"items": [MUG | {"title": 5}]}, "items.0.title"), ({"items": [MUG | {"fields": []}]}, "items.0.fields"),
    ],
)  # fmt: skip
def test_items_of_the_wrong_form_are_refused(client: httpx.Client, body: object, param: str) -> None:
    assert problem(client.post("/items:upsert", json=body), 422)["param"] == param


def test_of_items_more_bytes_are_taken_but_not_any_number(client: httpx.Client, searcher: FakeSearcher) -> None:
    large = base64.b64encode(bytes(20 << 20)).decode()
    assert client.post("/items:upsert", json={"items": [{**MUG, "image": large}]}).status_code == 200
    assert searcher.written[0]["image"] == bytes(20 << 20)
    problem(client.post("/items:upsert", json={"items": [{**MUG, "image": large}] * 2}), 413)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (refusals.ForbiddenError("this endpoint takes no changes", "set `writes: true`"), 403),
        (refusals.RefusedError("wanted fields among price; found colour"), 422),
        (refusals.UnavailableError("not written within 30 s"), 503),
    ],
)
def test_a_change_that_is_not_made_says_why(
    client: httpx.Client, searcher: FakeSearcher, error: Exception, status: int
) -> None:
    searcher.error = error
    for path, body in (("/items:upsert", {"items": [MUG]}), ("/items:delete", {"item_ids": ["7"]})):
        hint = "set `writes: true`" if status == 403 else ""
        assert problem(client.post(path, json=body), status, hint)["message"] == str(error)


def test_while_it_is_busy_a_search_is_refused_before_anything_else(
    client: httpx.Client, searcher: FakeSearcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSearcher, "busy", True)
    for path in refusals.SEARCHES:
        response = client.post(path, content=b"no JSON", headers=JSON)
        assert problem(response, 503)["message"] == "too many searches at once"
        assert response.headers["retry-after"] == "1"
    assert client.get("/items/jpeg").status_code == 200
    assert searcher.asks == []


def test_how_photo_and_text_are_weighed_and_which_version_is_asked_is_passed_on(
    client: httpx.Client, searcher: FakeSearcher
) -> None:
    post(client, asking(image_weight=0.25, version="2"))
    post(client, asking())
    client.post("/similar", json={"item_id": "7", "version": "2"})
    assert [(ask.image_weight, ask.version) for ask in searcher.asks] == [(0.25, "2"), (None, ""), (None, "2")]
    searcher.error = refusals.MissingError("version 2 is not in memory; 3 are", "version")
    assert problem(post(client, asking(version="2")), 404)["param"] == "version"


@pytest.mark.parametrize("wrong", [{"image_weight": 1.1}, {"image_weight": -0.1}, {"version": ""}, {"version": 2}])
def test_a_weight_or_a_version_that_is_none_is_refused(client: httpx.Client, wrong: dict[str, Any]) -> None:
    assert problem(post(client, asking(**wrong)), 422)["param"] == next(iter(wrong))


def test_the_values_of_the_fields_are_told(client: httpx.Client, searcher: FakeSearcher) -> None:
    answer = client.post("/facets", json={"filter": {"price": {"lt": 5}}, "limit": 7})
    assert answer.json() == {"model": {"name": "towers", "version": "3"}, "fields": [FACET]}
    assert searcher.written == [{"price": {"lt": 5}}, 7]
    client.post("/facets", json={})
    assert searcher.written == [None, 20]
    for wrong in ({"limit": 0}, {"limit": 101}, {"filter": []}, {"fields": 1}):
        problem(client.post("/facets", json=wrong), 422)


def test_mlflows_word_is_taken_when_it_is_signed(client: httpx.Client, searcher: FakeSearcher) -> None:
    body = json.dumps({"entity": "model_version_alias", "action": "created"})
    now, hint = str(int(time.time())), "set ASKEW_WEBHOOK_SECRET for the endpoint"

    def sent(secret: str, at: str = now, body_: str = body) -> httpx.Response:
        signed = delivery._generate_hmac_signature(secret, "id", at, body)  # MLflow's own
        headers = {"x-mlflow-delivery-id": "id", "x-mlflow-timestamp": at, "x-mlflow-signature": signed}
        return client.post("/hooks/mlflow", content=body_, headers={**JSON, **headers})

    assert sent(SECRET).json() == {"status": "ok"}
    assert searcher.calls == [("look", 0)]
    old = str(int(time.time()) - 3600)
    for response in (sent("another"), sent(SECRET, body_="{}"), sent(SECRET, at=old), sent(SECRET, at="soon")):
        problem(response, 403, hint)
    problem(client.post("/hooks/mlflow", content=body, headers=JSON), 403, hint)
    assert searcher.calls == [("look", 0)]


def test_the_page_comes_with_its_parts_and_a_policy_that_lets_nothing_else_in(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    parts = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    assert parts == ["page/style.css", "page/script.js"]
    for path in ("", *parts):
        answer = client.get(f"/{path}")
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http://" not in answer.text
        assert "https://" not in answer.text
