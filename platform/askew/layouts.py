"""Layouts: a triplets artifact's training split as arrays that any step reads at random, made once by Ray Data.

Tokens, pixels, pairs and negatives are memory-mapped, so no worker holds the catalogue, and no epoch decodes
anything. Knows nothing of towers or of training.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from askew import artifacts, datasets, register, tables
from askew.errors import ArtifactError, ConfigError
from askew.inputs import PADDING, Tokens
from askew.recipes import LayoutSettings

ROWS_AT_ONCE = 1024


def lay_out(triplets: Path, settings: LayoutSettings, tokens: Tokens, root: Path) -> Path:
    """Lay triplets out as arrays in an artifact "layout"; done once, then found.

    Raises ArtifactError when there are no items or no pairs of the split, ConfigError for an unknown text field.
    """
    manifest = artifacts.read(triplets, "triplets", verify=False)
    content = settings.model_dump(mode="json") | {"tokens": tokens.digest}
    content["validation"].pop("every")
    inputs = {"triplets": manifest.key}
    place = artifacts.place(root, "layout", artifacts.key("layout", content, inputs))
    try:
        artifacts.read(place, "layout")
    except ArtifactError as error:
        if place.exists():
            print(f"askew: warning: {error}; it is laid out anew", flush=True)
        artifacts.read(triplets, "triplets")
        with artifacts.draft(root, "layout", content, inputs) as draft:
            work = _Work(triplets, settings, tokens, manifest.details["image_size"], draft.folder)
            work.items()
            work.pairs()
            if settings.validation.queries:
                work.validation(manifest.details["candidates"])
            draft.counts |= work.counts
    return place


class _Work:
    """One layout in the making."""

    def __init__(self, triplets: Path, settings: LayoutSettings, tokens: Tokens, size: int, out: Path) -> None:
        self.triplets, self.settings, self.tokens, self.size, self.out = triplets, settings, tokens, size, out
        self.counts: dict[str, int] = {}
        (out / artifacts.WORK).mkdir()

    def items(self) -> None:
        """Write titles, pixels and the ids' hashes, a task for each part."""
        triplets, settings, out, size, text = self.triplets, self.settings, self.out, self.size, self.tokens.text
        starts = _starts(triplets, settings.split)
        n = starts[-1][1] if starts else 0
        if not n:
            found = f"none of split {settings.split!r} in {triplets}"
            raise ArtifactError("items to train on", found, "prepare a catalogue that has them, or name its split")
        fields = {f.name for f in pq.read_schema(starts[0][0]).field("fields").type}
        if unknown := set(settings.texts) - fields - {tables.TEXT}:
            names = ", ".join(sorted({tables.TEXT, *fields}))
            raise ConfigError(f"texts among {names}", ", ".join(sorted(unknown)), "mend texts")
        shapes = {
            "titles": ((len(settings.texts), n, settings.title_length), np.int32),
            "pixels": ((n, size, size, 3), np.uint8),
            "has_image": ((n,), np.bool_),
            f"{artifacts.WORK}/hashes": ((n,), np.uint64),
        }
        for name, (shape, kind) in shapes.items():
            open_memmap(out / f"{name}.npy", "w+", kind, shape).flush()
        begins = [0, *(end for _, end in starts)]
        units: list[datasets.Unit] = [
            {"path": str(path), "start": start} for (path, _), start in zip(starts, begins, strict=False)
        ]

        def write(unit: datasets.Unit) -> datasets.Unit:
            arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r+") for name in shapes}
            tokens, at = Tokens.parse(text), unit["start"]
            for batch in _chunks(Path(unit["path"]), settings.split, settings.texts):
                rows = slice(at, at := at + batch.num_rows)
                for place, name in enumerate(settings.texts):
                    arrays["titles"][place, rows] = _padded(tokens, batch[name].to_pylist(), settings.title_length)
                arrays["pixels"][rows] = tables.pixels(batch["pixels"], size)
                arrays["has_image"][rows] = batch["has_image"].to_numpy(zero_copy_only=False)
                arrays[f"{artifacts.WORK}/hashes"][rows] = register.hashes(batch["item_id"])
            return {}

        datasets.spread(units, write, "laid out parts of items")
        hashes = np.load(out / artifacts.WORK / "hashes.npy")
        order = np.argsort(hashes, kind="stable")
        np.save(out / artifacts.WORK / "order.npy", order)
        np.save(out / artifacts.WORK / "ordered.npy", hashes[order])
        self.counts["items"] = n

    def pairs(self) -> None:
        """Write queries, positives, grades and negatives: a task for each part, which holds its queries whole."""
        out, length, text = self.out, self.settings.query_length, self.tokens.text
        parts = tables.parts(self.triplets / "pairs")

        repeats = self.settings.repeats

        def write(unit: datasets.Unit) -> datasets.Unit:
            arrays = _pairs(Path(unit["path"]), out / artifacts.WORK, Tokens.parse(text), length, list(repeats))
            for name, array in arrays.items():
                np.save(out / artifacts.WORK / f"{name}-{unit['number']:05d}.npy", array)
            return {"queries": len(arrays["queries"]), "pairs": len(arrays["positives"])}

        units: list[datasets.Unit] = [{"path": str(path), "number": n} for n, path in enumerate(parts)]
        results = datasets.spread(units, write, "laid out parts of pairs")
        self.counts |= {name: sum(result[name] for result in results) for name in ("queries", "pairs")}
        if not self.counts["pairs"]:
            raise ArtifactError(
                f"training pairs in {self.triplets}", "none", "prepare judgments that have positives"
            )
        for name in ("queries", "positives", "grades", "negatives", "num_positives", "num_negatives", "pattern"):
            self._joined(name, len(results))
        for name in ("num_positives", "num_negatives"):
            counts = np.load(out / f"{name}.npy")
            np.save(out / f"{name.replace('num', 'first')}.npy", np.r_[0, np.cumsum(counts)])
            (out / f"{name}.npy").unlink()
        grades = np.load(out / "grades.npy")
        np.save(out / "grades.npy", grades / grades.max())
        self._asked()

    def _joined(self, name: str, num_parts: int) -> None:
        """Concatenate the parts' arrays of one name, each held alone."""
        parts = [self.out / artifacts.WORK / f"{name}-{number:05d}.npy" for number in range(num_parts)]
        first = np.load(parts[0], mmap_mode="r")
        total = sum(len(np.load(part, mmap_mode="r")) for part in parts)
        joined = open_memmap(self.out / f"{name}.npy", "w+", first.dtype, (total, *first.shape[1:]))
        at = 0
        for part in parts:
            rows = np.load(part, mmap_mode="r")
            joined[at : at + len(rows)] = rows
            at += len(rows)
        joined.flush()

    def _asked(self) -> None:
        """Write which queries an epoch asks, how often it draws each item, and the pairs of each item.

        A query that is repeated is so in all of them.
        """
        pattern = np.load(self.out / "pattern.npy")
        (self.out / "pattern.npy").unlink()
        names = list(self.settings.repeats)
        if unused := [name for number, name in enumerate(names) if not (pattern == number).any()]:
            found = f"{', '.join(unused)}, which fits none of {len(pattern):,} queries"
            raise ConfigError("patterns of query ids under repeats", found, "mend or remove it")
        times = np.array([*self.settings.repeats.values(), 1])[pattern]
        if not times.any():
            raise ConfigError("a query that is asked", "repeats that leave out all", "ask some of them once")
        np.save(self.out / "asked.npy", np.repeat(np.arange(len(times)), times))
        positives = np.load(self.out / "positives.npy", mmap_mode="r")
        count, num_items = np.diff(np.load(self.out / "first_positives.npy")), self.counts["items"]
        query = np.repeat(np.arange(len(count)), count)
        chance = np.bincount(positives, times[query] / count[query], num_items) / times.sum()
        np.save(self.out / "log_q.npy", np.log(np.maximum(chance, chance[chance > 0].min())).astype(np.float32))
        pairs = np.concatenate([np.flatnonzero(times[query] > turn) for turn in range(times.max())])
        pairs = pairs[np.argsort(positives[pairs], kind="stable")]
        np.save(self.out / "pairs.npy", pairs)
        counts = np.bincount(positives[pairs], minlength=num_items)
        np.save(self.out / "first_pairs.npy", np.r_[0, np.cumsum(counts)])

    def validation(self, candidates: Mapping[str, Sequence[str]]) -> None:
        """Write some queries of an evaluation split, their judged items, and others to be told from them."""
        how = self.settings.validation
        split = how.split or min(candidates, default="")
        if split not in candidates:
            if how.split:
                names = ", ".join(sorted(candidates)) or "none"
                raise ConfigError(f"an evaluation split ({names})", split, "mend validation.split")
            return
        queries = pq.read_table(self.triplets / "queries", filters=ds.field("split") == split)
        queries = queries.take(np.sort(_some(queries["query_id"], how.queries)))
        qrels = pq.read_table(
            self.triplets / "qrels", filters=pc.is_in(ds.field("query_id"), queries["query_id"].combine_chunks())
        )
        ids, rows = self._validation_items(list(candidates[split]), pc.unique(qrels["item_id"]), how.items)
        item = pc.index_in(qrels["item_id"], value_set=ids)
        query = pc.index_in(qrels["query_id"], value_set=queries["query_id"].combine_chunks())
        there = pc.is_valid(item)
        judged = [column.filter(there).to_numpy().astype(np.int64) for column in (query, item, qrels["grade"])]
        np.save(self.out / "valid_qrels.npy", np.stack(judged, axis=1))
        words = _padded(self.tokens, queries["query"].to_pylist(), self.settings.query_length)
        np.save(self.out / "valid_queries.npy", words)
        for name, array in rows.items():
            np.save(self.out / f"valid_{name}.npy", array)
        self.counts |= {"valid_queries": len(words), "valid_items": len(ids)}

    def _validation_items(
        self, splits: list[str], judged: pa.Array, num: int
    ) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
        """Choose judged items first, then others; returns ids, and arrays as of the training's items."""
        wanted = ds.field("split").isin(splits)
        known = ds.dataset(self.triplets / "items", format="parquet").to_table(columns=["item_id"], filter=wanted)
        ids = known["item_id"].combine_chunks()
        is_judged = pc.is_in(ids, value_set=judged).to_numpy(zero_copy_only=False)
        rank = register.hashes(ids) >> np.uint64(1)
        order = np.argsort(np.where(is_judged, np.uint64(0), np.uint64(1 << 63)) + rank, kind="stable")
        chosen = ids.take(pa.array(np.sort(order[:num])))
        found: list[pa.Table] = []
        for path in tables.parts(self.triplets / "items"):
            parts = (
                b.filter(pc.is_in(b["item_id"], value_set=chosen))
                for b in _chunks(path, None, self.settings.texts)
            )
            found += [pa.Table.from_batches([part]) for part in parts if len(part)]
        rows = pa.concat_tables(found).combine_chunks()
        titles = [
            _padded(self.tokens, rows[n].to_pylist(), self.settings.title_length) for n in self.settings.texts
        ]
        arrays = {
            "titles": np.stack(titles),
            "pixels": tables.pixels(rows["pixels"].combine_chunks(), self.size),
            "has_image": rows["has_image"].to_numpy(),
        }
        return rows["item_id"].combine_chunks(), arrays


def _starts(triplets: Path, split: str) -> list[tuple[Path, int]]:
    """Parts with items of the split, each with how many there are up to its end."""
    found, total = [], 0
    for path in tables.parts(triplets / "items"):
        count = pc.sum(pc.equal(pq.read_table(path, columns=["split"])["split"], split)).as_py() or 0
        if count:
            found.append((path, total := total + count))
    return found


def _chunks(path: Path, split: str | None, texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Stream a part's items, of one split or of all, each text a column."""
    fields = dict.fromkeys(name for text in texts for name in tables.columns_of(text))
    columns = ["item_id", "split", "pixels", "has_image", *fields]
    for batch in tables.batches([path], columns, ROWS_AT_ONCE):
        rows = batch if split is None else batch.filter(pc.equal(batch["split"], split))
        for name in texts:
            if name != tables.TEXT:
                rows = rows.append_column(name, tables.told(rows, name))
        yield rows


def _padded(tokens: Tokens, texts: Sequence[str], length: int) -> NDArray[np.int32]:
    out = np.full((len(texts), length), PADDING, dtype=np.int32)
    ids = tokens.ids(texts, length)
    out[:, : ids.shape[1]] = ids
    return out


def _pairs(
    path: Path, work: Path, tokens: Tokens, length: int, patterns: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Turn a part of pairs into arrays; its queries stay together.

    "pattern" is the number of the first pattern that a query's id fits, or how many patterns there are.
    """
    pairs = pq.read_table(path).sort_by([("query_id", "ascending"), ("item_id", "ascending")]).combine_chunks()
    query_ids = pairs["query_id"].combine_chunks()
    edges = np.asarray(pc.not_equal(query_ids[1:], query_ids[:-1])) if len(pairs) > 1 else np.empty(0, bool)
    firsts = np.flatnonzero(np.r_[np.ones(min(len(pairs), 1), bool), edges])
    texts = pairs["query"].combine_chunks().take(pa.array(firsts)).to_pylist()
    ids = query_ids.take(pa.array(firsts)).to_pylist() if patterns else [""] * len(firsts)
    fits = [next((n for n, one in enumerate(patterns) if fnmatchcase(q, one)), len(patterns)) for q in ids]
    lists = pairs["negatives"].combine_chunks()
    flat = lists.flatten().field("item_id") if len(pairs) else pa.array([], pa.string())
    return {
        "queries": _padded(tokens, texts, length),
        "pattern": np.array(fits, dtype=np.int64),
        "num_positives": np.diff(np.r_[firsts, len(pairs)]).astype(np.int64),
        "positives": _numbers(pairs["item_id"].combine_chunks(), work),
        "grades": pairs["grade"].to_numpy().astype(np.float32),
        "num_negatives": pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64),
        "negatives": _numbers(flat, work),
    }


def _numbers(item_ids: pa.Array, work: Path) -> NDArray[np.int64]:
    """Number items by the hashes of their ids."""
    ordered, order = (np.load(work / f"{name}.npy", mmap_mode="r") for name in ("ordered", "order"))
    at = np.minimum(np.searchsorted(ordered, register.hashes(item_ids)), len(ordered) - 1)
    numbers: NDArray[np.int64] = order[at].astype(np.int64)
    return numbers


def _some(ids: pa.ChunkedArray, count: int) -> NDArray[np.int64]:
    """Choose so many of n ids by their hashes, which do not depend on their order."""
    chosen: NDArray[np.int64] = np.argsort(register.hashes(ids.combine_chunks()), kind="stable")[:count]
    return chosen


def query_ids(triplets: Path, numbers: Sequence[int]) -> list[str]:
    """Find the ids of queries by their numbers in a layout."""
    found: dict[int, str] = {}
    at = 0
    for path in tables.parts(triplets / "pairs"):
        ids = pc.unique(pq.read_table(path, columns=["query_id"])["query_id"]).sort()
        found |= {n: str(ids[n - at]) for n in numbers if at <= n < at + len(ids)}
        at += len(ids)
    return [found[n] for n in numbers]
