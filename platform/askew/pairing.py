"""Pair: queries and judgments, met in buckets by the query's id, become training pairs and evaluation sets.

A bucket holds all that is said of its queries, so that memory is bounded and buckets are independent. Knows
items by their register rows alone, and nothing of files' formats or photos.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from askew import cleaning, negatives, register, splits, tables
from askew.cleaning import ALL
from askew.config import Settings
from askew.negatives import Mined, NegativeSettings, Pairs
from askew.overview import Tally
from askew.records import Bad, bad
from askew.register import Register
from askew.splits import SplitSettings
from askew.words import clean

MAX_QUERY = 10_000
Mine = Callable[[negatives.Kind, list[str], Pairs], Mined]
STRING = pa.string()
QUERIES = pa.schema([(n, STRING) for n in ("query_id", "query", "split", "segment")])
JUDGMENTS = pa.schema([("query_id", STRING), ("item", pa.int64()), ("grade", pa.int64()), ("split", STRING)])
QRELS = pa.schema([("query_id", STRING), ("item_id", STRING), ("grade", pa.int64())])
NEGATIVE = pa.struct([("item_id", STRING), ("kind", STRING)])
PAIRS = pa.schema(
    [
        ("query_id", STRING),
        ("query", STRING),
        ("item_id", STRING),
        ("grade", pa.int64()),
        ("negatives", pa.list_(NEGATIVE)),
    ]
)


# --- into buckets --------------------------------------------------------------------------------


def scatter(rows: pa.Table, num_buckets: int, path: Path) -> None:
    """Write rows to a Parquet file with a row group a bucket, in order: the bucket of a query is its hash's."""
    bucket = register.hashes(rows["query_id"].combine_chunks()) % np.uint64(num_buckets)
    order = np.argsort(bucket, kind="stable")
    rows, edges = (
        rows.take(pa.array(order)),
        np.searchsorted(bucket[order], np.arange(num_buckets + 1, dtype=np.uint64)),
    )
    with tables.opened(path, rows.schema) as writer:
        for first, last in pairwise(edges):
            writer.write_table(rows.slice(first, last - first).combine_chunks(), max(1, last - first))


def gathered(paths: Sequence[Path], bucket: int, schema: pa.Schema) -> pa.Table:
    """Read a bucket's rows from all files that were scattered."""
    found = [schema.empty_table()]
    for path in paths:
        with pq.ParquetFile(path) as file:
            found.append(file.read_row_group(bucket))
    return pa.concat_tables(found)


def clean_queries(rows: pa.Table, file: str) -> tuple[pa.Table, list[Bad]]:
    """Clean a chunk of queries to QUERIES; set aside are those without readable text, or with too much."""
    texts = [clean(text) for text in cleaning.texts(rows, "query")]
    keep, set_aside = [], []
    for query_id, text in zip(rows["query_id"].to_pylist(), texts, strict=True):
        problem = cleaning.id_problem(query_id) or _problem(text)
        keep.append(not problem)
        if problem:
            set_aside.append(bad("query", query_id, file, *problem))
    columns = {"query_id": rows["query_id"], "query": pa.array(texts, STRING)}
    columns |= {name: cleaning.words(rows, name, file) for name in ("split", "segment")}
    return pa.table(columns, schema=QUERIES).filter(pa.array(keep, pa.bool_())), set_aside


def _problem(text: str) -> tuple[str, str] | None:
    if not text:
        return "no_text", "a query with a readable character is wanted"
    if len(text) > MAX_QUERY:
        return "query_too_long", f"at most {MAX_QUERY:,} characters are wanted; this one has {len(text):,}"
    return None


def clean_judgments(rows: pa.Table, items: register.Register, file: str) -> tuple[pa.Table, list[Bad]]:
    """Clean a chunk of graded judgments to JUDGMENTS; set aside are negative grades and unknown items."""
    item = items.find(register.hashes(rows["item_id"].combine_chunks()))
    grade = rows["grade"].to_numpy()
    reason = np.select([grade < 0, item < 0], ["negative_grade", "unknown_item"], "")
    says = {
        "negative_grade": "a grade of at least 0 is wanted",
        "unknown_item": "the item is not in the catalogue",
    }
    wrong = pc.is_in(pa.array(reason), value_set=pa.array(list(says)))
    named = zip(
        *(rows[n].filter(wrong).to_pylist() for n in ("query_id", "item_id")), reason[reason != ""], strict=True
    )
    set_aside = [bad("judgment", f"{q}/{i}", file, r, says[r]) for q, i, r in named]
    split = cleaning.words(rows, "split", file)
    table = pa.table([rows["query_id"], pa.array(item), rows["grade"], split], schema=JUDGMENTS)
    return table.filter(pc.invert(wrong)), set_aside


# --- a bucket ------------------------------------------------------------------------------------


class PairSettings(Settings):
    """What is paired with what."""

    train_split: str = "train"
    positive_grade: int = 1  # the lowest grade that is a positive of the training
    seed: int = 0
    splits: SplitSettings = SplitSettings()
    negatives: NegativeSettings = NegativeSettings()


@dataclass
class Catalogue:
    """What a bucket must know of items: their register, ids, splits' names, and which of these are trained on."""

    register: Register
    ids: pa.ChunkedArray
    splits: Sequence[str]
    trained: Sequence[str]

    def __post_init__(self) -> None:
        """Number the items that are trained on: by number, and by kind."""
        self.rows = self.register.rows
        self._trained = np.isin(np.array(self.splits), list(self.trained))
        self.pool = np.flatnonzero(self._trained[self.rows["split"]])
        self.by_kind = self.pool[np.argsort(self.rows["kind"][self.pool], kind="stable")]

    def split_of(self, items: NDArray[np.int64]) -> NDArray[np.object_]:
        """Name the splits of items."""
        names: NDArray[np.object_] = np.array(self.splits, dtype=object)[self.rows["split"][items]]
        return names

    def is_trained(self, items: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which items are trained on; −1 is not."""
        trained: NDArray[np.bool_] = self._trained[self.rows["split"][items]] & (items >= 0)
        return trained


@dataclass
class Paired:
    """What a bucket came to."""

    pairs: pa.Table  # PAIRS
    queries: pa.Table  # QUERIES, of evaluation
    qrels: pa.Table  # QRELS
    set_aside: list[Bad]
    counts: Counter[str]
    ledger: dict[str, Counter[str]]
    candidates: dict[str, list[str]]  # an evaluation split -> the splits of its judged items; none: no query left
    tally: Tally


def pair(
    queries: pa.Table,
    judgments: pa.Table,
    items: Catalogue,
    settings: PairSettings,
    bucket: int = 0,
    mine: Mine | None = None,
) -> Paired:
    """Pair what a bucket holds: QUERIES and JUDGMENTS with each other, and positives with negatives.

    `mine(kind, texts, positives)` searches for mined negatives. The same bucket gives the same rows, in an
    order of their own.
    """
    asked, set_aside = _distinct(queries.to_pandas())
    judged = judgments.to_pandas()
    four = settings.splits.make == "four"
    if four:
        asked["split"], judged["split"] = None, None
    asked, judged, lost = _joined(asked.drop_duplicates("query_id") if four else asked, judged, items.ids)
    judged["item_split"] = items.split_of(judged["item"].to_numpy())
    aside = judged["item_split"] == splits.ASIDE
    counts = Counter(judgments_aside=int(aside.sum()))
    judged = judged[~aside]
    trained, evaluated = (_four if four else _given)(asked, judged, settings)
    elsewhere = ~trained["item_split"].isin(list(items.trained))
    counts["judgments_across_splits"] = int(elsewhere.sum())
    trained = trained[~elsewhere]
    generator = np.random.default_rng([settings.seed, bucket])
    of_training = asked if four else asked[asked["split"].isin([settings.train_split, ALL])]
    pairs, ledger, few = _pairs(trained, of_training, items, settings, generator, mine)
    eval_queries, qrels, none = _evaluation(evaluated, asked.drop(columns="split") if four else asked, items)
    without = [*few, *none]
    if four:  # a split that is made here and has no positive of a query is no fault of the query's
        used = {*pairs["query_id"].to_pylist(), *evaluated["query_id"][evaluated["grade"] > 0]}
        without = list({one.id: one for one in without if one.id not in used}.values())
    left = {*trained["query_id"], *evaluated["query_id"]}
    counts["queries_unjudged"] = len({*asked["query_id"]} - left)
    candidates: dict[str, list[str]] = {str(s): [] for s in _evaluated_splits(asked, settings)}
    answered = evaluated[evaluated["split"].isin(eval_queries["split"].to_pylist())]
    candidates |= {str(s): sorted(set(g)) for s, g in answered.groupby("split")["item_split"]}
    counts.update(judgments=len(judged), pairs=pairs.num_rows, queries=eval_queries.num_rows)
    counts["train_queries"] = len(pc.unique(pairs["query_id"]))
    tally = _tally(pairs, eval_queries, judged, ledger, settings)
    return Paired(pairs, eval_queries, qrels, [*set_aside, *lost, *without], counts, ledger, candidates, tally)


def _distinct(asked: pd.DataFrame) -> tuple[pd.DataFrame, list[Bad]]:
    """Keep the first of each query id and split; set aside another of other text."""
    keys = ["query_id", "split"]
    first = asked.drop_duplicates(keys)
    both = asked.merge(first[[*keys, "query"]], on=keys, how="left", suffixes=("", "_first"))
    other = both[both["query"] != both["query_first"]]
    message = "an earlier query of other text has the id of"
    return first, [
        bad("query", i, "queries", "conflicting_id", f"{message} {text[:80]!r}")
        for i, text in _zip(other, "query_id", "query")
    ]


def _joined(
    asked: pd.DataFrame, judged: pd.DataFrame, ids: pa.ChunkedArray
) -> tuple[pd.DataFrame, pd.DataFrame, list[Bad]]:
    """Give each query the splits it is in, and join the judgments to them, the highest of several counting.

    A query that names no split is in those of its judgments, or in ALL; a judgment that names none counts in
    all of its query's. Set aside are judgments of unknown queries.
    """
    nameless = asked["split"].isna()
    judged_in = judged[["query_id", "split"]].fillna({"split": ALL}).drop_duplicates()
    spread = (
        asked[nameless].drop(columns="split").merge(judged_in, on="query_id", how="left").fillna({"split": ALL})
    )
    asked = pd.concat([asked[~nameless], spread], ignore_index=True)[QUERIES.names]
    free = judged["split"].isna()
    ways = [(judged[~free], ["query_id", "split"]), (judged[free].drop(columns="split"), ["query_id"])]
    found = [part.merge(asked[["query_id", "split", "query"]], on=keys, how="left") for part, keys in ways]
    both = pd.concat([f for f in found if len(f)] or found[:1], ignore_index=True)
    lost = both[both["query"].isna()]
    message = "the query is not among the queries of this split"
    items = ids.take(pa.array(lost["item"].to_numpy(np.int64))).to_pylist()
    set_aside = [
        bad("judgment", f"{query}/{item}", "judgments", "unknown_query", message)
        for query, item in zip(lost["query_id"], items, strict=True)
    ]
    keys = ["query_id", "split", "item"]
    best = both[both["query"].notna()].groupby(keys)["grade"].max().reset_index()
    best["item"], best["grade"] = best["item"].astype(np.int64), best["grade"].astype(np.int64)
    return asked, best, set_aside


def _given(asked: pd.DataFrame, judged: pd.DataFrame, settings: PairSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judgments of training and of evaluation by the splits that the data names."""
    trained = judged["split"].isin([settings.train_split, ALL])
    keys = ["query_id", "item", "item_split"]
    once = judged[trained].groupby(keys)["grade"].max().reset_index()
    return once, judged[~trained]


FOUR = ("in_domain", "new_query", "new_item", "both_new")


def _evaluated_splits(asked: pd.DataFrame, settings: PairSettings) -> Sequence[str]:
    """Name the evaluation splits that these queries are meant for."""
    if settings.splits.make == "four":
        return FOUR
    return sorted({*asked["split"]} - {settings.train_split, ALL})


def _four(asked: pd.DataFrame, judged: pd.DataFrame, settings: PairSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judgments of training, and of evaluation in Marqo-GS's FOUR ways.

    Queries are new by a hash of their words, items by their split `new`.
    """
    words = register.hashes(asked["query"].str.casefold().tolist())
    share, seed = settings.splits, settings.seed
    new = dict(zip(asked["query_id"], splits.chosen(words, share.new_queries, seed, 1), strict=True))
    shown = dict(zip(asked["query_id"], splits.chosen(words, share.in_domain, seed, 2), strict=True))
    new_query = judged["query_id"].map(new).to_numpy(dtype=np.bool_)
    new_item = (judged["item_split"] == splits.NEW).to_numpy()
    trained = set(judged["query_id"][~new_query & ~new_item & (judged["grade"] >= settings.positive_grade)])
    both = judged["query_id"].map(shown).to_numpy(dtype=np.bool_) & judged["query_id"].isin(trained).to_numpy()
    names = np.select(
        [new_query & new_item, new_query, new_item, both], ["both_new", "new_query", "new_item", "in_domain"], ""
    )
    evaluated = judged.assign(split=names)[names != ""]
    return judged[~new_query & ~new_item], evaluated


def _pairs(
    trained: pd.DataFrame, asked: pd.DataFrame, items: Catalogue, settings: PairSettings,
    generator: np.random.Generator, mine: Mine | None,
) -> tuple[pa.Table, dict[str, Counter[str]], list[Bad]]:  # fmt: skip
    """Make PAIRS of the judgments of training, each positive with its negatives."""
    query, unique = pd.factorize(trained["query_id"], sort=True)
    is_positive = (trained["grade"] >= settings.positive_grade).to_numpy()
    item = trained["item"].to_numpy()
    order = np.lexsort((item, query))
    order = order[is_positive[order]]
    pairs = Pairs(query[order], item[order], query[is_positive], item[is_positive])
    texts = asked.drop_duplicates("query_id").set_index("query_id")["query"].reindex(unique)
    chosen, kinds, ledger = _chosen(
        pairs, query[~is_positive], item[~is_positive], texts.tolist(), items, settings, generator, mine
    )
    table = pa.table(
        [
            pa.array(unique.take(pairs.query), STRING), pa.array(texts.to_numpy()[pairs.query], STRING),
            items.ids.take(pa.array(pairs.item)), pa.array(trained["grade"].to_numpy()[order]),
            _listed(chosen, kinds, items.ids),
        ],
        schema=PAIRS,
    )  # fmt: skip
    without = unique[~np.isin(np.arange(len(unique)), pairs.query)]
    message = f"no item of the training is graded {settings.positive_grade} or higher for this query"
    return table, ledger, [bad("query", i, settings.train_split, "no_positive", message) for i in without]


def _chosen(
    pairs: Pairs, worse_query: NDArray[np.int64], worse_item: NDArray[np.int64], texts: list[str],
    items: Catalogue, settings: PairSettings, generator: np.random.Generator, mine: Mine | None,
) -> tuple[NDArray[np.int64], list[negatives.Kind], dict[str, Counter[str]]]:  # fmt: skip
    """Propose negatives of every kind that is wanted, and choose."""
    wanted = settings.negatives.per_pair
    by_query = np.argsort(worse_query, kind="stable")
    draw: dict[negatives.Kind, Callable[[int], NDArray[np.int64]]] = {
        "judged": lambda n: negatives.judged(pairs, worse_query[by_query], worse_item[by_query], n, generator),
        "random": lambda n: negatives.random(pairs, items.pool, n, generator),
        "same_kind": lambda n: negatives.same_kind(pairs, items.by_kind, items.rows, n, generator),
    }
    proposals = {}
    for kind in negatives.KINDS:
        if not (count := wanted.get(kind, 0)):
            continue
        if kind in draw:
            found = draw[kind](count)
            proposals[kind] = found, np.zeros(found.shape, dtype=np.bool_)
        elif mine is not None:
            proposals[kind] = negatives.mined(mine(kind, texts, pairs), settings.negatives, kind)
    return negatives.choose(pairs, proposals, items.rows, settings.negatives)


def _listed(chosen: NDArray[np.int64], kinds: Sequence[str], ids: pa.ChunkedArray) -> pa.Array:
    """Make lists of NEGATIVE of (P, m) items, those of −1 left out."""
    there = chosen != negatives.NONE
    names = np.broadcast_to(np.array(kinds, dtype=object), chosen.shape)[there]
    found = ids.take(pa.array(chosen[there]))
    values = pa.StructArray.from_arrays(
        [pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], STRING), pa.array(names, STRING)],
        fields=list(NEGATIVE),
    )
    offsets = np.r_[0, np.cumsum(there.sum(axis=1))].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(NEGATIVE))


def _evaluation(
    evaluated: pd.DataFrame, asked: pd.DataFrame, items: Catalogue
) -> tuple[pa.Table, pa.Table, list[Bad]]:
    """Make QUERIES and QRELS of the judgments of evaluation; a query in several splits gets an id in each.

    `asked` has no column `split` where a query has one text in all of them.
    """
    best = evaluated.groupby(["query_id", "split"], as_index=False)["grade"].max()
    none = best[best["grade"] <= 0]
    message = "no item of its split is graded higher than 0 for this query"
    set_aside = [bad("query", i, split, "no_positive", message) for i, split in _zip(none, "query_id", "split")]
    kept = best[best["grade"] > 0][["query_id", "split"]]
    keys = [name for name in kept.columns if name in asked.columns]
    table = kept.merge(asked.drop_duplicates(keys)[[*keys, "query", "segment"]], on=keys)
    table["segment"] = table["segment"].fillna(table["split"])
    repeated = table["query_id"].duplicated(keep=False)
    table["new_id"] = np.where(repeated, table["query_id"] + "@" + table["split"], table["query_id"])
    qrels = evaluated.merge(table[["query_id", "split", "new_id"]], on=["query_id", "split"])
    item_ids = items.ids.take(pa.array(qrels["item"].to_numpy())).to_pylist()
    qrels = qrels.assign(query_id=qrels["new_id"], item_id=item_ids).sort_values(["query_id", "item_id"])
    table = table.assign(query_id=table["new_id"]).sort_values("query_id")
    return _arrow(table, QUERIES), _arrow(qrels, QRELS), set_aside


def _arrow(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)


def _zip(frame: pd.DataFrame, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(frame[name] for name in names), strict=True)


def _tally(
    pairs: pa.Table,
    queries: pa.Table,
    judged: pd.DataFrame,
    ledger: Mapping[str, Counter[str]],
    settings: PairSettings,
) -> Tally:
    """Count what the overview shows of queries and pairs."""
    tally = Tally()
    texts = [*pc.unique(pairs["query"]).to_pylist(), *queries["query"].to_pylist()]
    tally.add("query_words", np.array([len(text.split()) for text in texts], dtype=np.int64))
    tally.add("items_per_query", judged.groupby(["query_id", "split"]).size().to_numpy())
    tally.add("positives_per_query", np.unique(pairs["query_id"].to_numpy(), return_counts=True)[1])
    tally.count("grades", Counter(str(g) for g in judged["grade"]))
    tally.count("splits", Counter(f"queries of {s}" for s in queries["split"].to_pylist()))
    tally.count("splits", {f"pairs of {settings.train_split}": pairs.num_rows})
    for kind, counts in ledger.items():
        told = {name: n for name, n in counts.items() if n or not name.startswith("masked")}
        tally.count("negatives", {f"{kind}, {name.replace('_', ' ')}": n for name, n in told.items()})
    return tally
