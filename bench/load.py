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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
TICK_S = 0.001  # of uvloop's timers
SWEEP_S = 0.05  # between looks for what hangs
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


class Asked(NamedTuple):
    """A request under way."""

    due: float
    sent: float
    query: str


class Connection(asyncio.Protocol):
    """A connection that is kept, with one request under way at a time, of which it tells `over` what came."""

    def __init__(self, over: "Callable[[Connection, Answered | None], None]") -> None:
        self._over = over
        self._transport: Any = None
        self._received = b""
        self.asked: Asked | None = None
        self.open, self.used = False, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note."""
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        """Take what came, and tell it when it is whole."""
        self._received += data
        if (found := parsed(self._received)) is None:
            return
        self._received = b""
        self.open = self.open and not found.closing
        if self.asked is not None:
            self._over(self, found)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell that no answer will come."""
        self.open = False
        if self.asked is not None:
            self._over(self, None)

    def ask(self, asked: Asked, request: bytes) -> None:
        """Send a request."""
        self.asked = asked
        self._transport.write(request)

    def close(self) -> None:
        """Close it at once."""
        self.open, self.asked = False, None
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
    """A load while it is done: callbacks alone, for the processor that it takes is not left to what answers."""

    def __init__(self, load: Load) -> None:
        self._load = load
        address = urlsplit(load.url)
        self._host, self._port = str(address.hostname), address.port or 80
        self._requests = itertools.cycle(list(_requests(load, address.path or "/", address.netloc)))
        self._gaps = np.random.default_rng(load.seed)
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._connecting: set[asyncio.Task[None] | None] = set()
        self._due: deque[float] = deque()  # beyond the connections that there may be
        self._next = self._end = 0.0  # when another one falls due in an open loop, and when the last one does
        self._rows = array("d")  # of an hour there are millions
        self._right = Right(load.right) if load.right else None

    async def run(self) -> "array[float]":
        """Ask until the time is over or SIGTERM comes, then wait for what is under way."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        now = time.monotonic()
        self._end = now + self._load.seconds
        print("begun", flush=True)
        if self._load.rate is None:
            for _ in range(self._load.connections):
                self._ask(now)
        else:
            self._next = now
            self._fall_due(1 / self._load.rate)
        while time.monotonic() < self._end or self._busy or self._connecting or self._due:
            await asyncio.sleep(SWEEP_S)
            self._give_up()
        return self._rows

    def _stop(self) -> None:
        self._end = 0.0

    def _fall_due(self, every_s: float) -> None:
        """Ask all that is due in an open loop, to the tick of the loop's clock, and come again for the next."""
        while self._next < (now := time.monotonic()) + TICK_S / 2 and self._next < self._end:
            self._ask(self._next)
            self._next += self._gaps.exponential(every_s)
        if self._next < self._end:
            asyncio.get_running_loop().call_later(max(self._next - now, TICK_S), self._fall_due, every_s)

    def _ask(self, due: float) -> None:
        """Ask, if there is a connection for it, or may be."""
        if len(self._busy) + len(self._connecting) >= self._load.connections:
            self._due.append(due)
            return
        query, request = next(self._requests)
        asked = Asked(due, time.monotonic(), query)
        while self._idle:  # that which was used last
            connection = self._idle.pop()
            if connection.open and asked.sent - connection.used < IDLE_S:
                self._send(connection, asked, request)
                return
            connection.close()
        self._connecting.add(asyncio.get_running_loop().create_task(self._connect(asked, request)))

    def _send(self, connection: Connection, asked: Asked, request: bytes) -> None:
        self._busy.add(connection)
        connection.ask(asked, request)

    async def _connect(self, asked: Asked, request: bytes) -> None:
        try:
            async with asyncio.timeout(self._load.patience_s + asked.due - time.monotonic()):
                _, made = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self._over), self._host, self._port
                )
        except OSError as error:  # TimeoutError is one
            self._connecting.discard(asyncio.current_task())
            self._note(asked, HUNG if isinstance(error, TimeoutError) else BROKEN)
        else:
            self._connecting.discard(asyncio.current_task())
            self._send(made, asked, request)

    def _over(self, connection: Connection, answer: Answered | None) -> None:
        """Note what came of a request, and let the connection go on."""
        asked, connection.asked = connection.asked, None
        self._busy.discard(connection)
        if connection.open:
            connection.used = time.monotonic()
            self._idle.append(connection)
        if answer is None:
            self._note(asked, BROKEN)
        else:
            degraded = DEGRADED.search(answer.body) is not None
            self._note(asked, self._judged(asked.query, answer), degraded)

    def _note(self, asked: Asked, status: int, degraded: bool = False) -> None:
        """Note an outcome; where one waits, or in a closed loop, it is time to ask another."""
        now = time.monotonic()
        self._rows.extend((asked.due, asked.sent, now, status, degraded))
        if self._load.rate is None and now < self._end:
            if status in (BROKEN, HUNG):  # a server that is down is not asked a million times
                asyncio.get_running_loop().call_later(0.01, lambda: self._ask(time.monotonic()))
            else:
                self._ask(now)
        elif self._due:
            self._ask(self._due.popleft())

    def _judged(self, query: str, answer: Answered) -> int:
        if answer.status != OK or self._right is None or self._right.holds(query, self._load.k, answer.body):
            return answer.status
        return WRONG

    def _give_up(self) -> None:
        """Count as hung what has not been answered in time."""
        late = (now := time.monotonic()) - self._load.patience_s
        while self._due and self._due[0] < late:  # these first: what follows makes room for others
            due = self._due.popleft()
            self._rows.extend((due, due, now, HUNG, False))
        for connection in [one for one in self._busy if one.asked is not None and one.asked.due < late]:
            asked = connection.asked
            self._busy.discard(connection)
            connection.close()
            self._note(asked, HUNG)


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
