"""Evaluate: a registered model's rankings of the judged queries, by its three kinds of vectors and by BM25.

Ranks are exact: every candidate item is scored against every query. Shows what the photo adds (fused
against text), what the model adds (fused against BM25), and what the index loses (its hits against the
exact ones). Knows nothing of how the model was trained or is served.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from askew import artifacts, metrics, tables
from askew.bm25 import BM25
from askew.config import Settings
from askew.datasets import Progress
from askew.errors import ArtifactError, DataError
from askew.metrics import Qrels, Run, Scores
from askew.models import Model, Vectors
from askew.registry import Registry, Version
from askew.segments import Shard

FILE = "evaluation.json"
MODELS_OWN = {False: "fused", True: "adaptive"}  # what the index holds, without and with a header
VARIANTS = ("text", "image", "fused", "adaptive")  # adaptive: as the index is searched, with SMAR's header
EVALUATION_KEY = "askew.evaluation_key"
MAIN = "nDCG@10"
DEPTH, QUERIES_A_SEARCH = 1000, 64


class EvaluateSettings(Settings):
    """Settings of the evaluate stage (`jobs/evaluate.yaml`)."""

    model: str
    version: str = "champion"
    triplets: Path
    index: Path
    root: Path
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    k: int = Field(default=100, ge=100)
    min_relevant: int | None = Field(default=None, ge=1)
    text: str = tables.TEXT  # or a field that is read in its place, to see what poorer titles cost
    resamples: int = Field(default=10_000, ge=100)
    seed: int = 0
    batch_size: int = Field(default=256, ge=1)
    device: str = "cpu"

    def content(self) -> dict[str, Any]:
        """What of the settings determines the numbers, beyond the artifacts that they name."""
        return self.model_dump(mode="json", include={"k", "min_relevant", "text", "resamples", "seed"})


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a model version on the triplets' judged queries, and log the numbers on it.

    Raises RegistryError, ArtifactError, or DataError when there is nothing to judge.
    """
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    model = registry.download(version, settings.root)
    inputs = _inputs(settings, model)
    key = artifacts.key("evaluation", settings.content(), inputs)
    folder = artifacts.place(settings.root, "evaluation", key)
    try:
        artifacts.read(folder, "evaluation")
        skipped = True
    except ArtifactError:
        skipped = False
        with artifacts.draft(settings.root, "evaluation", settings.content(), inputs) as draft:
            found = report(settings, Model.load(model, settings.device))
            draft.counts |= {"queries": found["queries"], "items": found["items"]}
            artifacts.write_text(draft.folder / FILE, json.dumps(found, indent=1, allow_nan=False))
    found = json.loads((folder / FILE).read_bytes())
    if version.tags.get(EVALUATION_KEY) != key:
        _log(registry, version, folder, key, found)
    return {
        "artifact": str(folder), "key": key, "rows": found["queries"], "skipped": skipped,
        "model": version.name, "version": version.version, **found,
    }  # fmt: skip


def report(settings: EvaluateSettings, model: Model) -> dict[str, Any]:
    """Rank the candidate items for every judged query in every way, and measure the rankings.

    Raises DataError when there are no queries, items or judgments.
    """
    details = artifacts.read(settings.triplets, "triplets", verify=False).details
    queries = pq.read_table(settings.triplets / "queries")
    qrels = _qrels(settings.triplets / "qrels")
    groups = [_ranked(group, splits, qrels, model, settings) for group, splits in _groups(queries, details)]
    if not groups:
        found = f"{queries.num_rows} queries"
        raise DataError(f"queries and items to evaluate in {settings.triplets}", found, "add an evaluation split")
    scores = {name: Scores.joined([group.scores[name] for group in groups]) for name in groups[0].scores}
    if not scores["fused"].query_ids:
        raise DataError("a query with a relevant item", "none", "lower min_relevant, or judge more")
    print(f"askew: {MAIN} " + ", ".join(f"{n} {s.means()[MAIN]:.4f}" for n, s in scores.items()), flush=True)
    segment_of = dict(zip(queries["query_id"].to_pylist(), queries["segment"].to_pylist(), strict=True))
    return {
        "queries": len(scores["fused"].query_ids),
        "left_out": scores["fused"].left_out,
        "items": sum(group.num_items for group in groups),
        "relevant_from": settings.min_relevant or metrics.relevant_from(qrels),
        **_measured(scores, slice(None), settings),
        "segments": _segments(scores, segment_of, settings),
        "comparisons": _comparisons(scores, settings),
        **_index_told(groups),
        **({"text_ceiling": details["text_ceiling"]} if "text_ceiling" in details else {}),
    }


def _index_told(groups: Sequence["Ranked"]) -> dict[str, Any]:
    if not groups[0].index:
        return {}
    recalls, weights = [g.index["recall@10"] for g in groups], [g.num_queries for g in groups]
    return {"index": {"items": groups[0].index["items"], "recall@10": float(np.average(recalls, weights=weights))}}


# --- ranking -------------------------------------------------------------------------------------


@dataclass
class Ranked:
    """Queries that are ranked over the same items, and how well."""

    num_queries: int
    num_items: int
    scores: dict[str, Scores]
    index: dict[str, float]


def _groups(queries: pa.Table, details: Mapping[str, Any]) -> list[tuple[pa.Table, list[str]]]:
    """Part the queries by the splits of items that they are ranked over: those of their split's judged items."""
    over: dict[tuple[str, ...], list[str]] = {}
    for split, splits in details["candidates"].items():
        over.setdefault(tuple(splits), []).append(split)
    parts = [
        (queries.filter(pc.is_in(queries["split"], value_set=pa.array(asked))), [*s]) for s, asked in over.items()
    ]
    return [(part, splits) for part, splits in parts if part.num_rows]


def _ranked(
    queries: pa.Table, splits: Sequence[str], qrels: Qrels, model: Model, settings: EvaluateSettings
) -> Ranked:
    """Rank the items of these splits for each query in every way."""
    candidates = Candidates.of(settings.triplets, splits)
    query_ids, words = (queries[name].to_pylist() for name in ("query_id", "query"))
    queries_of = _query_vectors(model, words, settings.batch_size)
    tops, texts = _rank(model, queries_of, candidates, settings)
    tops["bm25"] = Top(*BM25(texts).search(words, settings.k))
    scores = {
        name: metrics.score(
            qrels, Run(query_ids, candidates.item_ids, top.rows, top.scores), min_relevant=settings.min_relevant
        )
        for name, top in tops.items()
    }
    index = {}
    if settings.text == tables.TEXT:
        index = _index_check(settings, queries_of["index"], candidates, tops[MODELS_OWN[model.header]])
    return Ranked(len(query_ids), len(candidates.item_ids), scores, index)


@dataclass
class Top:
    """The k best items of each of q queries, best first, equal scores by row: rows and scores are (q, <= k)."""

    rows: NDArray[np.int64]
    scores: Vectors

    def add(self, rows: NDArray[np.int64], scores: Vectors, k: int) -> None:
        """Take in n further items, whose scores are (q, n)."""
        scores = np.concatenate([self.scores, scores], axis=1)
        rows = np.concatenate([self.rows, np.broadcast_to(rows, (len(scores), len(rows)))], axis=1)
        best = np.lexsort((rows, -scores))[:, :k]
        self.rows = np.take_along_axis(rows, best, axis=1)
        self.scores = np.take_along_axis(scores, best, axis=1)

    @classmethod
    def empty(cls, num_queries: int) -> "Top":
        """Before any item."""
        return cls(np.empty((num_queries, 0), dtype=np.int64), np.empty((num_queries, 0), dtype=np.float32))


@dataclass
class Candidates:
    """The items that queries are ranked over, numbered in the order of their ids.

    `rows[i]` is the number of the i-th of them in the order of the parts.
    """

    paths: list[Path]
    splits: pa.Array
    item_ids: list[str] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, triplets: Path, splits: Sequence[str]) -> "Candidates":
        """Number the items of these splits."""
        wanted = pa.array(list(splits), pa.string())
        paths, ids = [], [pa.array([], pa.string())]
        for path in tables.parts(triplets / "items"):
            table = pq.read_table(path, columns=["item_id", "split"])
            kept = table.filter(pc.is_in(table["split"], value_set=wanted))["item_id"]
            if len(kept):
                paths.append(path)
                ids += kept.chunks
        unsorted = pa.chunked_array(ids)
        order = pc.sort_indices(unsorted).to_numpy()
        rows = np.empty(len(order), dtype=np.int64)
        rows[order] = np.arange(len(order))
        return cls(paths, wanted, unsorted.take(pa.array(order)).to_pylist(), rows)

    def batches(self, columns: Sequence[str], size: int) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
        """Stream the items' columns with their rows, in bounded memory."""
        start = 0
        for batch in tables.batches(self.paths, [*columns, "split"], size):
            kept = batch.filter(pc.is_in(batch["split"], value_set=self.splits))
            if len(kept):
                yield self.rows[start : start + len(kept)], kept
            start += len(kept)


def _rank(
    model: Model, queries: Mapping[str, Vectors], candidates: Candidates, settings: EvaluateSettings
) -> tuple[dict[str, Top], list[str]]:
    """Score every candidate by every kind of vector; returns the best of each kind, and all texts by row."""
    tops: dict[str, Top] = {}
    texts = [""] * len(candidates.item_ids)
    progress = Progress("embedded items", len(texts))
    columns = [*tables.columns_of(settings.text), "pixels", "has_image"]
    for rows, batch in candidates.batches(columns, settings.batch_size):
        words = tables.told(batch, settings.text).to_pylist()
        pixels = tables.pixels(batch["pixels"], model.image_size)
        vectors = model.items(words, pixels, batch["has_image"].to_numpy(zero_copy_only=False))
        if model.header:
            vectors = {**vectors, "adaptive": vectors["index"]}
        for name in VARIANTS:
            if name in vectors:
                asked = queries["index" if name == "adaptive" else "plain"]
                tops.setdefault(name, Top.empty(len(asked))).add(rows, asked @ vectors[name].T, settings.k)
        for row, text in zip(rows, words, strict=True):
            texts[row] = text
        progress.step(len(rows))
    return tops, texts


def _query_vectors(model: Model, queries: Sequence[str], size: int) -> dict[str, Vectors]:
    """Encode queries as Q, "plain", and as the index is searched, "index": without a header these are the same."""
    ways = {"plain": model.plain_queries} | ({"index": model.queries} if model.header else {})
    starts = range(0, len(queries), size)
    found = {name: np.concatenate([way(queries[i : i + size]) for i in starts]) for name, way in ways.items()}
    return {"index": found["plain"], **found}


def index_recall(shard: Shard, queries: Vectors, item_ids: Sequence[str], exact: NDArray[np.int64]) -> float:
    """The mean share of each query's exact hits that the index gives as well.

    `exact` is (q, n): each query's n best of `item_ids`. The index may hold other items too: they are
    passed over, as deep as 20 times where they would hide the n best if spread evenly.
    """
    place = pc.index_in(pa.array(shard.item_ids), value_set=pa.array(item_ids, pa.string()))
    rows = pc.fill_null(place, -1).to_numpy().astype(np.int64)
    n = exact.shape[1]
    depth = max(DEPTH, 20 * n * shard.size // len(item_ids))
    shares = []
    for start in range(0, len(queries), QUERIES_A_SEARCH):
        hits = rows[shard.search(queries[start : start + QUERIES_A_SEARCH], depth).rows]
        given = np.cumsum(hits >= 0, axis=1) <= n
        both = zip(exact[start : start + QUERIES_A_SEARCH], hits, given, strict=True)
        shares += [np.isin(wanted, found[first]).mean() for wanted, found, first in both]
    return float(np.mean(shares))


def _index_check(
    settings: EvaluateSettings, queries: Vectors, candidates: Candidates, exact: Top
) -> dict[str, float]:
    """What the index loses of the exact ten best fused hits, candidates alone being counted."""
    details = artifacts.read(settings.index, "index", verify=False).details
    names = [segment["name"] for segment in details["segments"]]
    shard = Shard(settings.index, names, verify=False)  # _inputs has checked every file
    recall = index_recall(shard, queries, candidates.item_ids, exact.rows[:, :10])
    print(f"askew: the index gives {recall:.2%} of the exact ten best", flush=True)
    return {"items": shard.size, "recall@10": recall}


# --- numbers -------------------------------------------------------------------------------------


def _measured(
    scores: Mapping[str, Scores], mask: NDArray[np.bool_] | slice, settings: EvaluateSettings
) -> dict[str, Any]:
    def span(of: Scores) -> list[float]:
        return list(metrics.interval(of.values[MAIN][mask], settings.resamples, settings.seed))

    return {
        "metrics": {name: of.means(mask) for name, of in scores.items()},
        "intervals": {name: {MAIN: span(of)} for name, of in scores.items()},
    }


def _segments(
    scores: Mapping[str, Scores], segment_of: Mapping[str, str], settings: EvaluateSettings
) -> dict[str, Any]:
    segments = np.array([segment_of[q] or "none" for q in scores["fused"].query_ids])
    return {
        str(name): {"queries": int((segments == name).sum()), **_measured(scores, segments == name, settings)}
        for name in np.unique(segments)
    }


def _comparisons(scores: Mapping[str, Scores], settings: EvaluateSettings) -> dict[str, dict[str, float]]:
    main = "adaptive" if "adaptive" in scores else "fused"
    ours = scores[main].values[MAIN]
    return {
        f"{main} vs {other}": metrics.paired_bootstrap(
            ours, scores[other].values[MAIN], settings.resamples, settings.seed
        )
        for other in scores
        if other != main
    }


# --- borders -------------------------------------------------------------------------------------


def _inputs(settings: EvaluateSettings, model: Path) -> dict[str, str]:
    """The keys of what is evaluated; an index of another model or of other triplets is refused."""
    keys = {
        "model": artifacts.read(model, "model", verify=False).key,
        "triplets": artifacts.read(settings.triplets, "triplets").key,
    }
    index = artifacts.read(settings.index, "index")
    for name, wanted in keys.items():
        if index.inputs.get(name) != wanted:
            found = f"one made from {name} {index.inputs.get(name)} in {settings.index}"
            raise ArtifactError(f"an index made from {name} {wanted}", found, "build the index of this version")
    return {**keys, "index": index.key}


def _qrels(path: Path) -> Qrels:
    qrels: dict[str, dict[str, int]] = {}
    table = pq.read_table(path)
    columns = (table[name].to_pylist() for name in ("query_id", "item_id", "grade"))
    for query_id, item_id, grade in zip(*columns, strict=True):
        qrels.setdefault(query_id, {})[item_id] = grade
    return qrels


def _log(registry: Registry, version: Version, folder: Path, key: str, found: Mapping[str, Any]) -> None:
    """Put the numbers on the version and its run; the key comes last, so that a broken log is done again."""
    means = {
        f"eval/{name}/{measure.replace('@', '_at_')}": value
        for name, values in found["metrics"].items()
        for measure, value in values.items()
    }
    registry.log_metrics(version.run_id, means)
    registry.log_files(version.run_id, folder / FILE, "evaluation")
    tags = {f"askew.metrics.{name}_ndcg_at_10": f"{values[MAIN]:.4f}" for name, values in found["metrics"].items()}
    registry.tag(version, tags)
    registry.tag(version, {EVALUATION_KEY: key})
