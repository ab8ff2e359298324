"""Measure how the index grows: memory, build and search time of 10⁵, 10⁶ and, with compressed kinds, 10⁷ vectors.

`python bench/scale.py` writes `docs/scale.json` and `docs/scale.md`. Vectors are made up as for `bench/index.py`,
a chunk at a time, so that the full vectors of the largest are never all in memory. Times are processor time of
one thread for searches in batches of 32 of 100 hits, at the least effort that gives recall@10 and @100 of 0.99;
builds take all cores, and wall and processor time stand beside each other. A power law through the points carries
them on to 10⁸ and 10⁹.
"""

import ctypes
import gc
import json
import math
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


def resident() -> int:
    """Bytes of memory that this process holds, what it has freed given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


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
    before = resident()
    sample = [part[:: max(1, size // need)].copy() for part in chunks(world)]
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
    memory = resident() - before
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
        found: list[float] = []
        for effort in ladder:
            rows = _searched(index, queries, effort)
            recall = {f"recall@{k}": hit(wanted, rows, k) for k in (10, K)}
            found.append(min(recall.values()))
            if len(found) > 6 and found[-1] - found[-4] < 0.001:
                break  # wider finds nothing more: too few are scored again
            if found[-1] >= RECALL:
                seconds = timed({"ours": lambda e=effort: _searched(index, queries, e)}, rounds=3)["ours"]
                if (ms := 1000 * seconds / len(queries)) < best["query_ms"]:
                    best = {"query_ms": ms, **recall, "effort": effort.model_dump()}
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


ROWS = {
    "size": ("vectors", "{:,.0f}"), "item_bytes": ("bytes an item, by design", "{:.0f}"),
    "memory_bytes_an_item": ("bytes an item, as the process grew", "{:.0f}"),
    "train_processor_s": ("training, processor s", "{:.0f}"), "add_processor_s": ("adding, processor s", "{:.0f}"),
    "query_ms": ("a query, processor ms", "{:.3f}"), "recall@10": ("recall@10", "{:.3f}"),
    "recall@100": ("recall@100", "{:.3f}"),
}  # fmt: skip
NODE_GIB, NODE_CORES, NODE_DOLLARS = 256, 32, 2.0  # an hour; put your own price here


def table(points: Sequence[dict[str, Any]]) -> str:
    """What was measured of one kind, as Markdown."""
    lines = [f"| {' | '.join(name for name, _ in ROWS.values())} |", "|" + "---|" * len(ROWS)]
    for point in points:
        cells = [form.format(point[key]) if key in point else "–" for key, (_, form) in ROWS.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plan(point: dict[str, Any], fits: dict[str, dict[str, float]], queries_per_second: int = 1000) -> str:
    """What 10⁸ and 10⁹ vectors want, as Markdown."""
    lines = [
        "| vectors | in memory | nodes for memory | building, core hours | a query, ms of one core | "
        f"cores for {queries_per_second:,} queries a second | nodes | a month |",
        "|" + "---|" * 8,
    ]
    for n in (8, 9):
        gib = point["memory_bytes_an_item"] * 10**n / 2**30
        ms = fits["query_ms"][f"at_1e{n}"]
        hours = (fits["add_processor_s"][f"at_1e{n}"] + fits["train_processor_s"][f"at_1e{n}"]) / 3600
        cores = ms / 1000 * queries_per_second
        by_memory = math.ceil(gib / (0.8 * NODE_GIB))
        nodes = max(by_memory, math.ceil(cores / (0.7 * NODE_CORES)))
        lines.append(
            f"| 10^{n} | {gib:,.0f} GiB | {by_memory} | {hours:,.1f} | {ms:.2f} | {cores:.1f} | {nodes} | "
            f"${nodes * NODE_DOLLARS * 730:,.0f} |"
        )
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    """All of it as `docs/scale.md`."""
    machine, measured, fits = found["machine"], found["measured"], found["fits"]
    on = f"{machine['cores']} cores, {machine['memory_gib']} GiB"
    told = ", ".join(f"{name} {fit['exponent']:.2f}" for name, fit in fits["ivf_rabitq"].items())
    short = measured["ivf_rabitq"]
    return f"""# How it grows

Written by `python bench/scale.py`; the figures are in `scale.json`. Made-up clustered vectors of
{short[0]["dim"]} dimensions, {on}.
A query is one of a batch of 32 that asks for 100 hits, by one thread, at the least effort that gives recall@10
and recall@100 of {RECALL}. Real text against photos is harder than these vectors, and wants more effort for as
much recall.

## Measured: exact (`flat`)

{table(measured["flat"])}

## Measured: short codes, the best scored again in fp16 (`ivf_rabitq`)

{table(short)}

## Carried on

A power law through the points, value = a · size^b, has these exponents: {told}.
Beyond what was measured this is arithmetic, not experience. Nodes have {NODE_GIB} GiB, of which vectors may take
80 %, and {NODE_CORES} cores, of which searches may take 70 %; a node costs {NODE_DOLLARS:g} dollars an hour
(put your own price here). One copy of everything: for a node to be lost without a loss, double it.

{plan(short[-1], fits["ivf_rabitq"])}

- **Memory** is bytes an item, as the process grew, times items, and decides. `refine: sq8` takes 128 bytes less
  an item of 128 dimensions; titles, fields and photos are mapped from disk, and take memory as far as they are
  looked at.
- **Shards** cost: two take about 1.2 times and four 1.4 times the processor time of one (`make bench-index`),
  for each looks into all lists that a query wants. Few large shards beat many small ones.
- **Building** is spread over workers: embedding and filling by segment; only centroids are learned in one
  process, from 64 vectors a list. Embedding comes on top and is the model's own time.
"""


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
    every = {"machine": machine, "measured": found, "fits": fits}
    out.write_text(json.dumps(every, indent=1))
    out.with_suffix(".md").write_text(report(every))
    say(f"{out} is written")


if __name__ == "__main__":
    typer.run(main)
