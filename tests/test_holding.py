"""A replica holds what it is told to: what is live first, others beside it, and none for longer than needed."""

import asyncio
import gc
import threading
import weakref
from typing import Any

import psutil
import pytest
from tests.fakes import FakeSwitch, release

from askew import holding
from askew.holding import Holder, NotHeldError
from askew.releases import Release

OLD, NEW = release(version="1"), release(version="2")


def loaded(one: Release) -> str:
    return f"files of {one.version}"


def holder(switch: Any, load: Any = loaded) -> Holder[str]:
    async def report(*what: Any, deadline: float) -> Any:
        return await switch.report(*what)

    return Holder("encoder", load, report, 0.01)


async def until(true: Any) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


class Slow:
    """Loads a release as soon as it may."""

    def __init__(self) -> None:
        self.may = {one.key: threading.Event() for one in (OLD, NEW)}

    def __call__(self, one: Release) -> str:
        assert self.may[one.key].wait(20)
        return loaded(one)


def test_it_holds_what_is_live_first_and_then_the_others() -> None:
    async def scenario() -> None:
        switch, slow = FakeSwitch(NEW, OLD), Slow()
        switch.live = OLD.key
        one = holder(switch, slow)
        slow.may[OLD.key].set()
        await one.start()
        assert (one[OLD.key], one.orders["serve"]) == ("files of 1", OLD.key)
        with pytest.raises(NotHeldError, match="release 2-i is not in memory here"):
            one[NEW.key]
        slow.may[NEW.key].set()
        await until(lambda: NEW.key in one)
        await until(lambda: set(switch.reports["encoder"][0]) == {OLD.key, NEW.key})
        switch.live = NEW.key
        await until(lambda: one.orders["serve"] == NEW.key)

    asyncio.run(scenario())


def test_it_reports_while_it_loads_and_before_it_is_ready() -> None:
    async def reported(switch: FakeSwitch, *held: str) -> None:
        for _ in range(5):
            switch.reports.clear()
            await until(lambda: switch.reports)
            assert switch.reports["encoder"][0] == [*held]

    async def scenario() -> None:
        switch, slow = FakeSwitch(OLD), Slow()
        one = holder(switch, slow)
        start = asyncio.ensure_future(one.start())
        await reported(switch)
        assert not start.done()
        slow.may[OLD.key].set()
        await start
        switch.releases.append(NEW)
        await reported(switch, OLD.key)
        slow.may[NEW.key].set()
        await until(lambda: NEW.key in one)

    asyncio.run(scenario())


def test_one_that_is_live_by_the_time_it_is_loaded_is_waited_for() -> None:
    async def scenario() -> None:
        switch, slow = FakeSwitch(OLD, NEW), Slow()
        one = holder(switch, slow)
        start = asyncio.ensure_future(one.start())
        await until(lambda: one.orders)
        switch.live = NEW.key
        await until(lambda: one.orders["serve"] == NEW.key)
        slow.may[OLD.key].set()
        await until(lambda: OLD.key in one)
        await asyncio.sleep(0.05)
        assert not start.done()
        slow.may[NEW.key].set()
        await start
        assert NEW.key in one

    asyncio.run(scenario())


def test_what_is_not_told_any_more_goes_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "GRACE_S", 0.2)

    async def scenario() -> None:
        switch = FakeSwitch(OLD, NEW)
        one = holder(switch)
        await one.start()
        await until(lambda: NEW.key in one)
        switch.releases = [NEW]
        switch.live = NEW.key
        await asyncio.sleep(0.1)
        assert OLD.key in one  # searches in it may be under way
        assert switch.reports["encoder"][0] == [NEW.key]  # and yet nothing new may rely on it
        await until(lambda: OLD.key not in one)
        switch.releases = [NEW, OLD]
        await until(lambda: OLD.key in one)

    asyncio.run(scenario())


class Knot:
    """Something that holds itself, as objects do that hand their own methods on."""

    def __init__(self, one: Release) -> None:
        self.release, self.own = one, self.__init__  # type: ignore[misc]


def test_what_has_gone_is_in_memory_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "GRACE_S", 0.05)

    async def scenario() -> None:
        switch = FakeSwitch(OLD, NEW)
        one = holder(switch, Knot)
        await one.start()
        await until(lambda: NEW.key in one)
        kept = weakref.ref(one[NEW.key])
        switch.releases = [OLD]
        await until(lambda: NEW.key not in one)
        assert kept() is None

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()
        gc.unfreeze()


def test_what_has_gone_is_given_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "GRACE_S", 0.05)
    kept: list[bytes] = []

    def load(one: Release) -> list[bytes]:
        pieces = [bytes(2000) for _ in range(100_000)]
        kept.append(bytes(2001))  # comes to lie behind them, so that the allocator keeps the memory to itself
        return pieces

    def held() -> int:
        return psutil.Process().memory_info().rss

    async def scenario() -> None:
        switch = FakeSwitch(OLD, NEW)
        one: Holder[Any] = holder(switch, load)
        await one.start()
        await until(lambda: NEW.key in one)
        before = held()
        switch.releases = [OLD]
        await until(lambda: held() < before - 150e6)

    asyncio.run(scenario())
    gc.unfreeze()


def test_what_cannot_be_loaded_is_told_and_tried_again_when_it_is_told_again() -> None:
    broken = True

    def load(one: Release) -> str:
        if one.version == "2" and broken:
            raise OSError("no such file")
        return loaded(one)

    async def scenario() -> None:
        nonlocal broken
        switch = FakeSwitch(OLD, NEW)
        one = holder(switch, load)
        await one.start()
        await until(lambda: switch.reports["encoder"][1] == {NEW.key: "OSError: no such file"})
        switch.releases, broken = [OLD], False
        await until(lambda: switch.reports["encoder"][1] == {})
        assert NEW.key not in one
        switch.releases = [OLD, NEW]
        await until(lambda: NEW.key in one)

    asyncio.run(scenario())


def test_a_replica_without_what_is_live_is_never_ready() -> None:
    def load(one: Release) -> str:
        raise ValueError("damaged")

    with pytest.raises(RuntimeError, match=r"release 1-i was not loaded: .*ValueError: damaged"):
        asyncio.run(holder(FakeSwitch(OLD), load).start())


def test_it_waits_for_orders_and_keeps_the_last_ones() -> None:
    async def scenario() -> None:
        switch, fails = FakeSwitch(OLD), True

        class Report:
            async def report(self, *what: Any) -> Any:
                if fails:
                    raise ConnectionError("the switch is not there")
                return await switch.report(*what)

        one = holder(Report())
        start = asyncio.ensure_future(one.start())
        await asyncio.sleep(0.1)
        assert not start.done()
        fails = False
        await start
        fails = True
        await asyncio.sleep(0.1)
        assert (one[OLD.key], one.orders["serve"]) == ("files of 1", OLD.key)
        fails = False
        switch.releases.append(NEW)
        await until(lambda: NEW.key in one)

    asyncio.run(scenario())
