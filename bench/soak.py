"""Half load for a while, with switches, changes and kills: `make soak MINUTES=5`, or an hour of it, `MINUTES=60`.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets.

Two versions of one model, each with an index of its own, behind one endpoint that follows the alias `champion`,
with two replicas of the ingress and of the query encoder, and two shards of one replica each. Requests fall due at
random, half as many a second as are answered at most, whatever becomes of them. Meanwhile, all from one seed: the
alias moves there and back; products are added, changed and deleted through the endpoint, and searched for after
each change; the log of the release that is not live is put into segments; and one process after the other is
killed by SIGKILL, of each kind as often as of the others. Then everything is stopped.

The longer it takes, the older processes grow, for a young one fills up for a while and tells nothing of a leak:
past a quarter of an hour there is more time between kills, and each process counts from a greater age.

    memory_slope         by which share of all memory it surely grows in the time that this takes: the lower end of
                         the slope's 95 % interval (`bench/watch.py`), times that time
    wrong                answers that are not right, and changes that were acknowledged and are not there
    leftover_processes   of all that ever belonged to the stack, how many live after its stop
    leftover_files       what is left in the temporary folder and in shared memory, and drafts nobody cleared

An answer is right when it has ten hits whose ids are those of the ten best by the files of the release that it
names, exactly searched in this process; of an answer without a shard, of the other shard's files. Of products that
change meanwhile only searches for them tell, and `GET /release` after every move tells that it came to pass.
"""

import itertools
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import load
import numpy as np
import psutil
import serve as bench
import typer
import watch
from load import Load
from prepare import at_most, say

from askew import local, segments
from askew.client import Client
from askew.errors import ArtifactError, EndpointError
from askew.hits import merge
from askew.live import Live
from askew.models import Model
from askew.registry import CHAMPION, Registry, Version
from askew.shards import Shard

NAMES, MODEL, K, ASKED = ("tiny", "tiny-1"), "bench-soak", 10, 200
KILLED = ("shard", "encoder", "ingress", "items", "switch", "controller")
CONTROLLER, REPLICA = "ray::ServeController", "ray::ServeReplica:search:"
TOUCHED = 50  # products of the catalogue that are changed, and as many new ones
APART = 1e-5  # scores that are nearer to each other may change places in another batch
PREVIOUS_S, WATCHED_S, CALM_S, PATIENCE_S = 3.0, 2.0, 6.0, 90.0
GROWTH = 0.05  # of memory while it runs, as in `make chaos-release`: what fills up once takes less, a leak more
TWO, ONE = ({"scaling": {"min_replicas": n, "max_replicas": n}} for n in (2, 1))


# --- what is right -------------------------------------------------------------------------------


def touched() -> list[str]:
    """The ids of products that change meanwhile."""
    return [f"item-{97 * number:08d}" for number in range(TOUCHED)] + [f"soak-{n}" for n in range(TOUCHED)]


def best(release: bench.Release, asked: Sequence[str]) -> list[list[list[dict[str, Any]]]]:
    """The best hits by a release's own files: of both shards together, of one, of the other; for each query."""
    plan, vectors = segments.Plan.read(release.index), Model.load(release.model).queries(asked)
    parts, wanted = [], K + TOUCHED
    for number in range(bench.NUM_SHARDS):
        shard = Shard(plan, plan.share(number, bench.NUM_SHARDS))
        parts.append(shard.answer(shard.search(vectors, wanted, exact=True)))
    return [merge(of, wanted) for of in (parts, *([part] for part in parts))]


def lists(found: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[list[str]]] | None:
    """What a query's answers may be, by how many shards answer; None where scores are too near to tell."""
    apart, told = {*touched()}, []
    for hits in found:
        kept = [hit for hit in hits if hit["item_id"] not in apart][: K + 1]
        if np.diff([-hit["score"] for hit in kept]).min() < APART:
            return None
        told.append([hit["item_id"] for hit in kept[:K]])
    return {"2": told[:1], "1": told[1:]}


def right(releases: Mapping[str, bench.Release]) -> dict[str, Any]:
    """What each version must find, for queries that tell: as `load.Right` reads it."""
    asked = [*dict.fromkeys(load.queries())][: 4 * ASKED]
    of = {
        version: dict(zip(asked, map(lists, zip(*best(release, asked), strict=True)), strict=True))
        for version, release in releases.items()
    }
    clear = [query for query in asked if all(found[query] for found in of.values())][:ASKED]
    kept = {version: {query: found[query] for query in clear} for version, found in of.items()}
    return {"apart": touched(), "right": kept}


# --- what happens meanwhile ----------------------------------------------------------------------


@dataclass
class Stage:
    """What everybody who acts on the stack knows of it."""

    stack: bench.Cluster
    server: bench.Server
    client: Client
    versions: Sequence[Version]
    indexes: Mapping[str, Path]
    chance: random.Random
    said: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def live(self) -> Any:
        """What the endpoint says of its release; None when it does not answer."""
        with suppress(EndpointError):
            return self.client.release()


class Switches:
    """Moves the alias from one version to the other, and sees it come to pass."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._registry = stage, Registry(stage.stack.mlflow)
        self.wanted, self._since, self._moved = stage.versions[0].version, time.monotonic(), 0.0
        self.waiting, self.slowest_s = False, 0.0

    @property
    def calm(self) -> bool:
        """Whether the live version is known, the one before let go of, and no move under way."""
        return not self.waiting and time.monotonic() > self._since + CALM_S

    @property
    def other(self) -> str:
        """The version that is not live."""
        return next(one.version for one in self._stage.versions if one.version != self.wanted)

    def move(self) -> None:
        """Move the alias to the version that is not live."""
        if self.waiting:
            return
        self.wanted, self._moved, self.waiting = self.other, time.monotonic(), True
        self._registry.promote(self._version(self.wanted), CHAMPION)

    def _version(self, number: str) -> Version:
        return next(one for one in self._stage.versions if one.version == number)

    def look(self) -> None:
        """See whether the last move came to pass, and stays. Raises RuntimeError when it takes too long."""
        if self.calm or (told := self._stage.live()) is None:
            return
        took, candidate = time.monotonic() - self._moved, told.candidate
        if told.model.version == self.wanted:
            if self.waiting:
                self.waiting, self._since = False, time.monotonic()
                self._stage.said["switches"] += 1
                self.slowest_s = max(self.slowest_s, took)
        elif candidate and candidate.reasons and candidate.reasons[0].startswith("rolled back"):
            self._brought_back(told.model.version)
        elif took > PATIENCE_S:
            raise RuntimeError(f"version {self.wanted} is not live after {PATIENCE_S:.0f} s: {told!r}")

    def _brought_back(self, version: str) -> None:
        """Put the alias back too, where the release before came back: a kill made the other look bad."""
        self._stage.said["brought_back"] += 1
        self.wanted, self.waiting, self._since = version, False, time.monotonic()
        self._registry.promote(self._version(version), CHAMPION)

    def come_to_pass(self) -> None:
        """Wait until the last move has."""
        while not self.calm:
            self.look()
            time.sleep(0.2)


class Changes:
    """Changes products of the live release one after the other, and searches for each that was acknowledged."""

    def __init__(self, stage: Stage, switches: Switches) -> None:
        self._stage, self._switches = stage, switches
        of_the_catalogue = {item_id: True for item_id in touched()[:TOUCHED]}
        self._there = {one.version: dict(of_the_catalogue) for one in stage.versions}  # False: deleted
        self._unsure = {one.version: set[str]() for one in stage.versions}
        self._asked: tuple[str, list[str], float] | None = None
        self._compacted: str | None = None
        self.slowest_s = 0.0

    def turn(self) -> None:
        """Search for the last change, or make another one."""
        if not self._switches.calm:
            self._asked = None
        elif self._asked:
            self._look(*self._asked)
        else:
            self._change(self._switches.wanted)
            self._compact(self._switches.other)

    def _change(self, version: str) -> None:
        chance, there = self._stage.chance, self._there[version]
        ids, gone = chance.sample(touched(), chance.randint(1, 8)), chance.random() < 0.4
        try:
            if gone:
                self._stage.client.delete(ids)
            else:
                titles = (f"{chance.choice(('red', 'blue'))} mug {one}" for one in ids)
                items = [{"item_id": one, "title": title} for one, title in zip(ids, titles, strict=True)]
                self._stage.client.upsert(items)
        except EndpointError:
            self._stage.said["changes_failed"] += 1
            self._unsure[version] |= {*ids}
            return
        self._unsure[version] -= {*ids}
        there |= dict.fromkeys(ids, not gone)
        self._stage.said["changes"] += 1
        self._asked = version, ids, time.monotonic()

    def _look(self, version: str, ids: Sequence[str], since: float) -> None:
        found = self._found(version, ids)
        waited = time.monotonic() - since
        if found is None or (found and waited < PATIENCE_S / 3):
            return
        self._asked = None
        if found:
            self._stage.wrong.append(f"version {version}, {waited:.0f} s after the change: {found}")
        self._stage.said["changes_found"] += not found
        self.slowest_s = max(self.slowest_s, waited)

    def _found(self, version: str, ids: Sequence[str]) -> list[str] | None:
        """Which of these products are there and should not be, or the other way round; None: no answer of all."""
        try:
            told = self._stage.client.search(
                "mug", k=100, filter={"item_id": [*ids]}, version=version, require_full=True
            )
        except EndpointError:
            return None
        hits, there = {hit.item_id for hit in told.hits}, self._there[version]
        sure = {*ids} - self._unsure[version]
        return sorted(one for one in sure if (one in hits) != there.get(one, False))

    def _compact(self, version: str) -> None:
        if version == self._compacted:
            return
        with suppress(ArtifactError):  # who wrote last may still hold it
            with Live(self._stage.indexes[version]) as live:
                live.compact()
            self._compacted = version
            self._stage.said["compactions"] += 1

    def all_there(self) -> None:
        """Search for every product of the live release that was ever changed."""
        version, since = self._switches.wanted, time.monotonic()
        while (found := self._found(version, touched())) != [] and time.monotonic() < since + PATIENCE_S / 3:
            time.sleep(0.5)
        if found != []:
            self._stage.wrong.append(f"version {version} at the end: {found}")


class Kills:
    """Kills one process after the other, each kind as often as the others."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._kinds = stage, list[str]()

    def kill(self) -> None:
        """Kill a process of the next kind, if there is one."""
        self._kinds = self._kinds or self._stage.chance.sample(KILLED, len(KILLED))
        kind = self._kinds.pop()
        start = CONTROLLER if kind == "controller" else REPLICA + kind
        found = {one.pid: one for one in self._stage.server.processes() if named(one).startswith(start)}
        if found:
            with suppress(psutil.Error):
                found[self._stage.chance.choice(sorted(found))].kill()
                self._stage.said[f"killed_{kind}"] += 1


def named(process: psutil.Process) -> str:
    """The name of a process that may just have ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def kinds(stack: bench.Cluster) -> dict[psutil.Process, str]:
    """All processes of the stack, each with what it does."""
    found = {}
    for process in local.members(stack.instance):
        with suppress(psutil.Error):
            is_mlflow = "mlflow" in " ".join(process.cmdline())
            found[process] = "mlflow" if is_mlflow else bench.role(process)
    return found


# --- all of it -----------------------------------------------------------------------------------


def peak(url: str, asked: Sequence[str], right: Path, seconds: float) -> float:
    """The most answers a second, of 32 connections."""
    wanted = Load(url, asked, 32, seconds=2 + seconds, right=str(right))
    running, start = load.start(wanted), time.monotonic() + 2
    found = load.told(running.wait(), wanted, start, start + seconds)
    say(f"at most {found['ok_a_second']:,.0f} answers a second, p99 {found.get('p99')} ms")
    return float(found["ok_a_second"])


def regularly(doings: Sequence[tuple[float, Callable[[], None]]], until: float) -> None:
    """Do things, each every so many seconds."""
    due = [time.monotonic() + every for every, _ in doings]
    while (now := time.monotonic()) < until:
        for number, (every, do) in enumerate(doings):
            if now >= due[number]:
                do()
                due[number] = time.monotonic() + every
        time.sleep(max(0.0, min(min(due), until) - time.monotonic()))


def soaked(stage: Stage, rights: Path, minutes: float, memory: watch.Memory) -> dict[str, Any]:
    """Load the endpoint for so long while things happen; returns the figures."""
    asked = [*next(iter(json.loads(rights.read_bytes())["right"].values()))]
    short, long = min(1.0, minutes / 4), older(minutes)
    most = peak(stage.server.url, asked, rights, 8 * short)
    switches = Switches(stage)
    changes, kills, started = Changes(stage, switches), Kills(stage), time.monotonic()
    held = [0.0]

    def sample() -> None:
        held[0] = memory.sample(kinds(stage.stack), counts=switches.calm)

    def tell() -> None:
        told = ", ".join(f"{name} {count}" for name, count in sorted(stage.said.items()))
        at = time.monotonic() - started
        say(f"{at:.0f} of {60 * minutes:.0f} s: {held[0]:,.0f} MiB, {told}, {len(stage.wrong)} changes lost")

    wanted = Load(stage.server.url, asked, bench.MANY, most / 2, 60 * minutes, k=K, right=str(rights))
    running = load.start(wanted)
    doings = [(2 * short, sample), (0.3, switches.look), (0.7, changes.turn), (10.0, tell),
              (max(15.0, 30 * short), switches.move), (max(12.0, 40 * short * long), kills.kill)]  # fmt: skip
    regularly(doings, started + 60 * minutes)
    outcomes = running.wait()
    for number in range(len(stage.versions)):
        if number:
            switches.move()
        switches.come_to_pass()
        changes.all_there()
    return {
        "peak_a_second": most, "rate": round(most / 2, 1), **outcomes.counts(),
        **load.percentiles(outcomes.ok.latencies_ms), **stage.said, "what_is_lost": stage.wrong[:5],
        "lost": len(stage.wrong), "slowest_switch_s": round(switches.slowest_s, 2),
        "slowest_change_s": round(changes.slowest_s, 2), "queries": len(asked),
    }  # fmt: skip


def older(minutes: float) -> float:
    """How many times as old as in a quarter of an hour processes grow."""
    return max(1.0, minutes / 15)


def served(home: Path, stack: bench.Cluster, made: Mapping[str, bench.Release], seed: int) -> tuple[Stage, Path]:
    """Register both releases, deploy the endpoint, and write what is right of them."""
    registry, versions = Registry(stack.mlflow), list[Version]()
    for name, release in made.items():
        tags = {"askew.index": str(release.index), "askew.release": "bench"}
        run = registry.start_run("bench", name, {}, {})
        versions.append(registry.register(MODEL, release.model, run, tags))
    of = {version.version: release for version, release in zip(versions, made.values(), strict=True)}
    registry.promote(versions[0], CHAMPION)
    args = {
        "model": MODEL, "cache": str(home / "models"), "num_shards": bench.NUM_SHARDS, "cached_results": 0,
        "writes": True, "open_writes": True, "ingress": TWO, "encoder": TWO, "shard": ONE,
        "switch": {"previous_s": PREVIOUS_S, "watched_s": WATCHED_S},
    }  # fmt: skip
    server = bench.deployed(stack, "soak", "askew.serving:build", args, {})
    rights = home / "right.json"
    rights.write_text(json.dumps(right(of)))
    client = Client(stack.endpoint, timeout_s=10)
    indexes = {version: release.index for version, release in of.items()}
    return Stage(stack, server, client, versions, indexes, random.Random(seed)), rights


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Judge what was measured. Raises RuntimeError when too little happened to tell."""
    for what in ("ok", "switches", "changes_found", "compactions"):
        if not figures.get(what):
            raise RuntimeError(f"nothing can be said: there were no {what}")
    if not any(name.startswith("killed_") for name in figures):
        raise RuntimeError("nothing can be said: nothing was killed")
    slope = watch.Slope(*figures["memory"]["all"])
    return {
        "memory_slope": at_most(slope.low / slope.mib * figures["minutes"] / 60, GROWTH),
        "wrong": at_most(figures["wrong"] + figures["lost"], 0),
        "leftover_processes": at_most(len(figures["leftover_processes"]), 0),
        "leftover_files": at_most(len(figures["leftover_files"]), 0),
    }


def main(
    minutes: Annotated[float, typer.Option(help="how long it is under load")] = 5,
    seed: Annotated[int, typer.Option(help="of what is killed and changed")] = 1,
    items: Annotated[int, typer.Option(help="products of each index")] = 50_000,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 when a target does not hold")] = False,
) -> None:
    """Load, disturb, stop, and print what came of it."""
    settle_s = min(60.0, 12 * minutes) * older(minutes)
    began, memory = time.monotonic(), watch.Memory(settle_s, min(10.0, 2 * minutes))
    with tempfile.TemporaryDirectory() as home, watch.own_temporary() as temporary:
        shared, root = watch.shared(), Path(home)
        made = bench.releases(root, items, NAMES, kind="flat")
        with bench.cluster(root / "soak", tuned=True) as stack:
            stage, rights = served(root / "soak", stack, made, seed)
            figures = soaked(stage, rights, minutes, memory)
            stage.client.close()
            memory.sample(kinds(stack), counts=False)
        say("stopped")
        slopes = memory.slopes()
        files = (watch.left_in(temporary), watch.left_in(stack.temporary), watch.drafts(root))
        figures |= {
            "memory": {"all": watch.together(slopes), **slopes},
            "leftover_processes": watch.alive({*memory.seen, *local.members(stack.instance)}),
            "leftover_files": [*itertools.chain(*files), *watch.unused(watch.shared() - shared)],
            "minutes": minutes, "seed": seed, "items": items, "num_cores": os.cpu_count(),
            "load_average": [round(one, 1) for one in os.getloadavg()],
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
    targets = judged(figures)
    print(json.dumps({"figures": figures, "targets": targets}), flush=True)
    raise typer.Exit(int(check and not all(target["holds"] for target in targets.values())))


if __name__ == "__main__":
    typer.run(main)
