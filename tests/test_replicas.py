"""Replicas that come, go, and have unequal work, as a caller over sockets finds them."""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from askew import replicas, wire
from askew.replicas import Replicas, Wired
from askew.wire import Address, GoneError, Listener

LISTENERS: list[Listener] = []


class Replica:
    """Tells its name, after some time."""

    def __init__(self, name: str, after_s: float = 0) -> None:
        self.name, self.after_s, self.asked = name, after_s, 0
        self.listener = Listener({"name": self.answer})
        LISTENERS.append(self.listener)

    async def answer(self) -> str:
        self.asked += 1
        await asyncio.sleep(self.after_s)
        return self.name


class Handle:
    """Tells where its replicas answer, one after another."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas, self.asked = list(replicas), 0

    async def __call__(self) -> Address:
        self.asked += 1
        await asyncio.sleep(0.01)
        if not self.replicas:
            raise RuntimeError("none is up")
        return await self.replicas[self.asked % len(self.replicas)].listener.address("127.0.0.1")


class Silent(Handle):
    """Does not answer when it is asked for the second time, as if the network had been cut."""

    async def __call__(self) -> Address:
        if self.asked == 1:
            self.asked += 1
            await asyncio.sleep(1000)
        return await super().__call__()


def asker(handle: Callable[[], Awaitable[Address]], every_s: float = 99) -> Callable[[], Awaitable[str]]:
    method = Replicas(handle, every_s).method("name")
    return lambda: method(deadline=asyncio.get_running_loop().time() + 30)


def run(scenario: Any) -> None:
    async def closing() -> None:
        try:
            await asyncio.wait_for(scenario, 30)
        finally:
            while LISTENERS:
                LISTENERS.pop().close()
            await asyncio.sleep(0.01)

    asyncio.run(closing())


def test_many_first_calls_look_for_a_replica_once() -> None:
    async def scenario() -> None:
        handle = Handle(Replica("a"))
        ask = asker(handle)
        assert await asyncio.gather(*(ask() for _ in range(50))) == ["a"] * 50
        assert handle.asked == 1

    run(scenario())


def test_new_replicas_are_found_and_the_least_busy_is_asked() -> None:
    async def scenario() -> None:
        quick, slow = Replica("quick"), Replica("slow", after_s=0.3)
        handle = Handle(quick)
        ask = asker(handle, every_s=0.02)
        assert await ask() == "quick"
        handle.replicas.append(slow)
        while slow.asked < 1:
            await asyncio.gather(ask(), asyncio.sleep(0.03))
        before = quick.asked
        await asyncio.gather(*(ask() for _ in range(2)), *([asyncio.sleep(0.05)]))
        for _ in range(20):
            assert await ask() in ("quick", "slow")
        assert quick.asked > before

        slow.after_s, before = 99, slow.asked
        asked = []
        while slow.asked == before:
            asked.append(asyncio.ensure_future(ask()))
            await asyncio.sleep(0.01)
        assert [await ask() for _ in range(20)] == ["quick"] * 20  # while the slow one has something to do
        for one in asked:
            one.cancel()

    run(scenario())


def test_one_that_dies_is_left_and_another_found() -> None:
    async def scenario() -> None:
        first, second = Replica("first"), Replica("second")
        handle = Handle(first)
        found = Replicas(handle, 99)
        method = found.method("name")
        assert await method(deadline=asyncio.get_running_loop().time() + 30) == "first"
        handle.replicas = [second]
        found.close()
        await asyncio.sleep(0.01)
        assert await method(deadline=asyncio.get_running_loop().time() + 30) == "second"

    run(scenario())


def test_one_that_was_silent_is_asked_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "DOUBT_S", 0.5)

    async def scenario() -> None:
        well, silent = Replica("well"), Replica("silent", after_s=99)
        handle = Handle(well, silent)
        ask = asker(handle, every_s=0.02)

        async def answer() -> str:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(ask(), 0.1)
            return ""

        while not (await answer() and silent.asked):  # both are known, and this one has been given up on
            pass
        well.after_s = 0.01
        before = silent.asked
        answers = await asyncio.gather(*(ask() for _ in range(20)))
        assert (answers, silent.asked) == (["well"] * 20, before)
        silent.after_s = 0
        await asyncio.sleep(0.6)
        assert {await ask() for _ in range(40)} == {"well", "silent"}

    run(scenario())


def test_what_the_handle_says_is_passed_on_when_there_is_nobody_else() -> None:
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="none is up"):
            await asker(Handle())()
        gone = Replica("gone")
        await gone.listener.address("127.0.0.1")
        gone.listener.close()
        await asyncio.sleep(0.01)
        with pytest.raises((GoneError, IndexError)):
            await asker(Handle(gone))()

    run(scenario())


def test_those_that_are_known_are_asked_though_the_handle_fails() -> None:
    async def scenario() -> None:
        handle = Handle(Replica("a"))
        ask = asker(handle, every_s=0)
        assert await ask() == "a"
        handle.replicas.clear()
        for _ in range(10):
            assert await ask() == "a"
            await asyncio.sleep(0.002)
        assert handle.asked > 1

    run(scenario())


def test_a_deployment_tells_where_it_answers_and_how_much_it_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deployment(Wired):
        answers = ("double",)

        async def double(self, number: int) -> int:
            return 2 * number

    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    ticks: Iterator[int] = itertools.count()

    async def scenario() -> None:
        deployment = Deployment()
        LISTENERS.append(deployment._listener)
        assert await deployment.address() == await deployment.address()
        double = Replicas(deployment.address).method("double")
        deadline = asyncio.get_running_loop().time() + 30
        assert [await double(next(ticks), deadline=deadline) for _ in range(3)] == [0, 2, 4]
        [(name, ongoing)] = (await deployment.record_autoscaling_stats()).items()
        assert name == "running_requests"
        assert 0 < ongoing < 1

    run(scenario())


def test_a_look_that_the_network_swallowed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_WITHIN_S", 0.3)

    async def scenario() -> None:
        one, other = Replica("one"), Replica("other")
        ask = asker(handle := Silent(other, one), 0)
        assert await ask() == "one"
        assert await ask() == "one"  # meanwhile another is looked for, in vain
        one.listener.close()
        handle.replicas = [other]
        await asyncio.sleep(0.05)
        with pytest.raises(GoneError, match=r"within 0\.3 s"):
            await ask()
        assert await ask() == "other"

    run(scenario())
