"""Judging: queries that are ranked over the same items, in every way, and measured.

The model's ranking by each kind of vector, those of words, of checkpoints that never saw the catalogue, of other
systems' run files, and of the index. Knows nothing of registries or reports.
Shapes: Q queries, K hits.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from askew import inputs, metrics, modality, tables, trec
from askew.ann import Effort
from askew.bm25 import BM25
from askew.candidates import Candidates
from askew.config import Settings
from askew.datasets import Progress
from askew.metrics import Qrels, Run
from askew.modality import Photos, Shares, Vectors
from askew.models import Model
from askew.rankings import Ranking, Top, fused_by_rank
from askew.segments import Plan
from askew.shards import Shard

MAIN = "nDCG@10"
MODELS_OWN = {False: "fused", True: "adaptive"}  # what the index holds, without and with a header
ASKED_AS_INDEX = ("adaptive", "shuffled", "missing")  # vectors as they are indexed; others meet the plain query
DEPTH, QUERIES_A_SEARCH, SHOWN_HITS = 1000, 64, 10
SEARCHED = "as it is searched"
EFFORTS = {"a quarter of the effort": 0.25, "half": 0.5, SEARCHED: 1, "twice": 2, "four times": 4}


class JudgeSettings(Settings):
    """What is ranked, and how."""

    triplets: Path
    index: Path | None = None  # without one, nothing is said of what it loses
    k: int = Field(default=100, ge=100)
    min_relevant: int | None = Field(default=None, ge=1)
    text: str = tables.TEXT  # or a field that is read in its place, to see what poorer titles cost
    modality: bool = True  # also rank with shuffled photos and without any: two more passes of the item tower
    runs: dict[str, Path] = Field(default_factory=dict)  # TREC run files of other systems, by name
    zero_shot: dict[str, str] = Field(default_factory=dict)  # checkpoints of CLIP or SigLIP, by name
    batch_size: int = Field(default=256, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"


class Group:
    """Queries that are ranked over the items of the same splits, in every way."""

    def __init__(
        self, settings: JudgeSettings, model: Model, queries: pa.Table, splits: Sequence[str], qrels: Qrels
    ) -> None:
        self.settings, self.model, self.own = settings, model, MODELS_OWN[model.header]
        self.candidates = Candidates.of(settings.triplets, splits)
        self.num_items = len(self.candidates.item_ids)
        self.query_ids: list[str] = queries["query_id"].to_pylist()
        self.place = {query_id: number for number, query_id in enumerate(self.query_ids)}
        words: list[str] = queries["query"].to_pylist()
        self.asked = query_vectors(model, words, settings.batch_size)
        tops, self.texts = self._ranked()
        tops["bm25"] = Top(*BM25(self.texts).search(words, settings.k))
        tops["hybrid"] = fused_by_rank(tops["bm25"], tops[self.own], settings.k)
        for name, checkpoint in settings.zero_shot.items():
            tops[name] = self._zero_shot(Model.zero_shot(checkpoint, settings.device), words)
        self.runs = {n: Run(self.query_ids, self.candidates.item_ids, t.rows, t.scores) for n, t in tops.items()}
        self.runs |= {name: self._theirs(path) for name, path in settings.runs.items()}
        least = settings.min_relevant
        self.scores = {name: metrics.score(qrels, run, min_relevant=least) for name, run in self.runs.items()}
        self.shares = self._shares(tops[self.own]) if "missing" in tops else None
        self.index = self._index(settings.index, tops[self.own], qrels) if settings.index else None

    def _batches(self, model: Model) -> Iterator[tuple[NDArray[np.int64], list[str], Photos]]:
        """Stream the items' rows, texts and photos."""
        columns = [*tables.columns_of(self.settings.text), "pixels", "has_image"]
        for rows, batch in self.candidates.batches(columns, self.settings.batch_size):
            yield rows, tables.told(batch, self.settings.text).to_pylist(), _photos(batch, model.image_size)

    def _ranked(self) -> tuple[dict[str, Top], list[str]]:
        """Rank every candidate by every kind of vector; returns the best of each kind, and all texts by row."""
        rankings: dict[str, Ranking] = {}
        texts = [""] * self.num_items
        progress = Progress("embedded items", self.num_items)
        others = self.candidates.others(["pixels", "has_image"], self.settings.batch_size)
        for rows, words, photos in self._batches(self.model):
            other = _photos(next(others), self.model.image_size) if self.settings.modality else None
            for name, vectors in modality.ways(self.model, words, photos, other).items():
                asked = self.asked["index" if name in ASKED_AS_INDEX else "plain"]
                if name not in rankings:
                    rankings[name] = Ranking(asked, self.settings.k)
                rankings[name].add(rows, vectors)
            for row, text in zip(rows, words, strict=True):
                texts[row] = text
            progress.step(len(rows))
        return {name: ranking.top() for name, ranking in rankings.items()}, texts

    def _zero_shot(self, model: Model, queries: list[str]) -> Top:
        """Rank by a checkpoint that never saw the catalogue, with photos at the size that it was trained on."""
        asked = query_vectors(model, queries, self.settings.batch_size)["index"]
        ranking = Ranking(asked, self.settings.k)
        columns = [*tables.columns_of(self.settings.text), "image", "has_image"]
        for rows, batch in self.candidates.batches(columns, self.settings.batch_size):
            there = batch["has_image"].to_numpy(zero_copy_only=False)
            words = tables.told(batch, self.settings.text).to_pylist()
            pixels = _decoded(batch["image"].to_pylist(), there, model.image_size)
            ranking.add(rows, model.items(words, pixels, there)["index"])
        return ranking.top()

    def _theirs(self, path: Path) -> Run:
        """Another system's run of these queries; a query that it lacks finds nothing."""
        run = trec.read_run(path, self.candidates.item_ids, self.query_ids)
        shape, at = (len(self.query_ids), run.rows.shape[1]), [self.place[query_id] for query_id in run.query_ids]
        rows, scores = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
        rows[at], scores[at] = run.rows, run.scores
        return Run(self.query_ids, self.candidates.item_ids, rows, scores)

    def _shares(self, top: Top) -> Shares:
        """Part the scores of each query's first hits into what text and photo brought."""
        hits = top.rows[:, :SHOWN_HITS]
        wanted, place = np.unique(hits, return_inverse=True)
        kept: dict[str, Vectors] = {}
        for rows, words, (pixels, there) in self._batches(self.model):
            here = np.flatnonzero(np.isin(rows, wanted))
            if len(here):
                part = modality.lacking(self.model, [words[i] for i in here], (pixels[here], there[here]))
                for name, vectors in part.items():
                    held = kept.setdefault(name, np.empty((len(wanted), vectors.shape[1]), np.float32))
                    held[np.searchsorted(wanted, rows[here])] = vectors
        of = place.reshape(hits.shape)
        return modality.shares({n: np.einsum("qd,qkd->qk", self.asked["index"], v[of]) for n, v in kept.items()})

    def hits(self, system: str, query_id: str, qrels: Qrels) -> list[dict[str, Any]]:
        """Tell a query's first hits by a system: what they are, their judgments, and what brought the score."""
        number, run, found = self.place[query_id], self.runs[system], []
        for place, row in enumerate(run.rows[number, :SHOWN_HITS].tolist()):
            item = self.candidates.item_ids[row]
            hit = {"item_id": item, "text": self.texts[row], "score": float(run.scores[number, place])}
            hit["grade"] = qrels[query_id].get(item, 0)
            if system == self.own and self.shares is not None:
                hit["from_text"] = float(self.shares.text[number, place])
                hit["from_image"] = float(self.shares.image[number, place])
            found.append(hit)
        return found

    def _index(self, folder: Path, exact: Top, qrels: Qrels) -> dict[str, Any]:
        """What the index loses of the exact ranking at each effort, candidates alone being counted."""
        shard = Shard(Plan.read(folder), verify=False)  # the stage has checked every file
        plan, settings = shard.plan, []
        for name, factor in EFFORTS.items():
            if plan.design.exact and factor != 1:
                continue
            effort = plan.effort.wider(factor, plan.design)
            found = indexed(shard, self.asked["index"], self.candidates.item_ids, self.settings.k, effort)
            recalls = {f"recall@{n}": recall(exact.rows[:, :n], found.rows[:, :n]) for n in (10, 100)}
            run = Run(self.query_ids, self.candidates.item_ids, found.rows, found.scores)
            scores = metrics.score(qrels, run, [MAIN], self.settings.min_relevant)
            settings.append({"name": name, **recalls, "scores": scores})
            if factor == 1:
                print(f"askew: the index gives {recalls['recall@10']:.2%} of the exact ten best", flush=True)
        return {"items": shard.size, "settings": settings}


def _photos(batch: pa.RecordBatch, size: int) -> Photos:
    return tables.pixels(batch["pixels"], size), batch["has_image"].to_numpy(zero_copy_only=False)


def _decoded(images: Sequence[bytes | None], there: NDArray[np.bool_], size: int) -> NDArray[np.uint8]:
    """Decode photos anew at another size than that of the triplets; nought where there is none."""
    blank = np.zeros((size, size, 3), dtype=np.uint8)
    both = zip(images, there, strict=True)
    return np.stack([inputs.pixels(image, size) if image and has else blank for image, has in both])


def query_vectors(model: Model, queries: Sequence[str], size: int) -> dict[str, Vectors]:
    """Encode queries as Q, "plain", and as the index is searched, "index": without a header these are the same."""
    ways = {"plain": model.plain_queries} | ({"index": model.queries} if model.header else {})
    starts = range(0, len(queries), size)
    found = {name: np.concatenate([way(queries[i : i + size]) for i in starts]) for name, way in ways.items()}
    return {"index": found["plain"], **found}


def indexed(shard: Shard, queries: Vectors, item_ids: Sequence[str], k: int, effort: Effort | None = None) -> Top:
    """The k best of `item_ids`, as rows in these, that the index gives for each query; -1 where it gives fewer.

    The index may hold other items too: they are passed over, as deep as four times where they would hide the k
    best if spread evenly.
    """
    place = pc.index_in(shard.item_ids, value_set=pa.array(item_ids, pa.string()))
    row_of = pc.fill_null(place, -1).to_numpy().astype(np.int64)
    depth = max(DEPTH, 4 * k * shard.size // len(item_ids))
    parts = []
    for start in range(0, len(queries), QUERIES_A_SEARCH):
        hits = shard.search(queries[start : start + QUERIES_A_SEARCH], depth, effort=effort)
        rows = row_of[hits.rows]
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(rows, order, axis=1)
        scores = np.where(rows < 0, -np.inf, np.take_along_axis(hits.scores, order, axis=1))
        parts.append((rows, scores.astype(np.float32)))
    return Top(np.concatenate([rows for rows, _ in parts]), np.concatenate([scores for _, scores in parts]))


def recall(exact: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """The mean share of each query's exact rows (Q, K) that are among those found."""
    return float(np.mean([np.isin(wanted, given).mean() for wanted, given in zip(exact, found, strict=True)]))
