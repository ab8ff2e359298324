"""TREC's files: runs (`query Q0 item rank score tag`) and judgments (`query 0 item grade`), read strictly.

Any system's run can be scored beside ours. A rank is written and not read: items stand by their scores, equal
scores by item id. Knows nothing of measures or models.
"""

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from askew import artifacts
from askew.errors import DataError
from askew.metrics import Qrels, Run

RUN, QRELS = ("query_id", "q0", "item_id", "rank", "score", "tag"), ("query_id", "zero", "item_id", "grade")


def read_run(path: Path, item_ids: Sequence[str] | None = None, query_ids: Sequence[str] | None = None) -> Run:
    """Read a run; the scores that it comes with are ranks, which keep what 32 bits of a score could not.

    Raises DataError for a line of another form, a score that is no number, or an item twice for a query. With
    `item_ids`, sorted, rows count in these, and an item that is none of them is an error too. With `query_ids`,
    what was found for other queries, which may be of other items, is left out.
    """
    table = _table(path, RUN)
    scores = pd.to_numeric(table["score"], errors="coerce").astype(np.float64)
    _refuse(path, table, ~np.isfinite(scores), "scores that are finite numbers", "score")
    _refuse(path, table, table.duplicated(["query_id", "item_id"]), "each item once for a query", "item_id")
    if query_ids is not None:
        asked = table["query_id"].isin(list(query_ids))
        table, scores = table[asked], scores[asked]
    known = sorted(set(table["item_id"])) if item_ids is None else item_ids
    rows = pd.Index(known).get_indexer(pd.Index(table["item_id"]))
    _refuse(path, table, rows < 0, "items of the catalogue", "item_id")
    query, queries = pd.factorize(table["query_id"])
    order = np.lexsort((rows, -scores, query))
    query = query[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)
    found = np.full((len(queries), int(place.max(initial=-1)) + 1), -1, np.int64)
    found[query, place] = rows[order]
    ranks = np.broadcast_to(-np.arange(found.shape[1], dtype=np.float32), found.shape)
    return Run([str(q) for q in queries], list(known), found, ranks)


def write_run(path: Path, runs: Sequence[Run], tag: str) -> None:
    """Write runs of different queries as one, best item first, equal scores by item id."""
    with artifacts.written(path) as stream:
        for run in runs:
            for number, query_id in enumerate(run.query_ids):
                hits = zip(run.rows[number].tolist(), run.scores[number].tolist(), strict=True)
                ranked = sorted((-score, run.item_ids[row]) for row, score in hits if row >= 0)
                lines = (
                    f"{query_id} Q0 {item} {n} {-score:.9g} {tag}\n" for n, (score, item) in enumerate(ranked, 1)
                )
                stream.writelines(lines)


def read_qrels(path: Path) -> Qrels:
    """Read judgments. Raises DataError for a line of another form, a grade that is not whole, or a pair twice."""
    table = _table(path, QRELS)
    grades = pd.to_numeric(table["grade"], errors="coerce")
    _refuse(path, table, ~(grades % 1 == 0), "grades that are whole numbers", "grade")
    _refuse(path, table, table.duplicated(["query_id", "item_id"]), "each item judged once for a query", "item_id")
    found: dict[str, dict[str, int]] = {}
    for query_id, item_id, grade in zip(table["query_id"], table["item_id"], grades, strict=True):
        found.setdefault(query_id, {})[item_id] = int(grade)
    return found


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write judgments."""
    lines = (f"{query} 0 {item} {grade}\n" for query, judged in qrels.items() for item, grade in judged.items())
    artifacts.write_text(path, "".join(lines))


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    wanted, do = f"lines of {len(columns)} columns ({' '.join(columns)}) in {path}", "write it in TREC's form"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)  # of a line that is too long, refused below
            table = pd.read_csv(
                path, sep=r"\s+", header=None, names=list(range(len(columns) + 1)), dtype=str, index_col=False,
                keep_default_na=False, quoting=csv.QUOTE_NONE, encoding="utf-8", encoding_errors="strict",
            )  # fmt: skip
    except FileNotFoundError:
        raise DataError(f"a file {path}", "none", "check the path") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(wanted, " ".join(str(error).split()), do) from None
    if table.empty:
        raise DataError(wanted, "an empty file", do)
    last = table[len(columns) - 1]
    wrong = last.isna() | (last == "") | ~(table[len(columns)].isna() | (table[len(columns)] == ""))
    table = table.iloc[:, : len(columns)].set_axis(list(columns), axis=1)
    _refuse(path, table, wrong, f"{len(columns)} columns ({' '.join(columns)}) in each line", "query_id")
    return table


def _refuse(path: Path, table: pd.DataFrame, wrong: Any, wanted: str, column: str) -> None:
    """Raise DataError when a line is wrong, naming the first."""
    if not (count := int(np.sum(wrong))):
        return
    first = int(np.argmax(np.asarray(wrong)))
    row, line = table.iloc[first], int(table.index.to_numpy()[first]) + 1
    found = f"{column} {row[column]!r} of query {row['query_id']!r} in line {line}, and {count - 1} more"
    raise DataError(f"{wanted} in {path}", found, "mend the file")
