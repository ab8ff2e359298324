"""Replicas: those of a deployment, found by Ray Serve's handle and called over sockets of their own.

The handle knows which replicas live and are ready. It is asked again and again where one of them answers, and so
replicas that are new are found; one that died is found by its connection, which ends.
"""

import asyncio
import contextlib
import contextvars
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray.util

from askew.wire import Address, Connection, GoneError, Listener

LOOK_EVERY_S = 1.0
LOOK_WITHIN_S = 3.0  # in which one must be found: a network that lets nothing pass does not say so
RUNNING = "running_requests"  # what Ray Serve scales by, under its own name for it


class Wired:
    """A deployment that answers calls over sockets, of the methods named, beside those by handles."""

    answers: tuple[str, ...] = ()

    @property
    def _listener(self) -> Listener:
        if "listener" not in self.__dict__:
            self.__dict__["listener"] = Listener({name: getattr(self, name) for name in self.answers})
        listener: Listener = self.__dict__["listener"]
        return listener

    async def address(self) -> Address:
        """Tell where it answers: on the address by which Ray knows its machine."""
        return await self._listener.address(ray.util.get_node_ip_address())

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """Tell Ray Serve how many calls are under way, for it sees those by handles alone."""
        return {RUNNING: self._listener.ongoing()}


class Replicas:
    """Calls the replica of a deployment that has the least to do, as this process knows; a silent one last."""

    def __init__(self, address: Callable[[], Awaitable[Address]], every_s: float = LOOK_EVERY_S):
        """Take what asks one of the replicas where it answers."""
        self._address, self._every_s = address, every_s
        self._connections: dict[Address, Connection] = {}
        self._looking: asyncio.Task[None] | None = None
        self._looked = 0.0

    def method(self, name: str) -> Callable[..., Awaitable[Any]]:
        """A method of one of them, to be called with what it takes and a `deadline` on the loop's clock.

        Raises GoneError when the replica died, RemoteError when the method failed, or what finding one raised.
        """

        async def call(*what: Any, deadline: float) -> Any:
            connection = await self._connection()
            left_s = deadline - asyncio.get_running_loop().time()
            return await connection.ask(name, *what, left_s=left_s)

        return call

    async def find(self) -> None:
        """Find one of them before anything is asked of it: the first time takes long. Nothing is raised."""
        await asyncio.wait([self._look()])

    async def _connection(self) -> Connection:
        live = [one for one in self._connections.values() if not one.closed]
        if not live or asyncio.get_running_loop().time() - self._looked >= self._every_s:
            looking = self._look()
            if not live:
                await asyncio.shield(looking)
                live = [one for one in self._connections.values() if not one.closed]
        if not live:
            raise GoneError("no replica answers")
        return min(live, key=lambda one: (one.doubtful, one.under_way, random.random()))

    def _look(self) -> asyncio.Task[None]:
        """Find a replica, in a call that belongs to no request."""
        if self._looking is None or self._looking.done():
            loop = asyncio.get_running_loop()
            self._looking = loop.create_task(self._found(), context=contextvars.Context())
            self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._looking

    async def _found(self) -> None:
        try:
            async with asyncio.timeout(LOOK_WITHIN_S):
                await self._connected()
        except TimeoutError as error:
            raise GoneError(f"no replica was found within {LOOK_WITHIN_S:g} s") from error

    async def _connected(self) -> None:
        address = await self._address()
        self._looked = asyncio.get_running_loop().time()
        self._connections = {at: one for at, one in self._connections.items() if not one.closed}
        if address not in self._connections:
            with contextlib.suppress(OSError):
                self._connections[address] = await Connection.open(address)

    def close(self) -> None:
        """End all connections."""
        for one in self._connections.values():
            one.close()
