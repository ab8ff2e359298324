"""Draw: the demo's own catalogue, made up from a seed and drawn by all workers.

The layout is that of any shop's data (see `askew.triplets`), so nothing later knows the difference; the
manifest says that it is made up, and what a text-only ranker could reach on it at best.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from askew import artifacts, datasets, drawn, tables
from askew.config import Settings
from askew.errors import ArtifactError

ROWS_A_PART = 500


class DrawSettings(Settings):
    """Settings of the draw stage (`jobs/draw.yaml`)."""

    root: Path
    num_items: int = Field(default=drawn.FULL_SIZE, ge=drawn.LEAST_ITEMS)  # made-up products
    seed: int = Field(default=0, ge=0)


def draw(settings: DrawSettings) -> dict[str, Any]:
    """Draw the made-up catalogue as an artifact "catalogue"."""
    content = settings.model_dump(exclude={"root"})
    folder = artifacts.place(settings.root, "catalogue", artifacts.key("catalogue", content, {}))
    try:
        return _result(folder, artifacts.read(folder, "catalogue"), skipped=True)
    except ArtifactError:
        pass
    with artifacts.draft(settings.root, "catalogue", content, {}) as draft:
        catalogue = drawn.plan(settings.seed, settings.num_items)
        datasets.spread(_units(catalogue, draft.folder), lambda unit: draw_part(unit, settings), "drawn parts")
        drawn.write_queries(catalogue, draft.folder)
        draft.counts |= {"items": len(catalogue.items), "queries": len(catalogue.queries)}
        draft.details |= {"text_ceiling": drawn.text_ceiling(catalogue), "omitted": catalogue.omission_rates()}
    return _result(folder, artifacts.read(folder, "catalogue", verify=False), skipped=False)


def _result(folder: Path, manifest: artifacts.Manifest, skipped: bool) -> dict[str, Any]:
    rows = manifest.counts["items"]
    return {"artifact": str(folder), "key": manifest.key, "rows": rows, "skipped": skipped}


def _units(catalogue: drawn.Catalogue, folder: Path) -> list[datasets.Unit]:
    return [
        {"split": split, "start": start, "path": str(folder / "items" / split / f"part-{number:05d}.parquet")}
        for split in ("train", "val")
        for number, start in enumerate(range(0, len(catalogue.items_of(split)), ROWS_A_PART))
    ]


def draw_part(unit: datasets.Unit, settings: DrawSettings) -> datasets.Unit:
    """Draw the items of one part; any worker draws the same bytes."""
    items = drawn.plan(settings.seed, settings.num_items).items_of(unit["split"])
    part = items[unit["start"] : unit["start"] + ROWS_A_PART]
    tables.write(Path(unit["path"]), drawn.draw_batch(part, settings.seed))
    return {"items": len(part)}
