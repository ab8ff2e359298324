"""A load on a search endpoint: a process of its own asks it over HTTP and notes when each answer came.

    python bench/load.py http://127.0.0.1:8000/search --connections 32 --seconds 10
    python bench/load.py http://127.0.0.1:8000/search --rate 200 --seconds 10

Closed loop: so many connections, each of which asks anew as soon as it is answered. Open loop (`rate`): requests
fall due at random (a Poisson process), whatever the answers do, and a latency counts from when its request fell
due, so that a server that stands still cannot hide it (no coordinated omission). Nothing is asked twice: a failure
is an outcome too. In Python:

    running = load.start(Load(url, rate=200, seconds=60))
    ...                                         # kill something
    outcomes = running.wait()                   # times on the clock of time.monotonic(), of any process here

Knows nothing of what answers, but what is right where that is told (`Load.right`).
"""

import asyncio
import gc
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import uvloop
from numpy.typing import NDArray

HERE = Path(__file__).parent
REAL_QUERIES = HERE.parents[1] / "shared" / "data" / "wands_queries" / "query.csv"
OK, BROKEN, HUNG, WRONG = 200, 0, -1, -2  # statuses; ours: connection broke, none in time, answered but not right
ROW = [("due", "f8"), ("sent", "f8"), ("done", "f8"), ("status", "i2"), ("degraded", "?")]
PERCENTILES = (50, 90, 99, 99.9)
IDLE_S = 1.0  # a connection that has not been used for so long may have been closed at the other end
DEGRADED = re.compile(rb'"degraded": ?true')
LENGTH = re.compile(rb"content-length: *(\d+)")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What is asked, how often, and for how long."""

    url: str
    queries: Sequence[str] = ("red striped mug",)
    connections: int = 32  # of an open loop: at most so many
    rate: float | None = None  # requests a second; None: closed loop
    seconds: float = 10
    k: int = 10
    patience_s: float = 10  # after which a request counts as hung
    seed: int = 0
    right: str = ""  # a file by which each answer is held: see `Right`


@dataclass(frozen=True)
class Outcomes:
    """What became of requests: when each was due, sent and done (seconds), and its status."""

    rows: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def due(self, start: float, stop: float) -> "Outcomes":
        """Those that were due in a span of time."""
        return Outcomes(self.rows[(self.rows["due"] >= start) & (self.rows["due"] < stop)])

    def done(self, start: float, stop: float) -> "Outcomes":
        """Those that were done in a span of time."""
        return Outcomes(self.rows[(self.rows["done"] >= start) & (self.rows["done"] < stop)])

    @property
    def ok(self) -> "Outcomes":
        """Those that were answered, degraded or not."""
        return Outcomes(self.rows[self.rows["status"] == OK])

    @property
    def latencies_ms(self) -> Floats:
        """From when each was due until it was done."""
        latencies: Floats = 1000 * (self.rows["done"] - self.rows["due"])
        return latencies

    def counts(self) -> dict[str, Any]:
        """Count what became of them; errors by status."""
        status, count = np.unique(self.rows["status"], return_counts=True)
        found = dict(zip(status.tolist(), count.tolist(), strict=True))
        ok, hung, wrong = found.pop(OK, 0), found.pop(HUNG, 0), found.pop(WRONG, 0)
        errors = {"broken" if status == BROKEN else str(status): count for status, count in found.items()}
        degraded = int(self.rows["degraded"].sum())
        return {
            "requests": len(self),
            "ok": ok,
            "degraded": degraded,
            "hung": hung,
            "wrong": wrong,
            "errors": errors,
        }


def percentiles(latencies_ms: Floats) -> dict[str, float]:
    """The percentiles of latencies, p50 to p99.9."""
    if not len(latencies_ms):
        return {}
    found = np.percentile(latencies_ms, PERCENTILES).tolist()
    return {f"p{p:g}": round(value, 3) for p, value in zip(PERCENTILES, found, strict=True)}


def corrected(latencies_ms: Floats, every_ms: float) -> Floats:
    """Add to a closed loop's latencies those of the requests that it did not make while it waited.

    As HdrHistogram does: had a connection gone on asking `every_ms`, these would have waited for the rest of it.
    """
    missed = np.maximum(latencies_ms / every_ms, 1).astype(np.int64) - 1
    of = np.repeat(latencies_ms, missed)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(missed) - missed, missed) + 1
    return np.concatenate([latencies_ms, of - nth * every_ms])


def told(outcomes: Outcomes, load: Load, start: float, stop: float) -> dict[str, Any]:
    """Count what became of a load's requests in a span of time: outcomes, answers a second, latencies."""
    due, answered = outcomes.due(start, stop), len(outcomes.ok.done(start, stop))
    latencies_ms = due.ok.latencies_ms
    found = due.counts() | {"ok_a_second": round(answered / (stop - start), 1)} | percentiles(latencies_ms)
    if load.rate is None and answered:
        every_ms = 1000 * load.connections * (stop - start) / answered
        found["corrected"] = percentiles(corrected(latencies_ms, every_ms))
    return found


def queries() -> list[str]:
    """Real shoppers' queries where they are at hand, else those of the shop that the demo draws."""
    if REAL_QUERIES.exists():
        lines = REAL_QUERIES.read_text(encoding="utf-8").splitlines()[1:]
        return [line.split("\t")[1] for line in lines]
    from askew import drawn

    return [query.text for query in drawn.plan(num_items=600).queries]


# --- a load in the background --------------------------------------------------------------------


class Running:
    """A load under way in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.started = bool(process.stdout.readline())  # it tells when it begins

    def stop(self) -> Outcomes:
        """Let it ask no more, and return what came of it until now."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> Outcomes:
        """Wait for its end."""
        written, _ = self._process.communicate()
        if not self.started or self._process.returncode:
            raise RuntimeError(f"the load ended with exit code {self._process.returncode}")
        return Outcomes(np.load(io.BytesIO(written)))


def start(load: Load) -> Running:
    """Start a load; returns when it begins."""
    command = [sys.executable, "-c", "import load; load.child()"]
    process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
    process.stdin.flush()
    return Running(process)


def child() -> None:
    """Read a load, do it, and write what came of it."""
    load = Load(**json.loads(sys.stdin.buffer.readline()))
    gc.disable()  # a pause of ours would look like one of the server's
    columns = np.array(uvloop.run(Asking(load).run())).reshape(-1, len(ROW)).T
    rows = np.empty(columns.shape[1], dtype=ROW)
    for (name, _), column in zip(ROW, columns, strict=True):
        rows[name] = column
    np.save(sys.stdout.buffer, rows)


# --- in that process -----------------------------------------------------------------------------


class Right:
    """What each release must find, by which answers are held.

    The file is JSON: "right" has, for each version, each query and each number of shards that answered, the lists
    of ids of which the answer's must be one; "apart" are ids that may change meanwhile, of which nothing is said.
    """

    def __init__(self, path: str) -> None:
        told = json.loads(Path(path).read_bytes())
        self._lists, self._apart = told["right"], {*told["apart"]}

    def holds(self, query: str, k: int, body: bytes) -> bool:
        """Whether an answer has k hits, in order, and they are those of the release that it names."""
        told = json.loads(body)
        hits, scores = [hit["item_id"] for hit in told["hits"]], [hit["score"] for hit in told["hits"]]
        said = [item_id for item_id in hits if item_id not in self._apart]
        lists = self._lists.get(told["model"]["version"], {}).get(query, {})
        some = lists.get(str(told["coverage"]["answered"]), [])
        ordered = scores == sorted(scores, reverse=True)
        return ordered and len({*hits}) == k and any(said == one[: len(said)] for one in some)


class Answered(NamedTuple):
    """An HTTP response."""

    status: int
    body: bytes
    closing: bool  # the connection, after it


class Connection(asyncio.Protocol):
    """A connection that is kept, with one request under way at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = bytearray()
        self._answer: asyncio.Future[Answered] | None = None
        self.open, self.used = False, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note."""
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        """Take what came, and answer when it is whole."""
        self._received += data
        if (found := parsed(bytes(self._received))) is None:
            return
        self._received.clear()
        self.open = self.open and not found.closing
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(found)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever waits."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("closed before the answer"))

    async def ask(self, request: bytes) -> Answered:
        """Send a request and wait for its answer. Raises OSError when the connection breaks."""
        if not self.open:
            raise ConnectionResetError("closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close it at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()


def parsed(data: bytes) -> Answered | None:
    """Read a response; None until it is whole."""
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return None
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        if not body.endswith(b"0\r\n\r\n"):
            return None
    elif (length := LENGTH.search(lowered)) and len(body) < int(length[1]):
        return None
    return Answered(int(head[9:12]), body, b"connection: close" in lowered)


class Asking:
    """A load while it is done."""

    def __init__(self, load: Load) -> None:
        self._load = load
        address = urlsplit(load.url)
        self._host, self._port = str(address.hostname), address.port or 80
        self._requests = itertools.cycle(list(_requests(load, address.path or "/", address.netloc)))
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(load.connections)
        self._rows = array("d")  # of an hour there are millions
        self._right = Right(load.right) if load.right else None
        self._end = 0.0

    async def run(self) -> "array[float]":
        """Ask until the time is over or SIGTERM comes, then wait for what is under way."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        self._end = time.monotonic() + self._load.seconds
        print("begun", flush=True)
        await (self._closed() if self._load.rate is None else self._open(self._load.rate))
        return self._rows

    def _stop(self) -> None:
        self._end = 0.0

    async def _closed(self) -> None:
        async def client() -> None:
            while (now := time.monotonic()) < self._end:
                if not await self._one(now):
                    await asyncio.sleep(0.01)  # a server that is down is not asked a million times

        await asyncio.gather(*(client() for _ in range(self._load.connections)))

    async def _open(self, rate: float) -> None:
        random = np.random.default_rng(self._load.seed)
        under_way: set[asyncio.Task[bool]] = set()
        due = time.monotonic()
        while (due := due + random.exponential(1 / rate)) < self._end:
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._one(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _one(self, due: float) -> bool:
        """Ask once; returns whether there was an answer."""
        sent, status, degraded = due, HUNG, False
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._load.patience_s + due - time.monotonic()), self._room:
                connection = await self._connection()
                sent = time.monotonic()
                query, request = next(self._requests)
                answer = await connection.ask(request)
                status, degraded = self._judged(query, answer), DEGRADED.search(answer.body) is not None
        except OSError as error:  # TimeoutError is one
            status = HUNG if isinstance(error, TimeoutError) else BROKEN
            if connection is not None:
                connection.close()
        done = time.monotonic()
        self._rows.extend((due, sent, done, status, degraded))
        if connection is not None and connection.open:
            connection.used = done
            self._idle.append(connection)
        return status not in (BROKEN, HUNG)

    def _judged(self, query: str, answer: Answered) -> int:
        if answer.status != OK or self._right is None or self._right.holds(query, self._load.k, answer.body):
            return answer.status
        return WRONG

    async def _connection(self) -> Connection:
        """Take the connection that was used last, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open and time.monotonic() - connection.used < IDLE_S:
                return connection
            connection.close()
        made = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        return made[1]


def _requests(load: Load, path: str, host: str) -> Iterator[tuple[str, bytes]]:
    order = np.random.default_rng(load.seed).permutation(len(load.queries))
    for number in order.tolist():
        body = json.dumps({"query": load.queries[number], "k": load.k}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        yield load.queries[number], f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


if __name__ == "__main__":
    import typer

    def main(
        url: str,
        connections: Annotated[int, typer.Option(help="of an open loop: at most so many")] = 32,
        rate: Annotated[float | None, typer.Option(help="requests a second; without it a closed loop")] = None,
        seconds: float = 10,
        warm: Annotated[float, typer.Option(help="seconds before these that do not count")] = 2,
        k: int = 10,
    ) -> None:
        """Ask an endpoint, and print what came of it as one line of JSON."""
        load = Load(url, queries(), connections, rate, warm + seconds, k)
        running = start(load)
        began = time.monotonic() + warm
        print(json.dumps(told(running.wait(), load, began, began + seconds)))

    typer.run(main)
