"""Measure the query encoder: compiled against the model as it was trained, in processor time and in what is found.

    python bench/encoder.py                                           # untrained towers
    python bench/encoder.py --model artifacts/model-… --triplets artifacts/triplets-…

Progress goes to stderr, and the last line of stdout is one JSON object of figures and targets. Times are processor
milliseconds a call on one thread, cleaning and tokenising included, each the median of interleaved rounds, over
real queries where they are at hand. Towers have random weights: one of MiniLM's size (6 layers, width 384; about
six tokens a query, as by its own vocabulary), which the targets are about, and one of the demo's. What ranking
loses is measured by `--model` over all items of `--triplets`, for their queries that are not of training; without
them, by the untrained tower of the demo's size over the titles of the shop that the demo draws, roughly.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from load import queries as real_queries
from numpy.typing import NDArray
from prepare import at_least, at_most, say

from askew import drawn, metrics, tables
from askew.compiled import CompiledEncoder
from askew.inputs import Tokens
from askew.models import Model
from askew.rankings import Ranking
from askew.towers import TowerSettings, TwoTower
from askew.words import clean

TOWERS: Mapping[str, dict[str, Any]] = {
    "minilm": {"dim": 384, "text": {"width": 384, "layers": 6, "heads": 12}},
    "demo": {},
}
VOCABULARIES = {"minilm": 700, "demo": 8000}  # entries that are learnt: so many make six tokens of a real query
ROWS = 30_522  # of the table of token vectors, as MiniLM has
CALLS = {1: 100, 32: 10}  # of each batch size, in each round
ROUNDS, BATCH, K, MAIN = 5, 32, 10, "nDCG@10"
Encode = Callable[[Sequence[str]], NDArray[np.float32]]


def encoder_figures(model: Path | None = None, triplets: Path | None = None) -> dict[str, Any]:
    """Measure all; `speedup_b1`, `speedup_b32` and `ndcg_loss` (a share) are what the targets are about."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = real_queries()
    minilm, demo = (untrained(name, texts) for name in TOWERS)
    times = {"minilm": timed(minilm, texts), "demo": timed(demo, texts)}
    found = over_triplets(Model.load(model), triplets) if model and triplets else over_titles(demo)
    speedups = {f"speedup_b{size}": times["minilm"][str(size)]["speedup"] for size in CALLS}
    return {**speedups, "ndcg_loss": found["loss"], "processor_ms": times, "ndcg": found}


def untrained(name: str, texts: Sequence[str]) -> Model:
    """Make towers of random weights, with a vocabulary of these texts."""
    torch.manual_seed(0)
    tokens = Tokens.train(texts, VOCABULARIES[name])
    settings = TowerSettings.model_validate({**TOWERS[name], "fusion": "text", "shared_text": True})
    return Model(TwoTower(settings, max(ROWS, tokens.size)), tokens)


# --- time ----------------------------------------------------------------------------------------


def timed(model: Model, texts: Sequence[str]) -> dict[str, Any]:
    """Measure milliseconds a call of every way, for each batch size."""
    start = time.process_time()
    compiled = CompiledEncoder(model)
    figures: dict[str, Any] = {"runtime": compiled.runtime, "start_s": round(time.process_time() - start, 2)}
    length, ready = model.towers.settings.query_length, [clean(text) for text in texts]
    figures["tokens_a_query"] = round(float((model.tokens.ids(ready, length) >= 0).sum(1).mean()), 2)
    ways: dict[str, Encode] = {
        "eager": model.queries,
        "compiled": compiled.queries,
        "fp32": CompiledEncoder(model, "fp32").queries,
        "bf16": CompiledEncoder(model, "bf16").queries,
        "tokens": lambda some: model.tokens.ids([clean(text) for text in some], length),
    }
    for size, calls in CALLS.items():
        medians = _medians(ways, _batches(texts, size, calls))
        speedup = medians["eager"] / medians["compiled"]
        figures[str(size)] = {name: round(ms, 4) for name, ms in medians.items()} | {"speedup": round(speedup, 2)}
        say(f"batch {size}: {figures[str(size)]}")
    return figures


def _batches(texts: Sequence[str], size: int, calls: int) -> list[list[str]]:
    random = np.random.default_rng(0)
    return [[texts[row] for row in random.choice(len(texts), size, replace=False)] for _ in range(calls)]


def _medians(ways: Mapping[str, Encode], batches: Sequence[Sequence[str]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            for batch in batches:
                start = time.process_time()
                way(batch)
                if number:  # the first round warms up
                    taken[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(times) for name, times in taken.items()}


# --- what is found -------------------------------------------------------------------------------


def over_triplets(model: Model, triplets: Path) -> dict[str, Any]:
    """Rank the items of triplets for the queries that no model is trained on."""
    columns = ["item_id", tables.TEXT, "pixels", "has_image"]
    ids, vectors = [], []
    for rows in tables.batches(tables.parts(triplets / "items"), columns, 256):
        photos, there = tables.pixels(rows["pixels"], model.image_size), rows["has_image"]
        texts, has_image = rows[tables.TEXT].to_pylist(), there.to_numpy(zero_copy_only=False)
        ids += rows["item_id"].to_pylist()
        vectors.append(model.items(texts, photos, has_image)["index"])
    qrels: dict[str, dict[str, int]] = {}
    for row in pq.read_table(triplets / "qrels", columns=["query_id", "item_id", "grade"]).to_pylist():
        qrels.setdefault(row["query_id"], {})[row["item_id"]] = row["grade"]
    asked = pq.read_table(triplets / "queries", columns=["query_id", "query", "split"]).to_pylist()
    queries = {row["query_id"]: row["query"] for row in asked if row["split"] != "train"}
    return compared(model, queries, dict(zip(ids, np.concatenate(vectors), strict=True)), qrels)


def over_titles(model: Model) -> dict[str, Any]:
    """Rank the made-up shop's titles, by one tower for queries and titles."""
    shop = drawn.plan()
    ids, titles = [item.item_id for item in shop.items], [item.title for item in shop.items]
    pixels, has_image = np.zeros((BATCH, *2 * [model.image_size], 3), np.uint8), np.zeros(BATCH, np.bool_)
    vectors = []
    for start in range(0, len(ids), BATCH):
        some = titles[start : start + BATCH]
        vectors.append(model.items(some, pixels[: len(some)], has_image[: len(some)])["index"])
    qrels: dict[str, dict[str, int]] = {}
    for place, number, grade in shop.judgments.tolist():
        qrels.setdefault(shop.queries[place].query_id, {})[ids[number]] = grade
    queries = {query.query_id: query.text for query in shop.queries}
    return compared(model, queries, dict(zip(ids, np.concatenate(vectors), strict=True)), qrels)


def compared(
    model: Model, queries: Mapping[str, str], items: Mapping[str, NDArray[np.float32]], qrels: metrics.Qrels
) -> dict[str, Any]:
    """Rank items for each query by the model, and by what is compiled; the loss is bfloat16's share of nDCG@10."""
    ids = sorted(items)
    vectors, texts = np.stack([items[item_id] for item_id in ids]), list(queries.values())
    figures: dict[str, Any] = {"queries": len(queries), "items": len(ids)}
    ways: dict[str, Encode] = {
        "eager": model.queries,
        "fp32": CompiledEncoder(model, "fp32").queries,
        "bf16": CompiledEncoder(model, "bf16").queries,
    }
    for name, encode in ways.items():
        parts = [encode(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        ranking = Ranking(np.concatenate(parts), K)
        ranking.add(np.arange(len(ids)), vectors)
        top = ranking.top()
        run = metrics.Run(list(queries), ids, top.rows, top.scores)
        figures[name] = metrics.score(qrels, run, [MAIN]).means()[MAIN]
        say(f"{MAIN} {name} {figures[name]:.4f}")
    return figures | {"loss": 1 - figures["bf16"] / figures["eager"]}


def main(
    model: Annotated[Path | None, typer.Option(help="a trained model's folder")] = None,
    triplets: Annotated[Path | None, typer.Option(help="the folder of triplets that it is judged by")] = None,
) -> None:
    """Measure all and print it."""
    if (model is None) != (triplets is None):
        raise typer.BadParameter("a model is judged by triplets: give both, or neither")
    figures = encoder_figures(model, triplets)
    figures |= {"num_cores": os.cpu_count(), "load_average": [round(one, 1) for one in os.getloadavg()]}
    targets = {
        "encoder_speedup_b1": at_least(figures["speedup_b1"], 4),
        "encoder_speedup_b32": at_least(figures["speedup_b32"], 4),
        "encoder_ndcg_loss": at_most(figures["ndcg_loss"], 0.001),
    }
    print(json.dumps({"figures": figures, "targets": targets}), flush=True)


if __name__ == "__main__":
    typer.run(main)
