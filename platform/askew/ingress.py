"""The ingress: HTTP in, and each request to the release that is live when it comes."""

import asyncio
import functools
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import Field
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from askew import endpoint, hooks, messages, telemetry
from askew.calls import Caller
from askew.comparing import Comparison
from askew.endpoint import Answer, Ask
from askew.errors import ArtifactError, DataError
from askew.filters import Filter
from askew.holding import Holder
from askew.keys import Keys
from askew.refusals import ForbiddenError, MissingError, RefusedError, UnavailableError
from askew.releases import Release
from askew.replicas import Replicas
from askew.searching import Parts, Search, SearchSettings
from askew.wire import GoneError

EXACT_RESTS = 100  # times as long as a search of every item took, none is made: a hundredth of the time at most
LATENCIES, LATENCIES_S = 1000, 20.0  # of so many last searches, not older, a release's p99 is told


class IngressSettings(SearchSettings):
    """What it takes on, beside how it searches."""

    report_every_s: float = Field(default=0.25, gt=0)  # so often every replica hears which release is live
    write_timeout_s: float = Field(default=30.0, gt=0)  # in which a change must be on disk
    keys: Path | None = None  # file of keys, of which a request must show one; empty: everybody may ask
    writes: bool = False  # whether items can be upserted and deleted, by who has a key for it
    open_writes: bool = False  # without keys: by whoever reaches the port
    exact_share: float = Field(default=0.001, ge=0, le=1)  # of searches are also made by scoring every item,
    shadow_share: float = Field(default=0.1, ge=0, le=1)  # and in the release of the alias `shadow`
    hedge_after_ms: float | None = Field(default=None, gt=0)  # a shard or the encoder: ask a second replica then


class Seen:
    """What became of the searches of a release."""

    def __init__(self) -> None:
        self.searches, self.failed = 0, 0
        self.ms: deque[tuple[float, float]] = deque(maxlen=LATENCIES)  # when, and how long

    def told(self) -> dict[str, float]:
        """Counts since the release is held here, and the p99 of the last searches, in milliseconds."""
        late = time.perf_counter() - LATENCIES_S
        lately = [ms for at, ms in self.ms if at > late]
        p99 = float(np.percentile(lately, 99)) if lately else 0.0
        return {"searches": self.searches, "failed": self.failed, "p99": p99}


class Ingress:
    """What the endpoint asks: a `Searcher` over deployments."""

    async def __init__(  # type: ignore[misc]
        self,
        settings: dict[str, Any],
        switch: DeploymentHandle,
        encoder: DeploymentHandle,
        items: DeploymentHandle,
        *shards: DeploymentHandle,
    ) -> None:
        """Take the deployments' handles, and wait until the release that is live can be searched in time."""
        self._settings = settings_ = IngressSettings.model_validate(settings)
        warn = functools.partial(telemetry.warner.warn, "keys")
        self._keys = None if settings_.keys is None else Keys(settings_.keys, warn)
        again = (GoneError, RayActorError)

        def hedged(of: str) -> dict[str, Any]:
            after_ms, told = settings_.hedge_after_ms, functools.partial(telemetry.HEDGED.add, 1, of=of)
            return {"hedge_after_s": None if after_ms is None else after_ms / 1000, "on_hedge": told}

        self._items, self._seen = items, dict[str, Seen]()
        replicas, encoders = [Replicas(shard.address.remote) for shard in shards], Replicas(encoder.address.remote)
        self._parts = Parts(
            encode=Caller(encoders.method("encode"), again=again, **hedged("encoder")),
            explain=Caller(_by_handle(items.explain)),
            search=[
                Caller(one.method("search"), again=again, **hedged(f"shard-{number}"))
                for number, one in enumerate(replicas)
            ],
            exact=[Caller(one.method("exact"), again=again) for one in replicas],
            items=[Caller(one.method("items"), again=again) for one in replicas],
            facets=[Caller(one.method("facets"), again=again) for one in replicas],
        )  # fmt: skip
        self._exact = Comparison("exact", settings_.exact_share, EXACT_RESTS)
        self._shadows = dict[str, Comparison]()  # by release
        the_switch = Replicas(switch.address.remote, every_s=60)  # there is one
        self._look = Caller(the_switch.method("look"))
        self._holder = Holder("ingress", self._opened, the_switch.method("report"), settings_.report_every_s)
        await self._holder.start()
        await asyncio.gather(*(one.find() for one in (encoders, *replicas)))
        self._live = self._holder[self._holder.orders["serve"]]
        self._holder.seen = self._told

    def __serve_build_asgi_app__(self) -> FastAPI:
        return endpoint.endpoint(self, os.environ.get(hooks.SECRET, ""), self._keys)

    def _opened(self, release: Release) -> Search:
        return Search(self._settings, release, self._parts)

    def _told(self) -> dict[str, Any]:
        """What is reported of searches: of each release, what became of them."""
        release = self.live.release
        tags = {"model": release.name, "version": release.version, "index": release.index_key[:12]}
        telemetry.RELEASE.set(1, tags)  # again and again: Ray forgets a gauge that nobody sets
        if exact := self._exact.told():
            telemetry.RECALL.set(exact["overlap_at_10"])
        self._seen = {key: seen for key, seen in self._seen.items() if key in self._holder}
        self._shadows = {key: one for key, one in self._shadows.items() if key in self._holder}
        shadows = {f"shadow {key}": one.told() for key, one in self._shadows.items()}
        return {key: seen.told() for key, seen in self._seen.items()} | shadows

    @property
    def live(self) -> Search:
        """Where a request that comes now is searched."""
        key = self._holder.orders["serve"]
        if self._live.release.key != key and key in self._holder:
            self._live = self._holder[key]
            self._seen.setdefault(key, Seen()).ms.clear()  # of its times when it was live before
        return self._live

    @property
    def release(self) -> messages.ReleaseResponse:
        """What is served, and what becomes of what shall be."""
        told = {"held": [*self._held], **self._holder.orders["told"]}
        return messages.ReleaseResponse(**self.live.told.model_dump(), **told)

    @property
    def _held(self) -> dict[str, Search]:
        """Where each version that is in memory is searched."""
        return {one.release.version: one for one in self._holder.held}

    def _of(self, version: str) -> Search:
        """Where a version is searched. Raises MissingError when it is not in memory here."""
        if not version or version == self.live.release.version:
            return self.live
        if version not in (held := self._held):
            raise MissingError(f"version {version} is not in memory; {', '.join(held)} are", "version")
        return held[version]

    @property
    def busy(self) -> bool:
        """Whether so many searches wait that another one would be refused."""
        if full := self.live.full:
            telemetry.SEARCHES.add(1, outcome="unavailable")
        return full

    async def search(self, ask: Ask) -> Answer:
        """Search in the release that is live now, or in another one that is held; see `Search.search`."""
        if (other := self._of(ask.version)) is not self.live or ask.canary:  # of no account for what is live
            return await other.search(ask)
        started, live = time.perf_counter(), self.live
        seen = self._seen.setdefault(live.release.key, Seen())
        seen.searches += 1
        try:
            answer = await live.search(ask)
        except UnavailableError as error:
            seen.failed += 1
            telemetry.SEARCHES.add(1, outcome="unavailable")
            told = f"unavailable: {error}; {error.__cause__!r}"
            telemetry.warner.warn("unavailable", told, request_id=ask.request_id)
            raise
        except (DataError, MissingError):
            telemetry.SEARCHES.add(1, outcome="refused")
            raise
        degraded = answer.answered < answer.release.shards
        outcome = "degraded" if degraded else "cached" if "cached" in answer.took else "full"
        telemetry.SEARCHES.add(1, outcome=outcome)
        seen.ms.append((done := time.perf_counter(), ms := 1000 * (done - started)))
        if ask.query and outcome == "full" and ask.image_weight is None:
            self._compare(live, ask, answer, ms)
        return answer

    def _compare(self, live: Search, ask: Ask, answer: Answer, ms: float) -> None:
        """Search a share of what was answered in other ways, in the background."""
        self._exact.offer(answer.hits, ms, lambda: live.exact(ask))
        key = self._holder.orders.get("shadow", "")
        if key and key != live.release.key and key in self._holder:
            shadow = self._holder[key]

            async def hits() -> Sequence[Mapping[str, Any]]:
                return (await shadow.search(ask)).hits

            self._shadows.setdefault(key, Comparison("shadow", self._settings.shadow_share)).offer(
                answer.hits, ms, hits
            )

    async def facets(self, where: Filter | None, limit: int) -> tuple[list[dict[str, Any]], messages.Release]:
        """Tell the items' fields and their values; see `Search.facets`."""
        live = self.live
        return await live.facets(where, limit), live.told

    async def item(self, item_id: str) -> tuple[dict[str, Any], bytes | None]:
        """Return a product, and its photo if it has one. Raises MissingError, UnavailableError."""
        record, _ = await self.live.found(item_id)
        return record, record.get("image")

    async def upsert(self, items: Sequence[Mapping[str, Any]]) -> tuple[int, int, list[dict[str, str]]]:
        """Add products or put them in others' place; see `items.Items.upsert`. Raises UnavailableError."""
        live = self.live
        changed: tuple[int, int, list[dict[str, str]]] = await self._write(self._items.upsert, live, items)
        live.forget(changed[0])
        telemetry.WRITTEN.add(changed[1], what="upserted")
        telemetry.WRITTEN.add(len(changed[2]), what="refused")
        return changed

    async def delete(self, item_ids: Sequence[str]) -> int:
        """Delete products; returns the change's number. Raises UnavailableError."""
        live = self.live
        number: int = await self._write(self._items.delete, live, item_ids)
        live.forget(number)
        telemetry.WRITTEN.add(len(item_ids), what="deleted")
        return number

    async def look(self) -> None:
        """Have the switch ask MLflow now. Raises UnavailableError."""
        try:
            await self._look.ask(deadline=asyncio.get_running_loop().time() + self._settings.timeout_s)
        except Exception as error:
            raise UnavailableError(f"the switch did not answer ({type(error).__name__})") from error

    async def _write(self, method: DeploymentHandle, live: Search, what: Any) -> Any:
        if not self._settings.writes:
            raise ForbiddenError("this endpoint takes no changes", "set `writes: true` in its settings")
        try:
            async with asyncio.timeout(self._settings.write_timeout_s):
                return await method.remote(live.release.key, what)
        except TimeoutError as error:
            raise UnavailableError(f"not written within {self._settings.write_timeout_s:g} s") from error
        except ArtifactError as error:
            raise RefusedError(str(error)) from error
        except Exception as error:
            raise UnavailableError(f"what writes did not answer ({type(error).__name__})") from error


def _by_handle(method: DeploymentHandle) -> Callable[..., Awaitable[Any]]:
    """A method that is called by Ray Serve's handle: what is rare, and may hold anything."""

    async def call(*what: Any, deadline: float) -> Any:
        return await method.remote(*what)

    return call
