"""Prepare: a catalogue, its queries and its judgments become triplets.

Reads a folder of this layout (the demo's own catalogue has it too):

    items/<split>/*.parquet     item_id, title, image (bytes), any other columns
    <split>.queries.jsonl       query_id, query, and if known the segment
    <split>.qrels.tsv           TREC qrels: query_id 0 item_id grade

and writes the artifact "triplets": cleaned items with decoded pixels, training pairs with a negative
each, evaluation queries with their judgments, and a quarantine of every record that cannot be used.
Knows nothing of models.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew import artifacts, datasets, inputs, tables
from askew.config import Settings
from askew.errors import ArtifactError, DataError

QUARANTINE = pa.schema([(name, pa.string()) for name in ("kind", "id", "source", "reason", "message")])
QUERIES = pa.schema([(name, pa.string()) for name in ("query_id", "query", "split", "segment")])
QRELS = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.int64())])
MAX_TEXT, MAX_ID = 10_000, 512
ROWS_A_PART = 20_000


class PrepareSettings(Settings):
    """Settings of the prepare stage (`jobs/prepare.yaml`)."""

    data: Path
    root: Path
    text_fields: tuple[str, ...] = ("title",)
    image_size: int = 48
    train_split: str = "train"
    positive_grade: int | None = None
    max_quarantined_fraction: float = 0.05
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """What of the settings determines the triplets: all but where they are read and written."""
        return self.model_dump(mode="json", exclude={"data", "root"})


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Make the triplets of a catalogue. Raises DataError when the data cannot be used."""
    sources = {path.relative_to(settings.data).as_posix(): path for path in _sources(settings)}
    fingerprints = {name: artifacts.sha256(path) for name, path in sources.items()}
    key = artifacts.key("triplets", settings.content(), fingerprints)
    folder = artifacts.place(settings.root, "triplets", key)
    try:
        return _result(folder, artifacts.read(folder, "triplets"), skipped=True)
    except ArtifactError:
        pass
    with artifacts.draft(settings.root, "triplets", settings.content(), fingerprints) as draft:
        quarantine = [*_items(settings, draft), *_judgments(settings, draft)]
        _seal_quarantine(settings, draft, quarantine)
    return _result(folder, artifacts.read(folder, "triplets", verify=False), skipped=False)


def _result(folder: Path, manifest: artifacts.Manifest, skipped: bool) -> dict[str, Any]:
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["pairs"],
        "counts": manifest.counts, "skipped": skipped,
    }  # fmt: skip


def _sources(settings: PrepareSettings) -> list[Path]:
    data = settings.data
    wanted = "a folder with items/<split>/*.parquet, <split>.queries.jsonl and <split>.qrels.tsv"
    do = "give its path as data=…"
    if not data.is_dir():
        raise DataError(wanted, f"no folder {data}", do)
    items, queries, qrels = (sorted(data.glob(g)) for g in ("items/*/*.parquet", "*.queries.jsonl", "*.qrels.tsv"))
    for found, what in ((items, "items/<split>/*.parquet"), (queries, "*.queries.jsonl"), (qrels, "*.qrels.tsv")):
        if not found:
            raise DataError(wanted, f"no {what} in {data}", do)
    if data / f"{settings.train_split}.queries.jsonl" not in queries:
        raise DataError(f"{settings.train_split}.queries.jsonl in {data}", "none", "name the split train_split=…")
    return [*items, *queries, *qrels]


# --- items ---------------------------------------------------------------------------------------


def _items(settings: PrepareSettings, draft: artifacts.Draft) -> list[dict[str, str]]:
    """Clean all items, a part for each row group of the input; returns what was quarantined."""
    units = [
        {"source": str(path), "group": group, "part": str(draft.folder / "items")}
        for path in sorted(settings.data.glob("items/*/*.parquet"))
        for group in range(_row_groups(path))
    ]
    for number, unit in enumerate(units):
        unit["part"] = f"{unit['part']}/part-{number:05d}.parquet"
    values = settings.model_dump(mode="json")
    results = datasets.spread(
        units, lambda unit: clean_items(unit, PrepareSettings(**values)), "prepared item parts"
    )
    paths = tables.parts(draft.folder / "items")
    bad = [record for r in results for record in r["quarantine"]] + _duplicates(paths)
    has_image = tables.column(paths, "has_image")
    draft.counts["items"] = len(has_image)
    draft.counts["items_without_image"] = len(has_image) - (pc.sum(has_image).as_py() or 0)
    if not len(has_image):
        raise DataError(
            "items with an id and a text", "none that can be used", "see the columns that prepare reads"
        )
    return bad


def _row_groups(path: Path) -> int:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"a Parquet file at {path}", str(error), "copy it again") from error
    if missing := {"item_id", "title"} - set(file.schema_arrow.names):
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"columns item_id and title in {path}", names, f"add {', '.join(sorted(missing))}")
    return int(file.num_row_groups)


def clean_items(unit: Mapping[str, Any], settings: PrepareSettings) -> dict[str, Any]:
    """Clean one row group of items into one part: text normalised, photo decoded; returns what was set aside."""
    source = Path(unit["source"])
    with pq.ParquetFile(source) as file:
        table = file.read_row_group(unit["group"])
    rows, bad = [], []
    for record in table.to_pylist():
        try:
            rows.append(_item(record, source.parent.name, settings))
        except DataError as error:
            bad.append(_bad("item", str(record.get("item_id"))[:MAX_ID], source.name, error))
    for row in rows:
        if row["problem"]:
            bad.append(_bad("image", row["item_id"], source.name, row["problem"]))
        row.pop("problem")
    tables.write(Path(unit["part"]), pa.Table.from_pylist(rows, _schema(table.schema)))
    return {"quarantine": bad}


def _schema(source: pa.Schema) -> pa.Schema:
    fields = pa.struct([f for f in source if f.name not in ("item_id", "title", "image")])
    names = [(n, pa.string()) for n in ("item_id", "split", "title", "text")]
    return pa.schema(
        [*names, ("fields", fields), ("image", pa.binary()), ("pixels", pa.binary()), ("has_image", pa.bool_())]
    )


def _item(record: dict[str, Any], split: str, settings: PrepareSettings) -> dict[str, Any]:
    item_id, image = record.pop("item_id"), record.pop("image", None)
    if not isinstance(item_id, str) or not item_id.strip() or len(item_id) > MAX_ID or not item_id.isprintable():
        raise DataError(f"an item_id of 1 to {MAX_ID} printable characters", repr(item_id)[:80], "mend the id")
    text = inputs.clean(" ".join(str(record.get(f) or "") for f in settings.text_fields))
    title = inputs.clean(str(record.pop("title") or "")) or text
    if not text or len(text) > MAX_TEXT:
        raise DataError(
            f"a text of 1 to {MAX_TEXT:,} characters", f"{len(text):,}", f"mend {settings.text_fields}"
        )
    pixels, problem = None, None
    if image is not None:
        try:
            pixels = inputs.pixels(image, settings.image_size).tobytes()
        except DataError as error:
            image, problem = None, error
    return {
        "item_id": item_id, "split": split, "title": title, "text": text, "fields": record,
        "image": image, "pixels": pixels, "has_image": pixels is not None, "problem": problem,
    }  # fmt: skip


def _bad(kind: str, record_id: str, source: str, error: DataError) -> dict[str, str]:
    return {"kind": kind, "id": record_id, "source": source, "reason": error.wanted, "message": str(error)}


def _duplicates(paths: list[Path]) -> list[dict[str, str]]:
    """Drop items whose id stood in an earlier row, rewriting the parts that hold them."""
    seen: set[str] = set()
    bad = []
    for path in paths:
        ids = tables.column([path], "item_id").to_pylist()
        keep = [not (i in seen or seen.add(i)) for i in ids]  # type: ignore[func-returns-value]
        if all(keep):
            continue
        bad += [
            _bad("item", i, path.name, DataError("an item_id that stands once", "a second one", "mend the id"))
            for i, kept in zip(ids, keep, strict=True)
            if not kept
        ]
        tables.write(path, pq.read_table(path).filter(pa.array(keep)))
    return bad


# --- queries and judgments -----------------------------------------------------------------------


def _judgments(settings: PrepareSettings, draft: artifacts.Draft) -> list[dict[str, str]]:
    """Write training pairs, evaluation queries and qrels; returns what was quarantined."""
    paths = tables.parts(draft.folder / "items")
    ids = tables.column(paths, "item_id").combine_chunks()
    splits = tables.column(paths, "split").combine_chunks()
    bad: list[dict[str, str]] = []
    queries, qrels = [], []
    for path in sorted(settings.data.glob("*.queries.jsonl")):
        split = path.name.removesuffix(".queries.jsonl")
        asked, judged = _read_queries(path, split, bad), _read_qrels(settings.data, split)
        judged = _known(judged, asked["query_id"], ids, split, bad)
        if split == settings.train_split:
            pool = ids.filter(pc.equal(splits, split))
            _write_pairs(asked, judged, pool, settings, draft)
        else:
            queries.append(asked)
            qrels.append(judged)
    queries_table, qrels_table = (
        pa.concat_tables([QUERIES.empty_table(), *queries]),
        pa.concat_tables([QRELS.empty_table(), *qrels]),
    )
    tables.write(draft.folder / "queries.parquet", queries_table)
    tables.write(draft.folder / "qrels.parquet", qrels_table)
    draft.counts |= {"queries": queries_table.num_rows, "judgments": qrels_table.num_rows}
    draft.details |= {
        "image_size": settings.image_size,
        "text_fields": list(settings.text_fields),
        "candidate_splits": _candidates(qrels_table, ids, splits),
        **_made_up(settings.data),
    }
    return bad


def _read_queries(path: Path, split: str, bad: list[dict[str, str]]) -> pa.Table:
    try:
        table = pyarrow.json.read_json(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"one JSON object a line in {path}", str(error), "mend the file") from error
    if missing := {"query_id", "query"} - set(table.column_names):
        raise DataError(f"keys query_id and query in {path}", ", ".join(table.column_names), f"add {missing}")
    if "segment" not in table.column_names:
        table = table.append_column("segment", pa.array(["all"] * table.num_rows))
    texts = [inputs.clean(q or "") for q in table["query"].to_pylist()]
    keep = [0 < len(t) <= MAX_TEXT for t in texts]
    wrong = DataError(f"a query of 1 to {MAX_TEXT:,} characters", "an empty or longer one", "mend the query")
    bad += [
        _bad("query", str(i), path.name, wrong)
        for i, kept in zip(table["query_id"].to_pylist(), keep, strict=True)
        if not kept
    ]
    columns = [table["query_id"].cast(pa.string()), pa.array(texts), pa.array([split] * len(texts))]
    return pa.table([*columns, table["segment"].cast(pa.string())], schema=QUERIES).filter(pa.array(keep))


def _read_qrels(data: Path, split: str) -> pa.Table:
    path = data / f"{split}.qrels.tsv"
    if not path.is_file():
        raise DataError(f"judgments of {split}.queries.jsonl", f"no {path}", "add it")
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(column_names=["query_id", "zero", "item_id", "grade"]),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={"query_id": pa.string(), "item_id": pa.string(), "grade": pa.int64()}
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"query_id 0 item_id grade, tab separated, in {path}", str(error), "mend the line"
        ) from error
    return table.select(QRELS.names)


def _known(
    judged: pa.Table, query_ids: pa.ChunkedArray, item_ids: pa.Array, split: str, bad: list[dict[str, str]]
) -> pa.Table:
    """Keep judgments of known queries and items with a grade of at least 0, each pair once."""
    checks = {
        "a known query": pc.is_in(judged["query_id"], value_set=query_ids.combine_chunks()),
        "a known item": pc.is_in(judged["item_id"], value_set=item_ids),
        "a grade of at least 0": pc.greater_equal(judged["grade"], 0),
    }
    keep = pa.array(np.ones(judged.num_rows, dtype=bool))
    for wanted, holds in checks.items():
        wrong = judged.filter(pc.and_(keep, pc.invert(holds)))
        for row in wrong.to_pylist():
            error = DataError(wanted, f"{row['query_id']} {row['item_id']} {row['grade']}", "mend the judgment")
            bad.append(_bad("judgment", f"{row['query_id']}/{row['item_id']}", f"{split}.qrels.tsv", error))
        keep = pc.and_(keep, holds)
    kept = judged.filter(keep).group_by(["query_id", "item_id"]).aggregate([("grade", "max")])
    return kept.rename_columns(QRELS.names).cast(QRELS).sort_by([(n, "ascending") for n in QRELS.names[:2]])


def _candidates(qrels: pa.Table, ids: pa.Array, splits: pa.Array) -> list[str]:
    """The splits with a judged item: what an evaluation query is ranked over."""
    judged = pc.is_in(ids, value_set=qrels["item_id"].combine_chunks())
    return sorted(pc.unique(splits.filter(judged)).to_pylist())


def _write_pairs(
    asked: pa.Table, judged: pa.Table, pool: pa.Array, settings: PrepareSettings, draft: artifacts.Draft
) -> None:
    """Write (query, positive, negative) rows, sorted by query and item, in parts of bounded size."""
    judged = judged.filter(pc.is_in(judged["item_id"], value_set=pool))
    best = settings.positive_grade if settings.positive_grade is not None else pc.max(judged["grade"]).as_py()
    if best is None:
        raise DataError("judgments of training items", "none", f"check {settings.train_split}.qrels.tsv")
    positive = np.asarray(pc.greater_equal(judged["grade"], best))
    query = pc.index_in(judged["query_id"], value_set=asked["query_id"].combine_chunks()).to_numpy()
    item = pc.index_in(judged["item_id"], value_set=pool).to_numpy()
    chosen = negatives(query, item, positive, len(pool), settings.seed)
    pairs = judged.filter(pa.array(positive)).append_column("negative_id", pool.take(pa.array(chosen)))
    pairs = pairs.append_column("query", asked["query"].take(pa.array(query[positive])))
    for number, start in enumerate(range(0, pairs.num_rows, ROWS_A_PART)):
        path = draft.folder / "pairs" / f"part-{number:05d}.parquet"
        tables.write(path, pairs.slice(start, ROWS_A_PART))
    draft.counts |= {"pairs": pairs.num_rows, "train_queries": len(pc.unique(pairs["query_id"]))}


def negatives(
    query: NDArray[np.int64], item: NDArray[np.int64], positive: NDArray[np.bool_], num_items: int, seed: int
) -> NDArray[np.int64]:
    """Choose an item for each positive judgment: one judged worse for its query, else a random one not positive.

    All three arrays have a row for each judgment, sorted by query. Returns one item a positive row.
    """
    random = np.random.default_rng(seed)
    keys = np.sort(query[positive] * num_items + item[positive])
    asked = query[positive]
    worse_query, worse_item = query[~positive], item[~positive]
    first, last = np.searchsorted(worse_query, asked), np.searchsorted(worse_query, asked, side="right")
    chosen = random.integers(num_items, size=len(asked))
    for _ in range(20):  # a random item is positive with small chance: draw again where it is
        again = _contains(keys, asked * num_items + chosen)
        if not again.any():
            break
        chosen[again] = random.integers(num_items, size=int(again.sum()))
    judged = last > first
    offset = (random.random(len(asked)) * (last - first)).astype(np.int64)
    chosen[judged] = worse_item[(first + offset)[judged]]
    return chosen


def _contains(sorted_keys: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found: NDArray[np.bool_] = sorted_keys[at] == keys
    return found


def _made_up(data: Path) -> dict[str, Any]:
    """What the demo's own catalogue states of itself; nothing for a shop's data."""
    try:
        return {"made_up": True, **artifacts.read(data, "catalogue", verify=False).details}
    except ArtifactError:
        return {"made_up": False}


def _seal_quarantine(settings: PrepareSettings, draft: artifacts.Draft, bad: list[dict[str, str]]) -> None:
    tables.write(draft.folder / "quarantine" / "part-00000.parquet", pa.Table.from_pylist(bad, QUARANTINE))
    reasons = Counter(f"{b['kind']}: wanted {b['reason']}" for b in bad)
    draft.details["quarantined"] = dict(reasons.most_common())
    draft.counts["quarantined"] = len(bad)
    total = len(bad) + draft.counts["items"] + draft.counts["pairs"] + draft.counts["judgments"]
    if bad:
        print(f"askew: quarantined {len(bad):,} of {total:,} records: {dict(reasons.most_common(3))}", flush=True)
    if len(bad) > settings.max_quarantined_fraction * total:
        wanted = f"at most {settings.max_quarantined_fraction:.0%} of records quarantined"
        raise DataError(wanted, f"{len(bad):,} of {total:,}: {dict(reasons.most_common(3))}", "mend the data")
