"""Evaluate: a registered model's rankings of the judged queries, beside all that it must beat.

Ranks are exact: every candidate item is scored against every query. The report says what the photo adds and
whether it is the photo that does (another item's in its place), what the model adds to words alone, what the index
loses, and for which queries. Knows nothing of how the model was trained or is served.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from askew import artifacts, metrics, reports, slices, tables, trec
from askew.errors import ArtifactError, ConfigError, DataError
from askew.judging import MAIN, MODELS_OWN, SEARCHED, Group, JudgeSettings
from askew.metrics import Qrels, Scores
from askew.modality import Shares
from askew.models import Model
from askew.registry import Registry, Version

FILE, QUERIES, RUNS, QRELS = "report.json", "queries.parquet", "runs", "qrels.txt"
EVALUATION_KEY = "askew.evaluation_key"
SOME = 100
RECALLS = ("recall@10", "recall@100")


class EvaluateSettings(JudgeSettings):
    """Settings of the evaluate stage (`jobs/evaluate.yaml`)."""

    model: str
    version: str = "champion"
    root: Path
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    examples: int = Field(default=8, ge=0)  # queries that the photo saves, and as many that it hurts
    resamples: int = Field(default=10_000, ge=100)
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """What of the settings determines the numbers, beyond the artifacts that they name."""
        names = {"k", "min_relevant", "text", "modality", "zero_shot", "examples", "resamples", "seed"}
        return self.model_dump(mode="json", include=names)


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a model version on the triplets' judged queries, and log the numbers and the report on it.

    Raises RegistryError, ArtifactError, or DataError when there is nothing to judge.
    """
    _check_text(settings)
    registry = Registry(settings.tracking_uri)
    version = registry.resolve(settings.model, settings.version)
    model = registry.download(version, settings.root)
    inputs = _inputs(settings, model)
    key = artifacts.key("evaluation", settings.content(), inputs)
    folder = artifacts.place(settings.root, "evaluation", key)
    try:
        artifacts.read(folder, "evaluation")
        skipped = True
    except ArtifactError:
        skipped = False
        with artifacts.draft(settings.root, "evaluation", settings.content(), inputs) as draft:
            found = Evaluation(settings, Model.load(model, settings.device))
            found.write(draft.folder, f"{version.name} version {version.version}")
            draft.counts |= {"queries": found.numbers["queries"], "items": found.numbers["items"]}
    numbers = json.loads((folder / FILE).read_bytes())
    if version.tags.get(EVALUATION_KEY) != key:
        _log(registry, version, folder, key, numbers)
    return {
        "artifact": str(folder), "key": key, "rows": numbers["queries"], "skipped": skipped,
        "model": version.name, "version": version.version, **numbers,
    }  # fmt: skip


class Evaluation:
    """All rankings of the judged queries, and what is said of them.

    Raises DataError when there are no queries, items or judgments.
    """

    def __init__(self, settings: EvaluateSettings, model: Model) -> None:
        self.settings, self.own = settings, MODELS_OWN[model.header]
        manifest = artifacts.read(settings.triplets, "triplets", verify=False)
        queries, self.qrels = pq.read_table(settings.triplets / "queries"), _qrels(settings.triplets / "qrels")
        parts = _groups(queries, manifest.details)
        if not parts:
            found = f"{queries.num_rows} queries"
            do = "add an evaluation split"
            raise DataError(f"queries and items to evaluate in {settings.triplets}", found, do)
        self.least = _least(self.qrels, settings.min_relevant)
        self.groups = [Group(settings, model, asked, splits, self.qrels) for asked, splits in parts]
        names = self.groups[0].scores
        self.scores = {name: Scores.joined([group.scores[name] for group in self.groups]) for name in names}
        if not self.scores[self.own].query_ids:
            found = f"none among {queries.num_rows:,} queries that has an item of grade {self.least} to find"
            raise DataError("a query with a relevant item", found, "lower min_relevant, or judge more")
        print(f"askew: {MAIN} " + ", ".join(f"{n} {s.means()[MAIN]:.4f}" for n, s in self.scores.items()))
        asked = pa.array(self.scores[self.own].query_ids)
        every = queries["query_id"].combine_chunks()
        self.queries = queries.take(pc.index_in(asked, value_set=every))
        self.left_out: list[str] = every.filter(pc.invert(pc.is_in(every, value_set=asked))).to_pylist()
        kind = str(manifest.settings.get("kind_field", ""))
        self.labels = slices.labels(settings.triplets, self.queries, self.qrels, self.least, settings.text, kind)
        self.numbers = self._numbers(manifest.details)

    def _numbers(self, details: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "queries": len(self.queries), "left_out": len(self.left_out), "left_out_ids": self.left_out[:SOME],
            "items": sum(group.num_items for group in self.groups),
            "main": self.own, "relevant_from": self.least, "text": self.settings.text,
            **self._measured(slice(None)),
            "comparisons": self._comparisons(),
            "slices": self._slices(),
            **self._photos(),
            **self._index(),
            **({"text_ceiling": details["text_ceiling"]} if "text_ceiling" in details else {}),
        }  # fmt: skip

    def _measured(self, mask: NDArray[np.bool_] | slice) -> dict[str, Any]:
        """Means and intervals of every measure of every system."""
        columns = [(system, name) for system, of in self.scores.items() for name in of.values]
        values = np.stack([self.scores[system].values[name][mask] for system, name in columns], axis=1)
        spans = metrics.intervals(values, self.settings.resamples, self.settings.seed)
        intervals: dict[str, dict[str, Any]] = {system: {} for system in self.scores}
        for (system, name), span in zip(columns, spans, strict=True):
            intervals[system][name] = None if span is None else list(span)
        return {"metrics": {n: s.means(mask) for n, s in self.scores.items()}, "intervals": intervals}

    def _compared(self, a: str, b: str, mask: NDArray[np.bool_] | slice = slice(None)) -> dict[str, float]:
        one, other = (self.scores[name].values[MAIN][mask] for name in (a, b))
        return metrics.paired_bootstrap(one, other, self.settings.resamples, self.settings.seed)

    def _comparisons(self) -> dict[str, dict[str, float]]:
        """The model against every other ranking, with p corrected for their number (Holm)."""
        if len(self.queries) < 2:
            return {}
        others = [name for name in self.scores if name != self.own]
        return _corrected({f"{self.own} vs {other}": self._compared(self.own, other) for other in others})

    def _slices(self) -> dict[str, Any]:
        """Every slice of every dimension: its numbers, and the photo's gain where there are enough queries."""
        found: dict[str, Any] = {}
        for dimension, of in self.labels.items():
            masks = {label: np.array([one == label for one in of]) for label in sorted(set(of))}
            found[dimension] = {n: {"queries": int(m.sum()), **self._measured(m)} for n, m in masks.items()}
            if "text" in self.scores and self.own != "text":
                enough = {n: m for n, m in masks.items() if m.sum() >= metrics.LEAST_QUERIES}
                gains = _corrected({n: self._compared(self.own, "text", m) for n, m in enough.items()})
                for name, one in found[dimension].items():
                    one["image_gain"] = gains.get(name)
        return found

    def _photos(self) -> dict[str, Any]:
        """What photos bring: their gain, the controls, the share of scores, and the queries at both ends."""
        if "missing" not in self.scores or len(self.queries) < 2:
            return {}
        gain = self.scores[self.own].values[MAIN] - self.scores["text"].values[MAIN]
        order = np.argsort(gain, kind="stable")
        saved = [i for i in order[::-1][: self.settings.examples] if gain[i] > 0]
        hurt = [i for i in order[: self.settings.examples] if gain[i] < 0]
        shares = [group.shares for group in self.groups if group.shares is not None]
        means = {
            n: float(np.mean(np.concatenate([getattr(s, n).ravel() for s in shares]))) for n in Shares._fields
        }
        gains = {
            "image": (self.own, "text"), "shuffled": ("shuffled", "text"), "over_shuffled": (self.own, "shuffled"),
            "over_missing": (self.own, "missing"),
        }  # fmt: skip
        return {
            "modality": {
                "gains": {name: self._compared(*pair) for name, pair in gains.items()},
                "queries": {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())},
                "score_shares": means,
                "saved": [self._example(i, float(gain[i])) for i in saved],
                "hurt": [self._example(i, float(gain[i])) for i in hurt],
            }
        }

    def _example(self, number: int, gain: float) -> dict[str, Any]:
        query_id = self.queries["query_id"][number].as_py()
        group = next(group for group in self.groups if query_id in group.place)
        return {
            "query_id": query_id, "query": self.queries["query"][number].as_py(), "gain": gain,
            "hits": group.hits(self.own, query_id, self.qrels),
            "by_text": group.hits("text", query_id, self.qrels),
        }  # fmt: skip

    def _index(self) -> dict[str, Any]:
        """What the index loses of the exact ranking, all queries together."""
        parts = [group.index for group in self.groups if group.index]
        if not parts:
            return {}
        sizes = [len(group.query_ids) for group in self.groups]
        settings = [self._loss(ofs, sizes) for ofs in zip(*(part["settings"] for part in parts), strict=True)]
        [searched] = [one for one in settings if one["name"] == SEARCHED]
        recalls = {name: searched[name] for name in RECALLS}
        return {"index": {"items": parts[0]["items"], **recalls, "settings": settings}}

    def _loss(self, parts: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
        """What one effort loses, over all groups of queries."""
        scores = Scores.joined([part["scores"] for part in parts])
        recalls = {name: float(np.average([p[name] for p in parts], weights=sizes)) for name in RECALLS}
        setting = {"name": parts[0]["name"], **recalls, MAIN: scores.means()[MAIN]}
        exact = self.scores[self.own].values[MAIN]
        if len(exact) >= 2:
            how = (self.settings.resamples, self.settings.seed)
            setting["loss"] = metrics.paired_bootstrap(scores.values[MAIN], exact, *how)
        return setting

    def write(self, folder: Path, title: str) -> None:
        """Write the report as a page and as JSON, the values of each query, and all rankings as TREC's files."""
        artifacts.write_text(folder / FILE, json.dumps(self.numbers, indent=1, allow_nan=False))
        columns: dict[str, Any] = {name: self.queries[name] for name in ("query_id", "query", "split")}
        columns |= {f"slice/{name}": of for name, of in self.labels.items()}
        for system, of in self.scores.items():
            columns |= {f"{system}/{name}": values for name, values in of.values.items()}
        tables.write(folder / QUERIES, pa.table(columns))
        trec.write_qrels(folder / QRELS, {q: self.qrels[q] for q in columns["query_id"].to_pylist()})
        for name in self.scores:
            trec.write_run(folder / RUNS / f"{name}.run", [group.runs[name] for group in self.groups], name)
        photos = reports.photos(self.settings.triplets, reports.shown(self.numbers))
        artifacts.write_text(folder / reports.PAGE, reports.page(self.numbers, title, photos))


def _least(qrels: Qrels, min_relevant: int | None) -> int:
    """The grade from which an item is relevant. Raises DataError when no judgment reaches it."""
    highest = metrics.relevant_from(qrels)
    if min_relevant is not None and min_relevant > highest:
        do = "lower min_relevant"
        raise DataError(f"judgments of grade {min_relevant} (min_relevant)", f"grades up to {highest}", do)
    return min_relevant or highest


def _corrected(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    corrected = metrics.holm([one["p"] for one in found.values()])
    return {n: {**one, "p_holm": p} for (n, one), p in zip(found.items(), corrected, strict=True)}


def _groups(queries: pa.Table, details: Mapping[str, Any]) -> list[tuple[pa.Table, list[str]]]:
    """Part the queries by the splits of items that they are ranked over: those of their split's judged items."""
    over: dict[tuple[str, ...], list[str]] = {}
    for split, splits in details["candidates"].items():
        over.setdefault(tuple(splits), []).append(split)
    parts = [
        (queries.filter(pc.is_in(queries["split"], value_set=pa.array(asked))), [*s]) for s, asked in over.items()
    ]
    return [(part, splits) for part, splits in parts if part.num_rows]


# --- borders -------------------------------------------------------------------------------------


def _inputs(settings: EvaluateSettings, model: Path) -> dict[str, str]:
    """The keys of what is evaluated; an index of another model or of other triplets is refused."""
    keys = {
        "model": artifacts.read(model, "model", verify=False).key,
        "triplets": artifacts.read(settings.triplets, "triplets").key,
    }
    if settings.index is not None:
        keys["index"] = _index_key(settings.index, keys)
    for name, path in settings.runs.items():
        if not path.is_file():
            raise DataError(f"the run {name!r}", f"no file {path}", "mend runs")
        keys[f"run {name}"] = artifacts.sha256(path)
    return keys


def _index_key(folder: Path, keys: Mapping[str, str]) -> str:
    """The key of an index that was made from these, its files checked."""
    index = artifacts.read(folder, "index")
    for name, wanted in keys.items():
        if index.inputs.get(name) != wanted:
            found = f"one made from {name} {index.inputs.get(name)} in {folder}"
            raise ArtifactError(f"an index made from {name} {wanted}", found, "build the index of this version")
    return index.key


def _check_text(settings: EvaluateSettings) -> None:
    if settings.text != tables.TEXT and settings.index is not None:
        do = "give no index= when text= names another field"
        raise ConfigError("an index of the texts that are read", f"text={settings.text}", do)


def _qrels(path: Path) -> Qrels:
    qrels: dict[str, dict[str, int]] = {}
    table = pq.read_table(path)
    columns = (table[name].to_pylist() for name in ("query_id", "item_id", "grade"))
    for query_id, item_id, grade in zip(*columns, strict=True):
        qrels.setdefault(query_id, {})[item_id] = grade
    return qrels


def _log(registry: Registry, version: Version, folder: Path, key: str, found: Mapping[str, Any]) -> None:
    """Put numbers, of each query too, and report on the version and its run.

    The key comes last, so that a broken log is done again.
    """
    means = {
        f"eval/{name}/{measure.replace('@', '_at_')}": value
        for name, values in found["metrics"].items()
        for measure, value in values.items()
    }
    registry.log_metrics(version.run_id, means)
    for name in (FILE, QUERIES, reports.PAGE):
        registry.log_files(version.run_id, folder / name, "evaluation")
    tags = {f"askew.metrics.{name}_ndcg_at_10": f"{values[MAIN]:.4f}" for name, values in found["metrics"].items()}
    registry.tag(version, tags)
    registry.tag(version, {EVALUATION_KEY: key})
