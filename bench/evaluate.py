"""Measure what ranking costs beyond the arithmetic: 1,000 queries over 100,000 items, against product and top-k.

`make bench-evaluate`; progress goes to stderr, and the last line of stdout is one JSON object of figures and
targets. Both take the same vectors on one thread; each figure is the median processor time of interleaved rounds.
Ours takes items by batches of 256, as they come from a tower, and breaks ties by item id.
"""

import json
import statistics
import time

import numpy as np
import torch
from prepare import at_most, say

from askew.rankings import Ranking

NUM_QUERIES, NUM_ITEMS, DIM, K, BATCH, ROUNDS = 1_000, 100_000, 128, 100, 256, 7


def bare(queries: torch.Tensor, items: torch.Tensor) -> np.ndarray:
    """One product of everything with everything, and its top-k."""
    return torch.topk(queries @ items.T, K, dim=1).indices.numpy()


def ours(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The ranking of the evaluate stage."""
    ranking = Ranking(queries, K)
    for start in range(0, NUM_ITEMS, BATCH):
        rows = np.arange(start, min(start + BATCH, NUM_ITEMS))
        ranking.add(rows, items[start : start + BATCH])
    return ranking.top().rows


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    queries, items = (random.normal(size=(n, DIM)).astype(np.float32) for n in (NUM_QUERIES, NUM_ITEMS))
    taken: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(ROUNDS + 1):
        start = time.process_time()
        wanted = bare(torch.from_numpy(queries), torch.from_numpy(items))
        middle = time.process_time()
        found = ours(queries, items)
        end = time.process_time()
        if np.mean(wanted == found) < 0.999:
            raise RuntimeError("another ranking")
        if number:  # the first warms up
            taken["bare"].append(middle - start)
            taken["ours"].append(end - middle)
        say(f"round {number}: bare {middle - start:.2f} s, ours {end - middle:.2f} s")
    medians = {name: statistics.median(times) for name, times in taken.items()}
    figures = {
        "processor_s": medians, "rounds": taken, "queries": NUM_QUERIES, "items": NUM_ITEMS, "dim": DIM, "k": K,
    }  # fmt: skip
    targets = {"vs_product_and_top_k": at_most(medians["ours"] / medians["bare"], 1.5)}
    print(json.dumps({"figures": figures, "targets": targets}), flush=True)


if __name__ == "__main__":
    main()
