"""A watchdog over the proxies: a search goes through each, again and again; one that passes none on is restarted.

A proxy may say that it is well and still pass nothing on: one that was cut off from the others for a while does.
What counts is therefore a search, which goes everyone's way: by the proxy's own port, to an ingress, the encoder
and all shards. An error in the ingress's own words shows that the proxy did its part, and is none of its failures.
Nor is it one of a proxy that it can't be connected to from here: it may be well for others, and if it is not, Ray
Serve sees to it. Knows nothing of what is searched.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import ray
from pydantic import Field
from ray import serve

from askew import refusals, telemetry
from askew.config import Settings

CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
CANARY = "/readyz"  # a search that every shard must answer; no key is asked for there
ALONE = 3  # so many times the failures are needed where no other proxy passes anything on: it may not be the proxy
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::")  # noqa: S104 (to tell, not to bind)
SHUTDOWN_S = 1.0  # in which a proxy may end what it started


class WatchdogSettings(Settings):
    """How proxies are watched, and when one is restarted."""

    enabled: bool = True  # false leaves the proxies to Ray Serve alone
    every_s: float = Field(default=2.0, gt=0)  # so often a search goes through every proxy
    timeout_s: float = Field(default=2.5, gt=0)  # in which it must be answered; the search itself has half of it
    failures: int = Field(default=3, ge=1)  # in a row, after which the proxy is restarted,
    pause_s: float = Field(default=30.0, ge=0)  # but not sooner than so long after the last time


class Proxy(NamedTuple):
    """A proxy: its node, the name of its actor, and where it is asked."""

    node: str
    actor: str
    url: str


@dataclass
class Health:
    """What is known of the proxy of a node."""

    failures: int = 0  # in a row
    seen_well: bool = False  # one that never was is not to be restarted: perhaps it can't be reached from here
    restarted: float = float("-inf")


class Watchdog:
    """Watches over proxies, and restarts them."""

    def __init__(
        self,
        settings: WatchdogSettings,
        find: Callable[[], Awaitable[Sequence[Proxy]]],
        restart: Callable[[Proxy], Awaitable[None]],
    ) -> None:
        self._settings, self._find, self._restart = settings, find, restart
        self._proxies: Sequence[Proxy] = ()
        self._known: dict[str, Health] = {}

    async def run(self) -> None:
        """Watch for ever."""
        limits = httpx.Limits(max_keepalive_connections=0)  # each as a new client
        async with httpx.AsyncClient(trust_env=False, verify=False, limits=limits) as client:  # noqa: S501  # nosec B501 (no secret goes this way, and it is asked by its address)
            while True:
                began = time.monotonic()
                try:
                    await self.look(client)
                    telemetry.teller.tell()
                except Exception:
                    telemetry.log.exception("watching the proxies")
                await asyncio.sleep(max(0.0, began + self._settings.every_s - time.monotonic()))

    async def look(self, client: httpx.AsyncClient) -> None:
        """Send a search through every proxy, and restart those that have failed too often."""
        with suppress(TimeoutError):  # else those that are known are asked
            async with asyncio.timeout(self._settings.timeout_s):
                self._proxies = await self._find()
        for node in {*self._known} - {one.node for one in self._proxies}:
            self._known[node].failures = 0  # it is starting, or gone
        passed = await asyncio.gather(*(self._passes(client, one) for one in self._proxies))
        for proxy, well in zip(self._proxies, passed, strict=True):
            telemetry.PROXY.set(float(bool(well)), {"node": proxy.node[:12]})
            health = self._known.setdefault(proxy.node, Health())
            if well is not None:
                health.failures = 0 if well else health.failures + 1
                health.seen_well |= well
        for proxy in self._proxies:
            if self._is_to_blame(self._known[proxy.node], any(passed)):
                await self._restarted(proxy)

    def _is_to_blame(self, health: Health, others_pass: bool) -> bool:
        bound = self._settings.failures * (1 if others_pass else ALONE)
        rested = time.monotonic() - health.restarted >= self._settings.pause_s
        return health.seen_well and rested and health.failures >= bound

    async def _restarted(self, proxy: Proxy) -> None:
        health = self._known[proxy.node]
        told = f"{health.failures} searches in a row did not come through the proxy of node {proxy.node[:12]}"
        telemetry.log.error("%s at %s: it is restarted", told, proxy.url)
        telemetry.PROXY_RESTARTS.add(1, node=proxy.node[:12])
        health.failures, health.restarted = 0, time.monotonic()
        try:
            await self._restart(proxy)
        except Exception:
            telemetry.log.exception("restarting the proxy at %s", proxy.url)

    async def _passes(self, client: httpx.AsyncClient, proxy: Proxy) -> bool | None:
        """Whether a search comes through a proxy, or at least an ingress's word that it can't answer.

        None where it can't be connected to.
        """
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                half_ms = int(500 * self._settings.timeout_s)
                within = httpx.Timeout(None, connect=half_ms / 1000)
                answer = await client.get(f"{proxy.url}{CANARY}", params={"timeout_ms": half_ms}, timeout=within)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return None
        except (httpx.HTTPError, TimeoutError):
            return False
        return answer.is_success or is_ingress(answer)


def is_ingress(answer: httpx.Response) -> bool:
    """Whether an error is in an ingress's words. HAProxy, where it has no ingress, uses those of a full one."""
    kind = answer.headers.get("content-type", "")
    return kind.startswith("application/json") and answer.content != bytes(refusals.FULL.body)


# --- Ray Serve's proxies -------------------------------------------------------------------------


def of_serve(settings: WatchdogSettings) -> Watchdog:
    """The watchdog over the proxies that lead to the application of this replica."""
    application, node = serve.get_replica_context().app_name, ray.get_runtime_context().get_node_id()

    async def find() -> Sequence[Proxy]:
        controller = await asyncio.to_thread(ray.get_actor, CONTROLLER, NAMESPACE)
        return proxies(await controller.get_serve_instance_details.remote(), application, node)

    return Watchdog(settings, find, _kill)


def proxies(details: Mapping[str, Any], application: str, here: str) -> list[Proxy]:
    """The proxies that Serve's controller takes for well; one on loopback, if it is of this node."""
    http = details.get("http_options") or {}
    host, port = http.get("host") or LOOPBACK[0], http.get("port") or 8000
    scheme = "https" if http.get("ssl_certfile") else "http"
    prefix = str((details["applications"].get(application) or {}).get("route_prefix") or "/").rstrip("/")
    found = []
    for node, one in (details.get("proxies") or {}).items():
        if one.get("status") != "HEALTHY" or (host in LOOPBACK and node != here):
            continue
        address = one["node_ip"] if host in ANY else host
        named = f"[{address}]" if ":" in address else address
        found.append(Proxy(node, one["actor_name"], f"{scheme}://{named}:{port}{prefix}"))
    return found


async def _kill(proxy: Proxy) -> None:
    """Kill a proxy's actor; Serve's controller sees to another one."""
    actor = await asyncio.to_thread(ray.get_actor, proxy.actor, NAMESPACE)
    with suppress(Exception):  # it is killed all the same; HAProxy is a process of its own, which this ends
        async with asyncio.timeout(SHUTDOWN_S):
            await actor.shutdown.remote()
    await asyncio.to_thread(ray.kill, actor, no_restart=True)
