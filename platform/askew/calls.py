"""Calls of one deployment: the first answer counts, in time or not at all.

A call that takes long is made a second time, and one whose replica died under it is made again: the replicas of a
deployment are alike. One that has not answered several times is not asked for a while, so that nobody waits for it
in vain. Knows nothing of what is called.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

A = TypeVar("A")

FAILURES, AWAY_S = 3, 1.0  # after so many calls in a row without an answer, nothing is asked for so long
HEDGED, SAVED = 0.1, 10.0  # of all calls so many may be made twice, and so many more if there were few before


class AwayError(Exception):
    """It has not answered lately, and is not asked now."""


class Caller(Generic[A]):
    """Calls one deployment.

    `again` names the errors after which a call is made once more: those of a replica, not of what was asked.
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
        self._failures, self._away_until, self._spare, self._on_hedge = 0, 0.0, SAVED, on_hedge

    async def ask(self, *what: Any, deadline: float) -> A:
        """Call until `deadline`, on the loop's clock.

        Raises TimeoutError, AwayError, or what the call raised.
        """
        if time.monotonic() < self._away_until:
            raise AwayError("it has not answered lately")
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._hedged(*what)
        except Exception as error:
            self._failures += 1
            if self._failures >= FAILURES and isinstance(error, (TimeoutError, *self._again)):
                self._away_until = time.monotonic() + AWAY_S  # then one more is asked: it may be back
            raise
        self._failures = 0
        return answer

    async def _hedged(self, *what: Any) -> A:
        first = asyncio.ensure_future(self._once(*what))
        calls = {first}
        self._spare = min(SAVED, self._spare + HEDGED)
        try:
            if self._hedge_after_s is not None:
                await asyncio.wait(calls, timeout=self._hedge_after_s)
                if not first.done() and self._spare >= 1:
                    self._spare -= 1
                    self._on_hedge()
                    calls.add(asyncio.ensure_future(self._once(*what)))
            while True:
                done, calls = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                answered = next((one for one in done if one.exception() is None), None)
                if answered or not calls:
                    return (answered or done.pop()).result()
        finally:
            for one in calls:
                one.cancel()

    async def _once(self, *what: Any) -> A:
        try:
            return await self._call(*what)
        except self._again:
            return await self._call(*what)
