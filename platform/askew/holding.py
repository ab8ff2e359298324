"""Holding: a replica has the releases in memory that it is told to have, and says which it has.

What is asked of it names the release, so that an answer comes from that one or from none. A release is loaded in a
thread beside those that are served, and let go of when nobody can ask for it any more. A replica reports while it
loads too, and before it is ready, so that nothing goes live that it does not have yet. Knows nothing of what is
loaded, or of who decides.
"""

import asyncio
import atexit
import contextvars
import ctypes
import gc
import sys
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from askew import telemetry
from askew.releases import Release

H = TypeVar("H")
Report = Callable[..., Awaitable[Mapping[str, Any]]]
GARBAGE = 20_000  # objects that are new, before Python looks for some; its own default is a few searches'
GRACE_S = 5.0  # what is let go of is still there for so long, for searches that are under way
PATIENCE_S = 30.0  # of one report
SWITCH_S = 0.0005  # so soon a thread that loads lets what is answered go first; Python's own is 5 ms


class NotHeldError(Exception):
    """The release that was asked for is not in memory here."""


class Holder(Generic[H]):
    """The releases that a replica has in memory."""

    def __init__(self, kind: str, load: Callable[[Release], H], report: Report, every_s: float) -> None:
        """Take what kind of replica it is, what loads a release, and what takes its reports and tells orders."""
        self._kind, self._load, self._report, self._every_s = kind, load, report, every_s
        self._id = uuid.uuid4().hex
        self._thread = ThreadPoolExecutor(1, "load")  # one, for each has an arena, which keeps what is freed
        self._held: dict[str, H] = {}
        self._told: list[Release] = []
        self._failed: dict[str, str] = {}
        self._leaving: dict[str, float] = {}
        self._following: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self.orders: Mapping[str, Any] = {}
        self.seen: Callable[[], Mapping[str, Any]] = dict  # what is told of searches, with every report

    async def start(self) -> None:
        """Load what is served, and from now on what is told. Raises RuntimeError when it can't be loaded."""
        telemetry.escape()
        gc.freeze()  # what is imported stays; looking for garbage is short then,
        gc.set_threshold(GARBAGE)  # and seldom: of what a request makes, next to nothing is any
        atexit.register(gc.unfreeze)  # vendors complain of what is still there at the end
        while not self.orders:
            await self._ask()
            if not self.orders:
                await asyncio.sleep(self._every_s)
        self._following = self._start(self._follow())
        while self.orders["serve"] not in self._held:
            if self.orders["serve"] in self._failed:
                self._following.cancel()
                raise RuntimeError(f"release {self.orders['serve']} was not loaded: {self._failed}")
            await asyncio.sleep(self._every_s)
        sys.setswitchinterval(SWITCH_S)

    @staticmethod
    def _start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    def __getitem__(self, key: str) -> H:
        """Return a release that is in memory. Raises NotHeldError."""
        try:
            return self._held[key]
        except KeyError:
            raise NotHeldError(f"release {key} is not in memory here") from None

    def __contains__(self, key: str) -> bool:
        return key in self._held

    @property
    def held(self) -> list[H]:
        """What is in memory, and told to be."""
        return [self._held[one.key] for one in self._told if one.key in self._held]

    async def _follow(self) -> None:
        while True:
            if self._loading is None or self._loading.done():
                wanted = sorted(self._told, key=lambda one: one.key != self.orders["serve"])
                self._loading = self._start(self._hold(wanted))
            await asyncio.sleep(self._every_s)
            try:
                await self._ask()
                self._let_go()
                telemetry.teller.tell()
            except Exception:
                telemetry.log.exception("holding releases")

    async def _ask(self) -> None:
        """Report, and take orders; without an answer the last ones stand.

        What is in memory but not told any more is not reported: it may be let go of before the next orders come.
        """
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        held = [one.key for one in self._told if one.key in self._held]
        report = (self._kind, self._id, held, dict(self._failed), dict(self.seen()))
        try:
            async with asyncio.timeout_at(deadline):
                orders = await self._report(*report, deadline=deadline)
            if orders["hold"] != self.orders.get("hold"):
                self._told = [Release.model_validate(one) for one in orders["hold"]]
            self.orders = orders
        except Exception as error:  # whatever became of it, it is up again some time
            telemetry.log.debug("no orders: %s", error)

    async def _hold(self, wanted: list[Release]) -> None:
        keys = {one.key for one in wanted}
        self._failed = {key: why for key, why in self._failed.items() if key in keys}
        for one in wanted:
            self._leaving.pop(one.key, None)
            if one.key in self._held or one.key in self._failed:
                continue
            try:
                loading = asyncio.get_running_loop().run_in_executor(self._thread, self._load, one)
                self._held[one.key] = await loading
                telemetry.log.info("release %s is in memory", one.key)
            except Exception as error:
                self._failed[one.key] = f"{type(error).__name__}: {error}"
                telemetry.log.warning("release %s was not loaded: %s", one.key, self._failed[one.key])

    def _let_go(self) -> None:
        now = asyncio.get_running_loop().time()
        told = {one.key for one in self._told}
        for key in set(self._held) - told:
            if now - self._leaving.setdefault(key, now) > GRACE_S:
                del self._held[key], self._leaving[key]
                gc.collect()  # in a process this large Python looks so seldom that releases would pile up
                self._thread.submit(give_back)
                telemetry.log.info("release %s was let go of", key)


def give_back() -> None:
    """Return to the system what is free, which glibc keeps for the next release, scattered as it is."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
