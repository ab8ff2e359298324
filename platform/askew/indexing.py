"""Index: a registered model embeds the catalogue, and its vectors become FAISS segments.

The items are cut into segments by their order alone; Ray Data gives each segment to an actor that holds
the model, reads the segment's rows as a stream, and writes its folder. No process holds more than a segment.
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from askew import artifacts, datasets, segments, tables
from askew.config import Settings
from askew.errors import ArtifactError
from askew.models import Model
from askew.registry import Registry


class IndexSettings(Settings):
    """Settings of the index stage (`jobs/index.yaml`)."""

    model: str
    version: str
    triplets: Path
    root: Path
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    num_segments: int = Field(default=4, ge=1)
    num_workers: int = Field(default=2, ge=1)
    batch_size: int = Field(default=256, ge=1)


def index(settings: IndexSettings) -> dict[str, Any]:
    """Build the index of a model version, and note its place on the version."""
    places = {"root": settings.root.absolute(), "triplets": settings.triplets.absolute()}  # for other processes
    settings = settings.model_copy(update=places)
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    model = registry.download(version, settings.root)
    triplets = artifacts.read(settings.triplets, "triplets")
    content = {"num_segments": settings.num_segments}
    inputs = {"model": artifacts.read(model, "model").key, "triplets": triplets.key}
    folder = artifacts.place(settings.root, "index", artifacts.key("index", content, inputs))
    try:
        manifest, skipped = artifacts.read(folder, "index"), True
    except ArtifactError:
        skipped = False
        with artifacts.draft(settings.root, "index", content, inputs) as draft:
            _build(settings, model, draft)
        manifest = artifacts.read(folder, "index", verify=False)
    registry.tag(version, {"askew.index": str(folder), "askew.index_key": manifest.key})
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["items"],
        "segments": len(manifest.details["segments"]), "skipped": skipped,
    }  # fmt: skip


def _build(settings: IndexSettings, model: Path, draft: artifacts.Draft) -> None:
    total = len(tables.column(tables.parts(settings.triplets / "items"), "has_image"))
    cuts = np.linspace(0, total, min(settings.num_segments, total) + 1).astype(int).tolist()
    units = [
        {"start": start, "stop": stop, "folder": str(draft.folder / f"segment-{number:05d}")}
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]
    arguments = (str(model), str(settings.triplets), settings.batch_size)
    results = datasets.spread(units, Embedder, "indexed segments", arguments, settings.num_workers)
    draft.counts["items"] = sum(r["items"] for r in results)
    draft.details |= {
        "dim": results[0]["dim"],
        "metric": "inner product",
        "segments": [
            {"name": Path(u["folder"]).name, "items": r["items"]} for u, r in zip(units, results, strict=True)
        ],
    }


class Embedder:
    """An actor that holds the model and turns units (ranges of rows) into segment folders."""

    def __init__(self, model: str, triplets: str, batch_size: int) -> None:
        self._model, self._batch_size = Model.load(Path(model)), batch_size
        self._paths = tables.parts(Path(triplets) / "items")

    def __call__(self, unit: datasets.Unit) -> datasets.Unit:
        """Embed the items from row `start` to row `stop` and write their segment."""
        columns, vectors, kept = [*segments.COLUMNS, "text", "pixels"], [], []
        for batch in tables.rows(self._paths, columns, self._batch_size, unit["start"], unit["stop"]):
            has_image = batch["has_image"].to_numpy(zero_copy_only=False)
            photos = tables.pixels(batch["pixels"], self._model.image_size)
            vectors.append(self._model.items(batch["text"].to_pylist(), photos, has_image)["index"])
            kept.append(batch.select(list(segments.COLUMNS)))
        segments.write(Path(unit["folder"]), np.concatenate(vectors), pa.Table.from_batches(kept))
        return {"items": unit["stop"] - unit["start"], "dim": self._model.dim}
