"""Calls of a deployment whose replicas are slow, die, or are all gone."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from askew import calls
from askew.calls import AwayError, Caller


class DiedError(Exception):
    pass


class Replicas:
    """Answers in turn as told: seconds to wait, or an error."""

    def __init__(self, *each: float | Exception, then: float | Exception = 0) -> None:
        self.each, self.then, self.asked = list(each), then, 0

    async def __call__(self, what: str, deadline: float) -> str:
        self.asked += 1
        number = self.asked
        now = self.each.pop(0) if self.each else self.then
        if isinstance(now, Exception):
            raise now
        await asyncio.sleep(now)
        return f"{what} by {number}"


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(scenario())


async def ask(caller: Caller[str], within_s: float = 30) -> str:
    return await caller.ask("it", deadline=asyncio.get_running_loop().time() + within_s)


def test_a_slow_call_is_made_again_and_the_first_answer_counts() -> None:
    replicas = Replicas(5, 0)
    hedged: list[int] = []
    caller = Caller(replicas, hedge_after_s=0.02, on_hedge=lambda: hedged.append(1))
    assert run(lambda: ask(caller)) == "it by 2"
    assert (replicas.asked, hedged) == (2, [1])


def test_a_call_in_time_is_made_once_and_so_is_a_slow_one_without_hedging() -> None:
    for replicas, after in ((Replicas(0.01), 0.2), (Replicas(0.1), None)):
        assert run(lambda r=replicas, a=after: ask(Caller(r, hedge_after_s=a))) == "it by 1"
        assert replicas.asked == 1


def test_of_two_calls_one_may_fail() -> None:
    assert run(lambda: ask(Caller(Replicas(0.1, ValueError("no")), hedge_after_s=0.02))) == "it by 1"
    assert run(lambda: ask(Caller(Replicas(0.1, 0.02), hedge_after_s=0.02))) == "it by 2"
    with pytest.raises(ValueError, match="second"):
        run(lambda: ask(Caller(Replicas(ValueError("second")), hedge_after_s=0.02)))


def test_few_calls_are_made_twice() -> None:
    """When all are slow, twice as many calls would make them slower still."""

    async def scenario() -> int:
        replicas = Replicas(then=0.03)
        caller = Caller(replicas, hedge_after_s=0.001)
        await asyncio.gather(*(ask(caller) for _ in range(200)))
        return replicas.asked

    assert 205 <= run(scenario) <= 200 + calls.SAVED + calls.HEDGED * 200


def test_what_a_dead_replica_was_asked_another_is() -> None:
    replicas = Replicas(DiedError(), 0)
    assert run(lambda: ask(Caller(replicas, again=(DiedError,)))) == "it by 2"
    with pytest.raises(DiedError):
        run(lambda: ask(Caller(Replicas(DiedError(), DiedError()), again=(DiedError,))))
    replicas = Replicas(ValueError("no"), 0)
    with pytest.raises(ValueError, match="no"):
        run(lambda: ask(Caller(replicas, again=(DiedError,))))
    assert replicas.asked == 1


def test_what_does_not_answer_in_time_is_late() -> None:
    with pytest.raises(TimeoutError):
        run(lambda: ask(Caller(Replicas(5)), 0.02))


def test_nobody_waits_for_what_has_not_answered_until_it_does() -> None:
    async def scenario() -> None:
        replicas = Replicas(*[99.0] * calls.FAILURES, 0.05)
        caller = Caller(replicas)
        for _ in range(calls.FAILURES):
            with pytest.raises(TimeoutError):
                await ask(caller, 0.01)
        for _ in range(3):
            with pytest.raises(AwayError):
                await ask(caller)
        await asyncio.sleep(0.01)
        assert replicas.asked == calls.FAILURES + 1  # one at a time, in the background
        while caller._failures:
            await asyncio.sleep(0.01)
        assert await ask(caller) == f"it by {calls.FAILURES + 2}"

    run(scenario)


def test_a_question_that_it_refuses_says_nothing_of_it() -> None:
    caller = Caller(Replicas(*[ValueError("no")] * 5))

    async def scenario() -> str:
        for _ in range(5):
            with pytest.raises(ValueError, match="no"):
                await ask(caller)
        return await ask(caller)

    assert run(scenario) == "it by 6"
