"""Mined negatives: what BM25 or a trained model finds for a query among the items that are trained on.

Knows how to search, and nothing of which finds are believed (see `negatives`).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from askew import artifacts, register, tables
from askew.bm25 import BM25
from askew.models import Model
from askew.negatives import NONE, Kind, Mined, NegativeSettings, Pairs
from askew.pairing import Catalogue
from askew.registry import Registry
from askew.segments import Plan
from askew.shards import Shard

QUERIES_AT_ONCE = 256


@dataclass
class Miner:
    """Searches for negatives of the kinds `bm25` and `model`; its index of words is built by `ready`."""

    settings: NegativeSettings
    inputs: dict[str, str] = field(default_factory=dict)  # keys of the model and of its index
    model: Path | None = None
    index: Path | None = None
    words: Path | None = None

    @classmethod
    def of(cls, settings: NegativeSettings, tracking_uri: str, root: Path) -> "Miner | None":
        """Make a miner for what the settings want; None when nothing is mined.

        Raises RegistryError or ArtifactError when the model or its index is not there.
        """
        wanted = {kind for kind, count in settings.per_pair.items() if count}
        if not wanted & {"bm25", "model"}:
            return None
        if "model" not in wanted:
            return cls(settings)
        registry = Registry(tracking_uri)
        version = registry.resolve(settings.model, settings.version)
        index, model = version.index, registry.download(version, root)
        keys = {
            "negatives/model": artifacts.read(model, "model").key,
            "negatives/index": artifacts.read(index, "index").key,
        }
        return cls(settings, keys, model, index)

    def ready(self, items: Path, trained: Sequence[str], work: Path) -> None:
        """Index the words of the items that are trained on, numbered in the order of the parts."""
        self.words = work / "words"
        if self.settings.per_pair.get("bm25") and not self.words.exists():
            draft = work / "words-draft"
            BM25(_texts(items, frozenset(trained)), draft)
            draft.rename(self.words)

    def search(self, items: Catalogue, kind: Kind, texts: Sequence[str], pairs: Pairs) -> Mined:
        """Find the best items of each pair's query; `texts` are those that `pairs` numbers."""
        asked, place = np.unique(pairs.query, return_inverse=True)
        queries = [texts[number] for number in asked]
        found, scores = self._by_words(queries) if kind == "bm25" else self._by_model(items, queries)
        found, scores = found[place], scores[place]
        hit = found == pairs.item[:, None]
        last = np.where(np.isfinite(scores), scores, np.inf).min(axis=1, initial=np.inf)
        positive = np.where(hit.any(axis=1), np.where(hit, scores, -np.inf).max(axis=1, initial=-np.inf), last)
        return Mined(found, scores, positive.astype(np.float32))

    def _by_words(self, queries: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert self.words is not None
        return _words(self.words).search(queries, self.settings.range_max)

    def _by_model(self, items: Catalogue, queries: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        assert self.model is not None
        assert self.index is not None
        model, shard = _model(self.model), _shard(self.index)
        found, scores = [np.empty((0, self.settings.range_max), dtype=np.int64)], []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            hits = shard.search(model.queries(queries[start : start + QUERIES_AT_ONCE]), self.settings.range_max)
            ids = shard.item_ids.take(pa.array(hits.rows.ravel())).combine_chunks()
            numbers = items.register.find(register.hashes(ids)).reshape(hits.rows.shape)
            rest = ((0, 0), (0, self.settings.range_max - hits.scores.shape[1]))  # a small index gives fewer
            found.append(np.pad(np.where(items.is_trained(numbers), numbers, NONE), rest, constant_values=NONE))
            scores.append(np.pad(hits.scores, rest, constant_values=-np.inf))
        return np.concatenate(found), np.concatenate([np.empty((0, self.settings.range_max), np.float32), *scores])


def _texts(items: Path, trained: frozenset[str]) -> Iterator[tuple[int, str]]:
    number = 0
    for batch in tables.batches(tables.parts(items), ["split", "text"], 4096):
        for split, text in zip(batch["split"].to_pylist(), batch["text"].to_pylist(), strict=True):
            if split in trained:
                yield number, text
            number += 1


@functools.lru_cache(maxsize=1)
def _words(folder: Path) -> BM25:
    return BM25.open(folder)


@functools.lru_cache(maxsize=1)
def _model(folder: Path) -> Model:
    return Model.load(folder)


@functools.lru_cache(maxsize=1)
def _shard(folder: Path) -> Shard:
    return Shard(Plan.read(folder))
