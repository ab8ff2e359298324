"""Switching: the alias in MLflow says which release shall be live, and this makes it so, or says why not.

A version that the alias comes to is fetched, checked at the gates, loaded by every replica beside the one that is
live, and only then all requests go to it: none fails, and no answer is of two. What was live before stays in
memory for a while, to be returned to at once: when the alias is set back, or when the new one fails in its first
minutes. What is live is written to disk before anyone hears of it, so that this process may die at any point.
"""

import asyncio
import contextlib
import contextvars
import functools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from askew import artifacts, building, gates, hooks, releases, telemetry
from askew.building import BuildSettings
from askew.config import Settings
from askew.errors import AskewError, RegistryError
from askew.gates import GateSettings, Verdict
from askew.registry import Registry, Version
from askew.releases import BY, FORCE, Release
from askew.replicas import Wired
from askew.watchdog import WatchdogSettings, of_serve

EVALUATION = "evaluation/queries.parquet"
SETTLED_S = 1.0  # after so long every replica that lives has reported
AWAY_S = 3.0  # a replica that has not reported for so long is not waited for
RETRY_S = 30.0  # after which a preparation is tried again that failed by MLflow or the disk
PATIENCE_S = 60.0  # of one question to MLflow, which gives up by itself much sooner
T = TypeVar("T")
PATH = re.compile(r"(?<![^\s'\"(])/(?:[^\s/:;,'\")]+/)+[^\s/:;,'\")]*")
EVENTS = 200  # that wait for MLflow; older ones are dropped


class SwitchSettings(Settings):
    """When a release goes live, and when the one before it comes back."""

    watch_every_s: float = Field(default=1.0, gt=0)  # so often MLflow is asked which version bears the alias
    webhook: str = ""  # the endpoint's /hooks/mlflow as MLflow reaches it; needs ASKEW_WEBHOOK_SECRET
    previous_s: float = Field(default=600.0, ge=0)  # so long the release before stays in memory
    load_timeout_s: float = Field(default=300.0, gt=0)  # in which every replica must have loaded a release
    gates: GateSettings = GateSettings()
    build: BuildSettings | None = None  # a version without an index gets one by a Ray job; empty: it is refused
    watched_s: float = Field(default=120.0, ge=0)  # so long after a switch the release before comes back, when
    max_failed: float = Field(default=0.02, ge=0, le=1)  # a greater share of searches fails,
    max_slower: float = Field(default=3.0, ge=1)  # or p99 is so many times that of the release before,
    slow_ms: float = Field(default=200.0, ge=0)  # and more than this
    slow_for_s: float = Field(default=4.0, ge=0)  # for so long,
    steady_s: float = Field(default=30.0, ge=0)  # no replica having come or gone for so long,
    least_searches: int = Field(default=100, ge=1)  # of at least so many
    shadow: str = "shadow"  # the alias of a version that a share of searches is made in too, unseen
    shadow_every_s: float = Field(default=30.0, gt=0)  # so often MLflow is told how other its answers are
    endpoint: str = "search"  # what tags and runs in MLflow call this endpoint


class Watched(NamedTuple):
    """What is watched, and where it is kept: of one endpoint."""

    uri: str
    model: str
    alias: str
    cache: str
    num_shards: int
    deployed: str  # tells deployments of this endpoint apart: a new one starts on what it was given


class Replica(NamedTuple):
    """The last report of a replica."""

    kind: str
    at: float
    held: frozenset[str]
    failed: Mapping[str, str]
    seen: Mapping[str, Mapping[str, float]]


class RefusedReleaseError(Exception):
    """A release that may not be served, with what its gates say."""

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        super().__init__("; ".join(one.told for one in verdicts))
        self.verdicts = verdicts


class Switch(Wired):
    """Decides which release is live, and which the replicas hold."""

    answers = ("report", "look")

    async def __init__(  # type: ignore[misc]
        self,
        settings: Mapping[str, Any],
        watched: Sequence[Any],
        start: Mapping[str, Any],
        watches: bool,
        watchdog: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what is live at first; `watches` is false where a version is named by its number.

        With a watchdog's settings, this process has it beside the switch: neither is in a request's way.
        """
        telemetry.escape()
        self._settings, self._watched = SwitchSettings.model_validate(settings), Watched(*watched)
        self._cache = Path(self._watched.cache)
        self._path = releases.memory(self._cache, self._watched.uri, self._watched.model, self._settings.endpoint)
        kept = releases.remembered(self._path, self._watched.deployed)
        self._live, self._before = (kept.now, kept.before) if kept else (Release.model_validate(start), None)
        self._since, self._note, self._began = datetime.now(UTC), "", time.monotonic()
        self._candidate: tuple[Version, str] | None = None  # and what becomes of it
        self._loading: Release | None = None
        self._refused: dict[str, tuple[float, list[str]]] = {}  # by version and index: until when, and why
        self._shadow: Release | None = None
        self._shadowing = ""  # the version and index that were last tried as shadow
        self._shadow_told = 0.0
        self._replicas: dict[str, Replica] = {}
        self._moved = float("-inf")  # when a replica last came or went
        self._events: deque[Callable[[Registry], None]] = deque(maxlen=EVENTS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._switching: asyncio.Task[None] | None = None
        self._registry: Registry | None = None
        self._woken = asyncio.Event()
        self._remember()
        self._start(self._telling())
        if watches:
            self._start(self._watching())
            self._start(self._hooked())
        if watchdog and (over := WatchdogSettings.model_validate(watchdog)).enabled:
            self._start(of_serve(over).run())

    # --- replicas --------------------------------------------------------------------------------

    async def report(
        self, kind: str, who: str, held: Sequence[str], failed: Mapping[str, str], seen: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Take a replica's report of what it holds; returns what it shall hold, and which of these is live."""
        if who not in self._replicas:
            self._moved = time.monotonic()
        self._replicas[who] = Replica(kind, time.monotonic(), frozenset(held), failed, seen)
        all_ = (self._live, self._before, self._loading, self._shadow)
        held_ = {one.key: one for one in all_ if one is not None}
        return {
            "serve": self._live.key, "shadow": self._shadow.key if self._shadow else "", "told": self._told(),
            "hold": [one.model_dump() for one in held_.values()],
        }  # fmt: skip

    def _told(self) -> dict[str, Any]:
        candidate = None
        if self._candidate:
            version, state = self._candidate
            candidate = {"version": version.version, "state": state, "reasons": []}
            if why := self._why(version):
                candidate |= {"state": "refused", "reasons": [_without_folders(one) for one in why]}
        before = self._before.version if self._before else None
        return {
            "since": f"{self._since:%Y-%m-%dT%H:%M:%SZ}", "previous": before, "candidate": candidate,
            "note": self._note,
        }  # fmt: skip

    def _reported(self) -> list[Replica]:
        """The replicas that live, as far as is known."""
        late = time.monotonic() - AWAY_S
        live = {who: one for who, one in self._replicas.items() if one.at > late}
        if len(live) < len(self._replicas):
            self._moved = time.monotonic()
        self._replicas = live
        return list(live.values())

    def _holds(self, key: str) -> bool:
        """Whether all replicas hold a release, of every kind at least one. Raises RuntimeError when one can't."""
        replicas = self._reported()
        if time.monotonic() < self._began + SETTLED_S:
            return False
        for one in replicas:
            if key in one.failed:
                raise RuntimeError(f"{one.kind} could not load it: {one.failed[key]}")
        kinds = {"ingress", "encoder", "items", *(f"shard-{n}" for n in range(self._watched.num_shards))}
        return kinds <= {one.kind for one in replicas} and all(key in one.held for one in replicas)

    # --- the alias -------------------------------------------------------------------------------

    async def _watching(self) -> None:
        while True:
            try:
                await self._look()
                await self._look_for_shadow()
                self._note = ""
            except (RegistryError, TimeoutError) as error:  # what is live stays so
                self._registry, self._note = None, f"MLflow: {error or 'no answer'}"
                telemetry.warner.warn("mlflow", self._note)
            except Exception:
                telemetry.log.exception("watching the alias")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.watch_every_s):
                    await self._woken.wait()
            self._woken.clear()

    async def look(self) -> None:
        """Ask MLflow now: it says that an alias was moved."""
        self._woken.set()

    async def _hooked(self) -> None:
        """Have MLflow say so, where that is wanted; until it can, and if it never can, it is asked."""
        url, secret = self._settings.webhook, os.environ.get(hooks.SECRET, "")
        if url and not secret:
            telemetry.log.error("a webhook that nobody signs is not believed: set %s", hooks.SECRET)
        while url and secret:
            name = f"{hooks.NAME}-{self._settings.endpoint}"
            try:
                registry = await _within(Registry, self._watched.uri)
                await _within(registry.hook, name, url, hooks.EVENTS, secret)
                return
            except (RegistryError, TimeoutError) as error:
                telemetry.warner.warn("webhook", f"MLflow takes no webhook, and is asked: {error}")
            await asyncio.sleep(RETRY_S)

    async def _look(self) -> None:
        """See which version bears the alias, and begin to switch to it where it is another one."""
        self._registry = registry = await _within(self._reached)
        wanted = await _within(registry.aliased, self._watched.model, self._watched.alias)
        busy = self._switching is not None and not self._switching.done()
        if wanted is None or self._live.is_of(wanted):
            if busy and self._switching:
                self._switching.cancel()  # the alias was set back, or taken away
            self._candidate = None
            self._refused.clear()  # a version is tried again when the alias comes to it again
        elif busy and self._candidate and _same(self._candidate[0], wanted):
            pass
        elif not self._why(wanted) or self._forced_since(wanted):
            if busy and self._switching:
                self._switching.cancel()
            self._candidate = wanted, "preparing"
            self._switching = self._start(self._switch(registry, wanted))
        else:
            self._candidate = wanted, "refused"

    def _reached(self) -> Registry:
        return self._registry or Registry(self._watched.uri)

    def _why(self, version: Version) -> list[str]:
        """Why a version is refused, if it is."""
        until, why = self._refused.get(_identity(version), (0.0, []))
        return why if time.monotonic() < until else []

    def _forced_since(self, version: Version) -> bool:
        refused = self._candidate is not None and not self._candidate[0].tags.get(FORCE)
        return bool(version.tags.get(FORCE)) and refused

    # --- switching -------------------------------------------------------------------------------

    async def _switch(self, registry: Registry, version: Version) -> None:
        started, retry_s = time.monotonic(), float("inf")
        verdicts: Sequence[Verdict] = ()
        try:
            if (before := self._before) and before.is_of(version) and self._holds(before.key):
                self._flip(before, version, started, ())
                return
            version = await self._indexed(registry, version)
            release = await asyncio.to_thread(self._fetched, registry, version)
            verdicts = await asyncio.to_thread(self._judged, registry, version, release)
            if refusals := gates.refusals(verdicts, force=bool(version.tags.get(FORCE))):
                raise RefusedReleaseError(refusals)
            self._candidate, self._loading = (version, "loading"), release
            async with asyncio.timeout(self._settings.load_timeout_s):
                await self._loaded(release.key)
            self._flip(release, version, started, verdicts)
            return
        except TimeoutError:
            why = [f"not every replica had loaded it within {self._settings.load_timeout_s:g} s"]
        except (RegistryError, OSError) as error:
            why, retry_s = [str(error)], RETRY_S
        except RefusedReleaseError as error:
            why = [one.told for one in error.verdicts]
        except (AskewError, RuntimeError) as error:
            why = [str(error)]
        finally:
            self._loading = None
        self._refuse(version, why, retry_s, verdicts)

    async def _indexed(self, registry: Registry, version: Version) -> Version:
        """A version that has an index: where it has none, it is built by a job. Raises StageError."""
        if releases.INDEX in version.tags or (build := self._settings.build) is None:
            return version
        self._candidate = version, "its index is being built"
        job = (build, self._watched.model, version.version, self._watched.uri)
        await asyncio.to_thread(building.build, *job)
        found = await asyncio.to_thread(registry.resolve, version.name, version.version)
        self._candidate = found, "preparing"
        return found

    def _fetched(self, registry: Registry, version: Version) -> Release:
        model = registry.download(version, self._cache)
        return releases.find(version, self._watched.num_shards, model)

    def _judged(self, registry: Registry, version: Version, release: Release) -> list[Verdict]:
        import torch  # only when there is something to judge

        torch.set_num_threads(1)  # a gate has time; what is answered beside it has none
        with artifacts.scratch(self._cache) as work:
            own = registry.file(version, EVALUATION, work / "own")
            live = self._version_live(registry)
            its = registry.file(live, EVALUATION, work / "live") if live else None
            return gates.judge(Path(release.model), Path(release.index), self._settings.gates, own, its)

    def _version_live(self, registry: Registry) -> Version | None:
        """The version that is live, unless someone deleted it."""
        try:
            return registry.resolve(self._live.name, self._live.version)
        except RegistryError:
            return None

    async def _loaded(self, key: str) -> None:
        while not self._holds(key):
            await asyncio.sleep(0.05)

    def _flip(self, release: Release, version: Version, started: float, verdicts: Sequence[Verdict]) -> None:
        """Let all requests go to a release that every replica holds."""
        old, p99 = self._live, self._p99(self._live.key)
        self._live, self._before, self._since = release, old, datetime.now(UTC)
        self._candidate = self._loading = None
        self._remember()
        seconds = time.monotonic() - started
        telemetry.log.warning("release %s is live, after %s; it took %.1f s", release.key, old.key, seconds)
        how = "back from memory, " if not verdicts else ""
        self._record("live", version, f"{how}in place of version {old.version}", verdicts, {"seconds": seconds})
        self._tell_replaced(old, version)
        self._start(self._guard(release, old, version, p99, self._counted(release.key)))

    def _remember(self) -> None:
        releases.remember(self._path, self._live, self._before, self._watched.deployed)

    def _refuse(self, version: Version, why: list[str], retry_s: float, verdicts: Sequence[Verdict]) -> None:
        again = _identity(version) in self._refused
        self._refused[_identity(version)] = time.monotonic() + retry_s, why
        if not again:
            told = "; ".join(why)
            telemetry.log.warning("version %s is refused, %s stays: %s", version.version, self._live.key, told)
            force = f"askew promote {version.name} {version.version} --force"
            soft = bool(verdicts) and not any(one.hard for one in verdicts if not one.holds)
            do = f", or serve it all the same by `{force}`" if soft and retry_s == float("inf") else ""
            stays = f"Version {self._live.version} stays live. Move the alias back{do}."
            self._record("refused", version, f"{told}. {stays}", verdicts, {})

    async def _guard(
        self, release: Release, old: Release, version: Version, p99: float, before: tuple[float, float]
    ) -> None:
        """Watch over the first minutes of a release, and let the one before go in the end."""
        until, well = time.monotonic() + self._settings.watched_s, time.monotonic()
        while time.monotonic() < until and self._live is release:
            await asyncio.sleep(0.25)
            now, slow = time.monotonic(), self._slowness(release.key, p99, before)
            well = well if slow else now
            why = self._failing(release.key, before) or (now - well >= self._settings.slow_for_s and slow)
            if why and self._live is release:
                self._refused[_identity(version)] = float("inf"), [f"rolled back: {why}"]
                self._live, self._before, self._since = old, release, datetime.now(UTC)
                self._candidate = version, "refused"
                self._remember()
                telemetry.log.error("release %s is live again: %s", old.key, why)
                self._record("rolled back", version, f"{why}; version {old.version} is live again", (), {})
                break
        await asyncio.sleep(max(0.0, self._settings.previous_s - self._settings.watched_s))
        if self._before in (old, release) and self._live in (old, release):
            self._before = None
            self._remember()

    def _counted(self, key: str) -> tuple[float, float]:
        """Searches of a release, and those that failed, since replicas hold it."""
        seen = [one.seen[key] for one in self._reported() if key in one.seen]
        return sum(one["searches"] for one in seen), sum(one["failed"] for one in seen)

    def _failing(self, key: str, counted: tuple[float, float]) -> str | None:
        """What fails in a release since it is live, if too much does."""
        searches, failed = np.subtract(self._counted(key), counted).tolist()
        if searches >= self._settings.least_searches and failed > self._settings.max_failed * searches:
            return f"{failed:.0f} of {searches:.0f} searches failed"
        return None

    def _slowness(self, key: str, p99_before: float, counted: tuple[float, float]) -> str | None:
        """How slow a release is, if it is too slow, and not because replicas came or went."""
        p99, searches = self._p99(key), self._counted(key)[0] - counted[0]
        steady = time.monotonic() - self._moved >= self._settings.steady_s
        enough = bool(p99_before) and searches >= self._settings.least_searches
        if steady and enough and p99 > max(self._settings.max_slower * p99_before, self._settings.slow_ms):
            return f"p99 is {p99:.0f} ms, and was {p99_before:.0f} ms before"
        return None

    def _p99(self, key: str) -> float:
        return max((one.seen[key]["p99"] for one in self._reported() if key in one.seen), default=0.0)

    # --- the shadow ------------------------------------------------------------------------------

    async def _look_for_shadow(self) -> None:
        """See which version bears the alias of the shadow, and tell MLflow how it does."""
        assert self._registry
        wanted = await _within(self._registry.aliased, self._watched.model, self._settings.shadow)
        if wanted is None or self._live.is_of(wanted):
            self._shadow, self._shadowing = None, ""
        elif self._shadowing != _identity(wanted):
            self._shadow, self._shadowing, self._shadow_told = None, _identity(wanted), time.monotonic()
            self._start(self._try_shadow(self._registry, wanted))
        elif self._shadow and time.monotonic() > self._shadow_told + self._settings.shadow_every_s:
            self._shadow_told = time.monotonic()
            self._tell_shadow(wanted, self._shadow.key)

    async def _try_shadow(self, registry: Registry, version: Version) -> None:
        """Let replicas hold a version beside the live one, unless it does not even fit together."""
        try:
            release = await asyncio.to_thread(self._fetched, registry, version)
            verdicts = await asyncio.to_thread(self._judged, registry, version, release)
            if refusals := gates.refusals(verdicts, force=True):
                raise RefusedReleaseError(refusals)
        except (AskewError, OSError, RefusedReleaseError) as error:
            self._record("refused as shadow", version, str(error), (), {})
            return
        if self._shadowing == _identity(version):
            self._shadow = release

    def _tell_shadow(self, version: Version, key: str) -> None:
        seen = [one.seen[name] for one in self._reported() if (name := f"shadow {key}") in one.seen]
        seen = [one for one in seen if one]
        if not (compared := sum(one["compared"] for one in seen)):
            return
        means = {name: sum(one[name] * one["compared"] for one in seen) / compared
                 for name in ("overlap_at_10", "rbo", "ms", "ms_live")}  # fmt: skip
        told = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        failed = sum(one["failed"] for one in seen)
        why = f"{compared:.0f} searches, {failed:.0f} failed; {told}"
        self._record("in the shadow", version, why, (), {"compared": compared, "failed": failed, **means})

    # --- what MLflow is told ---------------------------------------------------------------------

    async def _telling(self) -> None:
        """Tell MLflow what happened, in its order, as soon as it answers."""
        while True:
            await asyncio.sleep(self._settings.watch_every_s)
            try:
                registry = await _within(Registry, self._watched.uri) if self._events else None
                while registry and self._events:
                    try:
                        await _within(self._events[0], registry)
                    except (RegistryError, TimeoutError):
                        raise
                    except Exception:
                        telemetry.log.exception("telling MLflow")
                    self._events.popleft()
            except (RegistryError, TimeoutError):
                pass  # the watch says that MLflow does not answer

    def _record(
        self, event: str, version: Version, why: str, verdicts: Sequence[Verdict], figures: Mapping[str, float]
    ) -> None:
        """Tell MLflow, as soon as it answers: a run of the endpoint's history, and the version."""
        told = f"{event} since {_now()}: {why}"
        tags = {
            "askew.event": event, "askew.model": version.name, "askew.version": version.version,
            "askew.live": self._live.version, "askew.why": why, "askew.endpoint": self._settings.endpoint,
            "askew.by": version.tags.get(BY) or "someone by MLflow's page or API", "mlflow.note.content": told,
            **{f"askew.gate.{one.gate}": one.judged for one in verdicts},
        }  # fmt: skip

        def record(registry: Registry) -> None:
            _tell(registry, version, self._settings.endpoint, told)
            name = f"version {version.version} {event}"
            run = registry.start_run(f"{version.name}-releases", name, {}, tags)
            registry.log_metrics(run, {name: round(value, 3) for name, value in figures.items()})
            registry.end_run(run, ok="refused" not in event and event != "rolled back")

        self._events.append(record)

    def _tell_replaced(self, old: Release, by: Version) -> None:
        told = f"not live since {_now()}: version {by.version} took its place"

        def record(registry: Registry) -> None:
            with contextlib.suppress(RegistryError):  # it may have been deleted
                _tell(registry, registry.resolve(old.name, old.version), self._settings.endpoint, told)

        self._events.append(record)

    def _start(self, work: Any) -> asyncio.Task[None]:
        """Start what belongs to no request."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(functools.partial(_ended, self._tasks))
        return task


def _ended(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    tasks.discard(task)
    if not task.cancelled() and (error := task.exception()):
        telemetry.log.error("switching: %r", error)


async def _within(call: Callable[..., T], *what: Any) -> T:
    """Call what asks MLflow, in a thread. Raises TimeoutError when it hangs, whatever for."""
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.to_thread(call, *what)


def _tell(registry: Registry, version: Version, endpoint: str, told: str) -> None:
    """Say something of a version on its page, in the place of what was said before; what people wrote stays."""
    with contextlib.suppress(RegistryError):  # it may have been deleted meanwhile
        registry.tag(version, {f"askew.endpoint.{endpoint}": told})
        start, there = f"**Endpoint {endpoint}**:", registry.resolve(version.name, version.version).description
        others = [part for part in there.split("\n\n") if part and not part.startswith(start)]
        registry.describe(version, "\n\n".join([*others, f"{start} {told}"]))


def _without_folders(why: str) -> str:
    """A reason with the last two parts of each path in it: where files lie, searchers need not know."""
    return PATH.sub(lambda path: "/".join(path[0].split("/")[-2:]), why)


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _identity(version: Version) -> str:
    return f"{version.version} {version.tags.get(releases.INDEX)}"


def _same(one: Version, other: Version) -> bool:
    return _identity(one) == _identity(other) and one.tags.get(FORCE) == other.tags.get(FORCE)
