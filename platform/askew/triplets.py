"""Prepare: a catalogue, its queries and its judgments become triplets.

The data's files (see docs/sources.md for the layouts) become the artifact "triplets":

    items/*.parquet        clean items with decoded photos, each in its split
    pairs/*.parquet        query, positive item, negatives
    queries/*, qrels/*     what evaluation asks, and its judgments
    quarantine/*           every record that cannot be used, and why
    overview.html          what is in it, in numbers and plots

Work is cut into units that depend on the data alone; each is noted when it is done, so that a run that was
killed goes on, and the bytes are the same whoever did what. Knows nothing of models' insides.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BeforeValidator, Field

from askew import (
    artifacts,
    buckets,
    cleaning,
    clicks,
    datasets,
    overview,
    pairing,
    published,
    records,
    sources,
    splits,
    tables,
)
from askew.cleaning import Cleaner, CleanSettings
from askew.clicks import ClickSettings
from askew.config import Settings
from askew.errors import ArtifactError, DataError, RegistryError
from askew.fetching import FetchSettings
from askew.mining import Miner
from askew.negatives import NegativeSettings
from askew.pairing import PairSettings
from askew.register import Register
from askew.registry import Registry
from askew.splits import SplitSettings

LISTS = ("items", "queries", "judgments", "clicks", "triplets")
BUCKET_BYTES, CLICK_ROWS = 32 << 20, 2_000_000
OVERVIEW = "overview.html"


class PrepareSettings(Settings):
    """Settings of the prepare stage (`jobs/prepare.yaml`)."""

    data: Annotated[str, BeforeValidator(str)]  # a folder, or a URL that fsspec knows
    root: Path
    layout: sources.Layout | None = None  # without one, it is recognised by the files
    text_fields: tuple[str, ...] = ("title",)
    kind_field: str = ""
    trait_fields: tuple[str, ...] = ()
    image_size: int = Field(default=48, ge=8, le=1024)
    fetch: FetchSettings = FetchSettings()
    train_split: str = "train"
    positive_grade: int | None = None
    clicks: ClickSettings = ClickSettings()
    splits: SplitSettings = SplitSettings()
    negatives: NegativeSettings = NegativeSettings()
    max_quarantined_fraction: float = Field(default=0.05, ge=0, le=1)
    unit_bytes: int = Field(default=32 << 20, ge=1)
    seed: int = 0
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))

    def content(self) -> dict[str, Any]:
        """What of the settings determines the triplets: not the places, nor what is too bad."""
        return self.model_dump(mode="json", exclude={"data", "root", "tracking_uri", "max_quarantined_fraction"})

    def clean(self) -> CleanSettings:
        """The part of the settings that says what a clean item is."""
        names = CleanSettings.model_fields
        return CleanSettings.model_validate({n: v for n, v in self.model_dump().items() if n in names})


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Make the triplets of a catalogue. Raises DataError when the data cannot be used."""
    settings = settings.model_copy(
        update={"root": settings.root.absolute(), "data": sources.located(settings.data)}
    )
    layout = settings.layout or published.recognise(settings.data)
    settings = settings.model_copy(update={"layout": layout})
    tabs = [tab for kind in LISTS for tab in getattr(layout, kind)]
    if not layout.items and not layout.triplets:
        raise DataError(f"items in {settings.data}", "a layout without any", "name their files under items")
    prints = {name: value for tab in tabs for name, value in sources.fingerprint(tab, settings.data).items()}
    miner = Miner.of(settings.negatives, settings.tracking_uri, settings.root)
    prints |= miner.inputs if miner else {}
    folder = artifacts.place(settings.root, "triplets", artifacts.key("triplets", settings.content(), prints))
    try:
        return _result(folder, artifacts.read(folder, "triplets"), skipped=True)
    except ArtifactError:
        pass
    with artifacts.draft(settings.root, "triplets", settings.content(), prints, resume=True) as draft:
        Preparation(settings, layout, draft, miner).run()
    manifest = artifacts.read(folder, "triplets", verify=False)
    _log(settings, folder, manifest)
    return _result(folder, manifest, skipped=False)


def _result(folder: Path, manifest: artifacts.Manifest, skipped: bool) -> dict[str, Any]:
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["pairs"],
        "counts": manifest.counts, "skipped": skipped,
    }  # fmt: skip


def _log(settings: PrepareSettings, folder: Path, manifest: artifacts.Manifest) -> None:
    """Log counts and overview to MLflow; without a server the artifact has them all the same."""
    if not settings.tracking_uri:
        return
    try:
        registry = Registry(settings.tracking_uri)
        params = {"data": settings.data, "key": manifest.key}
        run = registry.start_run("triplets", folder.name, params, {"askew.triplets_key": manifest.key})
        registry.log_metrics(run, {name: float(count) for name, count in manifest.counts.items()})
        registry.log_files(run, folder / OVERVIEW, "overview")
        registry.end_run(run)
    except RegistryError as error:
        print(f"askew: warning: the overview is not logged: {error}", flush=True)


class Preparation:
    """One run over a catalogue: items, then judgments, then pairs."""

    def __init__(
        self, settings: PrepareSettings, layout: sources.Layout, draft: artifacts.Draft, miner: Miner | None
    ) -> None:
        self.settings, self.layout, self.draft, self.miner = settings, layout, draft, miner
        self.work = draft.folder / artifacts.WORK
        self.tally = overview.Tally()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Do all phases, and state what came of them in the draft."""
        self._items()
        highest = self._scatter()
        results = self._pair(highest)
        self._seal(results)

    # --- items -----------------------------------------------------------------------------------

    def _items(self) -> None:
        fields = cleaning.fields(self.layout, self.settings.data)
        units, values = self._units("items", "triplets"), self.settings.clean().model_dump(mode="json")
        work = self.work

        def clean(unit: datasets.Unit) -> datasets.Unit:
            cleaner = Cleaner(unit["table"], values, fields, unit["list"] == "triplets")
            return cleaner.clean(unit["unit"], work, unit["number"])

        results = datasets.spread(units, clean, "cleaned units of items", marks=work / "marks-items")
        for result in results:
            self.tally.merge(overview.Tally.from_json(result["tally"]))
        made = [part for result in results for part in result["parts"]]
        parts, starts = [Path(part["path"]) for part in made], np.cumsum([0, *(part["rows"] for part in made)])
        self.names = [*cleaning.names_of(results), splits.ASIDE, splits.NEW]
        everything = self._register(results, parts)
        if not len(everything):
            raise DataError("items with an id and a text", "none that can be used", self._mend())
        keep, again = self._repeated(everything, parts, starts)
        self._split(everything, keep)
        self._finish(parts, starts, everything, keep)
        self.counts["items"], self.counts["items_repeated"] = int(keep.sum()), again
        self.counts["items_without_image"] = int((everything.rows["photo"][keep] == 0).sum())

    def _units(self, *lists: str) -> list[datasets.Unit]:
        """Cut the files of these lists of tables into numbered units."""
        found = [
            {"list": name, "table": tab.model_dump(mode="json"), "unit": unit}
            for name in lists
            for tab in getattr(self.layout, name)
            for unit in sources.units(tab, self.settings.data, self.settings.unit_bytes)
        ]
        return [{**unit, "number": number} for number, unit in enumerate(found)]

    def _register(self, results: Sequence[Mapping[str, Any]], parts: Sequence[Path]) -> Register:
        recode = [
            np.array([self.names.index(name) for name in result["splits"]], dtype=np.uint8)
            for result in results
            for _ in result["parts"]
        ]
        return Register.gather([part.with_suffix(".npy") for part in parts], self.work / "everything", recode)

    def _repeated(self, everything: Register, parts: Sequence[Path], starts: np.ndarray) -> tuple[np.ndarray, int]:
        """Keep the first item of each id; one of other content is set aside, one of the same content counted."""
        numbers, same = everything.repeated()
        keep = np.ones(len(everything), dtype=np.bool_)
        keep[numbers] = False
        message, found = "an earlier item of other content has this id", []
        of_part = np.searchsorted(starts, numbers[~same], side="right") - 1
        for part in np.unique(of_part):
            here = numbers[~same][of_part == part]
            ids = tables.column([parts[part]], "item_id").take(pa.array(here - starts[part]))
            for number, item_id in zip(here, ids.to_pylist(), strict=True):
                found.append(records.bad("item", item_id, f"item {number:,}", "conflicting_id", message))
        tables.write(self.work / "quarantine" / "repeated.parquet", records.table(found))
        return keep, int(same.sum())

    def _split(self, everything: Register, keep: np.ndarray) -> None:
        """Give each item its final split: set aside what leaks, or tell new items from the training's."""
        rows, how = everything.rows, self.settings.splits
        given = {name for name in self.names if name not in (cleaning.ALL, splits.ASIDE, splits.NEW)}
        make = how.make if how.make != "auto" else "given" if given else "four"
        self.how = how.model_copy(update={"make": make})
        labels = splits.groups(rows, how)
        train = self._number(self.settings.train_split)
        if make == "four":
            new = splits.chosen(splits.group_keys(rows["id"], labels), how.new_items, self.settings.seed, 0)
            self.split = np.where(new, self.names.index(splits.NEW), train).astype(np.uint8)
            return
        named_none = rows["split"] == (self.names.index(cleaning.ALL) if cleaning.ALL in self.names else 255)
        self.split = np.where(named_none, train, rows["split"]).astype(np.uint8)
        again = np.flatnonzero(~keep)  # an item of evaluation is not trained on, in whichever order it came
        first = everything.find(rows["id"][again])
        moved = (self.split[first] == train) & (self.split[again] != train)
        self.split[first[moved]] = self.split[again[moved]]
        leaks = np.flatnonzero(keep)
        leaks = leaks[splits.set_aside(labels[keep], self.split[keep], self.names, self.settings.train_split)]
        self.split[leaks] = self.names.index(splits.ASIDE)
        self.counts["items_aside"] = len(leaks)

    def _number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def _finish(self, parts: Sequence[Path], starts: np.ndarray, everything: Register, keep: np.ndarray) -> None:
        """Write the final parts of items, their register and their ids."""
        np.save(self.work / "keep.npy", keep)
        np.save(self.work / "split.npy", self.split)
        names, work, out = self.names, self.work, self.draft.folder / "items"
        units: list[datasets.Unit] = [
            {"source": str(part), "start": start, "out": str(out / f"part-{number:05d}.parquet")}
            for number, (part, start) in enumerate(zip(parts, starts.tolist(), strict=False))
        ]

        def finish(unit: datasets.Unit) -> datasets.Unit:
            keep, split = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("keep", "split"))
            cleaning.finish(Path(unit["source"]), unit["start"], Path(unit["out"]), keep, split, names)
            return {}

        datasets.spread(units, finish, "finished parts of items", marks=work / "marks-finished")
        everything.kept(keep, self.split, self.work / "register")
        counts = np.bincount(self.split[keep], minlength=len(self.names))
        self.tally.count("splits", {f"items of {n}": int(c) for n, c in zip(self.names, counts, strict=True) if c})
        with (
            pa.OSFile(str(self.work / buckets.IDS), "wb") as sink,
            pa.ipc.new_file(sink, pa.schema([("id", pa.string())])) as file,
        ):
            for batch in tables.batches(tables.parts(out), ["item_id"], 65_536):
                file.write_batch(batch.rename_columns(["id"]))

    # --- queries, judgments and clicks -----------------------------------------------------------

    def _scatter(self) -> int | None:
        """Clean queries, judgments and clicks into buckets; returns the highest grade there is."""
        files = {f for name in LISTS[1:] for tab in getattr(self.layout, name) for f in tab.files}
        total = sum(sources.find(self.settings.data, files).values()) if files else 0
        self.num_buckets = max(1, math.ceil(total / BUCKET_BYTES))
        units, work, grades, num_buckets = self._units(*LISTS[1:]), self.work, self.layout.grades, self.num_buckets

        def scatter(unit: datasets.Unit) -> datasets.Unit:
            return buckets.Scattering(unit, work, grades, num_buckets).run()

        results = datasets.spread(units, scatter, "read units of judgments", marks=work / "marks-judgments")
        self.propensity = self._propensities()
        found = [r["highest"] for r in results if r["highest"] is not None]
        return max([*found, *([len(self.settings.clicks.thresholds)] if self.propensity else [])], default=None)

    def _propensities(self) -> dict[int, float]:
        """Estimate how often positions are clicked, from so many buckets as hold CLICK_ROWS rows."""
        paths = sorted((self.work / "clicks").glob("*.parquet"))
        found = [clicks.totals(clicks.SCHEMA.empty_table())]
        for bucket in range(self.num_buckets) if paths else ():
            found.append(clicks.totals(pairing.gathered(paths, bucket, clicks.SCHEMA)))
            if sum(map(len, found)) > CLICK_ROWS:
                break
        return clicks.propensities(pa.concat_tables(found), self.settings.clicks) if paths else {}

    # --- pairs -----------------------------------------------------------------------------------

    def _pair(self, highest: int | None) -> list[dict[str, Any]]:
        if highest is None and (self.layout.queries or self.layout.triplets):
            raise DataError("judgments of known items", "none that can be used", self._mend())
        positive = self.settings.positive_grade if self.settings.positive_grade is not None else highest or 1
        self.positive_grade = positive
        values = PairSettings(
            train_split=self.settings.train_split, positive_grade=positive, seed=self.settings.seed,
            splits=self.how, negatives=self.settings.negatives,
        )  # fmt: skip
        if self.miner:
            self.miner.ready(self.draft.folder / "items", [self.settings.train_split], self.work)
        pairer = buckets.Pairer(
            self.draft.folder, values, self.names, self.propensity, self.settings.clicks, self.miner
        )
        units: list[datasets.Unit] = [{"bucket": bucket} for bucket in range(self.num_buckets)]
        marks = self.work / "marks-pairs"
        return datasets.spread(
            units, lambda unit: pairer.run(unit["bucket"]), "paired buckets of queries", marks=marks
        )

    # --- the end ---------------------------------------------------------------------------------

    def _seal(self, results: Sequence[Mapping[str, Any]]) -> None:
        candidates: dict[str, set[str]] = {}
        for result in results:
            self.tally.merge(overview.Tally.from_json(result["tally"]))
            self.counts.update(result["counts"])
            for split, found in result["candidates"].items():
                candidates.setdefault(split, set()).update(found)
        names = ("pairs", "train_queries", "queries", "judgments")
        self.draft.counts |= {name: 0 for name in names} | dict(sorted(self.counts.items()))
        if not self.draft.counts["pairs"]:
            grade, split = self.positive_grade, self.settings.train_split
            wanted = f"a pair of a query and an item of split {split!r}, judged {grade} or higher"
            raise DataError(wanted, "none", self._mend())
        if empty := sorted(split for split, found in candidates.items() if not found):
            print(f"askew: warning: no query with a positive is left in {', '.join(empty)}", flush=True)
        self.draft.details |= {
            "image_size": self.settings.image_size,
            "text_fields": list(self.settings.text_fields),
            "positive_grade": self.positive_grade,
            "splits": self.how.make,
            "candidates": {split: sorted(found) for split, found in sorted(candidates.items()) if found},
            **_made_up(self.settings.data),
        }
        self._seal_quarantine()
        facts = {"triplets of": self.settings.data.rsplit("/", 1)[-1], **self.draft.counts}
        artifacts.write_text(self.draft.folder / OVERVIEW, overview.page(self.tally, facts))
        artifacts.write_text(self.draft.folder / "statistics.json", self.tally.to_json())

    def _set_aside(self) -> list[Path]:
        return tables.parts(self.work / "quarantine")

    def _reasons(self) -> Counter[str]:
        """Count what was set aside so far, by kind and reason, as `image/not_a_photo`."""
        found = pq.ParquetDataset(self._set_aside()).read(["kind", "reason"])
        names = pc.binary_join_element_wise(found["kind"], found["reason"], "/")
        return Counter({v["values"].as_py(): v["counts"].as_py() for v in pc.value_counts(names)})

    def _mend(self) -> str:
        return f"mend the data (set aside: {_top(self._reasons()) or 'nothing'})"

    def _seal_quarantine(self) -> None:
        """Take the quarantine over, count it by reason, and fail when it is more than the settings allow."""
        for path in self._set_aside():
            if pq.read_metadata(path).num_rows or path.name == "repeated.parquet":
                tables.link(path, self.draft.folder / "quarantine" / path.name)
        reasons = self._reasons()
        bad, counts = sum(reasons.values()), self.draft.counts
        self.draft.details["quarantined"] = dict(sorted(reasons.items()))
        self.tally.count("quarantined", reasons)
        total = bad + counts["items"] + counts["judgments"] + counts["queries"] + counts["train_queries"]
        counts["quarantined"] = bad
        if bad:
            print(f"askew: quarantined {bad:,} of {total:,} records: {_top(reasons)}", flush=True)
        most = self.settings.max_quarantined_fraction
        if total and bad / total > most:
            wanted = f"at most {100 * most:g} % of records quarantined"
            where = f"mend the data, or raise max_quarantined_fraction; {self.work / 'quarantine'} has them all"
            raise DataError(wanted, f"{bad:,} of {total:,}: {_top(reasons)}", where)


def _top(reasons: Counter[str]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(3))


def _made_up(data: str) -> dict[str, Any]:
    """What the demo's own catalogue states of itself; nothing for a shop's data."""
    try:
        return {"made_up": True, **artifacts.read(Path(data), "catalogue", verify=False).details}
    except (ArtifactError, OSError):
        return {"made_up": False}
