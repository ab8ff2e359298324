"""Calls of one deployment: the first answer counts, in time or not at all.

A call that takes long is made a second time, and one whose replica died under it is made again: the replicas of a
deployment are alike. One that has not answered several times is away: nobody waits for it any more, and it is
asked in the background until it answers. Knows nothing of what is called.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

A = TypeVar("A")

FAILURES = 3  # after so many calls in a row without an answer it is away
HEDGED, SAVED = 0.1, 10.0  # of all calls so many may be made twice, and so many more if there were few before


class AwayError(Exception):
    """It has not answered lately, and nobody waits for it."""


class Caller(Generic[A]):
    """Calls one deployment.

    `call` takes what is asked, and the deadline. `again` names the errors after which a call is made once more:
    those of a replica, not of what was asked.
    """

    def __init__(
        self,
        call: Callable[..., Awaitable[A]],
        *,
        hedge_after_s: float | None = None,
        again: tuple[type[Exception], ...] = (),
        on_hedge: Callable[[], object] = lambda: None,
    ) -> None:
        self._call, self._hedge_after_s, self._again = call, hedge_after_s, again
        self._gone: tuple[type[Exception], ...] = (TimeoutError, *again)
        self._failures, self._spare, self._on_hedge = 0, SAVED, on_hedge
        self._trial: asyncio.Task[None] | None = None

    async def ask(self, *what: Any, deadline: float) -> A:
        """Call until `deadline`, on the loop's clock.

        Raises TimeoutError, AwayError, or what the call raised.
        """
        if self._failures >= FAILURES:
            self._try(*what, deadline=deadline)
            raise AwayError("it has not answered lately")
        return await self._asked(*what, deadline=deadline)

    async def _asked(self, *what: Any, deadline: float) -> A:
        try:
            async with asyncio.timeout_at(deadline):
                asked = self._once if self._hedge_after_s is None else self._hedged
                answer = await asked(*what, deadline=deadline)
        except self._gone:
            self._failures += 1
            raise
        self._failures = 0
        return answer

    def _try(self, *what: Any, deadline: float) -> None:
        """Ask in the background whether it is back, one call at a time, which belongs to no request."""

        async def trial() -> None:
            with contextlib.suppress(Exception):
                await self._asked(*what, deadline=deadline)

        if self._trial is None or self._trial.done():
            self._trial = asyncio.get_running_loop().create_task(trial(), context=contextvars.Context())

    async def _hedged(self, *what: Any, deadline: float) -> A:
        first = asyncio.ensure_future(self._once(*what, deadline=deadline))
        calls = {first}
        self._spare = min(SAVED, self._spare + HEDGED)
        try:
            await asyncio.wait(calls, timeout=self._hedge_after_s)
            if not first.done() and self._spare >= 1:
                self._spare -= 1
                self._on_hedge()
                calls.add(asyncio.ensure_future(self._once(*what, deadline=deadline)))
            while True:
                done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                answered = next((one for one in done if one.exception() is None), None)
                if answered or not calls:
                    return (answered or done.pop()).result()
        finally:
            for one in calls:
                one.cancel()

    async def _once(self, *what: Any, deadline: float) -> A:
        try:
            return await self._call(*what, deadline=deadline)
        except self._again:
            return await self._call(*what, deadline=deadline)
