"""Wire: calls between replicas over a socket of their own.

A call by Ray Serve's handle costs each side a millisecond of processor; one of these costs a tenth of that. A
frame is a head of fixed size and what was asked or answered as MessagePack, arrays of numbers included; nothing
that arrives is run. Who connects shows a key first, which only those get that may ask the replica by other ways.
Knows nothing of what is called, or of how replicas are found.
"""

import asyncio
import hmac
import secrets
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
from numpy.typing import NDArray
from opentelemetry import propagate, trace

HEAD = struct.Struct("<IIB")  # bytes of what follows, number of the call, kind
ASKED, ANSWERED, FAILED = 0, 1, 2
KEY_BYTES, KEY_WITHIN_S = 32, 5.0
MAX_BYTES = 64 << 20  # of a frame
SILENT_S = 1.0  # a call that is given up after hearing nothing for so long gives up its connection
DOUBT_S = 5.0  # so long others are asked first, once a call was given up sooner and nothing came since
ARRAY = 1  # MessagePack's number for an array
DTYPES = ("<f4", "<i8")

tracer = trace.get_tracer("askew")


class GoneError(Exception):
    """The connection ended before the answer came: the replica's process did, or the network."""


class RemoteError(Exception):
    """What was called failed; the text is the error's kind and message."""


class Address(NamedTuple):
    """Where a replica answers, and the key that it wants to see."""

    host: str
    port: int
    key: bytes


class _Framed(asyncio.Protocol):
    """Frames in, frames out."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= HEAD.size:
            size, number, kind = HEAD.unpack_from(buffer)
            if size > MAX_BYTES:
                self.transport.abort()
                return
            if len(buffer) < HEAD.size + size:
                return
            payload = bytes(buffer[HEAD.size : HEAD.size + size])
            del buffer[: HEAD.size + size]
            self.framed(number, kind, payload)

    def framed(self, number: int, kind: int, payload: bytes) -> None:
        """Take a frame."""
        raise NotImplementedError

    def send(self, number: int, kind: int, value: object) -> None:
        """Send a frame."""
        payload = packed(value)
        self.transport.write(HEAD.pack(len(payload), number, kind) + payload)


class Listener:
    """Answers calls of some methods, each of which takes and returns what MessagePack and arrays can hold."""

    def __init__(self, methods: Mapping[str, Callable[..., Awaitable[Any]]]) -> None:
        self.methods, self.key = methods, secrets.token_bytes(KEY_BYTES)
        self._took_s, self._since = 0.0, time.monotonic()
        self._server: asyncio.Server | None = None
        self._opening, self.connections = asyncio.Lock(), set[asyncio.Transport]()

    async def address(self, host: str) -> Address:
        """Listen on a host's address, at the first call; returns where."""
        async with self._opening:
            if self._server is None:
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(lambda: _Answering(self), host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self.key)

    def ongoing(self) -> float:
        """How many calls were under way, as those saw it who called, on the average since this was last asked.

        By Little's law: the seconds that calls took, over the seconds in which they were made.
        """
        now = time.monotonic()
        took_s, since = self._took_s, self._since
        self._took_s, self._since = 0.0, now
        return took_s / max(now - since, 1e-3)

    def took(self, seconds: float) -> None:
        """Note how long calls took those who made them."""
        self._took_s += seconds

    def close(self) -> None:
        """Listen no more, and end what is connected."""
        if self._server is not None:
            self._server.close()
        for transport in self.connections:
            transport.abort()


class _Answering(_Framed):
    """A connection that calls come from."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener, self._keyed = listener, False
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.connections.add(self.transport)
        self._late = asyncio.get_running_loop().call_later(KEY_WITHIN_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if not self._keyed:
            self._buffer += data
            if len(self._buffer) < KEY_BYTES:
                return
            shown, data = bytes(self._buffer[:KEY_BYTES]), bytes(self._buffer[KEY_BYTES:])
            self._buffer.clear()
            self._late.cancel()
            if not hmac.compare_digest(shown, self._listener.key):
                self.transport.abort()
                return
            self._keyed = True
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self.transport)
        self._late.cancel()
        for task in self._tasks:
            task.cancel()

    def framed(self, number: int, kind: int, payload: bytes) -> None:
        method, what, left_s, took_s, traced = unpacked(payload)
        self._listener.took(took_s)
        late = time.monotonic() + left_s
        task = asyncio.get_running_loop().create_task(self._answer(number, method, what, late, traced))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(
        self, number: int, method: str, what: Sequence[Any], late: float, traced: Mapping[str, str]
    ) -> None:
        if time.monotonic() > late:  # nobody waits for it any more
            return
        try:
            call = self._listener.methods[method]
            if traced:
                with tracer.start_as_current_span(method, propagate.extract(traced), trace.SpanKind.SERVER):
                    answer = await call(*what)
            else:
                answer = await call(*what)
            self.send(number, ANSWERED, answer)
        except Exception as error:
            self.send(number, FAILED, f"{type(error).__name__}: {error}")


class Connection(_Framed):
    """A connection that calls go out on, as many at once as wished."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number, self._took_s, self._heard, self._doubted = 0, 0.0, time.monotonic(), 0.0

    @classmethod
    async def open(cls, address: Address) -> "Connection":
        """Connect. Raises OSError."""
        made = await asyncio.get_running_loop().create_connection(cls, address.host, address.port)
        connection = made[1]
        connection.transport.write(address.key)
        return connection

    @property
    def closed(self) -> bool:
        """Whether no call can be made on it any more."""
        return self.transport.is_closing()

    @property
    def under_way(self) -> int:
        """How many calls have no answer yet."""
        return len(self._waiting)

    @property
    def doubtful(self) -> bool:
        """Whether a call was given up on it lately, and nothing was heard since that call was made."""
        return self._heard < self._doubted and time.monotonic() < self._doubted + DOUBT_S

    async def ask(self, method: str, *what: Any, left_s: float) -> Any:
        """Call a method, whose answer nobody wants after `left_s` seconds; when to give up is the caller's to say.

        Raises GoneError, RemoteError.
        """
        if self.closed:
            raise GoneError("the connection is closed")
        self._number = number = (self._number + 1) % (1 << 32)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        traced: dict[str, str] = {}
        propagate.inject(traced)
        started = time.monotonic()
        self.send(number, ASKED, (method, what, left_s, self._took_s, traced))
        self._took_s = 0.0
        try:
            return await answer
        finally:
            now = time.monotonic()
            self._took_s += now - started
            if self._waiting.pop(number, None):
                self._given_up(started, now)

    def _given_up(self, started: float, now: float) -> None:
        """Think of what it means that a call was given up."""
        if self._heard < started:
            self._doubted = now
        if now - max(self._heard, started) > SILENT_S:
            self.transport.abort()  # nothing came meanwhile: as good as gone

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        super().data_received(data)

    def framed(self, number: int, kind: int, payload: bytes) -> None:
        answer = self._waiting.pop(number, None)
        if answer is None or answer.done():
            return
        try:
            told = unpacked(payload)
        except ValueError as error:  # else it would wait for ever: it is not among those that wait any more
            answer.set_exception(RemoteError(f"an answer that cannot be read: {error}"))
            return
        if kind == ANSWERED:
            answer.set_result(told)
        else:
            answer.set_exception(RemoteError(told))

    def connection_lost(self, error: Exception | None) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(GoneError("the connection ended before the answer"))
        self._waiting.clear()

    def close(self) -> None:
        """End it, and with it the calls that are under way."""
        self.transport.abort()


def packed(value: object) -> bytes:
    """Pack plain values and arrays. Raises TypeError for what is neither."""
    found: bytes = msgpack.packb(value, default=_array)
    return found


def unpacked(payload: bytes) -> Any:
    """Unpack what `packed` made, lists for tuples. Raises ValueError for what it did not make."""
    try:
        return msgpack.unpackb(payload, ext_hook=_unpacked, strict_map_key=False)
    except (TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"no packed values: {error}") from error


def _array(value: object) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray) or value.dtype.str not in DTYPES:
        raise TypeError(f"wanted plain values or arrays of {', '.join(DTYPES)}; found {type(value).__name__}")
    return msgpack.ExtType(ARRAY, packed((value.dtype.str, value.shape, value.tobytes())))


def _unpacked(code: int, payload: bytes) -> NDArray[Any]:
    if code != ARRAY:
        raise ValueError(f"an array has the number {ARRAY}; found {code}")
    dtype, shape, data = unpacked(payload)
    if dtype not in DTYPES:
        raise ValueError(f"an array is of {', '.join(DTYPES)}; found {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)
