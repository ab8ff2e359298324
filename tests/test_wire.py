"""Calls over sockets: what goes over, who may call, and what happens when an end is gone, late, or strange."""

import asyncio
import contextlib
import math
import pickle
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from askew import wire
from askew.wire import HEAD, KEY_BYTES, Address, Connection, GoneError, Listener, RemoteError, packed, unpacked


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a scenario on the loop of the standard library, and on that of Ray Serve."""

    def run(scenario: Callable[["Called"], Coroutine[Any, Any, Any]]) -> Any:
        async def closing() -> Any:
            called = Called()
            try:
                return await asyncio.wait_for(scenario(called), 30)
            finally:
                called.close()
                await asyncio.sleep(0.01)

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(closing())

    return run


class Called:
    """Methods, and how often they were called."""

    def __init__(self) -> None:
        self.times = 0
        self.connections: list[Connection] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.listener = Listener({"double": self.double, "fail": self.fail, "sleep": self.sleep})

    async def double(self, vectors: Any) -> Any:
        self.times += 1
        await asyncio.sleep(0.01)
        return vectors * 2

    async def fail(self) -> None:
        raise ValueError("no")

    async def sleep(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def open(self) -> Connection:
        self.connections.append(await Connection.open(await self.listener.address("127.0.0.1")))
        return self.connections[-1]

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        host, port, key = await self.listener.address("127.0.0.1")
        reader, writer = await asyncio.open_connection(host, port)
        self.writers.append(writer)
        return reader, writer, key

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.listener.close()
        for one in self.connections:
            one.close()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(plain)
def test_plain_values_go_over_as_they_are(value: Any) -> None:
    assert unpacked(packed(value)) == value


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20), st.integers(1, 3))
def test_arrays_go_over_as_they_are(values: list[float], width: int) -> None:
    rows = np.array(values * width, np.float32).reshape(-1, width)
    [found, numbers] = unpacked(packed((rows, np.arange(5))))
    assert (found.dtype, found.shape, found.tolist()) == (np.float32, rows.shape, rows.tolist())
    assert numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("odd", [object(), np.array([object()]), {1, 2}, np.float64(1).reshape(1)])
def test_what_is_neither_is_refused(odd: Any) -> None:
    with pytest.raises(TypeError, match="wanted plain values or arrays"):
        packed([odd])


def test_a_pickle_is_not_loaded_and_an_array_of_objects_neither() -> None:
    with pytest.raises(ValueError, match="extra data"):
        unpacked(pickle.dumps([print]))
    odd = packed(wire.msgpack.ExtType(wire.ARRAY, packed(("|O", (1,), b"12345678"))))
    with pytest.raises(ValueError, match="an array is of <f4, <i8; found"):
        unpacked(odd)
    with pytest.raises(ValueError, match="an array has the number 1; found 7"):
        unpacked(packed(wire.msgpack.ExtType(7, b"")))


def test_of_many_calls_at_once_each_gets_its_own_answer(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        connection = await called.open()
        asked = [connection.ask("double", np.full((n, 2), n, np.float32), left_s=30) for n in range(200)]
        for n, answer in enumerate(await asyncio.gather(*asked)):
            assert answer.tolist() == [[2 * n, 2 * n]] * n
        assert connection.under_way == 0
        large = np.ones((200_000, 8), np.float32)
        assert (await connection.ask("double", large, left_s=30)).sum() == 2 * large.size

    run(scenario)


def test_a_call_that_fails_says_so_and_the_others_go_on(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        connection = await called.open()
        asked = [connection.ask("fail", left_s=30), connection.ask("sleep", 0.01, left_s=30)]
        asked += [connection.ask("absent", left_s=30), connection.ask("double", "three", 4, left_s=30)]
        failed, slept, absent, odd = await asyncio.gather(*asked, return_exceptions=True)
        assert (str(failed), slept, str(absent)) == ("ValueError: no", 0.01, "KeyError: 'absent'")
        assert isinstance(odd, RemoteError)
        assert str(odd).startswith("TypeError")

    run(scenario)


def test_without_the_key_nothing_is_answered(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "KEY_WITHIN_S", 0.2)

    async def scenario(called: Called) -> None:
        host, port, key = await called.listener.address("127.0.0.1")
        for wrong in (bytes(KEY_BYTES), key[::-1]):
            connection = await Connection.open(Address(host, port, wrong))
            with pytest.raises(GoneError):
                await connection.ask("double", 1, left_s=30)
        silent, writer, _ = await called.raw()
        writer.write(key[:-1])
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await silent.readexactly(1)
        assert called.times == 0

    run(scenario)


@pytest.mark.parametrize(
    "frame",
    [
        HEAD.pack(wire.MAX_BYTES + 1, 1, 0),
        HEAD.pack(3, 1, 0) + b"\xc1\xc1\xc1",
        HEAD.pack(1, 1, 0) + packed(5),
        HEAD.pack(len(pickle.dumps(print)), 1, 0) + pickle.dumps(print),
    ],
    ids=["too large", "no MessagePack", "no call", "pickle"],
)
def test_a_strange_frame_ends_its_connection_alone(run: Callable[..., Any], frame: bytes) -> None:
    async def scenario(called: Called) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        other = await called.open()
        reader, writer, key = await called.raw()
        writer.write(key + frame)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        assert await other.ask("double", 4, left_s=30) == 8

    run(scenario)


def test_a_frame_may_come_in_any_pieces(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        reader, writer, key = await called.raw()
        call = packed(("double", (21,), 30.0, 0.0, {}))
        for byte in key + (HEAD.pack(len(call), 7, 0) + call) * 2:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        for _ in range(2):
            size, number, kind = HEAD.unpack(await reader.readexactly(HEAD.size))
            assert (number, kind, unpacked(await reader.readexactly(size))) == (7, wire.ANSWERED, 42)

    run(scenario)


def test_what_nobody_waits_for_any_more_is_not_done(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        connection = await called.open()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.ask("double", 1, left_s=-0.1), 0.2)
        assert (called.times, connection.under_way) == (0, 0)
        assert await connection.ask("double", 1, left_s=30) == 2

    run(scenario)


def test_an_end_that_is_gone_ends_the_calls(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        connection = await called.open()
        calls = [asyncio.ensure_future(connection.ask("sleep", 99, left_s=99)) for _ in range(3)]
        await asyncio.sleep(0.05)
        connection.close()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [GoneError] * 3
        assert connection.closed
        with pytest.raises(GoneError, match="closed"):
            await connection.ask("double", 1, left_s=30)

    run(scenario)


def test_a_connection_that_is_silent_is_given_up_with_the_call(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(called: Called) -> None:
        talking, silent = await called.open(), await called.open()

        async def talk() -> None:
            while True:
                await talking.ask("sleep", 0.01, left_s=30)

        talk_ = asyncio.ensure_future(talk())
        slow = [asyncio.wait_for(one.ask("sleep", 99, left_s=99), 0.3) for one in (talking, silent)]
        assert [type(e) for e in await asyncio.gather(*slow, return_exceptions=True)] == [TimeoutError] * 2
        await asyncio.sleep(0)
        assert (talking.closed, silent.closed) == (False, True)
        talk_.cancel()

    monkeypatch.setattr(wire, "SILENT_S", 0.2)
    run(scenario)


def test_how_many_calls_were_under_way(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> float:
        connection = await called.open()
        called.listener.ongoing()
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(connection.ask("sleep", 0.5, left_s=30) for _ in range(4)))
        await connection.ask("sleep", 0, left_s=30)
        seconds = asyncio.get_running_loop().time() - started
        return called.listener.ongoing() * seconds

    assert math.isclose(run(scenario), 4 * 0.5, rel_tol=0.3)


ODD = [
    b"\xc7\x01\x01\x05", b"\x81\x90\x01", b"\xc1", packed(wire.msgpack.ExtType(1, packed(("<f4", {"a": 1}, b"")))),
    packed(wire.msgpack.ExtType(1, packed(("<f4", [1], "abcd")))), b"\x91" * 5000,
]  # fmt: skip


@given(st.binary(max_size=40) | st.sampled_from(ODD))
@example(ODD[0])
@example(ODD[1])
@example(ODD[3])
@example(ODD[4])
def test_any_bytes_are_values_or_refused(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        packed(unpacked(payload))


def test_an_answer_that_cannot_be_read_fails_its_call_at_once(run: Callable[..., Any]) -> None:
    async def scenario(called: Called) -> None:
        async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            called.writers.append(writer)
            await reader.readexactly(KEY_BYTES + HEAD.size)
            writer.write(HEAD.pack(1, 1, wire.ANSWERED) + b"\xc1")

        server = await asyncio.start_server(odd, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        called.connections.append(await Connection.open(Address(host, port, bytes(KEY_BYTES))))
        with pytest.raises(RemoteError, match="cannot be read"):
            await asyncio.wait_for(called.connections[-1].ask("double", 1, left_s=30), 5)
        server.close()

    run(scenario)
