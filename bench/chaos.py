"""Faults of every kind, at random from a seed, under load: `make chaos SEED=1`, `OPTIONS='--only cluster,flips'`.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets. Three parts:

    kills     an endpoint on one machine loses processes, a hundred searches a second (`kills.py`)
    flips     500 bits are flipped, one at a time, in every kind of file that askew loads (`flips.py`)
    cluster   three nodes (`nodes.py`), two replicas of all that searches, clients that know every answer
              (`asking.py`), upserts, a training (`underway.py`), and each fault of `faults.py` once, in an
              order that the seed decides

Of each fault: searches, and how many of them were right, degraded (a shard missing, and said so), failed (none of
the proxies answered, each asked once) or wrong; upserts that were not acknowledged; the seconds to recover:
from the fault, or from its end where it says so, until the last search that any proxy did not answer as it should.

    wrong, lost            answers that were not the best of the release; upserts acknowledged, and gone
    failed_with_replica    searches without an answer: all that searches has a second replica
    recovery_s             the longest recovery of any fault
    recovery_proxy_s       of a proxy that was killed, until it answers again itself
    flips_refused          flipped bits that were refused by the file's name
    failed_*, seconds_*    of the kills, by process
"""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import asking
import faults
import flips
import httpx
import kills
import load
import nodes
import psutil
import serve as bench
import typer
import underway
from asking import RIGHT, Asked, Clients
from faults import Fault, World
from prepare import at_least, at_most, say

from askew import deploying, segments
from askew.errors import AskewError
from askew.hits import merge
from askew.models import Model
from askew.registry import CHAMPION, Registry
from askew.shards import Shard

PARTS = "kills,flips,cluster"
ASKED, ROOT_BYTES = 60, 400 << 20
CALM_S, PATIENCE_S = 3.0, 60.0
WANTED = {"ingress": 2, "encoder": 2, "shard-0": 2, "shard-1": 2, "items": 1, "switch": 1}  # replicas


def truth(release: bench.Release, asked: Sequence[str]) -> asking.Truth:
    """What must be found for each query, by the release's files alone: the best of all shards, and of each."""
    plan, vectors = segments.Plan.read(release.index), Model.load(release.model).queries(asked)
    opened = [Shard(plan, plan.share(number, bench.NUM_SHARDS)) for number in range(bench.NUM_SHARDS)]
    answers = [shard.answer(shard.search(vectors, asking.K)) for shard in opened]
    found = [merge(some, asking.K) for some in (answers, *([one] for one in answers))]
    return {query: [[hit["item_id"] for hit in of[row]] for of in found] for row, query in enumerate(asked)}


# --- the cluster ---------------------------------------------------------------------------------


def deploy(cluster: nodes.Cluster, release: bench.Release) -> None:
    """Register a release, promote it, and serve it with two replicas of all that searches."""
    registry = Registry(cluster.mlflow)
    run = registry.start_run("bench", release.name, {}, {})
    version = registry.register(
        release.name, release.model, run, {"askew.index": str(release.index), "askew.release": "bench"}
    )
    registry.promote(version, CHAMPION)
    apart = {"max_replicas_per_node": 1} if cluster.isolated else {}
    two = {**apart, "scaling": {"min_replicas": 2, "max_replicas": 2}}
    args = {
        "model": release.name, "cache": str(cluster.home / "models"), "num_shards": bench.NUM_SHARDS,
        "cached_results": 0, "writes": True, "open_writes": True, "timeout_s": 2.0, "hedge_after_ms": 200,
        "exact_share": 0, "ingress": two, "encoder": two, "shard": two,
    }  # fmt: skip
    http = {"host": "0.0.0.0" if cluster.isolated else "127.0.0.1", "port": cluster.http, "request_timeout_s": 5}  # noqa: S104
    application = {"name": "search", "route_prefix": "/", "import_path": deploying.BUILDER, "args": args}
    values = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
    deploying.deploy(cluster.dashboard, values, patience_s=300)


def is_whole(cluster: nodes.Cluster) -> bool:
    """Whether every replica that should be there runs, and a proxy beside them, as Serve tells.

    On a node that has come back there is no proxy until there is a replica again: so Ray Serve has it.
    """
    for node in cluster.nodes:
        node.supervise()
    for worker in cluster.named(faults.KINDS["trainer"]):
        with suppress(psutil.Error):
            worker.nice(19)  # trainings and searches share two cores here
    with suppress(Exception):
        told = deploying.applications(cluster.dashboard)
        found = told["applications"]["search"]["deployments"]
        there = {
            name: sum(replica["state"] == "RUNNING" for replica in found[name]["replicas"]) for name in WANTED
        }
        hosts = {replica["node_id"] for one in found.values() for replica in one["replicas"]}
        well = {node for node, one in told["proxies"].items() if one["status"] == "HEALTHY"}
        return there == WANTED and hosts <= well and len(cluster.nodes) == nodes.alive(cluster)
    return False


def absent(cluster: nodes.Cluster) -> tuple[int, ...]:
    """Numbers of the nodes on which Serve has no proxy; of none where it can't be asked."""
    with suppress(AskewError):
        there = {one["node_ip"] for one in deploying.applications(cluster.dashboard)["proxies"].values()}
        return tuple(node.number for node in cluster.nodes if node.ip not in there)
    return ()


def is_calm(clients: Clients, but: Sequence[int] = ()) -> bool:
    """Whether all that was asked lately was answered right, by the first proxy that was asked."""
    now = time.monotonic()
    lately = [one for one in clients.seen.between(now - CALM_S - 1, now) if one.done > now - CALM_S]
    return len(lately) > CALM_S and not any(is_bad(one, but) for one in lately)


def is_bad(one: Asked, but: Sequence[int] = ()) -> bool:
    """Whether a search went wrong in any way, be it that a second proxy had to be asked."""
    return one.outcome != RIGHT or any(found != RIGHT for proxy, found in one.tries if proxy not in but)


def is_training(world: World) -> bool:
    """Whether workers train, and have saved something."""
    saved = any((world.root / "runs").glob("model-*/checkpoint_*/state.json"))
    return saved and len(world.cluster.named(faults.KINDS["trainer"])) == 2


def struck(world: World, clients: Clients, fault: Fault, chance: random.Random) -> dict[str, Any]:
    """Do one fault, and undo it; returns what became of searches, writes and training."""
    if "trainer" in fault.name or "checkpoint" in fault.name:
        until(lambda: is_training(world), PATIENCE_S)
    steps, unwritten = len(underway.steps(world.root)), clients.seen.writes_failed.total()
    without = (*fault.unreachable, *absent(world.cluster))
    began = base = time.monotonic()
    try:
        victim = fault.do(world, chance)
    except Exception as error:  # the others are done all the same, and this one counts as not recovered from
        say(f"{fault.name} was not done: {error!r}")
        return {"fault": fault.name, "victim": f"not done: {error!r}", "recovery_s": PATIENCE_S, "calm": False}
    if fault.seconds:
        time.sleep(fault.seconds)
        fault.undo(world)
        base = time.monotonic() if fault.from_undone else began
    time.sleep(asking.SLOWEST_S)  # what hangs has been seen by then
    back = until(lambda: is_calm(clients, without) and is_whole(world.cluster), PATIENCE_S)
    with suppress(httpx.HTTPError):
        faults.resume(world)
    told = {
        "fault": fault.name, "victim": victim, **counted(clients, without, began, base),
        "counted_from": "its end" if fault.from_undone else "the fault", "calm": back,
        "whole_again_s": round(time.monotonic() - base, 1),
        "writes_failed": clients.seen.writes_failed.total() - unwritten,
        "steps_trained": len(underway.steps(world.root)) - steps,
    }  # fmt: skip
    say(", ".join(f"{name} {value}" for name, value in told.items() if name != "counted_from"))
    return told


def counted(clients: Clients, without: Sequence[int], began: float, base: float) -> dict[str, Any]:
    """What became of searches since a fault, and the seconds from `base` until all were well.

    It does not count that proxies did not answer which nobody can reach.
    """
    of = clients.seen.between(began - 1, time.monotonic())
    bad = [one.done for one in of if one.done > began and is_bad(one, without)]
    return {
        "searches": len(of), **{name: sum(one.outcome == name for one in of) for name in asking.OUTCOMES},
        "recovery_s": round(max(0.0, max(bad, default=base) - base), 1),
    }  # fmt: skip


def until(true: Any, patience_s: float) -> bool:
    """Wait until something is true; returns whether it came true."""
    with suppress(RuntimeError):
        nodes.await_true(true, "it", patience_s)
        return True
    return False


@dataclass(frozen=True)
class How:
    """How the faults are done: chance's seed, searches a second, items; some faults alone, and where logs go."""

    seed: int
    rate: float
    items: int
    only: str
    logs: Path | None

    @property
    def trains(self) -> bool:
        """Whether a training is under way: where all faults are done, or one of it."""
        return not self.only or "trainer" in self.only or "checkpoint" in self.only

    def faults(self, isolated: bool, chance: random.Random) -> list[Fault]:
        """Which faults are done, in their order."""
        wanted = [one for one in faults.every(isolated) if not self.only or one.name in self.only.split(",")]
        chance.shuffle(wanted)
        return wanted


def in_cluster(folder: Path, isolated: bool, how: How) -> dict[str, Any]:
    """Do all faults to a cluster under load."""
    home, root = folder / "home", folder / "root"
    for path in (home, root):
        path.mkdir()
    disk = nodes.disk(root, ROOT_BYTES) if isolated else nullcontext()  # small, for it to be filled
    with disk, nodes.cluster(home, isolated) as cluster:
        job = "training-0" if how.trains else ""
        if job:
            underway.submit(cluster.dashboard, root, job)
        release = bench.releases(root, how.items, ["tiny"])["tiny"]
        world = World(cluster, root, release.index, job)
        if job:
            nodes.await_true(lambda: is_training(world), "a training that has saved something", 300)
            say("a training under way")
        deploy(cluster, release)
        return under_load(world, release, how)


def under_load(world: World, release: bench.Release, how: How) -> dict[str, Any]:
    """Do the faults one after the other while clients search and write."""
    cluster, chance = world.cluster, random.Random(how.seed)
    proxies = [node.url for node in cluster.nodes[: None if cluster.isolated else 1]]
    clients = Clients(proxies, truth(release, load.queries()[:ASKED]), how.rate, how.seed)
    clients.start()
    nodes.await_true(lambda: is_calm(clients) and is_whole(cluster), "an endpoint that is whole")
    say("an endpoint that answers")
    found = [struck(world, clients, fault, chance) for fault in how.faults(cluster.isolated, chance)]
    if how.logs:
        for node in cluster.nodes:
            shutil.copytree(cluster.logs(node), how.logs / f"node-{node.number}", dirs_exist_ok=True)
    return found_in_all(world, clients, found)


def found_in_all(world: World, clients: Clients, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of all searches, writes and steps."""
    clients.over.set()
    clients.join(timeout=30)
    seen = clients.seen
    gone = asking.lost(clients.proxies, list(seen.written))
    return {
        "faults": found, "searches": len(seen.asked),
        **{name: sum(one.outcome == name for one in seen.asked) for name in asking.OUTCOMES},
        "what_was_wrong": seen.wrong[:5], "what_failed": seen.unanswered[:20],
        "tries_that_failed": dict(seen.failed.most_common(12)),
        "upserts_acknowledged": len(seen.written), "upserts_lost": len(gone), "which_were_lost": gone[:10],
        "upserts_not_acknowledged": dict(seen.writes_failed.most_common(12)),
        "proxies_restarted_by_the_watchdog": world.cluster.logged("it is restarted"),
        "training_steps": len({*underway.steps(world.root)}), "steps_redone": underway.redone(world.root),
        "nodes_on_which_ray_ended_by_itself": world.cluster.restarts,
        "trainings_that_had_to_be_submitted_again": world.jobs_ended,
    }  # fmt: skip


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """Judge what was measured."""
    targets = kills.judged(found["kills"]) if "kills" in found else {}
    if flipped := found.get("flips"):
        targets["flips_refused"] = at_least(flipped["refused"], flips.FLIPS)
    if cluster := found.get("cluster"):
        targets["wrong"] = at_most(cluster[asking.WRONG], 0)
        targets["lost"] = at_most(cluster["upserts_lost"], 0)
        targets["failed_with_replica"] = at_most(cluster[asking.FAILED], 0)
        seconds = {one["fault"]: one["recovery_s"] if one["calm"] else PATIENCE_S for one in cluster["faults"]}
        targets["recovery_s"] = at_most(max(seconds.values()), 30)
        if "kill proxy" in seconds:
            targets["recovery_proxy_s"] = at_most(seconds["kill proxy"], 10)
    return targets


def main(
    seed: Annotated[int, typer.Option(help="of what is done, to what, and in which order")] = 1,
    only: Annotated[str, typer.Option(help="parts, with commas between")] = PARTS,
    rate: Annotated[float, typer.Option(help="of the kills: searches a second")] = 100,
    rounds: Annotated[int, typer.Option(help="of the kills: how often each kind is killed")] = 1,
    cluster_rate: Annotated[float, typer.Option(help="of the cluster: searches a second")] = 15,
    fault: Annotated[str, typer.Option(help="of the cluster: these faults alone, with commas between")] = "",
    logs: Annotated[Path | None, typer.Option(help="of the cluster: a folder for its logs")] = None,
    items: int = 20_000,
) -> None:
    """Do all of it and print it."""
    parts = only.split(",")
    isolated = "cluster" in parts and nodes.enter()
    found: dict[str, Any] = {"seed": seed, "items": items, "num_cores": os.cpu_count()}
    if "kills" in parts:
        found["kills"] = kills.figures(seed, rate, rounds, items)
    with tempfile.TemporaryDirectory() as folder:
        if "flips" in parts:
            (Path(folder) / "flips").mkdir()
            found["flips"] = flips.flipped(Path(folder) / "flips", seed)
            say(f"{found['flips']['refused']} of {flips.FLIPS} flipped bits were refused by name")
        if "cluster" in parts:
            skipped = [one.name for one in faults.every(True) if one.network and not isolated]
            found["not_done_for_want_of_namespaces"] = skipped
            how = How(seed, cluster_rate, items, fault, logs)
            found["cluster"] = in_cluster(Path(folder), isolated, how)
    print(json.dumps({"figures": found, "targets": judged(found)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
