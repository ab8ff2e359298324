"""The benchmarks' load, against a server that answers, refuses, is late, breaks off or says nothing."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

LATE_S = 0.1


class Server:
    """A server that does with each query what its text says."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.open = self.most_open = 0
        begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(begun)))
        self._thread.start()
        begun.wait()

    async def _run(self, begun: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as listening:
            self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/search"
            begun.set()
            await self._over.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                query = json.loads(await reader.readexactly(length))["query"]
                self.asked.append(query)
                if query == "breaks off":
                    return
                if query == "says nothing":
                    await asyncio.sleep(60)
                if query == "late":
                    await asyncio.sleep(LATE_S)
                status = b"503 Service Unavailable" if query == "refused" else b"200 OK"
                body = json.dumps({"hits": [], "degraded": query == "degraded"}).encode()
                writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: %d\r\n\r\n" % len(body))
                await writer.drain()
                await asyncio.sleep(0)  # head and body come apart
                writer.write(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of a test's own."""
    made = Server()
    yield made
    made.close()


@pytest.fixture
def done(load: Any) -> Callable[..., Any]:
    """Does a load."""
    return lambda *args, **more: load.start(load.Load(*args, **more)).wait()


def test_each_outcome_is_counted_as_what_it_was(server: Server, done: Callable[..., Any]) -> None:
    queries = ["fine", "degraded", "refused", "breaks off", "says nothing"]
    outcomes = done(server.url, queries, connections=2, rate=50, seconds=1, patience_s=0.5)
    counts = outcomes.counts()
    each = {query: server.asked.count(query) for query in queries}
    hung, never_sent = each["says nothing"], len(outcomes) - len(server.asked)
    assert counts["ok"] == each["fine"] + each["degraded"] > 0
    assert counts["degraded"] == each["degraded"] > 0
    assert counts["errors"] == {"503": each["refused"], "broken": each["breaks off"]}
    assert counts["hung"] == hung + never_sent
    assert hung > 0


def test_a_closed_loop_asks_again_as_soon_as_it_is_answered_and_keeps_its_connections(
    server: Server, done: Callable[..., Any]
) -> None:
    outcomes = done(server.url, ["late"], connections=4, seconds=1)
    assert outcomes.counts()["ok"] == len(outcomes) == len(server.asked)
    assert 4 * 6 <= len(outcomes) <= 4 * 11
    assert server.most_open == 4


def test_a_closed_loop_goes_on_after_failures(server: Server, done: Callable[..., Any]) -> None:
    counts = done(server.url, ["breaks off", "fine"], connections=2, seconds=0.5).counts()
    assert counts["ok"] > 10
    assert counts["errors"]["broken"] > 10


def test_an_open_loop_asks_at_its_rate_whatever_the_answers_do(server: Server, done: Callable[..., Any]) -> None:
    outcomes = done(server.url, ["late"], connections=500, rate=400, seconds=1)
    assert len(outcomes) == pytest.approx(400, rel=0.25)
    assert np.diff(outcomes.due(0, np.inf).rows["due"]).std() > 0
    assert (outcomes.latencies_ms > 1000 * LATE_S - 2).all()


def test_the_time_that_a_request_waits_for_its_turn_counts(server: Server, done: Callable[..., Any]) -> None:
    outcomes = done(server.url, ["late"], connections=1, rate=40, seconds=1, patience_s=30)
    assert outcomes.counts()["ok"] == len(outcomes) > 20
    waited = np.sort(outcomes.latencies_ms)
    assert waited[-1] > 1000 * LATE_S * (len(outcomes) - 15)  # each of those before it took so long
    assert server.most_open == 1


def test_who_waits_too_long_is_given_up_and_the_others_keep_their_order(
    server: Server, done: Callable[..., Any]
) -> None:
    outcomes = done(server.url, ["late"], connections=1, rate=100, seconds=2, patience_s=0.5)
    assert outcomes.counts()["hung"] > 50
    sent = np.sort(outcomes.rows[outcomes.rows["sent"] > outcomes.rows["due"]], order="sent")
    assert len(sent) > 10
    assert (np.diff(sent["due"]) > 0).all()
    assert outcomes.latencies_ms.max() < 750


def test_nobody_listening_is_an_outcome(done: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/search"
        counts = done(url, ["fine"], connections=2, rate=50, seconds=0.5).counts()
    assert counts["errors"] == {"broken": counts["requests"]}
    assert counts["requests"] > 5


def test_a_load_that_is_stopped_tells_what_came_of_it(server: Server, load: Any) -> None:
    running = load.start(load.Load(server.url, ["fine"], connections=1, seconds=60))
    time.sleep(0.5)
    before = time.monotonic()
    assert running.stop().counts()["ok"] > 10
    assert time.monotonic() < before + 5
