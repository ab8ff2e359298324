"""Move the alias under load, again and again: `make chaos-release`, or `OPTIONS='--switches 20'`.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets.

Three made-up versions of one model, each with an index of its own, behind one endpoint that follows the alias
`champion`. Clients search without a pause between the answers, and hold each answer against what the release that
it names must find: the ids of the ten best, as a search of that release's own files finds them in this process.
Most switches go to a version that is not in memory, every fifth one back to the one before. In every tenth the
process that makes the switch is killed by SIGKILL at a random moment of it; seconds and p99 of this one and of the
next are told apart.
Memory is that of all replicas together (unique set size), after a fifth of the switches and at the end, when
one release is held alone.

    switches          how often the alias was moved, and the endpoint followed
    failed, mixed     answers that were none; that were not those of the release they name
    p99_ratio         p99 in the seconds of switches, over p99 before the first
    seconds_to_live   from the alias to /release, of an index that is built, the worst
    seconds_back      from the alias to /release, back to the version before, the worst
    memory_growth     at the end, over that after a fifth
"""

import asyncio
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import load
import numpy as np
import psutil
import serve as bench
import typer
from prepare import at_least, at_most, say

from askew import segments
from askew.hits import merge
from askew.models import Model
from askew.registry import CHAMPION, Registry, Version
from askew.shards import Shard

NAMES = ("tiny", "tiny-1", "tiny-2")
MODEL, ASKED, K = "bench-switch", 50, 10
BEFORE_S, PATIENCE_S, PREVIOUS_S = 20.0, 60.0, 3.0


@dataclass
class Seen:
    """What clients saw: when each answer came (seconds), how long it took (ms), and what was wrong."""

    done: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


class Clients(threading.Thread):
    """Clients that search and check, in a thread of their own."""

    def __init__(self, url: str, asked: Sequence[str], right: Mapping[str, Mapping[str, list[str]]], number: int):
        super().__init__(daemon=True)
        self._url, self._asked, self._right, self._number = url, asked, right, number
        self.seen, self.over = Seen(), threading.Event()

    def run(self) -> None:
        """Search until it is over."""
        asyncio.run(self._all())

    async def _all(self) -> None:
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            await asyncio.gather(*(self._one(client, random.Random(n)) for n in range(self._number)))

    async def _one(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        while not self.over.is_set():
            query, started = chance.choice(self._asked), time.monotonic()
            try:
                answer = await client.post(self._url, json={"query": query, "k": K})
            except httpx.HTTPError as error:
                self.seen.failed.append(repr(error))
                continue
            self.seen.done.append(time.monotonic())
            self.seen.ms.append(1000 * (self.seen.done[-1] - started))
            if answer.status_code != load.OK or (found := answer.json())["degraded"]:
                self.seen.failed.append(answer.text[:200])
                continue
            version = found["model"]["version"]
            self.seen.versions.add(version)
            if [hit["item_id"] for hit in found["hits"]] != self._right[version][query]:
                self.seen.mixed.append(f"{query!r} by version {version}")


def right(release: bench.Release, asked: Sequence[str]) -> dict[str, list[str]]:
    """What a release must find for each query: the ids of the best, by its files alone."""
    plan, model = segments.Plan.read(release.index), Model.load(release.model)
    vectors, answers = model.queries(asked), []
    for number in range(bench.NUM_SHARDS):
        shard = Shard(plan, plan.share(number, bench.NUM_SHARDS))
        answers.append(shard.answer(shard.search(vectors, K)))
    hits = merge(answers, K)
    return {query: [hit["item_id"] for hit in found] for query, found in zip(asked, hits, strict=True)}


def live(url: str) -> str:
    """The version that is live."""
    told: str = httpx.get(f"{url}/release", timeout=10, trust_env=False).json()["model"]["version"]
    return told


def moved(registry: Registry, url: str, version: Version, kill: tuple[bench.Server, float] | None = None) -> float:
    """Move the alias; returns the seconds until its version is live. `kill` is when the switch dies meanwhile."""
    started = time.monotonic()
    registry.promote(version, CHAMPION)
    while time.monotonic() < started + PATIENCE_S:
        if kill and time.monotonic() > started + kill[1]:
            for process in kill[0].processes():
                with suppress(psutil.Error):
                    if process.name().startswith("ray::ServeReplica:search:switch"):
                        process.kill()
            kill = None
        with suppress(httpx.HTTPError):
            if live(url) == version.version:
                return time.monotonic() - started
        time.sleep(0.05)
    told = httpx.get(f"{url}/release", timeout=10, trust_env=False).text
    raise RuntimeError(f"version {version.version} is not live after {PATIENCE_S:.0f} s: {told}")


def memory(server: bench.Server) -> int:
    """Bytes that the replicas have for themselves."""
    held = 0
    for process in server.processes():
        with suppress(psutil.Error):
            if "ServeReplica" in process.name():
                held += process.memory_full_info().uss
    return held


def measured(server: bench.Server, stack: bench.Cluster, versions: Sequence[Version], rights: Any, switches: int,
             clients: int) -> dict[str, Any]:  # fmt: skip
    """Move the alias so often under load."""
    registry, url = Registry(stack.mlflow), stack.endpoint
    asking = Clients(server.url, list(rights[versions[0].version]), rights, clients)
    asking.start()
    time.sleep(BEFORE_S)
    first = time.monotonic()
    at, there, back, spans, sizes = 0, list[float](), list[float](), list[tuple[float, float]](), list[int]()
    before, chance, killed, apart = versions[0], random.Random(0), 0, list[float]()
    for number in range(switches):
        now = versions[at]
        if number % 5 == 4:
            wanted, seconds = before, back
        else:
            wanted, seconds = next(one for one in versions if one not in (now, before)), there
        started = time.monotonic()
        kill = (server, 1.2 * chance.random()) if number % 10 == 2 else None
        took = moved(registry, url, wanted, kill)
        if kill or number % 10 == 3:  # the one after a kill waits until the switch is there again
            killed += kill is not None and took > kill[1]
            apart.append(took)
        else:
            seconds.append(took)
            spans.append((started - 0.5, time.monotonic() + 0.5))
        before, at = now, versions.index(wanted)
        say(
            f"switch {number + 1}: version {wanted.version} is live after {took:.1f} s{' and a kill' * bool(kill)}"
        )
        if number % 5 != 3:  # the next one does not go back: let the one before be let go of
            time.sleep(0.3)
        if number + 1 in (max(1, switches // 5), switches):
            time.sleep(PREVIOUS_S + 12)
            sizes.append(memory(server))
    asking.over.set()
    asking.join(timeout=30)
    done, ms = np.array(asking.seen.done), np.array(asking.seen.ms)
    during = np.zeros(len(done), bool)
    for start, stop in spans:
        during |= (done >= start) & (done <= stop)
    calm = float(np.percentile(ms[done < first], 99))
    return {
        "switches": switches, "killed": killed, "worst_with_or_after_a_kill_s": max(apart, default=0),
        "answers": len(ms), "failed": len(asking.seen.failed),
        "mixed": len(asking.seen.mixed),
        "what_failed": asking.seen.failed[:5], "what_mixed": asking.seen.mixed[:5],
        "versions": sorted(asking.seen.versions), "p50_before": float(np.percentile(ms[done < first], 50)),
        "p99_before": calm, "p99_during": float(np.percentile(ms[during], 99)),
        "seconds_to_live": {"median": float(np.median(there)), "worst": max(there)},
        "seconds_back": {"median": float(np.median(back)), "worst": max(back)} if back else None,
        "bytes": sizes,
    }  # fmt: skip


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """Judge what was measured."""
    targets = {
        "switches": at_least(found["switches"], 100), "failed": at_most(found["failed"], 0),
        "mixed": at_most(found["mixed"], 0),
        "p99_ratio": at_most(found["p99_during"] / found["p99_before"], 1.5),
        "seconds_to_live": at_most(found["seconds_to_live"]["worst"], 10),
        "memory_growth": at_most(found["bytes"][-1] / found["bytes"][0], 1.05),
    }  # fmt: skip
    if found["seconds_back"]:
        targets["seconds_back"] = at_most(found["seconds_back"]["worst"], 2)
    return targets


def main(
    switches: Annotated[int, typer.Option(help="how often the alias is moved")] = 100,
    clients: Annotated[int, typer.Option(help="connections that search")] = 4,
    items: int = 20_000,
) -> None:
    """Move, check and print it."""
    asked = load.queries()[:ASKED]
    with tempfile.TemporaryDirectory() as folder:
        made, home = bench.releases(Path(folder), items, NAMES), Path(folder) / "switch"
        with bench.cluster(home, tuned=True) as stack:
            registry, versions, rights = Registry(stack.mlflow), [], {}
            for name, release in made.items():
                tags = {"askew.index": str(release.index), "askew.release": "bench"}
                run = registry.start_run("bench", name, {}, {})
                versions.append(registry.register(MODEL, release.model, run, tags))
                rights[versions[-1].version] = right(release, asked)
            registry.promote(versions[0], CHAMPION)
            one = {"scaling": {"min_replicas": 1, "max_replicas": 1}}
            args = {
                "model": MODEL, "cache": str(home / "models"), "num_shards": bench.NUM_SHARDS, "cached_results": 0,
                "ingress": one, "encoder": one, "shard": one,
                "switch": {"previous_s": PREVIOUS_S, "watched_s": PREVIOUS_S},
            }  # fmt: skip
            server = bench.deployed(stack, "switch", "askew.serving:build", args, {})
            found = measured(server, stack, versions, rights, switches, clients)
    found |= {"clients": clients, "items": items, "num_cores": os.cpu_count()}
    print(json.dumps({"figures": found, "targets": judged(found)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
