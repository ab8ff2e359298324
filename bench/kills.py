"""Kill processes of an endpoint on one machine under load: `make chaos OPTIONS='--only kills --rounds 3'`.

The endpoint serves a made-up catalogue in two shards of one replica each, behind two replicas of the ingress and
of the query encoder. Requests fall due at random, whatever it answers; then one process is killed by SIGKILL, in
turn of each kind. Counted is what fails (anything but an answer with status 200), what is answered without a part
of the catalogue, and the seconds from the kill until the last of these.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import load
import psutil
import serve as bench
from load import Load
from prepare import at_most, say

KINDS = {  # a process's name begins so; of several the seed decides
    "shard": "ray::ServeReplica:search:shard", "encoder": "ray::ServeReplica:search:encoder",
    "ingress": "ray::ServeReplica:search:ingress", "controller": "ray::ServeController",
}  # fmt: skip
BEFORE_S, AFTER_S, PATIENCE_S = 4.0, 16.0, 60.0
TWO = {"min_replicas": 2, "max_replicas": 2}


def killed(server: bench.Server, kind: str, rate: float, chance: random.Random) -> dict[str, Any]:
    """Kill one process of a kind under load; returns what became of the requests."""
    settled(server)
    wanted = Load(server.url, load.queries(), bench.MANY, rate, BEFORE_S + AFTER_S, patience_s=8)
    running = load.start(wanted)
    time.sleep(BEFORE_S)
    found = [process for process in server.processes() if process.name().startswith(KINDS[kind])]
    victim = chance.choice(sorted(found, key=lambda process: process.pid))
    name, at = victim.name(), time.monotonic()
    victim.kill()
    outcomes = running.wait()
    rows = outcomes.rows
    wrong = rows[(rows["status"] != load.OK) | rows["degraded"]]
    late = wrong[wrong["done"] >= at]
    counts = outcomes.counts()
    seconds = float(late["done"].max() - at) if len(late) else 0.0
    failed = counts["requests"] - counts["ok"]
    told = {"victim": name.removeprefix("ray::"), "failed": failed, "seconds": round(seconds, 2), **counts}
    say(
        f"{told['victim']} killed: of {counts['requests']:,} requests {failed} failed, "
        f"{counts['degraded']} degraded; all well after {seconds:.1f} s"
    )
    return told | load.percentiles(outcomes.ok.latencies_ms)


def settled(server: bench.Server) -> None:
    """Wait until all kinds of processes are there as often as they should be, and every shard answers."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        names = [name(process) for process in server.processes()]
        whole = all(
            sum(one.startswith(start) for one in names) >= (1 if kind == "controller" else 2)
            for kind, start in KINDS.items()
        )
        answers = load.start(Load(server.url, load.queries(), 4, seconds=1)).wait().counts() if whole else {}
        if whole and answers["ok"] == answers["requests"] and not answers["degraded"]:
            return
        time.sleep(0.5)
    raise RuntimeError(f"the endpoint is not whole after {PATIENCE_S:.0f} s")


def name(process: psutil.Process) -> str:
    """The name of a process that may just have ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def judged(figures: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Judge all rounds together: all that failed, and the longest time."""
    found = {}
    for kind, rounds in figures.items():
        found[f"failed_{kind}"] = at_most(sum(one["failed"] for one in rounds), 0)
        found[f"seconds_{kind}"] = at_most(max(one["seconds"] for one in rounds), 15)
    return found


def figures(seed: int, rate: float, rounds: int, items: int) -> dict[str, list[dict[str, Any]]]:
    """Serve, kill and count; returns what became of each round, by kind."""
    chance, found = random.Random(seed), {kind: list[dict[str, Any]]() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        release = bench.releases(Path(folder), items, ["tiny"])["tiny"]
        scaling = {"ingress": TWO, "encoder": TWO}
        with bench.endpoint(Path(folder) / "kills", release, scaling=scaling) as (server, _):
            for _ in range(rounds):
                for kind in KINDS:
                    found[kind].append(killed(server, kind, rate, chance))
    return found
