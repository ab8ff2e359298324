"""Measure the index against others: `make bench-index`, or `OPTIONS='--size 100000 --dims 128'` for a smaller one.

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets; the frontier of
recall and time is drawn into `docs/index.png` (`--plot`).

Vectors are made up: 64 categories of products in 32 dimensions, sizes by Zipf, lifted to the width, with noise;
queries are items moved by noise and by one offset, as texts stand off from photos. That is easier than real text
to photos: expect more effort there. Searches ask for 100 hits by one thread, in batches of 32; times are the
medians of processor time over interleaved rounds. Bytes an item are those of the index as it is saved.

    ours        ivf_rabitq refined in fp16, built as by `jobs/index.py`, 8 segments joined in one shard
    faiss_hnsw  HNSW32, efConstruction 40 (FAISS's default)
    hnswlib     M 16, ef_construction 200
    usearch     connectivity 16, in bfloat16 and in float32
    svs         Vamana of Intel's Scalable Vector Search, degree 32, in float32

A contender is taken at the cheapest setting at which recall@10 is 0.99 or more. What the search path, shards,
filters and upserts cost is measured at the setting that the builder would take: where recall@100 is 0.99 too.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import faiss
import hnswlib
import numpy as np
import psutil
import pyarrow as pa
import svs
import typer
from numpy.typing import NDArray
from prepare import at_least, at_most, say
from usearch.index import Index as USearch
from world import World

from askew import ann, artifacts, segments, tuning
from askew.ann import Design, Effort
from askew.live import Follower, Live
from askew.segments import Plan
from askew.shards import Shard
from askew.tuning import IndexKindSettings

RECALL, K, BATCH, ROUNDS, NUM_SEGMENTS = 0.99, 100, 32, 5, 8
BREADTHS = (100, 110, 120, 135, 150, 170, 190, 220, 256, 320, 384, 512, 768, 1024)  # that graphs are searched with
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


def batches(queries: Vectors) -> Iterator[Vectors]:
    """Cut queries into batches."""
    for at in range(0, len(queries), BATCH):
        yield queries[at : at + BATCH]


def timed(searches: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median processor seconds of each, interleaved; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in searches}
    for number in range(rounds + 1):
        for name, search in searches.items():
            start = time.process_time()
            search()
            if number:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


# --- contenders ----------------------------------------------------------------------------------


class Contender(Protocol):
    """An index that is built of vectors and searched at a setting."""

    name: str
    settings: Sequence[Any]

    def build(self, vectors: Vectors) -> None:
        """Build."""

    def search(self, queries: Vectors, setting: Any) -> Rows:
        """Find 100 for each query."""

    def save(self, path: Path) -> int:
        """Save, and return the bytes."""


class FaissHNSW:
    """FAISS's graph."""

    name, settings = "faiss_hnsw", BREADTHS

    def build(self, vectors: Vectors) -> None:
        """Build."""
        self._index = faiss.index_factory(vectors.shape[1], "HNSW32", faiss.METRIC_INNER_PRODUCT)
        self._index.add(vectors)

    def search(self, queries: Vectors, setting: int) -> Rows:
        """Find 100 for each query."""
        rows: Rows = self._index.search(queries, K, params=faiss.SearchParametersHNSW(efSearch=setting))[1]
        return rows

    def save(self, path: Path) -> int:
        """Save, and return the bytes."""
        faiss.write_index(self._index, str(path))
        return path.stat().st_size


class HNSWLib:
    """The graph's first authors' own."""

    name, settings = "hnswlib", BREADTHS

    def build(self, vectors: Vectors) -> None:
        """Build."""
        self._index = hnswlib.Index("ip", vectors.shape[1])
        self._index.init_index(len(vectors), M=16, ef_construction=200, random_seed=0)
        self._index.add_items(vectors, num_threads=os.cpu_count())

    def search(self, queries: Vectors, setting: int) -> Rows:
        """Find 100 for each query."""
        self._index.set_ef(setting)
        return self._index.knn_query(queries, K, num_threads=1)[0].astype(np.int64)  # type: ignore[no-any-return]

    def save(self, path: Path) -> int:
        """Save, and return the bytes."""
        self._index.save_index(str(path))
        return path.stat().st_size


class USearchGraph:
    """usearch, in one of its types."""

    settings = BREADTHS

    def __init__(self, kind: str) -> None:
        self.name, self._kind = f"usearch_{kind}", kind

    def build(self, vectors: Vectors) -> None:
        """Build."""
        self._index = USearch(ndim=vectors.shape[1], metric="ip", dtype=self._kind, connectivity=16)
        self._index.add(np.arange(len(vectors)), vectors, threads=os.cpu_count() or 1)

    def search(self, queries: Vectors, setting: int) -> Rows:
        """Find 100 for each query."""
        self._index.expansion_search = setting
        rows: Rows = np.asarray(self._index.search(queries, K, threads=1).keys).astype(np.int64)
        return rows.reshape(len(queries), K)

    def save(self, path: Path) -> int:
        """Save, and return the bytes."""
        self._index.save(str(path))
        return path.stat().st_size


class SVS:
    """Intel's graph."""

    name, settings = "svs", BREADTHS

    def build(self, vectors: Vectors) -> None:
        """Build."""
        parameters = svs.VamanaBuildParameters(alpha=0.95, graph_max_degree=32, window_size=128)
        self._index = svs.Vamana.build(parameters, vectors, svs.DistanceType.MIP, num_threads=os.cpu_count() or 1)
        self._index.num_threads = 1
        self._bytes = vectors.nbytes + len(vectors) * 33 * 4

    def search(self, queries: Vectors, setting: int) -> Rows:
        """Find 100 for each query."""
        self._index.search_window_size = setting
        return self._index.search(queries, K)[0].astype(np.int64)  # type: ignore[no-any-return]

    def save(self, path: Path) -> int:
        """The bytes of its vectors and of its graph; saving writes more files than one."""
        return self._bytes


class Ours:
    """The index of this project, as a shard searches it."""

    name = "ours"

    def __init__(self, design: Design, folder: Path) -> None:
        self._design, self.folder = design, folder
        middle = range(design.lists // 128, design.lists // 16 + 1)
        self.settings = [e for ladder in ann.ladders(design) for e in ladder if e.lists in middle]
        self.effort = Effort()  # that the builder would take

    def build(self, vectors: Vectors) -> None:
        """Build its segments."""
        self.index = build(self._design, vectors, self.folder, items(len(vectors)))
        self.shard = Shard(Plan.read(self.index), verify=False)

    def search(self, queries: Vectors, setting: Effort) -> Rows:
        """Find 100 for each query."""
        return self.shard.search(queries, K, effort=setting).rows

    def save(self, path: Path) -> int:
        """The bytes of its vectors on disk, the centroids of every segment counted."""
        return sum(file.stat().st_size for file in self.index.glob(f"*/{segments.VECTORS}"))


def build(design: Design, vectors: Vectors, root: Path, every: pa.Table) -> Path:
    """Build an index of items as the stage does, from their vectors."""
    sample = vectors[np.random.default_rng(0).permutation(len(vectors))[: ann.sample_size(design)]]
    empty = ann.Index.trained(design, sample)
    with artifacts.draft(root, "index", design.model_dump(), {}) as draft:
        empty.write(draft.folder / segments.EMPTY)
        names = []
        cuts = np.linspace(0, len(vectors), NUM_SEGMENTS + 1).astype(int).tolist()
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            names.append(f"segment-{number:05d}")
            own = every.slice(start, stop - start)
            segments.write(draft.folder / names[-1], vectors[start:stop], own, empty, "bench")
        segments.tell(draft, names)
    return artifacts.place(root, "index", artifacts.key("index", design.model_dump(), {}))


def items(count: int) -> pa.Table:
    """Make up items with fields that half, a tenth, a hundredth and a thousandth of them share."""
    rows = np.arange(count)
    ids = pa.array([f"i{row:08d}" for row in range(count)])
    fields = {f"one_in_{n}": pa.array(rows % n == 0) for n in (2, 10, 100, 1000)}
    struct = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    return pa.table({"item_id": ids, "title": ids, "fields": struct})


# --- what is measured ----------------------------------------------------------------------------


def hit(wanted: Rows, found: Rows, k: int) -> float:
    """Recall at k."""
    return float(np.mean([np.isin(w[:k], f[:k]).mean() for w, f in zip(wanted, found, strict=True)]))


def climbed(contender: Contender, queries: Vectors, wanted: Rows) -> list[dict[str, Any]]:
    """Recall and time of a contender at its settings."""
    points = []
    for setting in contender.settings:
        found = np.concatenate([contender.search(batch, setting) for batch in batches(queries)])
        started = time.process_time()
        for batch in batches(queries):
            contender.search(batch, setting)
        point = {"setting": str(setting), "ms": 1000 * (time.process_time() - started) / len(queries)}
        points.append(point | {f"recall@{k}": hit(wanted, found, k) for k in (10, K)} | {"of": setting})
        if contender.name != "ours" and points[-1]["recall@10"] > 0.998:
            break
    return points


def chosen(points: Sequence[Mapping[str, Any]], ks: Sequence[int] = (10,)) -> Mapping[str, Any]:
    """The cheapest point that holds the recall, or, if none does, that is within 0.0005 of the best there is."""
    recalls = [min(point[f"recall@{k}"] for k in ks) for point in points]
    least = min(RECALL, max(recalls) - 0.0005)
    return min((p for p, r in zip(points, recalls, strict=True) if r >= least), key=lambda p: p["ms"])


def frontier(vectors: Vectors, queries: Vectors, wanted: Rows, folder: Path) -> tuple[dict[str, Any], Ours]:
    """Build and search every contender; returns their figures, and ours for further use."""
    design = tuning.design(IndexKindSettings(kind="ivf_rabitq"), len(vectors), vectors.shape[1])
    ours, figures = Ours(design, folder), {}
    others: list[Contender] = [FaissHNSW(), HNSWLib(), USearchGraph("bf16"), USearchGraph("f32"), SVS()]
    for contender in [ours, *others]:
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        started = time.perf_counter(), time.process_time()
        contender.build(vectors)
        taken = time.perf_counter() - started[0], time.process_time() - started[1]
        faiss.omp_set_num_threads(1)
        points = climbed(contender, queries, wanted)
        best = chosen(points)
        search = {contender.name: lambda c=contender, s=best["of"]: [c.search(b, s) for b in batches(queries)]}
        figures[contender.name] = {
            "build_s": round(taken[0], 1), "build_processor_s": round(taken[1], 1),
            "item_bytes": contender.save(folder / "saved") / len(vectors),
            "query_ms": 1000 * timed(search)[contender.name] / len(queries),
            **{key: best[key] for key in ("setting", "recall@10", "recall@100")},
            "points": [{k: v for k, v in point.items() if k != "of"} for point in points],
        }  # fmt: skip
        (folder / "saved").unlink(missing_ok=True)
        of = figures[contender.name]
        say(f"{contender.name}: {of['query_ms']:.3f} ms at {of['recall@10']:.4f}, {of['item_bytes']:.0f} bytes")
        if contender is ours:
            ours.effort = chosen(points, (10, K))["of"]
        else:
            contender.__dict__.clear()
            gc.collect()
    return figures, ours


def exact_search(vectors: Vectors, queries: Vectors) -> dict[str, float]:
    """Exact search in batches and one by one, by FAISS as it comes and as we set it."""
    flat = ann.Index.flat(vectors.shape[1])
    flat.add(vectors)
    few, own = queries[:BATCH], faiss.cvar.distance_compute_blas_threshold

    def by_default(batch: Vectors) -> None:
        faiss.cvar.distance_compute_blas_threshold = 128_000
        flat._index.search(batch, K)
        faiss.cvar.distance_compute_blas_threshold = own

    found = timed({
        "default_32": lambda: by_default(few), "ours_32": lambda: flat.search(few, K, Effort()),
        "default_1": lambda: by_default(few[:1]), "ours_1": lambda: flat.search(few[:1], K, Effort()),
    })  # fmt: skip
    return {name: 1000 * seconds / (1 if name.endswith("_1") else BATCH) for name, seconds in found.items()}


def path_and_shards(ours: Ours, queries: Vectors) -> dict[str, float]:
    """Our search path over the bare FAISS call, and two and four shards over one."""
    plan, effort = Plan.read(ours.index), ours.effort
    params = ours.shard._parts[0].index._params(K, effort, ann._Selector(None))
    index = ours.shard._parts[0].index._index
    shards = {n: [Shard(plan, plan.share(i, n), verify=False) for i in range(n)] for n in (2, 4)}

    def merged(batch: Vectors, every: Sequence[Shard]) -> None:
        found = [shard.search(batch, K, effort=effort) for shard in every]
        scores = np.concatenate([one.scores for one in found], axis=1)
        np.take_along_axis(scores, np.argsort(-scores, axis=1, kind="stable")[:, :K], 1)

    found = timed({
        "bare": lambda: [index.search(b, K, params=params) for b in batches(queries)],
        "path": lambda: [ours.shard.search(b, K, effort=effort) for b in batches(queries)],
        "shards_2": lambda: [merged(b, shards[2]) for b in batches(queries)],
        "shards_4": lambda: [merged(b, shards[4]) for b in batches(queries)],
    })  # fmt: skip
    return {name: 1000 * seconds / len(queries) for name, seconds in found.items()}


def filtered(ours: Ours, vectors: Vectors, queries: Vectors) -> dict[str, Any]:
    """Recall and time under filters of falling selectivity."""
    figures, few = {}, queries[:256]
    for n in (2, 10, 100, 1000):
        where, kept = {f"one_in_{n}": True}, np.arange(0, len(vectors), n)
        wanted = kept[ann.exact(vectors[kept], few, K)[1]]
        found = [ours.shard.search(b, K, where, ours.effort) for b in batches(few)]
        started = time.process_time()
        for batch in batches(few):
            ours.shard.search(batch, K, where, ours.effort)
        ms = 1000 * (time.process_time() - started) / len(few)
        rows = np.concatenate([one.rows for one in found])
        figures[f"1/{n}"] = {"ms": ms, "recall@10": hit(wanted, rows, 10), "recall@100": hit(wanted, rows, K)}
    return figures


def building(vectors: Vectors, folder: Path) -> dict[str, float]:
    """Building segments of vectors over bare FAISS's training and adding, by processor time.

    Both write files that were not there: to fill the pages of one that was costs less.
    """
    design = tuning.design(IndexKindSettings(kind="ivf_rabitq"), len(vectors), vectors.shape[1])
    every = items(len(vectors))
    faiss.omp_set_num_threads(1)
    number = itertools.count()

    def bare() -> None:
        index = faiss.index_factory(design.dim, design.factory, faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(index).cp.max_points_per_centroid = ann.TRAINED_ON
        index.train(vectors[: ann.sample_size(design)])
        index.add(vectors)
        faiss.write_index(index, str(folder / f"bare-{next(number)}"))

    def ours() -> None:
        build(design, vectors, folder / f"again-{next(number)}", every)

    return timed({"bare": bare, "ours": ours}, rounds=3)


def freshness(ours: Ours, queries: Vectors, seconds: float = 30) -> dict[str, float]:
    """How long an upsert takes until a search of a shard finds it, while searches go on."""
    follower, waits, pending, stop = Follower(ours.index), [], {}, threading.Event()
    dim = ours.shard.dim

    def write() -> None:
        random = np.random.default_rng(0)
        with Live(ours.index) as live:
            while not stop.wait(0.02):
                vector = random.normal(size=(1, dim)).astype(np.float32)
                began = time.monotonic()
                fields = {f"one_in_{n}": False for n in (2, 10, 100, 1000)}
                item = {"item_id": f"new{began}", "title": "new", "fields": fields}
                pending[live.upsert(vector / np.linalg.norm(vector), [item])] = began

    writer = threading.Thread(target=write)
    writer.start()
    searches, last, end = 0, 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        if time.monotonic() - last > 0.25:
            follower.follow()
            last = time.monotonic()
        follower.shard.search(queries[searches % 64 : searches % 64 + BATCH], K, effort=ours.effort)
        searches += 1
        found = [n for n in list(pending) if n <= follower.last]
        waits += [time.monotonic() - pending.pop(number) for number in found]
    stop.set()
    writer.join()
    return {
        "upserts": len(waits), "searches_a_second": searches * BATCH / seconds,
        **{f"p{p}_s": float(np.percentile(waits, p)) for p in (50, 99)},
    }  # fmt: skip


def embedding(num_items: int) -> dict[str, float]:
    """The processor time of embedding by Ray Data's actors over the bare loop of the model."""
    from embed import embedded

    return embedded(num_items)


def measured(size: int, dim: int, num_queries: int, folder: Path) -> dict[str, Any]:
    """All figures of one width."""
    say(f"{size:,} vectors of {dim} dimensions")
    world = World(size, dim)
    vectors = world.vectors(0, size)
    queries = world.queries(vectors, num_queries)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    wanted = ann.exact(vectors, queries, K)[1]
    contenders, ours = frontier(vectors, queries, wanted, folder)
    figures = {"contenders": contenders, "exact_ms": exact_search(vectors, queries)}
    say(f"exact: {figures['exact_ms']}")
    figures["effort"] = str(ours.effort)
    figures["path_ms"] = path_and_shards(ours, queries)
    say(f"path: {figures['path_ms']}")
    figures["filters"] = filtered(ours, vectors, queries)
    say(f"filters: {figures['filters']}")
    figures["freshness"] = freshness(ours, queries)
    say(f"freshness: {figures['freshness']}")
    figures["building_s"] = building(vectors, folder)
    say(f"building: {figures['building_s']}")
    return figures


def judged(by_dim: Mapping[int, Mapping[str, Any]], embed: Mapping[str, float]) -> dict[str, Any]:
    """Judge the worst of all widths."""

    def worst(of: Callable[[Mapping[str, Any]], float], most: bool = True) -> float:
        return (max if most else min)(of(figures) for figures in by_dim.values())

    def ms(figures: Mapping[str, Any], name: str) -> float:
        return float(figures["contenders"][name]["query_ms"])

    def peers(figures: Mapping[str, Any]) -> float:
        holding = [n for n, c in figures["contenders"].items() if n not in ("ours", "faiss_hnsw")
                   and c["recall@10"] >= RECALL]  # fmt: skip
        return min((ms(figures, name) for name in holding), default=float("inf"))

    def size(figures: Mapping[str, Any], name: str) -> float:
        return float(figures["contenders"][name]["item_bytes"])

    return {
        "vs_hnsw_time": at_most(worst(lambda f: ms(f, "ours") / ms(f, "faiss_hnsw")), 0.4),
        "vs_best_peer_time": at_most(worst(lambda f: ms(f, "ours") / peers(f)), 1.0),
        "vs_hnsw_memory": at_most(worst(lambda f: size(f, "ours") / size(f, "faiss_hnsw")), 0.5),
        "exact_vs_default": at_least(
            worst(lambda f: f["exact_ms"]["default_32"] / f["exact_ms"]["ours_32"], most=False), 8
        ),
        "path_overhead": at_most(worst(lambda f: f["path_ms"]["path"] / f["path_ms"]["bare"]), 1.05),
        "shard_tax_2": at_most(worst(lambda f: f["path_ms"]["shards_2"] / f["path_ms"]["path"]), 1.25),
        "shard_tax_4": at_most(worst(lambda f: f["path_ms"]["shards_4"] / f["path_ms"]["path"]), 1.7),
        "build_vs_faiss": at_least(
            worst(lambda f: f["building_s"]["bare"] / f["building_s"]["ours"], most=False), 0.95
        ),
        "embed_vs_loop": at_most(embed["stage_s"] / embed["loop_s"], 1.1),
        "upsert_p99_s": at_most(worst(lambda f: f["freshness"]["p99_s"]), 2),
    }


def draw(by_dim: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Draw recall over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(by_dim), figsize=(6 * len(by_dim), 4.5), squeeze=False)
    for axis, (dim, figures) in zip(axes[0], by_dim.items(), strict=True):
        for name, contender in figures["contenders"].items():
            points = sorted((p["ms"], p["recall@10"]) for p in contender["points"])
            best = np.maximum.accumulate([recall for _, recall in points])
            axis.plot([ms for ms, _ in points], best, marker=".", label=name, linewidth=2 if name == "ours" else 1)
        axis.axhline(RECALL, color="grey", linewidth=0.8, linestyle=":")
        axis.set(
            xscale="log", xlabel="processor time of a query, ms", ylabel="recall@10", title=f"{dim} dimensions"
        )
        axis.set_ylim(0.9, 1.002)
        axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], labels=["0.1", "0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    size: int = 1_000_000,
    dims: str = "128,256",
    queries: int = 1000,
    embed: int = 100_000,
    plot: Path | None = None,
) -> None:
    """Measure all and print it."""
    by_dim = {}
    for dim in map(int, dims.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            by_dim[dim] = measured(size, dim, queries, Path(folder))
    embedded = embedding(embed)
    if plot:
        draw(by_dim, plot)
    figures = {
        "by_dim": by_dim, "embedding": embedded, "size": size, "queries": queries, "num_cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "memory_gib": psutil.virtual_memory().total >> 30,
    }  # fmt: skip
    print(json.dumps({"figures": figures, "targets": judged(by_dim, embedded)}), flush=True)


if __name__ == "__main__":
    sys.exit(typer.run(main))
