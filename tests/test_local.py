"""What starts and ends on this machine: only what is ours, and only where there is room."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from askew import local, messages
from askew.errors import MachineError


def a_stack(home: Path, instance: str) -> local.Stack:
    ports = local.Ports(**dict(zip(local.PURPOSES, local.free_ports(4), strict=True)))
    return local.Stack(instance=instance, home=home, ports=ports)


@contextmanager
def sleeping(environment: dict[str, str], script: str = "") -> Iterator[psutil.Process]:
    command = [sys.executable, "-c", f"import time, signal\n{script}\nprint(1, flush=True)\ntime.sleep(60)"]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it has started
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate()


def test_stop_ends_its_own_and_no_other(tmp_path: Path) -> None:
    ours = a_stack(tmp_path, "aaaa0000")
    (tmp_path / "local.json").write_text(ours.model_dump_json())
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    # a child without the mark, like one that wrote its title over its environment
    parent = "import subprocess; subprocess.Popen(['sleep', '60'], env={})"
    with (
        sleeping({local.INSTANCE: "aaaa0000"}, parent) as one,
        sleeping({local.INSTANCE: "aaaa0000"}, deaf) as two,
        sleeping({local.INSTANCE: "bbbb1111"}) as other,
        sleeping({}) as stranger,
    ):
        [child] = one.children()
        assert local.stop(tmp_path) == 3
        for ended in (one, two, child):
            assert not ended.is_running() or ended.status() == psutil.STATUS_ZOMBIE
        for left in (other, stranger):
            assert left.status() != psutil.STATUS_ZOMBIE
    assert local.find(tmp_path) is None


def test_stop_where_nothing_runs(tmp_path: Path) -> None:
    assert local.stop(tmp_path) == 0


@pytest.mark.parametrize("name", ["http", "mlflow", "dashboard", "gcs"])
def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, name: str) -> None:
    with socket.socket() as holder:
        holder.bind((local.HOST, 0))
        holder.listen()
        taken, ports = holder.getsockname()[1], a_stack(tmp_path, "").ports
        with pytest.raises(MachineError) as caught:
            local.start(tmp_path, ports.model_copy(update={name: taken}))
    assert f"wanted port {taken} free for {local.PURPOSES[name]}" in str(caught.value)
    assert f"found process {os.getpid()}" in str(caught.value)
    assert f"make demo {name.upper()}_PORT=" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_two_parts_on_one_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="four different ports"):
        local.start(tmp_path, local.Ports(http=7001, mlflow=7001))


def test_what_a_process_inherits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of some other cluster
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1")
    stack = a_stack(tmp_path, "cccc2222")
    assert "RAY_ADDRESS" not in stack.environment
    assert stack.environment["MLFLOW_TRACKING_URI"] == stack.mlflow
    assert stack.environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert stack.environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_a_damaged_note_is_no_stack(tmp_path: Path) -> None:
    (tmp_path / "local.json").write_text('{"instance": ')
    assert local.find(tmp_path) is None


def test_members_sees_newborns(tmp_path: Path) -> None:
    assert local.members("dddd3333") == []
    with sleeping({local.INSTANCE: "dddd3333"}) as process:
        deadline = time.monotonic() + 5
        while not local.members("dddd3333") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert local.members("dddd3333") == [process]


def test_the_stacks_own_folder_does_not_travel_with_a_job(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "runtime_env.yaml").write_text("working_dir: .\nexcludes: [demo]\n")
    stack = a_stack(tmp_path / "runs" / "mine", "aaaa0000")
    stack.home.mkdir(parents=True)
    written = yaml.safe_load(local._runtime_env(stack, tmp_path).read_text())
    assert written == {"working_dir": ".", "excludes": ["demo", "/runs/mine"]}


SERVE = ("x-request-disconnect-disabled", "x-request-timeout-seconds")


async def _asked(port: int, count: int) -> list[bytes]:
    """What so many requests at once are answered, by a server that answers none of them."""

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        try:
            async with asyncio.timeout(local.QUEUE_S + 2):
                return await reader.read()
        except TimeoutError:
            return b""
        finally:
            writer.close()

    return await asyncio.gather(*(one() for _ in range(count)))


@contextmanager
def proxied(folder: Path, backend: int, log: int) -> Iterator[int]:
    """HAProxy before a port, as the stack starts it: on which port it is."""
    stack = a_stack(folder, uuid.uuid4().hex[:8])
    try:
        script = stack.serving()["RAY_SERVE_HAPROXY_BINARY_PATH"]
        [port] = local.free_ports(1)
        config = folder / "haproxy.cfg"
        config.write_text(  # of Ray Serve's own the lines that the script changes, and what logs
            f"global\n    log 127.0.0.1:{log} local0 info\n"
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
            f"    log global\n    option httplog\n    errorfile 503 {folder}/500.http\n"
            f"frontend http_frontend\n    bind *:{port}\n    default_backend app\n"
            f"backend app\n    server one 127.0.0.1:{backend} check inter 60s\n"
        )
        proxy = subprocess.Popen([script, "-f", str(config), "-db"])
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield port
        finally:
            proxy.kill()
            proxy.wait()
    finally:
        shutil.rmtree(stack.temporary)


def test_what_waits_too_long_before_an_ingress_is_refused_in_our_words(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(512)
        with proxied(tmp_path, deaf.getsockname()[1], log=9) as port:
            answers = asyncio.run(_asked(port, local.AT_ONCE + 7))
    refused = [one for one in answers if one]
    assert len(refused) == 7  # what was passed on has no answer yet
    head, _, body = refused[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head
    assert messages.Failure.model_validate_json(body).error.code == "unavailable"


def test_serve_watches_no_search_and_writes_no_line_of_a_request(tmp_path: Path) -> None:
    class Backend(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told = {name: self.headers[name] for name in SERVE if name in self.headers}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

    with HTTPServer(("127.0.0.1", 0), Backend) as backend, socket.socket(type=socket.SOCK_DGRAM) as log:
        threading.Thread(target=backend.serve_forever, daemon=True).start()
        log.bind(("127.0.0.1", 0))
        with proxied(tmp_path, backend.server_port, log.getsockname()[1]) as port:

            def asked(path: str, **sent: str) -> dict[str, str]:
                answer: dict[str, str] = httpx.post(f"http://127.0.0.1:{port}{path}", headers=sent).json()
                return answer

            of_searches = [asked(path) for path in ("/search", "/search/batch", "/similar", "/shop/search")]
            others = [asked(path) for path in ("/items:upsert", "/facets", "/searches")]
            theirs = asked("/search", **{"x-request-timeout-seconds": "7"})
        backend.shutdown()
        log.setblocking(False)
        lines = []
        with contextlib.suppress(BlockingIOError):
            while True:
                lines.append(log.recv(4096))
    assert of_searches == [dict(zip(SERVE, ("?1", "0"), strict=True))] * 4
    assert others == [{}] * 3
    assert theirs == of_searches[0]
    assert not [line for line in lines if b"HTTP/1.1" in line]
