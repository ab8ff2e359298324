"""Index: a registered model embeds the catalogue, and its vectors become FAISS segments.

The items are cut into ranges by their order alone. Ray Data gives each to an actor that holds the model, reads
the rows as a stream, and keeps their vectors, shared out over segments; from a sample of these the index's
centroids and codes are learned, once; each segment is filled, and its recall measured against exact search, by
whoever is free. No process holds more than a segment, and a run that was killed goes on where it was.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from askew import ann, artifacts, config, datasets, inputs, records, segments, tables, tuning
from askew.ann import Design, Index, Vectors
from askew.errors import ArtifactError, DataError
from askew.models import Model
from askew.registry import Registry
from askew.tuning import IndexKindSettings

QUARANTINE = "quarantine"
FAN_OUT = 32  # segments that a range of rows is shared out over


class IndexSettings(IndexKindSettings):
    """Settings of the index stage (`jobs/index.yaml`)."""

    model: str
    version: str
    triplets: Path
    root: Path
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    num_segments: int = Field(default=4, ge=1)  # or more, so that none has more items than this:
    items_a_segment: int = Field(default=50_000, ge=1)
    num_workers: int = Field(default=2, ge=1)
    batch_size: int = Field(default=256, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    num_queries: int = Field(default=500, ge=1)  # of the catalogue's own, by which recall is measured
    max_quarantined_fraction: float = Field(default=0.05, ge=0, le=1)
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """What of the settings determines the index."""
        apart = {"model", "version", "triplets", "root", "tracking_uri", "num_workers", "batch_size", "device"}
        return self.model_dump(mode="json", exclude=apart | {"max_quarantined_fraction"})


def index(settings: IndexSettings) -> dict[str, Any]:
    """Build the index of a model version, and note its place on the version."""
    places = {"root": settings.root.absolute(), "triplets": settings.triplets.absolute()}  # for other processes
    settings = settings.model_copy(update=places)
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    model = registry.download(version, settings.root)
    triplets = artifacts.read(settings.triplets, "triplets")
    content = settings.content()
    inputs = {"model": artifacts.read(model, "model").key, "triplets": triplets.key}
    folder = artifacts.place(settings.root, "index", artifacts.key("index", content, inputs))
    try:
        manifest, skipped = artifacts.read(folder, "index"), True
    except ArtifactError:
        skipped = False
        if settings.device == "cuda":
            datasets.check_gpus(settings.num_workers, "device=cpu")
        with artifacts.draft(settings.root, "index", content, inputs, resume=True) as draft:
            Build(settings, model, triplets, draft).run()
        manifest = artifacts.read(folder, "index", verify=False)
    registry.tag(version, {
        "askew.index": str(folder), "askew.index_key": manifest.key, "askew.release": manifest.details["release"],
    })  # fmt: skip
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["items"],
        "segments": len(manifest.details["segments"]), "release": manifest.details["release"],
        "kind": manifest.details["design"]["kind"], "measured": manifest.details["measured"], "skipped": skipped,
    }  # fmt: skip


class Build:
    """The building of one index in its draft."""

    def __init__(
        self, settings: IndexSettings, model: Path, triplets: artifacts.Manifest, draft: artifacts.Draft
    ) -> None:
        self.settings, self.model, self.draft = settings, model, draft
        self.work = draft.folder / artifacts.WORK
        self.work.mkdir(exist_ok=True)
        self.dim = Model.load(model).dim
        self.release = segments.identity(
            artifacts.read(model, "model", verify=False), triplets.key, self.dim, inputs.TRANSFORM
        )
        self.text_fields = triplets.details.get("text_fields", ["title"])

    def run(self) -> None:
        """Embed, learn, fill, measure."""
        units = self._units()
        embedder = (str(self.model), str(self.settings.triplets), self.settings.batch_size, self.settings.device)
        num_gpus = float(self.settings.device == "cuda")
        kept = self._spread(units, Embedder, "embedded segments", embedder, num_gpus)
        self._refuse(sum(r["items"] for r in kept), sum(r["bad"] for r in kept))
        size = sum(r["items"] - r["bad"] for r in kept)
        design = tuning.design(self.settings, size, self.dim)
        self._learn(design)
        queries = self._queries()
        filler = (str(self.draft.folder), design.model_dump(), self.release, str(queries), size)
        filled = self._spread(units, Filler, "filled segments", filler)
        units = [unit for unit, result in zip(units, filled, strict=True) if result["items"]]
        segments.tell(self.draft, [Path(unit["folder"]).name for unit in units])
        self._tune(design, [Path(unit["found"]) for unit in units], queries)
        self.draft.details["text_fields"] = self.text_fields
        self.draft.counts["quarantined"] = sum(r["bad"] for r in kept)
        item_bytes = sum(r["bytes"] for r in filled) / self.draft.counts["items"]
        self.draft.details["measured"]["item_bytes"] = round(item_bytes, 1)

    def _units(self) -> list[datasets.Unit]:
        """Cut the items' rows into as many ranges as there are to be segments.

        A segment holds a like share of each range of its group, so that every shard, which has every n-th segment,
        has a like share of everything, though the catalogue be sorted by kind.
        """
        total = sum(pq.read_metadata(path).num_rows for path in tables.parts(self.settings.triplets / "items"))
        if not total:
            raise DataError(f"items in {self.settings.triplets}", "none", "prepare a catalogue that has some")
        count = min(max(self.settings.num_segments, -(-total // self.settings.items_a_segment)), total)
        cuts = np.linspace(0, total, count + 1).astype(int).tolist()
        parts = self.work / "parts"
        parts.mkdir(exist_ok=True)
        groups = [list(range(at, min(at + FAN_OUT, count))) for at in range(0, count, FAN_OUT)]
        return [
            {
                "number": number, "start": cuts[number], "stop": cuts[number + 1], "group": group,
                "parts": str(parts), "folder": str(self.draft.folder / f"segment-{number:05d}"),
                "found": str(self.work / f"{number:05d}.npz"),
                "bad": str(self.draft.folder / QUARANTINE / f"part-{number:05d}.parquet"),
            }
            for group in groups for number in group
        ]  # fmt: skip

    def _spread(
        self,
        units: Sequence[datasets.Unit],
        work: type,
        doing: str,
        arguments: tuple[Any, ...],
        num_gpus: float = 0,
    ) -> list[Any]:
        marks = self.work / work.__name__
        marks.mkdir(exist_ok=True)
        return datasets.spread(units, work, doing, arguments, self.settings.num_workers, marks, num_gpus)

    def _refuse(self, total: int, bad: int) -> None:
        do = "train the model again; its vectors of these items are no numbers"
        if bad == total:
            raise ArtifactError("a vector of one item at least", f"none of {total:,}", do)
        if bad > self.settings.max_quarantined_fraction * total:
            most = f"{100 * self.settings.max_quarantined_fraction:g} %"
            raise ArtifactError(f"at most {most} of items without a vector", f"{bad:,} of {total:,}", do)

    def _learn(self, design: Design) -> None:
        """Train the index that all segments start from on vectors drawn from all of them."""

        def learn(path: Path) -> None:
            ann.threads(os.cpu_count() or 1)
            files = sorted((self.work / "parts").glob("*.npy"))
            Index.trained(design, _sample(files, ann.sample_size(design), self.settings.seed)).write(path)

        _once(self.draft.folder / segments.EMPTY, learn)

    def _queries(self) -> Path:
        """Encode the catalogue's own queries, by which recall is measured."""

        def encode(path: Path) -> None:
            texts = _queries(self.settings.triplets, self.settings.num_queries, self.settings.seed)
            with path.open("wb") as stream:
                np.save(stream, _encoded(Model.load(self.model), texts, self.settings.batch_size))

        return _once(self.work / "queries.npy", encode)

    def _tune(self, design: Design, found: Sequence[Path], queries: Path) -> None:
        """Choose the cheapest effort that holds the recall over all segments, and note what was measured."""
        best = tuning.cheapest(tuning.settings(design, found), self.settings.recall_target)
        self.draft.details["effort"] = best.effort.model_dump()
        self.draft.details["measured"] = {
            "queries": len(np.load(queries, mmap_mode="r")), "recall_target": self.settings.recall_target,
            **{f"recall@{k}": round(value, 5) for k, value in best.recall.items()},
            "query_ms": round(1000 * best.seconds, 4),
        }  # fmt: skip
        print(f"askew: {design.factory} gives {best.recall[10]:.2%} of the exact ten best", flush=True)


def _once(path: Path, write: Callable[[Path], None]) -> Path:
    """Have a file written whole or not at all, so that one that a run left before it was killed can be trusted."""
    if not path.exists():
        draft = path.with_suffix(".draft")
        write(draft)
        artifacts.sync(draft)
        draft.replace(path)
    return path


def _sample(paths: Sequence[Path], count: int, seed: int) -> Vectors:
    """Draw vectors from all files, as many of each as it has its share."""
    random, drawn = np.random.default_rng(seed), []
    files = [np.load(path, mmap_mode="r") for path in paths]
    total = sum(map(len, files))
    for file in files:
        wanted = min(len(file), -(-count * len(file) // total))
        drawn.append(file[np.sort(random.choice(len(file), wanted, replace=False))])
    vectors: Vectors = np.concatenate(drawn)
    return vectors


def _queries(triplets: Path, count: int, seed: int) -> list[str]:
    """Draw the texts of queries: those of evaluation if there are enough, else those of training too."""
    texts = pq.read_table(triplets / "queries", columns=["query"])["query"].unique()
    if len(texts) < count:
        for path in tables.parts(triplets / "pairs"):
            more = pq.read_table(path, columns=["query"])["query"].unique()
            texts = pc.unique(pa.concat_arrays([texts, more.cast(texts.type)]))
    drawn = np.random.default_rng(seed).permutation(len(texts))[:count]
    found: list[str] = texts.take(pa.array(np.sort(drawn))).to_pylist()
    return found


def _encoded(model: Model, texts: Sequence[str], size: int) -> Vectors:
    return np.concatenate([model.queries(texts[i : i + size]) for i in range(0, len(texts), size)])


class Embedder:
    """An actor that holds the model and turns ranges of rows into vectors, shared out over a group's segments."""

    def __init__(self, model: str, triplets: str, batch_size: int, device: str = "cpu") -> None:
        self._model, self._batch_size = Model.load(Path(model), device), batch_size
        self._paths = tables.parts(Path(triplets) / "items")

    def __call__(self, unit: datasets.Unit) -> datasets.Unit:
        """Embed the items from row `start` to row `stop`; of one whose vector is no number there is a record."""
        columns, vectors, kept = [*segments.COLUMNS, tables.TEXT, "pixels"], [], []
        for batch in tables.rows(self._paths, columns, self._batch_size, unit["start"], unit["stop"]):
            vectors.append(self._model.embedded(batch))
            kept.append(batch.select(list(segments.COLUMNS)))
        every, items = np.concatenate(vectors), pa.Table.from_batches(kept)
        finite = np.asarray(np.isfinite(every).all(axis=1), dtype=np.bool_)
        of = np.arange(unit["start"], unit["stop"]) % len(unit["group"])
        for place, number in enumerate(unit["group"]):
            rows = np.flatnonzero(finite & (of == place))
            path = _part(unit, unit["number"], number)
            np.save(path, every[rows])
            segments.write_items(path.with_suffix(".arrow"), items.take(pa.array(rows)))
        if not finite.all():
            ids = items["item_id"].filter(pa.array(~finite)).to_pylist()
            told = [records.bad("item", item_id, "", "not_finite", "its vector is not finite") for item_id in ids]
            tables.write(Path(unit["bad"]), records.table(told))
        return {"items": len(every), "bad": int((~finite).sum())}


class Filler:
    """An actor that turns files of vectors into segments, and searches them by every effort."""

    def __init__(self, folder: str, design: dict[str, Any], release: str, queries: str, total: int) -> None:
        ann.threads(1)
        self._total = total
        self._design, self._release, self._queries = Design.model_validate(design), release, np.load(queries)
        self._empty = Index.read(Path(folder) / segments.EMPTY, self._design)

    def __call__(self, unit: datasets.Unit) -> datasets.Unit:
        """Write the segment of the items that its group's ranges have for it, and measure it."""
        paths = [_part(unit, source, unit["number"]) for source in unit["group"]]
        vectors = np.concatenate([np.load(path) for path in paths])
        if not len(vectors):
            return {"items": 0, "bytes": 0}
        items = pa.concat_tables([segments.mapped(path.with_suffix(".arrow")) for path in paths])
        folder = Path(unit["folder"])
        size = segments.write(folder, vectors, items, self._empty, self._release)
        index = Index.read(folder / segments.VECTORS, self._design)
        share = len(vectors) / self._total
        tuning.save(Path(unit["found"]), tuning.measure(index, self._empty, vectors, self._queries, share))
        return {"items": len(vectors), "bytes": size}


def _part(unit: datasets.Unit, source: int, target: int) -> Path:
    """Where the vectors lie that a range of rows has for a segment."""
    return Path(unit["parts"]) / f"{source:05d}-{target:05d}.npy"


if __name__ == "__main__":  # as a job that the endpoint submits
    config.main(IndexSettings, index, __doc__ or "")
