"""Coalescing: what is asked while earlier calls are under way is asked in one call.

A question that is alone goes at once. Behind a network hop that costs more than the work, one call of 32 costs
little more than one of one; so beside a call that is under way another one goes only with company, or when
somebody has waited for a while, and where several wait, they wait a moment for more; and so does one that comes
just after several were answered, who may be about to ask again. Knows nothing of what is asked.
"""

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")  # a question
A = TypeVar("A")  # its answer


class FullError(Exception):
    """So many wait that another would only wait in vain."""


class Coalescer(Generic[Q, A]):
    """Asks questions in batches, of which at most `max_calls` are under way.

    While one is, the next goes when as many questions wait as were asked in it, `min_batch` at least, or when the
    first of them has waited for `max_wait_s`; so many who ask without a pause are answered in two halves. While
    none is, a question that is alone goes at once, and several when the first has waited for `gather_s`; within
    that time after a call has ended, when there are as many as it answered and left waiting, or when the first
    has waited so long, be it alone.
    `work` answers a batch in its order. If it fails on a batch, each of its questions is asked again alone, so
    that one that is poisonous fails alone, unless the error is one of `common`, which says nothing of them.
    """

    def __init__(
        self,
        work: Callable[[list[Q]], Awaitable[Sequence[A]]],
        *,
        max_batch: int = 64,
        max_calls: int = 2,
        min_batch: int = 1,
        max_wait_s: float = 0.02,
        gather_s: float = 0.0,
        max_waiting: int = 256,
        common: tuple[type[Exception], ...] = (),
    ) -> None:
        self._work, self._common = work, common
        self._max_batch, self._max_calls, self._max_waiting = max_batch, max_calls, max_waiting
        self._min_batch, self._max_wait_s, self._gather_s = min(min_batch, max_batch), max_wait_s, gather_s
        self._waiting: deque[tuple[Q, asyncio.Future[A], float]] = deque()  # and since when
        self._calls: dict[asyncio.Task[None], int] = {}  # of how many questions each
        self._alarm: tuple[float, asyncio.TimerHandle] | None = None  # when it rings
        self._askers, self._end = 0, -math.inf  # how many were answered or left waiting by the last call, and when

    @property
    def waiting(self) -> int:
        """How many questions have not been asked yet."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether another question would be refused."""
        return len(self._waiting) >= self._max_waiting

    async def ask(self, question: Q) -> A:
        """Ask one question. Raises FullError when too many wait, and what `work` raised for it."""
        if self.full:
            raise FullError(f"{self._max_waiting} wait already")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, answer, loop.time()))
        self._start()
        try:
            return await answer
        finally:
            if answer.cancelled() and self._waiting:  # who hung up waits no more, and leaves room
                self._waiting = deque(one for one in self._waiting if one[1] is not answer)

    def _start(self) -> None:
        """Make calls of what waits.

        A call belongs to no request: were it made in one's context, Serve would cancel it when that client hangs
        up, and with it everyone else's answer.
        """
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._calls) < self._max_calls:
            enough, patience_s = self._company(loop.time())
            due = self._waiting[0][2] + patience_s
            if len(self._waiting) < enough and due > loop.time():
                self._wake(due)
                return
            batch = [self._waiting.popleft()[:2] for _ in range(min(len(self._waiting), self._max_batch))]
            call = loop.create_task(self._call(batch), context=contextvars.Context())
            self._calls[call] = len(batch)
            call.add_done_callback(self._answered)

    def _company(self, now: float) -> tuple[int, float]:
        """How many are enough for a call, and how long the first of those who wait does so for them."""
        if self._calls:
            return max(self._min_batch, *self._calls.values()), self._max_wait_s
        if self._askers > 1 and now < self._end + self._gather_s:
            return min(self._askers, self._max_batch), self._gather_s
        return self._min_batch, self._gather_s if len(self._waiting) > 1 else 0.0

    def _wake(self, due: float) -> None:
        if self._alarm is not None:
            if self._alarm[0] <= due:
                return
            self._alarm[1].cancel()
        self._alarm = due, asyncio.get_running_loop().call_at(due, self._rung)

    def _rung(self) -> None:
        self._alarm = None
        self._start()

    def _answered(self, call: asyncio.Task[None]) -> None:
        """Let those who were answered go on, and take in what has come meanwhile, before there is another call."""
        loop = asyncio.get_running_loop()
        self._askers = self._calls[call] + len(self._waiting)
        loop.call_soon(loop.call_soon, self._ended, call)  # in one turn of the loop it comes, in the next it asks

    def _ended(self, call: asyncio.Task[None]) -> None:
        del self._calls[call]
        self._end = asyncio.get_running_loop().time()
        self._start()

    async def _call(self, batch: list[tuple[Q, asyncio.Future[A]]]) -> None:
        batch = [one for one in batch if not one[1].done()]
        if not batch:
            return
        try:
            answers = await self._work([question for question, _ in batch])
            for (_, answer), found in zip(batch, answers, strict=True):
                if not answer.done():
                    answer.set_result(found)
        except BaseException as error:
            if len(batch) > 1 and isinstance(error, Exception) and not isinstance(error, self._common):
                await asyncio.gather(*(self._call([one]) for one in batch))
                return
            told = error if isinstance(error, Exception) else RuntimeError(f"the call was ended: {error!r}")
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(told)
