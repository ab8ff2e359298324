"""Evaluation with a made-up model whose rankings are known: titles name the thing, photos its colour."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from askew import artifacts, evaluation, segments, tables
from askew.errors import ArtifactError, DataError
from askew.evaluation import Candidates, EvaluateSettings, Top, evaluate, index_recall
from askew.registry import Version

THINGS, COLOURS = ["mug", "plate", "lamp"], ["red", "green", "blue"]
WORDS = [*THINGS, *COLOURS]
SIZE = 4


class MadeUp:
    """Words and mean colours as vectors: one axis a word."""

    dim, image_size, header = len(WORDS), SIZE, False

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "MadeUp":
        artifacts.read(folder, "model")
        return cls()

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return unit(np.array([[w in text.split() for w in WORDS] for text in texts], dtype=np.float32))

    plain_queries = queries

    def items(
        self, texts: Sequence[str], pixels: NDArray[np.uint8], has_image: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.float32]]:
        assert pixels.shape == (len(texts), SIZE, SIZE, 3)
        text, image = self.queries(texts), np.zeros((len(texts), self.dim), dtype=np.float32)
        image[:, 3:] = pixels.mean(axis=(1, 2)) / 255 * has_image[:, None]
        return {"text": text, "image": unit(image), "fused": unit(text + image), "index": unit(text + image)}


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


class Ledger:
    """A registry in memory that holds one version and remembers what was logged on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metrics, self.tags, self.files = folder, {}, {}, []  # type: ignore[var-annotated]

    def __call__(self, uri: str) -> "Ledger":
        return self

    def resolve(self, name: str, which: str) -> Version:
        assert (name, which) == ("shop", "champion")
        return Version(name=name, version="3", run_id="run", source="runs:/run/model", tags=dict(self.tags))

    def download(self, version: Version, into: Path) -> Path:
        return self.folder

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        self.metrics |= metrics

    def log_files(self, run_id: str, path: Path, to: str) -> None:
        self.files.append((to, json.loads(path.read_text())))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        self.tags |= tags


def item(thing: str, colour: str, split: str = "val", image: bool = True) -> dict[str, Any]:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[..., COLOURS.index(colour)] = 255
    return {
        "item_id": f"{thing}-{colour}{'' if split == 'val' else '-' + split}", "split": split, "text": thing,
        "title": thing, "pixels": pixels.tobytes() if image else None, "has_image": image,
    }  # fmt: skip


def make_triplets(
    root: Path, queries: Sequence[str] = ("red mug", "blue lamp", "green plate"), **details: Any
) -> Path:
    """9 candidates of 3 things in 3 colours, in two parts among items of another split; one has no photo."""
    items = [item(t, c, image=(t, c) != ("lamp", "red")) for t in THINGS for c in COLOURS]
    others = [item(t, c, "train") for t in THINGS for c in COLOURS]
    mixed = [*reversed(items[:5]), *others[:4]], [*others[4:], *items[5:]]
    with artifacts.draft(root, "triplets", {"queries": list(queries), **details}, {}) as draft:
        for number, part in enumerate(mixed):
            tables.write(draft.folder / "items" / f"part-{number:05d}.parquet", pa.Table.from_pylist(part))
        rows = [
            {"query_id": f"q{i}", "query": q, "split": "val", "segment": q.split()[1]}
            for i, q in enumerate(queries)
        ]
        schema = pa.schema([(n, pa.string()) for n in ("query_id", "query", "split", "segment")])
        tables.write(draft.folder / "queries" / "part-00000.parquet", pa.Table.from_pylist(rows, schema))
        qrels = [
            {
                "query_id": row["query_id"],
                "item_id": f"{row['segment']}-{c}",
                "grade": 3 if c in row["query"] else 1,
            }
            for row in rows
            for c in COLOURS
        ]
        schema = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.int64())])
        tables.write(draft.folder / "qrels" / "part-00000.parquet", pa.Table.from_pylist(qrels, schema))
        draft.details |= {"candidates": {"val": ["val"]}, "image_size": SIZE, **details}
    return next(root.glob("triplets-*"))


def make_index(root: Path, model: Path, triplets: Path, kind: str = "fused") -> Path:
    """An index of all items of the triplets in two segments."""
    inputs = {"model": artifacts.read(model, "model").key, "triplets": artifacts.read(triplets, "triplets").key}
    with artifacts.draft(root, "index", {"kind": kind}, inputs) as draft:
        names = []
        for part in tables.parts(triplets / "items"):
            table = pq.read_table(part).combine_chunks()
            pixels = tables.pixels(table["pixels"].combine_chunks(), SIZE)
            vectors = MadeUp().items(table["text"].to_pylist(), pixels, table["has_image"].to_numpy())
            segments.write(draft.folder / part.stem, vectors[kind], table.select(["item_id", "title"]))
            names.append({"name": part.stem, "items": len(table)})
        draft.details |= {"dim": MadeUp.dim, "segments": names}
    return artifacts.place(root, "index", artifacts.key("index", {"kind": kind}, inputs))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EvaluateSettings, Ledger]:
    """Settings over made-up artifacts, and the ledger that stands in for MLflow."""
    root = tmp_path / "artifacts"
    with artifacts.draft(root, "model", {}, {}) as draft:
        (draft.folder / "weights").write_text("none")
    model = next(root.glob("model-*"))
    triplets = make_triplets(root, text_ceiling=0.7)
    ledger = Ledger(model)
    monkeypatch.setattr(evaluation, "Registry", ledger)
    monkeypatch.setattr(evaluation, "Model", MadeUp)
    settings = EvaluateSettings(
        model="shop", triplets=triplets, index=make_index(root, model, triplets), root=root, batch_size=2,
        resamples=500, tracking_uri="",
    )  # fmt: skip
    return settings, ledger


def test_the_numbers_are_those_worked_out_by_hand(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    result = evaluate(settings)
    assert (result["queries"], result["left_out"], result["items"], result["relevant_from"]) == (3, 0, 9, 3)
    # fused knows thing and colour. By text the three of a thing are equal and stand by id: blue, green, red.
    first, second, third = 1.0, 1 / np.log2(3), 1 / 2
    ideal = 3 * first + second + third
    by_text = [first + second + 3 * third, 3 * first + second + third, first + 3 * second + third]
    # Only "green plate" is hindered: two other green things stand between its plate and the other plates by id.
    fused = np.mean([1, 1, (3 * first + 1 / np.log2(5) + 1 / np.log2(6)) / ideal])
    assert result["metrics"]["fused"] == pytest.approx({"nDCG@10": fused, "R@10": 1, "R@100": 1, "RR": 1})
    for words in ("text", "bm25"):
        means = result["metrics"][words]
        assert means["nDCG@10"] == pytest.approx(np.mean(by_text) / ideal)
        assert means["RR"] == pytest.approx(np.mean([1 / 3, 1, 1 / 2]))
    # The photo knows the colour alone: of the three of a colour, lamp stands before mug before plate by id.
    assert result["metrics"]["image"]["RR"] == pytest.approx(np.mean([1, 1, 1 / 3]))
    assert result["comparisons"]["fused vs text"]["difference"] == pytest.approx(fused - np.mean(by_text) / ideal)
    assert result["segments"]["mug"]["queries"] == 1
    assert result["segments"]["mug"]["metrics"]["text"]["nDCG@10"] == pytest.approx(by_text[0] / ideal)
    low, high = result["intervals"]["text"]["nDCG@10"]
    assert low <= result["metrics"]["text"]["nDCG@10"] <= high
    assert result["text_ceiling"] == 0.7
    assert result["index"] == {"items": 18, "recall@10": 1}


def test_the_numbers_are_put_on_the_version_once(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, ledger = shop
    result = evaluate(settings)
    assert result["rows"] == 3
    assert not result["skipped"]
    assert ledger.metrics["eval/fused/nDCG_at_10"] == result["metrics"]["fused"]["nDCG@10"]
    assert len(ledger.metrics) == 16
    assert ledger.tags["askew.metrics.fused_ndcg_at_10"] == f"{result['metrics']['fused']['nDCG@10']:.4f}"
    assert ledger.tags["askew.evaluation_key"] == result["key"]
    [(to, logged)] = ledger.files
    assert to == "evaluation"
    assert logged == json.loads((Path(result["artifact"]) / "evaluation.json").read_text())
    again = evaluate(settings)
    assert again == {**result, "skipped": True}
    assert len(ledger.files) == 1
    ledger.tags.clear()  # as if it had broken off before the end
    evaluate(settings)
    assert len(ledger.files) == 2
    assert ledger.tags["askew.evaluation_key"] == result["key"]


def test_batches_change_nothing(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    reports = [evaluation.report(settings.model_copy(update={"batch_size": n}), MadeUp()) for n in (1, 4, 100)]  # type: ignore[arg-type]
    assert reports[0] == reports[1] == reports[2]


def test_min_relevant_is_a_setting(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    lenient = evaluate(settings.model_copy(update={"min_relevant": 1}))
    assert lenient["relevant_from"] == 1
    assert lenient["metrics"]["text"]["RR"] == 1
    with pytest.raises(DataError, match="relevant item"):
        evaluate(settings.model_copy(update={"min_relevant": 4}))
    with pytest.raises(ValidationError):
        EvaluateSettings(**{**settings.model_dump(), "k": 50})  # R@100 would be a lie


def test_an_index_of_another_model_is_refused(shop: tuple[EvaluateSettings, Ledger], tmp_path: Path) -> None:
    settings, ledger = shop
    with artifacts.draft(tmp_path / "other", "model", {"other": True}, {}) as draft:
        (draft.folder / "weights").write_text("none")
    ledger.folder = next((tmp_path / "other").glob("model-*"))
    with pytest.raises(ArtifactError, match="an index made from model"):
        evaluate(settings)


def test_no_queries_is_an_error(shop: tuple[EvaluateSettings, Ledger], tmp_path: Path) -> None:
    settings, _ = shop
    triplets = make_triplets(tmp_path / "none", queries=())
    with pytest.raises(DataError, match="found 0 queries"):
        evaluation.report(settings.model_copy(update={"triplets": triplets}), MadeUp())  # type: ignore[arg-type]


def test_candidates_are_numbered_by_id_and_streamed_with_their_numbers(tmp_path: Path) -> None:
    candidates = Candidates.of(make_triplets(tmp_path), ["val"])
    assert candidates.item_ids == sorted(f"{t}-{c}" for t in THINGS for c in COLOURS)
    streamed = {}
    for rows, batch in candidates.batches(["item_id"], 2):
        assert len(batch) <= 2
        streamed |= dict(zip(rows.tolist(), batch["item_id"].to_pylist(), strict=True))
    assert [streamed[row] for row in range(9)] == candidates.item_ids


@pytest.mark.parametrize("size", [1, 7, 50])
def test_top_by_batches_is_the_top_of_a_full_sort(size: int) -> None:
    random = np.random.default_rng(size)
    scores = random.integers(0, 6, (5, 50)).astype(np.float32)  # few values, hence many ties
    order = random.permutation(50)
    top = Top.empty(5)
    for start in range(0, 50, size):
        rows = order[start : start + size]
        top.add(rows, scores[:, rows], k=12)
    expected = [sorted(range(50), key=lambda row: (-s[row], row))[:12] for s in scores]
    assert top.rows.tolist() == expected
    np.testing.assert_array_equal(top.scores, np.take_along_axis(scores, top.rows, axis=1))


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_the_index_is_held_against_the_exact_ranking_of_the_candidates(tmp_path: Path, noise: float) -> None:
    random = np.random.default_rng(0)
    ids = [f"item-{i}" for i in random.permutation(3000)]
    true = random.normal(size=(3000, 8)).astype(np.float32)
    kept = true + noise * random.normal(size=true.shape).astype(np.float32)
    queries = random.normal(size=(70, 8)).astype(np.float32)
    candidates = random.permutation(3000)[:300]
    with artifacts.draft(tmp_path, "index", {}, {}) as draft:
        draft.details["dim"] = 8
        for name, part in (("a", slice(0, 1000)), ("b", slice(1000, 3000))):
            segments.write(draft.folder / name, kept[part], pa.table({"item_id": ids[part]}))
    shard = segments.Shard(next(tmp_path.glob("index-*")), ["a", "b"])
    exact, given = (np.argsort(-queries @ v[candidates].T)[:, :10] for v in (true, kept))
    expected = np.mean([len(set(e) & set(g)) / 10 for e, g in zip(exact.tolist(), given.tolist(), strict=True)])
    assert (expected == 1) == (noise == 0)
    assert index_recall(shard, queries, [ids[i] for i in candidates], exact) == pytest.approx(expected)
