"""Update: items that are new or have changed are embedded by the served release and put into its live index.

They are read and cleaned as prepare reads items; whatever cannot be used goes to a quarantine. Beside that, items
are deleted, and the changes of the log compacted into segments. One process does it, a batch of items at a time.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import Field

from askew import artifacts, segments, sources, tables
from askew.cleaning import Cleaner, CleanSettings
from askew.config import Settings
from askew.datasets import Progress
from askew.errors import DataError
from askew.fetching import FetchSettings
from askew.live import Live
from askew.models import Model
from askew.registry import Registry


class UpdateSettings(Settings):
    """Settings of the update stage (`jobs/update.yaml`)."""

    model: str
    version: str = "champion"
    root: Path
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    data: str = ""  # a folder of items as prepare reads it; of those that are there already, all is replaced
    items: sources.Table = sources.Table(files=("items*",))  # which of its files, and their columns
    deleted: Path | None = None  # a text file of ids, one a line
    compact: bool = False  # put the log into segments
    fetch: FetchSettings = FetchSettings()
    batch_size: int = Field(default=256, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"


def update(settings: UpdateSettings) -> dict[str, Any]:
    """Change the live index of a model version; returns what was done.

    Raises ArtifactError when the version has no index, or one of another release; DataError when the data cannot
    be read at all.
    """
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    folder = version.index
    plan = segments.Plan.read(folder, version.tags.get("askew.release"))
    root = settings.root.absolute()
    with Live(folder) as writer:
        done = {"upserted": 0, "quarantined": 0, "deleted": 0}
        if settings.data:
            model = Model.load(registry.download(version, root), settings.device)
            done |= _upserted(settings, model, plan, writer, root)
        if settings.deleted:
            done["deleted"] = _deleted(settings.deleted, writer, settings.batch_size)
        if settings.compact:
            writer.compact()
        return {"index": str(folder), "change": writer.last, **done, "rows": done["upserted"] + done["deleted"]}


def _upserted(
    settings: UpdateSettings, model: Model, plan: segments.Plan, writer: Live, root: Path
) -> dict[str, Any]:
    """Clean, embed and upsert all items of the data folder; what was set aside becomes an artifact."""
    clean = CleanSettings(
        text_fields=tuple(plan.details["text_fields"]), image_size=model.image_size, fetch=settings.fetch
    )
    cleaner = Cleaner(settings.items.model_dump(), clean.model_dump(), plan.fields, triplets=False)
    units = sources.units(settings.items, settings.data)
    with artifacts.draft(root, "update", {"data": settings.data, "at": time.time_ns()}, {}) as draft:
        work = draft.folder / artifacts.WORK
        found = [cleaner.clean(unit, work, number) for number, unit in enumerate(units)]
        parts = [Path(part["path"]) for one in found for part in one["parts"]]
        if not parts:
            raise DataError(f"items with an id and a text in {settings.data}", "none", "mend the data")
        total = sum(part["rows"] for one in found for part in one["parts"])
        for path in tables.parts(work / "quarantine"):
            tables.link(path, draft.folder / "quarantine" / path.name)
        progress = Progress("upserted items", total)
        for items, vectors in _embedded(parts, model, settings.batch_size):
            writer.upsert(vectors, items)
            progress.step(len(items))
        draft.counts |= {"items": total, "quarantined": sum(one["quarantined"] for one in found)}
        return {"upserted": total, "quarantined": draft.counts["quarantined"]}


def _embedded(parts: list[Path], model: Model, size: int) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Embed clean items in batches, each item once in a batch."""
    for path in parts:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=size):
                vectors = model.embedded(batch)
                rows = batch.select(list(segments.COLUMNS)).to_pylist()
                last = {row["item_id"]: number for number, row in enumerate(rows)}
                keep = sorted(last.values())
                yield [rows[number] for number in keep], vectors[keep]


def _deleted(path: Path, writer: Live, size: int) -> int:
    """Delete the items whose ids a file lists."""
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"ids, one a line, in {path}", str(error), "mend the file") from error
    for at in range(0, len(ids), size):
        writer.delete(ids[at : at + size])
    return len(ids)
