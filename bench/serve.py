"""Measure the endpoint under load, and its yardsticks: `make bench-serve`; with OPTIONS=--quick only if it works.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets.

Served is a made-up catalogue (`--items` vectors of 128 dimensions, inverted lists in half precision, recall 0.99)
with query encoders of random weights: one of the demo's size, one of MiniLM's. Queries are real ones where they
are at hand. The endpoint has two shards, one replica of every part, and keeps no answers and no queries' vectors;
the yardsticks (`bench/yardsticks.py`) have the same model and the same files. Everything runs on this machine, the
load too, which is a process of its own.

Processor time is that of all processes of a server: of Ray, that of the head, the controller, the proxy and the
replicas. What they take when nothing is asked is measured before, and figures are given with and without it.
Latencies of closed loops are told raw and corrected for coordinated omission, those of open loops count from when
a request fell due. What is judged is measured three times, p99 seven times, and of these windows the
median one told.

    single, batching    a process of FastAPI and FAISS, without and with batches
    ours                the endpoint, with Ray Serve's flags for throughput
    ours_default        the endpoint, with the default flags of Ray and Ray Serve
    textbook            Ray Serve composed as its documentation does, with the same default flags
"""

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1",
    "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip

import httpx
import load
import numpy as np
import psutil
import pyarrow as pa
import torch
import typer
import yaml
from load import Load
from prepare import at_least, at_most, say
from world import World

from askew import ann, artifacts, drawn, local, segments, tuning
from askew.inputs import Tokens
from askew.models import Model
from askew.registry import Registry
from askew.towers import TowerSettings, TwoTower

HERE = Path(__file__).parent
DIM, NUM_SEGMENTS, NUM_SHARDS, K = 128, 4, 2, 10
ENDS = (1, 32, 64)  # connections
TOWERS = {
    "tiny": TowerSettings(),
    "minilm": TowerSettings.model_validate({
        "fusion": "text", "shared_text": True, "text": {"width": 384, "layers": 6, "heads": 12},
    }),
}  # fmt: skip
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
PARTS = ("yardsticks", "ours", "overload", "minilm", "scaling", "default", "textbook", "encoder")
NAMED = ("haproxy", "raylet", "gcs_server")  # processes that bear their own name
NUM_CPUS = 8  # as Ray counts them: replicas find a place on any machine
MANY, SCALING_S = 512, 150.0


# --- what is served ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """A model and the index that goes with it."""

    name: str
    model: Path
    index: Path


def releases(
    root: Path, num_items: int, names: Sequence[str] = tuple(TOWERS), kind: ann.Kind = "ivf_fp16"
) -> dict[str, Release]:
    """Make up models, and an index for each: "tiny" and "minilm", or "tiny-1" and so on of other weights.

    All have the same vectors and items; those of a number after the name are of other items.
    """
    say(f"making up {num_items:,} items")
    world = World(num_items, DIM)
    vectors = world.vectors(0, num_items)
    shop, asked = drawn.plan(), load.queries()
    products = pa.Table.from_pylist([
        {"title": item.title, "fields": {n: getattr(item, n) for n in (*drawn.ATTRIBUTES, "price")}}
        for item in shop.items
    ])  # fmt: skip
    items = products.take(pa.array(np.arange(num_items) % len(products)))
    items = items.add_column(0, "item_id", pa.array([f"item-{number:08d}" for number in range(num_items)]))
    items = items.append_column("has_image", pa.array(np.zeros(num_items, np.bool_)))
    tokens = Tokens.train([*(item.title for item in shop.items), *asked], TOWERS["tiny"].vocabulary)
    build = Build(vectors, items, world.queries(vectors, 256), kind)
    models = {name: model(root, name, tokens, asked) for name in names}
    return {
        name: Release(f"bench-{name}", folder, build.place(root, folder, numbered(name)))
        for name, folder in models.items()
    }


def numbered(name: str) -> int:
    """The number after a release's name; 0 where there is none."""
    return int(name.partition("-")[2] or 0)


def model(root: Path, name: str, tokens: Tokens, asked: Sequence[str]) -> Path:
    """Make a model of random weights, whose queries lie around the origin, as a trained one's do."""
    torch.manual_seed(numbered(name))
    made = Model(TwoTower(TOWERS[name.partition("-")[0]], tokens.size), tokens)
    with torch.no_grad():
        hidden = [made.towers.query(made._tensor(tokens.ids([query], 16))).pooled_BD[0] for query in asked]
        made.towers.query.project.bias -= torch.stack(hidden).mean(dim=0)
    with artifacts.draft(root, "model", {"name": name}, {}) as draft:
        made.save(draft.folder)
        draft.details["dim"] = DIM
    return artifacts.place(root, "model", artifacts.key("model", {"name": name}, {}))


class Build:
    """The building of an index, as the index stage does it, from vectors that are there."""

    def __init__(self, vectors: ann.Vectors, items: pa.Table, queries: ann.Vectors, kind: ann.Kind) -> None:
        ann.threads(os.cpu_count() or 1)
        self._vectors, self._items = vectors, items
        design = tuning.design(tuning.IndexKindSettings(kind=kind), len(vectors), DIM)
        self._empty = ann.Index.trained(design, vectors[: ann.sample_size(design)])
        self._effort = self._tuned(design, queries)
        say(f"{design.factory}, {self._effort}")

    def _tuned(self, design: ann.Design, queries: ann.Vectors) -> ann.Effort:
        ann.threads(1)
        index = self._empty.copy()
        index.add(self._vectors)
        with tempfile.TemporaryDirectory() as folder:
            tuning.save(
                path := Path(folder) / "all.npz", tuning.measure(index, self._empty, self._vectors, queries)
            )
            return tuning.cheapest(tuning.settings(design, [path]), 0.99).effort

    def place(self, root: Path, model: Path, shift: int = 0) -> Path:
        """Write the index of a model, each vector that of the item `shift` further on; returns its folder."""
        key = artifacts.read(model, "model", verify=False).key
        inputs, settings = {"model": key, "triplets": "made up"}, {"items": len(self._vectors)}
        with artifacts.draft(root, "index", settings, inputs) as draft:
            self._empty.write(draft.folder / segments.EMPTY)
            names = [f"segment-{number:05d}" for number in range(NUM_SEGMENTS)]
            for number, name in enumerate(names):
                own = self._items.take(pa.array(np.arange(number, len(self._vectors), NUM_SEGMENTS)))
                vectors = np.roll(self._vectors, -shift, axis=0)[number::NUM_SEGMENTS]
                segments.write(draft.folder / name, vectors, own, self._empty, "bench")
            segments.tell(draft, names, self._effort)
        return artifacts.place(root, "index", artifacts.key("index", settings, inputs))


# --- servers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Something that answers, and the processes that it consists of."""

    name: str
    url: str
    processes: Callable[[], list[psutil.Process]]


@contextmanager
def yardstick(kind: str, release: Release) -> Iterator[Server]:
    """Serve a release from one process."""
    [port] = local.free_ports(1)
    command = [str(HERE / "yardsticks.py"), kind, str(release.model), str(release.index), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command], env=os.environ | ONE_THREAD)
    try:
        server = Server(kind, f"http://{local.HOST}:{port}/search", lambda: [psutil.Process(process.pid)])
        await_answer(server)
        yield server
    finally:
        process.terminate()
        process.wait()


class Cluster(local.Stack):
    """Ray and MLflow, with the flags of Ray and Ray Serve that the project sets for speed, or with none."""

    tuned: bool

    @property
    def environment(self) -> dict[str, str]:
        """What every process finds in its environment."""
        theirs = ("RAY_SERVE_",) if self.tuned else ("RAY_SERVE_", "RAY_worker_")
        kept = {name: value for name, value in super().environment.items() if not name.startswith(theirs)}
        path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return kept | {"PYTHONPATH": os.pathsep.join(path)}

    def serving(self) -> dict[str, str]:
        """What Ray is started with beside it."""
        return super().serving() if self.tuned else {}


@contextmanager
def cluster(home: Path, tuned: bool) -> Iterator[Cluster]:
    """Start Ray and MLflow, and end them, also where this process is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ports = dict(zip(local.PURPOSES, local.free_ports(4), strict=True))
    stack = Cluster(instance=secrets.token_hex(4), home=home, ports=local.Ports(**ports), tuned=tuned)
    (home / "logs").mkdir(parents=True)
    artifacts.write_text(home / "local.json", stack.model_dump_json(exclude={"tuned"}))
    try:
        local._start_mlflow(stack)
        local._start_ray(stack, NUM_CPUS)
        local._await_health(stack)
        yield stack
    finally:
        local.stop(home)


@contextmanager
def endpoint(
    home: Path, release: Release, *, tuned: bool = True, scaling: Mapping[str, Any] | None = None
) -> Iterator[tuple[Server, Cluster]]:
    """Serve a release by the endpoint, as `serve deploy` does it."""
    one = {"scaling": {"min_replicas": 1, "max_replicas": 1}}
    with cluster(home, tuned) as stack:
        registry = Registry(stack.mlflow)
        tags = {"askew.index": str(release.index), "askew.release": "bench"}
        run = registry.start_run("bench", release.name, {}, {})
        version = registry.register(release.name, release.model, run, tags)
        args = {
            "model": release.name, "version": version.version, "cache": str(home / "models"),
            "num_shards": NUM_SHARDS, "cached_queries": 0, "cached_results": 0,
            "ingress": one, "encoder": one, "shard": one,
        }  # fmt: skip
        more = {"deployments": [{"name": n, "autoscaling_config": a} for n, a in (scaling or {}).items()]}
        quiet = {"logging_config": {"enable_access_log": False}} if tuned else {}
        name = "ours" if tuned else "ours_default"
        yield deployed(stack, name, "askew.serving:build", args, more | quiet), stack


@contextmanager
def textbook(home: Path, release: Release) -> Iterator[Server]:
    """Serve a release by the textbook's composition."""
    with cluster(home, tuned=False) as stack:
        args = {"model": str(release.model), "index": str(release.index), "num_shards": NUM_SHARDS}
        yield deployed(stack, "textbook", "yardsticks:textbook", args, {})


def deployed(
    stack: Cluster, name: str, import_path: str, args: Mapping[str, Any], more: Mapping[str, Any]
) -> Server:
    """Deploy an application and wait until it answers."""
    application = {"name": "search", "route_prefix": "/", "import_path": import_path, "args": dict(args), **more}
    config = stack.home / "application.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    local.deploy(stack, config, mark="bench")

    def processes() -> list[psutil.Process]:
        return [p for p in local.members(stack.instance) if "mlflow" not in " ".join(p.cmdline())]

    server = Server(name, f"{stack.endpoint}/search", processes)
    await_answer(server)
    return server


def await_answer(server: Server, patience_s: float = 120) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(httpx.HTTPError):
            if httpx.post(server.url, json={"query": "mug"}, timeout=5, trust_env=False).status_code == load.OK:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.name} does not answer at {server.url}")
        time.sleep(0.2)


# --- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """How much is measured, and how long."""

    items: int
    connections: Sequence[int]
    replicas: int
    seconds: float
    warm_s: float
    idle_s: float
    times: int  # that what is judged is measured
    tails: int  # that p99 is, which one burst of whatever else a machine does decides in a short window


FULL = Extent(200_000, (1, 2, 4, 8, 16, 32, 64), 3, seconds=8, warm_s=2, idle_s=5, times=3, tails=7)
QUICK = Extent(20_000, ENDS, 2, seconds=2, warm_s=1, idle_s=2, times=1, tails=1)


def role(process: psutil.Process) -> str:
    """What a process does: a deployment's name, or a part of Ray."""
    name = process.name().partition(".")[0]  # what follows is the method that it is in now
    if "ServeReplica" in name:
        return name.rpartition(":")[2]
    return name.removeprefix("ray::") if name.startswith("ray::") or name in NAMED else "other"


def spent(processes: Sequence[psutil.Process]) -> Counter[str]:
    """Processor seconds of processes until now, by what they do."""
    found: Counter[str] = Counter()
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[role(process)] += times.user + times.system
    return found


def idling(server: Server, seconds: float) -> float:
    """Processor seconds a second that a server takes when nothing is asked."""
    processes = server.processes()
    before, started = spent(processes), time.monotonic()
    time.sleep(seconds)
    return (spent(processes) - before).total() / (time.monotonic() - started)


def window(server: Server, wanted: Load, how: Extent, idle: float) -> dict[str, Any]:
    """Load a server for a while; returns what became of the requests, and the processor time that one took."""
    processes = server.processes()
    running = load.start(replace(wanted, seconds=how.warm_s + how.seconds + 0.5))
    time.sleep(how.warm_s)
    start, before, busy = time.monotonic(), spent(processes), busy_s()
    time.sleep(how.seconds)
    stop, after, busy = time.monotonic(), spent(processes), busy_s() - busy
    found = load.told(running.wait(), wanted, start, stop)
    span, by = stop - start, after - before
    answered = max(1, found["ok_a_second"] * span)
    found["cpu_us"] = round(1e6 * by.total() / answered, 1)
    found["cpu_us_less_idle"] = round(1e6 * (by.total() - idle * span) / answered, 1)
    found["cpu_us_by"] = {name: round(1e6 * seconds / answered, 1) for name, seconds in by.most_common()}
    found["cores_of_others"] = round((busy - by.total()) / span, 2)  # the load's too
    return found


def busy_s() -> float:
    """Processor seconds of the whole machine until now."""
    times = psutil.cpu_times()
    return float(sum(times[:8]) - times.idle - getattr(times, "iowait", 0))  # guests' are in users' already


def ladder(server: Server, connections: Sequence[int], how: Extent, times: int = 1) -> dict[str, Any]:
    """Load a server in closed loops of more and more connections, some `times` over those of `ENDS`.

    Of several windows that of the median processor time is told, and the processor times of all.
    """
    asked = load.queries()
    window(server, Load(server.url, asked, 8), replace(how, seconds=how.warm_s), 0)  # all paths are warm now
    time.sleep(1)
    idle = idling(server, how.idle_s)
    windows = defaultdict[int, list[dict[str, Any]]](list)
    for count in (*connections, *((times - 1) * ENDS)):
        windows[count].append(of := window(server, Load(server.url, asked, count, k=K), how, idle))
        text = f"{of['ok_a_second']:,.0f} a second, p50 {of.get('p50')} ms, p99 {of.get('p99')} ms"
        say(f"{server.name} c={count}: {text}, {of['cpu_us_less_idle']:,.0f} µs of processor")
    found = {str(count): median(of, "cpu_us_less_idle") for count, of in windows.items()}
    return {"idle_cores": round(idle, 4), **found}


def median(windows: Sequence[dict[str, Any]], figure: str) -> dict[str, Any]:
    """The window of the median figure, and that figure of each."""
    middle = sorted(windows, key=lambda one: float(one.get(figure, math.inf)))[len(windows) // 2]
    return middle | ({f"{figure}_each": [one.get(figure) for one in windows]} if len(windows) > 1 else {})


def open_loop(server: Server, rate: float, how: Extent, idle: float) -> dict[str, Any]:
    """Load a server with so many requests a second, whatever it answers."""
    found = window(server, Load(server.url, load.queries(), MANY, rate, k=K), how, idle)
    counts = f"{found['ok']:,} of {found['requests']:,} answered"
    say(f"{server.name} at {rate:,.0f} a second: {counts}, p50 {found.get('p50')} ms, p99 {found.get('p99')} ms")
    tail = {"p99_over_p50": found["p99"] / found["p50"]} if "p50" in found else {}
    return {"rate": round(rate, 1), **found, **tail}


def peak(ladder: Mapping[str, Any]) -> float:
    """The most answers a second, of any number of connections."""
    return max(float(of["ok_a_second"]) for of in ladder.values() if isinstance(of, dict))


def scaled(home: Path, release: Release, most: int) -> dict[str, Any]:
    """Let replicas grow from one to `most` under load, and shrink again, counting every request that fails."""
    common = {"min_replicas": 1, "max_replicas": most, "upscale_delay_s": 2, "downscale_delay_s": 5,
              "look_back_period_s": 3, "metrics_interval_s": 1}  # fmt: skip
    wanted = {"ingress": 8, "encoder": 0.1, "shard-0": 0.1, "shard-1": 0.1}  # calls under way, for each replica
    scaling = {name: common | {"target_ongoing_requests": ongoing} for name, ongoing in wanted.items()}
    with endpoint(home, release, scaling=scaling) as (server, stack):
        asked, before = load.queries(), replicas(stack, wanted)
        busy = load.start(Load(server.url, asked, 64, seconds=SCALING_S))
        up_s = until(lambda: set(replicas(stack, wanted).values()) == {most}, SCALING_S / 2)
        time.sleep(5)
        during, outcomes = replicas(stack, wanted), [busy.stop()]
        quiet = load.start(Load(server.url, asked, 64, rate=20, seconds=SCALING_S))
        down_s = until(lambda: set(replicas(stack, wanted).values()) == {1}, SCALING_S - 10)
        time.sleep(2)
        outcomes.append(quiet.stop())
    counts = [one.counts() for one in outcomes]
    found = {
        "replicas": {"before": before, "under_load": during}, "seconds_to_grow": up_s, "seconds_to_shrink": down_s,
        "requests": sum(map(len, outcomes)), "failed": sum(len(one) - len(one.ok) for one in outcomes),
        "under_load": counts[0], "afterwards": counts[1],
    }  # fmt: skip
    say(f"scaling: {during}, {found['failed']} of {found['requests']:,} failed, up {up_s} s, down {down_s} s")
    return found


def replicas(stack: Cluster, names: Iterable[str]) -> dict[str, int]:
    """How many replicas of these deployments run."""
    answer = httpx.get(f"{stack.dashboard}/api/serve/applications/", timeout=30, trust_env=False).json()
    deployments = answer["applications"]["search"]["deployments"]
    return {
        name: sum(replica["state"] == "RUNNING" for replica in deployments[name]["replicas"]) for name in names
    }


def until(true: Callable[[], bool], patience_s: float) -> float | None:
    """Wait until something is true; returns the seconds that it took, None if it did not come true."""
    started = time.monotonic()
    while time.monotonic() < started + patience_s:
        if true():
            return round(time.monotonic() - started, 1)
        time.sleep(0.5)
    return None


def encoder_figures() -> dict[str, Any] | None:
    """What the query encoder saves and loses, by the benchmark of that name; None where it is not there."""
    try:
        import encoder
    except ImportError as error:
        say(f"no figures of the encoder: {error}")
        return None
    return encoder.encoder_figures()  # type: ignore[no-any-return]


def measured(root: Path, only: Sequence[str], how: Extent) -> dict[str, Any]:
    """Measure the parts that are wanted."""
    served = releases(root, how.items)
    figures: dict[str, Any] = {"tiny": {}, "minilm": {}}
    tiny, minilm = served["tiny"], served["minilm"]
    if "minilm" in only:
        with yardstick("batching", minilm) as server:
            figures["minilm"]["batching"] = ladder(server, ENDS, how, how.times)
        with endpoint(root / "minilm", minilm) as (server, _):
            figures["minilm"]["ours"] = ladder(server, ENDS, how, how.times)
    if "yardsticks" in only:
        with yardstick("single", tiny) as server:
            figures["tiny"]["single"] = ladder(server, how.connections, how)
        with yardstick("batching", tiny) as server:
            figures["tiny"]["batching"] = ladder(server, how.connections, how, how.times)
    if "ours" in only:
        with endpoint(root / "ours", tiny) as (server, _):
            figures["tiny"]["ours"] = found = ladder(server, how.connections, how, how.times)
            half = (open_loop(server, peak(found) / 2, how, found["idle_cores"]) for _ in range(how.tails))
            figures["half_of_peak"] = median([*half], "p99_over_p50")
            if "overload" in only:
                over = open_loop(server, 5 * peak(found), how, found["idle_cores"])
                figures["overload"] = over | {"goodput_of_peak": round(over["ok_a_second"] / peak(found), 3)}
    if "default" in only:
        with endpoint(root / "default", tiny, tuned=False) as (server, _):
            figures["tiny"]["ours_default"] = ladder(server, ENDS, how)
    if "textbook" in only:
        with textbook(root / "textbook", tiny) as server:
            figures["tiny"]["textbook"] = ladder(server, ENDS, how, how.times)
    if "scaling" in only:
        figures["scaling"] = scaled(root / "scaling", tiny, how.replicas)
    if "encoder" in only:
        figures["encoder"] = encoder_figures()
    return figures


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Judge what was measured."""
    tiny, minilm, found = figures["tiny"], figures["minilm"], {}

    def of(where: Mapping[str, Any], name: str, other: str, connections: int, figure: str) -> float:
        step = str(connections)
        return float(where[name][step][figure]) / float(where[other][step][figure])

    if {"ours", "batching"} <= tiny.keys():
        for count, bound in ((1, 3.0), (32, 1.5), (64, 1.5)):
            ratio = of(tiny, "ours", "batching", count, "cpu_us_less_idle")
            found[f"cpu_vs_single_process_c{count}"] = at_most(ratio, bound)
        found["added_p50_ms_c1"] = at_most(tiny["ours"]["1"]["p50"] - tiny["batching"]["1"]["p50"], 4)
    if {"ours", "textbook"} <= tiny.keys():
        found["throughput_vs_textbook_c64"] = at_least(of(tiny, "ours", "textbook", 64, "ok_a_second"), 20)
    if {"ours", "batching"} <= minilm.keys():
        ratio = of(minilm, "ours", "batching", 64, "ok_a_second")
        found["throughput_vs_single_process_minilm"] = at_least(ratio, 0.95)
    if (half := figures.get("half_of_peak")) and "p50" in half:
        found["p99_over_p50"] = at_most(half["p99_over_p50"], 3)
    if encoder := figures.get("encoder"):
        found["encoder_speedup_b1"] = at_least(encoder["speedup_b1"], 4)
        found["encoder_speedup_b32"] = at_least(encoder["speedup_b32"], 4)
        found["encoder_ndcg_loss"] = at_most(encoder["ndcg_loss"], 0.001)
    if scaling := figures.get("scaling"):
        both = scaling["seconds_to_grow"] is not None and scaling["seconds_to_shrink"] is not None
        failed = at_most(scaling["failed"], 0)
        found["failed_while_scaling"] = failed | {"holds": failed["holds"] and both}
    return found


def main(
    items: Annotated[int, typer.Option(help="vectors of the index")] = FULL.items,
    only: Annotated[str, typer.Option(help="parts, with commas between")] = ",".join(PARTS),
    quick: Annotated[bool, typer.Option(help="few items and short windows: to see that it works")] = False,
) -> None:
    """Measure all and print it."""
    how = QUICK if quick else replace(FULL, items=items)
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(Path(folder), only.split(","), how)
    figures |= {
        "items": how.items, "seconds_a_window": how.seconds, "queries": len(load.queries()),
        "real_queries": load.REAL_QUERIES.exists(), "num_cores": os.cpu_count(),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "memory_gib": psutil.virtual_memory().total >> 30,
    }  # fmt: skip
    print(json.dumps({"figures": figures, "targets": judged(figures)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
