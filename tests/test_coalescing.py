"""Coalescing: batches form while calls are under way, and nobody's trouble is anybody else's."""

import asyncio
import contextvars
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from askew.coalescing import Coalescer, FullError

WHO = contextvars.ContextVar("who", default="nobody")


class Server:
    """Answers with the double, and notes what it was asked at once."""

    def __init__(
        self, takes_s: float = 0.02, bad: int | None = None, error: type[BaseException] = ValueError
    ) -> None:
        self.batches: list[list[int]] = []
        self.callers: set[str] = set()
        self._takes_s, self._bad, self._error = takes_s, bad, error

    async def __call__(self, questions: list[int]) -> list[int]:
        self.batches.append(questions)
        self.callers.add(WHO.get())
        await asyncio.sleep(self._takes_s)
        if self._bad in questions:
            raise self._error(f"{self._bad} is poison")
        return [2 * question for question in questions]


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_comes_meanwhile_is_asked_in_one_call_and_answered_each() -> None:
    server = Server()

    async def scenario() -> list[int]:
        coalescer = Coalescer(server, max_batch=10, max_calls=1)
        return await asyncio.gather(*(coalescer.ask(n) for n in range(32)))

    assert run(scenario) == [2 * n for n in range(32)]
    assert [len(batch) for batch in server.batches] == [1, 10, 10, 10, 1]
    assert [*itertools.chain(*server.batches)] == list(range(32))


def test_beside_a_call_another_goes_with_company_alone() -> None:
    server = Server(takes_s=0.2)

    async def scenario() -> None:
        coalescer = Coalescer(server, max_batch=8, max_calls=2, min_batch=4, max_wait_s=9)
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in range(4)]
        await asyncio.sleep(0.02)
        assert server.batches == [[0]]
        asked += [asyncio.ensure_future(coalescer.ask(n)) for n in range(4, 9)]
        await asyncio.sleep(0.02)
        assert server.batches == [[0], [1, 2, 3, 4]]  # when there were four; the others wait for a call to end
        assert await asyncio.gather(*asked) == [2 * n for n in range(9)]
        assert server.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]

    run(scenario)


def test_beside_a_large_call_as_many_go_as_were_asked_in_it() -> None:
    server = Server(takes_s=0.2)

    async def scenario() -> None:
        coalescer = Coalescer(server, max_calls=2, min_batch=2, max_wait_s=9)
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in range(7)]
        await asyncio.sleep(0.3)
        assert server.batches == [[0], [1, 2], [3, 4, 5, 6]]  # the last of them is under way
        asked += [asyncio.ensure_future(coalescer.ask(n)) for n in (7, 8, 9)]
        await asyncio.sleep(0.02)
        assert len(server.batches) == 3
        asked.append(asyncio.ensure_future(coalescer.ask(10)))
        await asyncio.sleep(0.02)
        assert server.batches[3:] == [[7, 8, 9, 10]]
        assert await asyncio.gather(*asked) == [2 * n for n in range(11)]

    run(scenario)


def test_who_has_waited_for_company_long_enough_goes_without() -> None:
    server = Server(takes_s=0.5)

    async def scenario() -> None:
        coalescer = Coalescer(server, max_calls=2, min_batch=4, max_wait_s=0.1)
        asked = [asyncio.ensure_future(coalescer.ask(0))]
        await asyncio.sleep(0.01)
        asked += [asyncio.ensure_future(coalescer.ask(n)) for n in (1, 2)]
        await asyncio.sleep(0.05)
        assert server.batches == [[0]]
        await asyncio.sleep(0.1)
        assert server.batches == [[0], [1, 2]]
        assert await asyncio.gather(*asked) == [0, 2, 4]

    run(scenario)


def test_several_wait_a_moment_for_more_when_a_call_ends() -> None:
    server = Server(takes_s=0.05)

    async def scenario() -> None:
        coalescer = Coalescer(server, min_batch=4, max_wait_s=9, gather_s=0.2)
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in range(3)]
        await asyncio.sleep(0.1)
        assert server.batches == [[0]]  # it has ended; two wait
        asked.append(asyncio.ensure_future(coalescer.ask(3)))
        assert await asyncio.gather(*asked) == [0, 2, 4, 6]
        assert server.batches == [[0], [1, 2, 3]]
        await asyncio.sleep(0.25)
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in range(5)]
        assert await asyncio.wait_for(asyncio.gather(*asked), 0.18) == [0, 2, 4, 6, 8]  # four wait for no more

    run(scenario)


def test_who_comes_when_several_were_just_answered_waits_for_as_many() -> None:
    server = Server(takes_s=0.01)

    async def scenario() -> None:
        coalescer = Coalescer(server, min_batch=9, max_wait_s=9, gather_s=0.3)
        assert await asyncio.gather(*(coalescer.ask(n) for n in range(4))) == [0, 2, 4, 6]
        assert server.batches == [[0], [1, 2, 3]]
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in (4, 5)]
        await asyncio.sleep(0.05)
        assert len(server.batches) == 2
        asked.append(asyncio.ensure_future(coalescer.ask(6)))
        assert await asyncio.wait_for(asyncio.gather(*asked), 0.2) == [8, 10, 12]
        assert server.batches[2:] == [[4, 5, 6]]
        last = asyncio.ensure_future(coalescer.ask(7))
        await asyncio.sleep(0.2)
        assert len(server.batches) == 3
        assert await asyncio.wait_for(last, 0.2) == 14  # a moment, no longer
        assert await asyncio.wait_for(coalescer.ask(8), 0.2) == 16  # nor after one alone, who is not waited for
        assert server.batches[3:] == [[7], [8]]

    run(scenario)


def test_a_call_counts_those_too_whom_it_left_waiting() -> None:
    server = Server(takes_s=0.1)

    async def scenario() -> None:
        coalescer = Coalescer(server, min_batch=9, max_wait_s=9, gather_s=0.3)
        first = asyncio.ensure_future(coalescer.ask(0))
        await asyncio.sleep(0.02)
        asked = [asyncio.ensure_future(coalescer.ask(n)) for n in (1, 2)]
        await first
        again = asyncio.ensure_future(coalescer.ask(3))
        assert await asyncio.wait_for(asyncio.gather(*asked, again), 0.2) == [2, 4, 6]
        assert server.batches == [[0], [1, 2, 3]]

    run(scenario)


def test_who_asks_again_as_soon_as_answered_goes_with_those_who_waited() -> None:
    server = Server()

    async def scenario() -> None:
        coalescer = Coalescer(server, max_calls=1)

        async def again() -> None:
            await coalescer.ask(0)
            await asyncio.sleep(0)  # a turn of the loop, in which the next request comes in
            await coalescer.ask(2)

        await asyncio.gather(again(), coalescer.ask(1))
        assert server.batches == [[0], [1, 2]]

    run(scenario)


def test_alone_a_question_is_asked_at_once() -> None:
    server = Server(takes_s=0)

    async def scenario() -> None:
        coalescer = Coalescer(server)
        for n in range(5):
            assert await asyncio.wait_for(coalescer.ask(n), 0.5) == 2 * n

    run(scenario)
    assert server.batches == [[n] for n in range(5)]


def test_of_32_one_hangs_up_and_31_are_answered() -> None:
    server = Server()

    async def scenario() -> list[Any]:
        coalescer = Coalescer(server, max_calls=1)
        tasks = [asyncio.create_task(coalescer.ask(n)) for n in range(32)]
        await asyncio.sleep(0.005)
        tasks[0].cancel()  # its call is under way
        tasks[7].cancel()  # it waits
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert await coalescer.ask(100) == 200
        return found

    found = run(scenario)
    assert [n for n, answer in enumerate(found) if isinstance(answer, asyncio.CancelledError)] == [0, 7]
    assert [answer for n, answer in enumerate(found) if n not in (0, 7)] == [
        2 * n for n in range(32) if n not in (0, 7)
    ]
    assert 7 not in [*itertools.chain(*server.batches)]


def test_a_call_is_of_no_request() -> None:
    server = Server()

    async def scenario() -> None:
        coalescer = Coalescer(server)
        WHO.set("somebody")
        await asyncio.gather(*(coalescer.ask(n) for n in range(5)))

    run(scenario)
    assert server.callers == {"nobody"}


def test_one_poisonous_question_fails_alone() -> None:
    server = Server(bad=5)

    async def scenario() -> list[Any]:
        coalescer = Coalescer(server, max_calls=1)
        return await asyncio.gather(*(coalescer.ask(n) for n in range(9)), return_exceptions=True)

    found = run(scenario)
    assert [answer for n, answer in enumerate(found) if n != 5] == [2 * n for n in range(9) if n != 5]
    assert isinstance(found[5], ValueError)


def test_trouble_that_is_common_to_all_is_not_asked_again() -> None:
    server = Server(bad=5)

    async def scenario() -> list[Any]:
        coalescer = Coalescer(server, max_calls=1, common=(ValueError,))
        return await asyncio.gather(*(coalescer.ask(n) for n in range(9)), return_exceptions=True)

    found = run(scenario)
    assert found[0] == 0
    assert all(isinstance(answer, ValueError) for answer in found[1:])
    assert len(server.batches) == 2


@pytest.mark.parametrize("error", [asyncio.CancelledError, ValueError])
def test_a_call_that_is_ended_ends_nothing_else(error: type[BaseException]) -> None:
    server = Server(bad=0, error=error)

    async def scenario() -> list[Any]:
        coalescer = Coalescer(server, max_calls=1)
        first = await asyncio.gather(coalescer.ask(0), return_exceptions=True)
        return [*first, await coalescer.ask(1)]

    first, second = run(scenario)
    assert isinstance(first, Exception)
    assert second == 2


def test_past_the_bound_a_question_is_refused_at_once_and_room_comes_back() -> None:
    server = Server()

    async def scenario() -> list[Any]:
        coalescer = Coalescer(server, max_batch=2, max_calls=1, max_waiting=4)
        tasks = [asyncio.create_task(coalescer.ask(n)) for n in range(8)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert coalescer.waiting == 0
        tasks = [asyncio.create_task(coalescer.ask(n)) for n in range(5)]
        await asyncio.sleep(0)
        tasks[4].cancel()
        await asyncio.sleep(0)
        assert coalescer.waiting == 3
        return [*found, await coalescer.ask(9), *await asyncio.gather(*tasks[:4])]

    found = run(scenario)
    assert found[:5] == [0, 2, 4, 6, 8]
    assert all(isinstance(answer, FullError) for answer in found[5:8])
    assert found[8:] == [18, 0, 2, 4, 6]


def test_an_answer_too_few_is_an_error_and_not_a_wait_for_ever() -> None:
    async def short(questions: list[int]) -> list[int]:
        return questions[:-1]

    async def scenario() -> list[Any]:
        coalescer = Coalescer(short, max_calls=1)
        return await asyncio.gather(coalescer.ask(1), return_exceptions=True)

    assert isinstance(run(scenario)[0], ValueError)
