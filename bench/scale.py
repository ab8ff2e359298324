"""Measure how the index grows: memory, build and search time of 10⁵, 10⁶ and, with compressed kinds, 10⁷ vectors.

`python bench/scale.py` writes `docs/scale.json`. Vectors are made up as for `bench/index.py`, a chunk at a
time, so that the full vectors of the largest are never all in memory. Times are processor time of one thread
for searches in batches of 32 of 100 hits, at the least effort that gives recall@10 of 0.99; builds take all
cores, and wall and processor time stand beside each other. A power law through the points carries them on to
10⁸ and 10⁹.
"""

import gc
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import typer
from index import BATCH, RECALL, K, World, hit, timed
from prepare import say

from askew import ann, tuning
from askew.ann import Effort, Index
from askew.tuning import IndexKindSettings

CHUNK = 500_000


def chunks(world: World) -> Iterator[np.ndarray]:
    """All vectors, a part at a time."""
    for number, at in enumerate(range(0, world.size, CHUNK)):
        yield world.vectors(number, min(CHUNK, world.size - at))


def truth(world: World, queries: np.ndarray) -> np.ndarray:
    """The exact best, a chunk at a time."""
    scores = np.full((len(queries), K), -np.inf, np.float32)
    rows, at = np.full((len(queries), K), -1, np.int64), 0
    for part in chunks(world):
        found, places = ann.exact(part, queries, K)
        both, of = np.concatenate([scores, found], 1), np.concatenate([rows, places + at], 1)
        order = np.argsort(-both, axis=1)[:, :K]
        scores, rows = np.take_along_axis(both, order, 1), np.take_along_axis(of, order, 1)
        at += len(part)
    return rows


def measured(world: World, settings: IndexKindSettings, queries: np.ndarray) -> dict[str, Any]:
    """Build one index and search it."""
    size, dim = world.size, world.dim
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    wanted = truth(world, queries)
    design = tuning.design(settings, size, dim)
    need = ann.sample_size(design)
    sample = [part[:: max(1, size // need)] for part in chunks(world)]
    before = psutil.Process().memory_info().rss
    started = time.perf_counter(), time.process_time()
    index = Index.trained(design, np.concatenate(sample)[:need])
    trained = time.perf_counter() - started[0], time.process_time() - started[1]
    del sample
    adding = [0.0, 0.0]
    for part in chunks(world):
        started = time.perf_counter(), time.process_time()
        index.add(part)
        adding[0] += time.perf_counter() - started[0]
        adding[1] += time.process_time() - started[1]
    del part
    gc.collect()
    memory = psutil.Process().memory_info().rss - before
    faiss.omp_set_num_threads(1)
    best = _least(index, queries, wanted)
    return {
        "size": size, "dim": dim, "design": design.model_dump(), "item_bytes": design.item_bytes,
        "memory_bytes_an_item": memory / size, "train_s": trained[0], "train_processor_s": trained[1],
        "add_s": adding[0], "add_processor_s": adding[1], **best,
    }  # fmt: skip


def _least(index: Index, queries: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """The cheapest effort that holds the recall."""
    best: dict[str, Any] = {"query_ms": float("inf")}
    for ladder in ann.ladders(index.design):
        for effort in ladder:
            rows = _searched(index, queries, effort)
            if (recall := hit(wanted, rows, 10)) >= RECALL:
                seconds = timed({"ours": lambda e=effort: _searched(index, queries, e)}, rounds=3)["ours"]
                if (ms := 1000 * seconds / len(queries)) < best["query_ms"]:
                    best = {"query_ms": ms, "recall@10": recall, "recall@100": hit(wanted, rows, K)}
                    best |= {"effort": effort.model_dump()}
                break
    return best


def _searched(index: Index, queries: np.ndarray, effort: Effort) -> np.ndarray:
    found = [index.search(queries[at : at + BATCH], K, effort)[1][:, :K] for at in range(0, len(queries), BATCH)]
    return np.concatenate(found)


def fitted(points: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Fit value = a · size^b through the points, and carry it on."""
    x, y = np.log([p["size"] for p in points]), np.log([max(p[name], 1e-9) for p in points])
    b, a = np.polyfit(x, y, 1)
    return {"exponent": b, **{f"at_1e{n}": float(np.exp(a + b * np.log(10.0**n))) for n in (8, 9)}}


def main(sizes: str = "100000,1000000,10000000", dim: int = 128, out: Path = Path("docs/scale.json")) -> None:
    """Measure all sizes and write what was found."""
    found: dict[str, list[dict[str, Any]]] = {"flat": [], "ivf_rabitq": []}
    for size in map(int, sizes.split(",")):
        world = World(size, dim)
        queries = world.queries(world.vectors(0, min(size, CHUNK)), 256)
        for kind, points in found.items():
            if kind == "flat" and size > 1_000_000:
                continue
            points.append(measured(world, IndexKindSettings.model_validate({"kind": kind}), queries))
            say(json.dumps(points[-1]))
    names = ("query_ms", "add_processor_s", "train_processor_s")
    fits = {kind: {name: fitted(points, name) for name in names} for kind, points in found.items()}
    machine = {"cores": os.cpu_count(), "memory_gib": psutil.virtual_memory().total >> 30}
    out.write_text(json.dumps({"machine": machine, "measured": found, "fits": fits}, indent=1))
    say(f"{out} is written")


if __name__ == "__main__":
    typer.run(main)
