"""Faults: what is done to a cluster that answers searches, and how it is undone.

Each names what it hit. Which process, file or node it is, chance decides. Knows nothing of how it is measured.
"""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nodes
import psutil
import underway
from nodes import Cluster

from askew import jobs

KINDS = {  # a process's name begins so; of several chance decides
    "shard": "ray::ServeReplica:search:shard", "encoder": "ray::ServeReplica:search:encoder",
    "ingress": "ray::ServeReplica:search:ingress", "items": "ray::ServeReplica:search:items",
    "switch": "ray::ServeReplica:search:switch", "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor", "trainer": "ray::RayTrainWorker", "raylet": "raylet", "gcs": "gcs_server",
}  # fmt: skip
KILLED = ("shard", "encoder", "ingress", "items", "switch", "controller", "proxy", "trainer")
STOPPED = ("shard", "encoder", "ingress", "proxy", "controller", "raylet", "gcs", "trainer")
STOPPED_S = {"gcs": 5.0, "raylet": 8.0}  # Ray takes a node for lost that is silent for longer
HOLD_S, CUT_S, AWAY_S, FULL_S = 10.0, 25.0, 8.0, 8.0
HEAD_S = 10.0  # the head ends with its GCS, and is started again after so long
REBOOT_S = 20.0  # Ray starts on no machine that it has not yet taken for lost


@dataclass
class World:
    """What faults are done to."""

    cluster: Cluster
    root: Path  # of all artifacts, on a small disk
    index: Path
    job: str = ""
    jobs_ended: int = 0
    driver_gone: bool = False  # with the head: Ray calls its job RUNNING until it takes the next one
    kept: dict[Path, bytes] = field(default_factory=dict)  # files as they were


@dataclass(frozen=True)
class Fault:
    """What is done, for how long it lasts (0: it is not undone), and how it is undone."""

    name: str
    do: Callable[[World, random.Random], str]
    seconds: float = 0.0
    undo: Callable[[World], Any] = lambda world: None
    network: bool = False  # it needs namespaces
    from_undone: bool = False  # recovery counts from when it was undone
    unreachable: tuple[int, ...] = ()  # proxies that nobody can reach while it lasts


def every(isolated: bool) -> list[Fault]:
    """All faults; without a network of their own, those that need none."""
    found = [Fault(f"kill {kind}", _sending(signal.SIGKILL, kind)) for kind in KILLED]
    found += [
        Fault(f"stop {kind}", _sending(signal.SIGSTOP, kind), STOPPED_S.get(kind, HOLD_S), _go_on)
        for kind in STOPPED
    ]
    found += [
        Fault("node removed and added", _remove, REBOOT_S, _add, unreachable=(2,)),
        Fault("kill gcs", _sending(signal.SIGKILL, "gcs"), HEAD_S, _restart_head, True, unreachable=(0,)),
        Fault("network cut and healed", _cut, CUT_S, lambda world: world.cluster.heal(0, 1), True, True),
        Fault("disk full", _fill, FULL_S, lambda world: _filler(world).unlink(missing_ok=True), True, True),
        Fault("flipped bit in a segment", _flip_segment, HOLD_S, _restore),
        Fault("flipped bit in a checkpoint", _flip_checkpoint, HOLD_S, _restore),
        Fault("MLflow restarted", _end_mlflow, AWAY_S, _start_mlflow, from_undone=True),
    ]
    return [fault for fault in found if isolated or not fault.network]


# --- processes -----------------------------------------------------------------------------------


def _victim(world: World, kind: str, chance: random.Random) -> psutil.Process:
    """A process of a kind; of raylets, none of the head's."""
    found = world.cluster.named(KINDS[kind])
    if kind == "raylet":
        found = [one for one in found if nodes.numbered(world.cluster.nodes, one) > 0]
    if not found:
        raise LookupError(f"no {kind} runs")
    return chance.choice(found)


def _told(world: World, process: psutil.Process) -> str:
    name = process.name().removeprefix("ray::").partition(".")[0]
    return f"{name} of node {nodes.numbered(world.cluster.nodes, process)}"


def _sending(number: signal.Signals, kind: str) -> Callable[[World, random.Random], str]:
    def send(world: World, chance: random.Random) -> str:
        told = _told(world, victim := _victim(world, kind, chance))
        victim.send_signal(number)
        return told

    return send


def _go_on(world: World) -> None:
    """Let go on what was stopped, if it still is there."""
    for process in world.cluster.processes():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_STOPPED:
                process.resume()


# --- nodes, networks, disks ----------------------------------------------------------------------


def _remove(world: World, chance: random.Random) -> str:
    world.cluster.nodes[2].remove()
    return "node 2"


def _add(world: World) -> None:
    world.cluster.nodes[2].start()


def _restart_head(world: World) -> None:
    """Start the head on what its GCS kept on disk."""
    world.driver_gone = True
    world.cluster.nodes[0].remove()
    world.cluster.nodes[0].start()


def _cut(world: World, chance: random.Random) -> str:
    world.cluster.cut(0, 1)
    return "between node 0 and node 1"


def _filler(world: World) -> Path:
    return world.root / "filler"


def _fill(world: World, chance: random.Random) -> str:
    """Write until there is no room left, not for a byte."""
    size = 1 << 20
    with _filler(world).open("wb", buffering=0) as stream:
        while size:
            try:
                size = 0 if stream.write(bytes(size)) == 0 else size
            except OSError:
                size //= 2
    return f"{world.root.name}: {_filler(world).stat().st_size >> 20} MiB more"


def _end_mlflow(world: World, chance: random.Random) -> str:
    nodes.end_mlflow(world.cluster)
    return "MLflow's server"


def _start_mlflow(world: World) -> None:
    nodes.start_mlflow(world.cluster)


# --- flipped bits --------------------------------------------------------------------------------


def _flip(world: World, path: Path, chance: random.Random) -> str:
    world.kept[path] = whole = path.read_bytes()
    content, bit = bytearray(whole), chance.randrange(8 * len(whole))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.parent.name}/{path.name}"


def _restore(world: World) -> None:
    for path, whole in world.kept.items():
        if path.parent.is_dir():
            path.write_bytes(whole)
    world.kept.clear()


def _flip_segment(world: World, chance: random.Random) -> str:
    """Flip a bit of a segment's file, and kill a replica that would have to read it again."""
    path = chance.choice(sorted(world.index.glob("segment-*/*.*")))
    shard = int(path.parent.name[-1]) % 2
    told = _flip(world, path, chance)
    victim = chance.choice(world.cluster.named(f"{KINDS['shard']}-{shard}"))
    told = f"{told}, then {_told(world, victim)} killed"
    victim.kill()
    return told


def _flip_checkpoint(world: World, chance: random.Random) -> str:
    """Flip a bit of the newest checkpoint, and kill a worker, so that it is read."""
    saved = sorted((world.root / "runs").glob("model-*/checkpoint_*/*.*"), key=lambda path: path.stat().st_mtime)
    newest = [path for path in saved if path.parent == saved[-1].parent]
    told = _flip(world, chance.choice(newest), chance)
    for worker in world.cluster.named(KINDS["trainer"]):
        worker.kill()
    return told


def resume(world: World) -> None:
    """Go on with the training where it ended, as whoever read its last words would."""
    if not world.job:
        return
    runs = underway.status(world.cluster.dashboard, world.job)["status"] in jobs.ALIVE
    if runs and not world.driver_gone:
        return
    job = f"training-{time.monotonic_ns()}"
    underway.submit(world.cluster.dashboard, world.root, job)
    world.job, world.driver_gone, world.jobs_ended = job, False, world.jobs_ended + 1
