"""The watchdog against real HTTP servers, and on a real Ray Serve whose proxy says that it is well and is not."""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from askew import refusals
from askew.local import free_ports
from askew.watchdog import Proxy, Watchdog, WatchdogSettings, proxies

ROOT = Path(__file__).parent.parent
WELL = (200, "application/json", b'{"status": "ready"}')
NO_SHARD = (503, "application/json", bytes(refusals.failed(503, "no shard answered").body))
NO_INGRESS = (503, "application/json", bytes(refusals.FULL.body))  # what HAProxy says
NO_ROUTE = (404, "text/plain", b"Path '/readyz' not found")  # what Ray Serve's proxy says
HANGS = (0, "", b"")
GONE = (-1, "", b"")
SETTINGS = WatchdogSettings(every_s=0.01, timeout_s=1, failures=3, pause_s=0)


class Stub(ThreadingHTTPServer):
    """A proxy that answers as it is told."""

    def __init__(self, node: str) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.says: tuple[int, str, bytes] = WELL
        self.paths: list[str] = []
        self.proxy = Proxy(node, f"actor-{node}", f"http://127.0.0.1:{self.server_port}")
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answering(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        status, kind, body = self.server.says
        if not status:
            time.sleep(1.5)
            return
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    stubs = [Stub("a"), Stub("b")]
    yield stubs
    for one in stubs:
        one.shutdown()
        one.server_close()


def looked(watched: list[Stub], *rounds: Any, settings: WatchdogSettings = SETTINGS) -> list[list[str]]:
    """What was restarted in each round; before it the first proxy is set to what the round says."""
    restarted: list[str] = []

    async def find() -> list[Proxy]:
        return [one.proxy for one in watched]

    async def restart(proxy: Proxy) -> None:
        restarted.append(proxy.node)

    async def all_() -> list[list[str]]:
        watchdog, found = Watchdog(settings, find, restart), []
        async with httpx.AsyncClient(trust_env=False) as client:
            for says in rounds:
                watched[0].says = says
                if says is GONE:
                    watched[0].server_close()
                await watchdog.look(client)
                found.append([*restarted])
                restarted.clear()
        return found

    return asyncio.run(all_())


@pytest.mark.parametrize("says", [NO_ROUTE, NO_INGRESS, HANGS, (500, "text/plain", b"Internal Server Error")])
def test_a_proxy_that_passes_nothing_on_is_restarted(stubs: list[Stub], says: Any) -> None:
    assert looked(stubs, WELL, says, says, says, WELL) == [[], [], [], ["a"], []]
    assert {*stubs[0].paths} == {"/readyz?timeout_ms=500"}


def test_what_the_ingress_itself_says_is_none_of_its_failures(stubs: list[Stub]) -> None:
    assert looked(stubs, WELL, *[NO_SHARD] * 5) == [[]] * 6


def test_failures_count_in_a_row(stubs: list[Stub]) -> None:
    assert looked(stubs, WELL, HANGS, HANGS, WELL, HANGS, HANGS) == [[]] * 6


def test_one_that_was_never_well_is_left_alone(stubs: list[Stub]) -> None:
    assert looked(stubs, *[NO_ROUTE] * 8) == [[]] * 8


def test_where_no_other_passes_anything_on_it_takes_longer(stubs: list[Stub]) -> None:
    assert looked(stubs[:1], WELL, *[NO_ROUTE] * 9) == [*[[]] * 9, ["a"]]


def test_one_that_cannot_be_connected_to_is_left_to_ray_serve(stubs: list[Stub]) -> None:
    assert looked(stubs, WELL, *[GONE] * 12) == [[]] * 13


def test_after_a_restart_it_has_its_time(stubs: list[Stub]) -> None:
    patient = SETTINGS.model_copy(update={"pause_s": 60.0})
    assert looked(stubs, WELL, *[NO_ROUTE] * 8, settings=patient) == [[], [], [], ["a"], *[[]] * 5]


def test_proxies_are_found_where_they_can_be_asked() -> None:
    one = {"node_ip": "10.0.0.1", "actor_name": "A", "status": "HEALTHY"}
    told: dict[str, Any] = {
        "http_options": {"host": "::", "port": 80}, "applications": {"search": {"route_prefix": "/shop"}},
        "proxies": {"a": one, "b": {**one, "node_ip": "fd00::1", "actor_name": "B"},
                    "c": {**one, "status": "DRAINING"}, "d": {**one, "status": "STARTING"}},
    }  # fmt: skip
    everywhere = [Proxy("a", "A", "http://10.0.0.1:80/shop"), Proxy("b", "B", "http://[fd00::1]:80/shop")]
    assert proxies(told, "search", "b") == everywhere
    here = {**told, "http_options": {"ssl_certfile": "x"}, "applications": {"search": {"route_prefix": "/"}}}
    assert proxies(here, "search", "b") == [Proxy("b", "B", "https://127.0.0.1:8000")]
    assert proxies({"applications": {}, "proxies": None}, "search", "b") == []


SCRIPT = """
import asyncio, json, sys, time, ray
from fastapi import FastAPI
from ray import serve
from askew.watchdog import WatchdogSettings, of_serve
app = FastAPI()

@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Small:
    def __init__(self):
        self._task = asyncio.get_running_loop().create_task(of_serve(WatchdogSettings(failures=1)).run())

    @app.get("/readyz")
    async def readyz(self, timeout_ms: int):
        return {"status": "ready"}

def lost(actor):
    actor.http_proxy.proxy_router.match_route = lambda *_: None

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(Small.bind(), name="small")
print("ready", flush=True)
sys.stdin.readline()
[name] = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "PROXY" in one["name"]]
ray.get(ray.get_actor(name, "serve").__ray_call__.remote(lost))
print("lost", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A small application on a Ray of its own, with a watchdog; its process and its port."""
    (tmp_path / "small.py").write_text(SCRIPT)
    [port] = free_ports(1)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "platform"),
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="askew-"),
    }
    environment.pop("RAY_ADDRESS", None)
    environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"  # as the demo and clusters have it
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "small.py"), str(port)], env=environment, cwd=tmp_path,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        assert process.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()[-3000:]
        yield process, port
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for one in [psutil.Process(process.pid), *family]:
            one.kill()
        process.wait()
        psutil.wait_procs(family, timeout=30)
        process.stdin.close()
        process.stdout.close()


def asked(port: int, path: str) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=2, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


def test_a_proxy_of_ray_serve_that_says_it_is_well_and_lost_its_way_is_back_within_20_s(
    small: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, port = small
    search = "/readyz?timeout_ms=9"
    time.sleep(5)  # the watchdog has seen it well
    assert (asked(port, "/-/healthz"), asked(port, search)) == (200, 200)
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"lost\n"
    assert (asked(port, "/-/healthz"), asked(port, search)) == (200, 404)
    started = time.monotonic()
    while asked(port, search) != 200:
        assert time.monotonic() < started + 20
        time.sleep(0.2)
