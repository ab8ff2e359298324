"""What a request holds ends no line of a log, and comes back in no header: through Ray Serve's own log files."""

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray.serve import context as serve_context
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from tests.fakes import FakeSearcher, FakeSwitch, deployed, handle, release, run, serving

from askew import keys, telemetry
from askew.ingress import Ingress
from askew.telemetry import escaped

NASTY = "\n[fake] line\x1b[31m\x9b\u2028\x00\r"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but the end of a line
RECORD = re.compile(r"(INFO|WARNING|ERROR|DEBUG) \d{4}-\d\d-\d\d ")


@contextmanager
def logging_to(folder: Path, **how: Any) -> Iterator[None]:
    """Log as a replica does, to a file in a folder."""
    serve, log = telemetry.serve, telemetry.log
    before = list(serve.handlers), serve.level, serve.propagate, log.level
    log.setLevel(logging.NOTSET)
    config = LoggingConfig(logs_dir=str(folder), **how)
    configure_component_logger(
        component_name="ingress", component_id="1", logging_config=config, max_bytes=1 << 20, backup_count=1
    )
    telemetry.escape()
    try:
        yield
    finally:
        for one in serve.handlers:
            target = getattr(one, "target", None)
            one.close()
            if target:
                target.close()
        serve.handlers[:], serve.level, serve.propagate, log.level = before
        for known in [one for one in serve.filters if isinstance(one, telemetry.Escaping)]:
            serve.removeFilter(known)


def written(folder: Path) -> str:
    """What stands in that file."""
    for one in telemetry.serve.handlers:
        one.flush()
    [path] = folder.glob("*.log")
    return path.read_bytes().decode()


@pytest.fixture(params=["TEXT", "JSON"])
def lines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Log as a replica does, and read what stands in its file."""
    token = serve_context._serve_request_context.set(
        serve_context._RequestContext(route=f"/items/{NASTY}", request_id=f"id{NASTY}", app_name="search")
    )

    def read() -> list[str]:
        text = written(tmp_path)
        assert not CONTROL.search(text)
        told = text.split("\n")[:-1]
        if request.param == "JSON":
            assert not CONTROL.search(" ".join(str(value) for line in told for value in json.loads(line).values()))
            return [f"{found['message']} {found.get('exc_text', '')}" for found in map(json.loads, told)]
        assert all(RECORD.match(line) or line.startswith("    ") for line in told), text
        return told

    with logging_to(tmp_path, encoding=request.param, log_level="DEBUG"):
        yield read
    serve_context._serve_request_context.reset(token)


def ingress(**how: Any) -> Ingress:
    """An ingress whose one shard and encoder complain of what they were asked, word for word."""

    async def encode(key: str, queries: list[str], ids: list[str]) -> np.ndarray:
        if "unreadable" in queries[0]:
            raise RuntimeError(f"cannot encode {queries[0]}")
        return np.ones((len(queries), 2), np.float32)

    async def search(key: str, vectors: Any, k: int, wheres: list[str], ids: list[str]) -> Any:
        raise RuntimeError(f"cannot filter by {json.loads(wheres[0])['colour']} for {ids[0]}")

    async def items(key: str, ids: list[str]) -> Any:
        raise RuntimeError(f"cannot find {ids[0]}")

    shard = handle(wired={"search": search, "items": items})
    encoder, writer = handle(wired={"encode": encode}), handle(upsert=None, delete=None, explain=None)
    first = {"timeout_s": 5, "cached_results": 0, "report_every_s": 5, **how}
    made: Ingress = deployed(Ingress, FakeSwitch(release(sizes=(7,))), encoder, writer, shard, first=first)
    return made


async def ask(app: Any, path: str, body: dict[str, Any] | None = None, **sent: str) -> httpx.Response:
    """Ask the application itself: no server in between, which would refuse such headers."""
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        return await client.request("GET" if body is None else "POST", path, json=body, headers=headers)


def test_whatever_a_request_holds_stays_on_the_line_of_its_record(
    lines: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "warner", telemetry.Warner(every_s=0))
    file = tmp_path / "keys.yaml"
    key = keys.add(file, "shop", ["search"])
    app = ingress(keys=file).__serve_build_asgi_app__()
    where = {"colour": f"red{NASTY}"}

    async def scenario() -> list[httpx.Response]:
        sent = {"x_request_id": f"7{NASTY}", "authorization": f"Bearer {key}"}
        return [
            await ask(app, "/search", {"query": f"mug{NASTY}", "filter": where}, **sent),
            await ask(app, "/search", {"query": f"unreadable{NASTY}", "filter": where}, **sent),
            await ask(app, "/search", {"query": "mug", "filter": {f"colour{NASTY}": "red"}}, **sent),
            await ask(app, "/search", {"query": "mug", f"more{NASTY}": 1}, **sent),
            await ask(app, "/search", {"query": "mug", "version": f"3{NASTY}"}, **sent),
            await ask(app, "/similar", {"item_id": f"i{NASTY}"}, **sent),
            await ask(app, "/items/i%0A%5Bfake%5D%1B%5B31m", **sent),
            await ask(app, "/items/i%5Bfake%5D%1B%5B31m/image", **sent),
            await ask(app, "/search", {"query": "mug"}, authorization=f"Bearer {key}{NASTY}"),
        ]

    answers = run(scenario())
    statuses = [answer.status_code for answer in answers]
    assert statuses == [503, 503, 422, 422, 404, 503, 404, 503, 401]
    for answer in answers:
        assert not re.search(r"[\x00-\x1f]", answer.text)  # JSON escapes them
        assert "[fake]" not in str(answer.headers)
    told = lines()
    for complaint in ("cannot filter by red", "cannot encode unreadable"):
        assert any(f"{complaint}\\n[fake] line\\x1b[31m\\x9b\\u2028" in one for one in told)
    assert not [one for one in told if key in one]


def test_neither_does_what_a_bug_says(lines: Callable[[], list[str]]) -> None:
    try:
        raise ValueError(f"a bug{NASTY}")
    except ValueError:
        telemetry.serve.exception("Request failed: %s", NASTY)  # as Serve does
    told = lines()
    assert any("Request failed: \\n[fake] line\\x1b[31m" in one for one in told)
    assert "    [fake] line\\x1b[31m" in "\n".join(told)  # a line of the traceback, set in as all of them


@pytest.mark.parametrize("access", [True, False])
def test_an_access_log_that_is_off_is_not_made_and_all_else_is(tmp_path: Path, access: bool) -> None:
    with logging_to(tmp_path, enable_access_log=access):
        telemetry.escape()  # again, as where it is called twice
        assert telemetry.serve.isEnabledFor(logging.INFO) is access
        telemetry.serve.info("POST /search", extra={"serve_access_log": True})
        telemetry.serve.warning("what Serve warns of")
        telemetry.log.info("a release is in memory")
        telemetry.log.debug("a call")
        told = written(tmp_path)
    assert ("POST /search" in told) is access
    assert "what Serve warns of" in told
    assert "a release is in memory" in told
    assert "a call" not in told


def test_text_of_any_script_stays_as_it_is() -> None:
    assert escaped("größe 👍🏽 שלום \\n") == "größe 👍🏽 שלום \\n"
    assert escaped("a\tb\nc") == "a\\tb\\nc"


# --- the id of a request -------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["7f", "a" * 128, "01J:trace/7+b=,@x_y.z-9"])
def test_an_id_of_a_request_that_can_be_logged_is_kept(sent: str) -> None:
    fake, headers = FakeSearcher(), {"x-request-id": sent}
    with serving(fake) as url:
        answer = httpx.post(f"{url}/search", json={"query": "mug"}, headers=headers, trust_env=False)
    assert (answer.json()["request_id"], fake.asks[0].request_id) == (sent, sent)


@pytest.mark.parametrize("sent", ["", "a" * 129, "a b", "a;b", 'a"b', "größe", "\x9b31m", "{}", "%0a"])
def test_another_one_is_made_up(sent: str) -> None:
    fake = FakeSearcher()
    headers = {b"x-request-id": sent.encode("latin-1")}
    with serving(fake) as url:
        answer = httpx.post(f"{url}/search", json={"query": "mug"}, headers=headers, trust_env=False)
    assert re.fullmatch("[0-9a-f]{32}", answer.json()["request_id"])
    assert fake.asks[0].request_id == answer.json()["request_id"]


@pytest.mark.parametrize("sent", [b"a\x1b[31m", b"a\x01b", b"a\nx: y", b"a\rb", b"a\x00", b"a\x7f"])
def test_the_server_takes_no_header_with_a_control_character(sent: bytes) -> None:
    """httptools refuses it, before Ray Serve's proxy sees it, which would write it to its log as text."""
    body = b'{"query": "mug"}'
    head = b"POST /search HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    head += b"content-length: %d\r\nx-request-id: " % len(body) + sent + b"\r\n\r\n"
    fake = FakeSearcher()
    with serving(fake) as url, closing(socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0))) as raw:
        raw.settimeout(5)
        raw.sendall(head + body)
        answer = b""
        while piece := raw.recv(1 << 16):
            answer += piece
    headers = answer.partition(b"\r\n\r\n")[0].replace(b"\r\n", b"")
    assert not re.search(rb"[\x00-\x1f\x7f]", headers)
    assert b" 400 " in answer.splitlines()[0] or re.fullmatch("[0-9a-f]{32}", fake.asks[0].request_id)
