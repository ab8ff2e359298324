"""Buckets: from units of queries, judgments and clicks to pairs, through files that are cut by the query.

First every unit of input is read, cleaned and scattered; then every bucket, which holds all that is said of its
queries, is paired by itself. Knows where things stand on disk, and nothing of who does the work.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from askew import artifacts, clicks, pairing, records, sources, tables
from askew.clicks import ClickSettings
from askew.errors import DataError
from askew.mining import Miner
from askew.pairing import Catalogue, PairSettings
from askew.register import Register

IDS = "ids.arrow"  # the ids of all items, in the order of the register


class Scattering:
    """Reads one unit of queries, judgments, clicks or ready triplets into buckets."""

    def __init__(self, unit: Mapping[str, Any], work: Path, grades: Mapping[str, int], num_buckets: int) -> None:
        self._unit, self._work, self._grades, self._num_buckets = unit, work, grades, num_buckets
        self._file: str = unit["unit"]["file"]
        self._items = _register(work / "register")
        self._found: dict[str, list[pa.Table]] = {"queries": [], "judgments": [], "clicks": []}
        self._bad: list[records.Bad] = []

    def run(self) -> dict[str, Any]:
        """Read, clean and scatter; returns the highest grade."""
        table = sources.Table.model_validate(self._unit["table"])
        kind = {"queries": "query", "judgments": "judgment", "clicks": "click"}.get(self._unit["list"])
        try:
            if kind is None:
                for chunk in sources.read_triplets(self._unit["unit"], table):
                    self._ready(chunk)
            else:
                for chunk in sources.read(self._unit["unit"], table, kind):
                    self._bad += chunk.bad
                    if chunk.table.num_rows:
                        getattr(self, f"_{self._unit['list']}")(chunk.table)
        except DataError as error:
            raise error.of(self._file) from error
        return self._written()

    def _ready(self, chunk: sources.Chunk) -> None:
        kinds = chunk.table["kind"]
        self._queries(chunk.table.filter(pc.equal(kinds, "query")))
        judged = chunk.table.filter(pc.equal(kinds, "judgment"))
        clean, found = pairing.clean_judgments(judged, self._items, self._file)
        self._found["judgments"].append(clean)
        self._bad += found

    def _queries(self, rows: pa.Table) -> None:
        clean, found = pairing.clean_queries(rows, self._file)
        self._found["queries"].append(clean)
        self._bad += found

    def _judgments(self, rows: pa.Table) -> None:
        graded = sources.graded(rows, self._grades, self._file)
        clean, found = pairing.clean_judgments(graded.table, self._items, self._file)
        self._found["judgments"].append(clean)
        self._bad += [*graded.bad, *found]

    def _clicks(self, rows: pa.Table) -> None:
        clean, found = clicks.check(rows, self._file)
        self._found["clicks"].append(clicks.totals(clean))
        self._bad += found

    def _written(self) -> dict[str, Any]:
        name = f"{self._unit['number']:06d}.parquet"
        highest = None
        for kind, found in self._found.items():
            if found:
                rows = pa.concat_tables(found)
                rows = clicks.totals(rows) if kind == "clicks" else rows
                pairing.scatter(rows, self._num_buckets, self._work / kind / name)
                if kind == "judgments":
                    highest = pc.max(rows["grade"]).as_py()
        tables.write(self._work / "quarantine" / f"judgments-{name}", records.table(self._bad))
        return {"highest": highest}


class Pairer:
    """Pairs buckets of what was scattered."""

    def __init__(
        self, folder: Path, settings: PairSettings, names: Sequence[str],
        propensity: Mapping[int, float], click_settings: ClickSettings, miner: Miner | None,
    ) -> None:  # fmt: skip
        self._folder, self._work, self._settings = folder, folder / artifacts.WORK, settings
        self._names = list(names)
        self._propensity, self._click_settings, self._miner = dict(propensity), click_settings, miner

    def run(self, bucket: int) -> dict[str, Any]:
        """Pair a bucket and write its parts; returns counts, candidates and tally."""
        register = _register(self._work / "register")
        items = Catalogue(register, _ids(self._work / IDS), self._names, [self._settings.train_split])
        queries, judgments = (
            pairing.gathered(sorted((self._work / kind).glob("*.parquet")), bucket, schema)
            for kind, schema in (("queries", pairing.QUERIES), ("judgments", pairing.JUDGMENTS))
        )
        clicked, found, few = self._clicked(bucket, register)
        mine = functools.partial(self._miner.search, items) if self._miner else None
        paired = pairing.pair(queries, pa.concat_tables([judgments, clicked]), items, self._settings, bucket, mine)
        for name, table in (("pairs", paired.pairs), ("queries", paired.queries), ("qrels", paired.qrels)):
            tables.write(self._folder / name / f"part-{bucket:05d}.parquet", table)
        path = self._work / "quarantine" / f"pairs-{bucket:06d}.parquet"
        tables.write(path, records.table([*found, *paired.set_aside]))
        return {
            "counts": dict(paired.counts) | few, "candidates": paired.candidates, "tally": paired.tally.to_json(),
        }  # fmt: skip

    def _clicked(self, bucket: int, items: Register) -> tuple[pa.Table, list[records.Bad], dict[str, int]]:
        """Grade a bucket's clicks; returns JUDGMENTS, what is set aside, and counts."""
        paths = sorted((self._work / "clicks").glob("*.parquet"))
        if not paths:
            return pairing.JUDGMENTS.empty_table(), [], {}
        totals = clicks.totals(pairing.gathered(paths, bucket, clicks.SCHEMA))
        graded, counts = clicks.judgments(totals, self._propensity, self._click_settings)
        clean, found = pairing.clean_judgments(graded, items, "clicks")
        return clean, found, {f"clicks_{name}": count for name, count in counts.items()}


@functools.lru_cache(maxsize=1)
def _register(folder: Path) -> Register:
    return Register(folder)


@functools.lru_cache(maxsize=1)
def _ids(path: Path) -> pa.ChunkedArray:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["id"]
