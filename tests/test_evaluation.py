"""Evaluation with a made-up model whose rankings are known: titles name the thing, photos its colour."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from askew import artifacts, evaluation, judging, segments, tables, trec
from askew.errors import ArtifactError, ConfigError, DataError
from askew.evaluation import EvaluateSettings, Evaluation, evaluate
from askew.judging import indexed, recall
from askew.registry import Version
from askew.shards import Shard

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

    @classmethod
    def zero_shot(cls, checkpoint: str, device: str = "cpu") -> "MadeUp":
        assert checkpoint == "some/clip"
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


class Adaptive(MadeUp):
    """The same with a header that always wants half of each: the index holds [S_t; S_m]."""

    dim, header = 2 * len(WORDS), True

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        plain = super().queries(texts)
        return np.concatenate([plain, plain], axis=1) / 2

    def plain_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return super().queries(texts)

    def items(
        self, texts: Sequence[str], pixels: NDArray[np.uint8], has_image: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.float32]]:
        plain = MadeUp().items(texts, pixels, has_image)
        return {**plain, "index": np.concatenate([plain["text"], plain["fused"]], axis=1)}


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
        self.files.append((to, path.name, path.read_bytes()))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        self.tags |= tags


def item(thing: str, colour: str, split: str = "val", image: bool = True) -> dict[str, Any]:
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    pixels[..., COLOURS.index(colour)] = 255
    return {
        "item_id": f"{thing}-{colour}{'' if split == 'val' else '-' + split}", "split": split, "text": thing,
        "title": thing, "pixels": pixels.tobytes() if image else None, "has_image": image,
        "image": png(pixels) if image else None, "fields": {"title": thing},
    }  # fmt: skip


def png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_triplets(
    root: Path, queries: Sequence[str] = ("red mug", "blue lamp", "green plate"), splits: Sequence[str] = ("val",),
    **details: Any,
) -> Path:  # fmt: skip
    """9 candidates of 3 things in 3 colours, in two parts among items of another split; one has no photo."""
    items = [item(t, c, image=(t, c) != ("lamp", "red")) for t in THINGS for c in COLOURS]
    others = [item(t, c, "train") for t in THINGS for c in COLOURS]
    mixed = [*reversed(items[:5]), *others[:4]], [*others[4:], *items[5:]]
    with artifacts.draft(root, "triplets", {"queries": list(queries), **details}, {}) as draft:
        for number, part in enumerate(mixed):
            tables.write(draft.folder / "items" / f"part-{number:05d}.parquet", pa.Table.from_pylist(part))
        rows = [
            {"query_id": f"q{i}", "query": q, "split": splits[i % len(splits)], "segment": q.split()[1]}
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
        pairs = pa.table({"query": ["red mug", "red mug", "green cup"]})
        tables.write(draft.folder / "pairs" / "part-00000.parquet", pairs)
        draft.details |= {"candidates": {"val": ["val"]}, "image_size": SIZE, **details}
    return next(root.glob("triplets-*"))


def make_index(root: Path, model: Path, triplets: Path, kind: str = "index") -> Path:
    """An index of all items of the triplets in two segments."""
    inputs = {"model": artifacts.read(model, "model").key, "triplets": artifacts.read(triplets, "triplets").key}
    with artifacts.draft(root, "index", {"kind": kind}, inputs) as draft:
        names = []
        for part in tables.parts(triplets / "items"):
            table = pq.read_table(part).combine_chunks()
            pixels = tables.pixels(table["pixels"].combine_chunks(), SIZE)
            vectors = MadeUp().items(table["text"].to_pylist(), pixels, table["has_image"].to_numpy())
            segments.write(draft.folder / part.stem, vectors[kind], table.select(["item_id", "title"]))
            names.append(part.stem)
        segments.tell(draft, names)
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
    assert result["metrics"]["fused"] == pytest.approx({
        "nDCG@10": fused, "R@10": 1, "R@50": 1, "R@100": 1, "P@50": 1 / 50, "F1@50": 2 / 51, "RR@10": 1,
        "AP@10": 1, "Judged@10": 1 / 3,
    })  # fmt: skip
    for words in ("text", "bm25"):
        means = result["metrics"][words]
        assert means["nDCG@10"] == pytest.approx(np.mean(by_text) / ideal)
        assert means["RR@10"] == pytest.approx(np.mean([1 / 3, 1, 1 / 2]))
    # The photo knows the colour alone: of the three of a colour, lamp stands before mug before plate by id.
    assert result["metrics"]["image"]["RR@10"] == pytest.approx(np.mean([1, 1, 1 / 3]))
    assert result["comparisons"]["fused vs text"]["difference"] == pytest.approx(fused - np.mean(by_text) / ideal)
    mug = result["slices"]["segment"]["mug"]
    assert mug["queries"] == 1
    assert mug["metrics"]["text"]["nDCG@10"] == pytest.approx(by_text[0] / ideal)
    assert mug["intervals"]["text"]["nDCG@10"] is None  # one query has none
    assert mug["image_gain"] is None
    assert result["text_ceiling"] == 0.7
    assert result["index"]["items"] == 18
    [setting] = result["index"]["settings"]
    assert setting["recall@10"] == setting["recall@100"] == 1
    assert setting["loss"]["difference"] == 0


def test_the_numbers_are_put_on_the_version_once(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, ledger = shop
    result = evaluate(settings)
    assert (result["rows"], result["model"], result["version"], result["main"]) == (3, "shop", "3", "fused")
    assert not result["skipped"]
    assert ledger.metrics["eval/fused/nDCG_at_10"] == result["metrics"]["fused"]["nDCG@10"]
    assert len(ledger.metrics) == 7 * 9  # systems, measures
    assert ledger.tags["askew.metrics.fused_ndcg_at_10"] == f"{result['metrics']['fused']['nDCG@10']:.4f}"
    assert ledger.tags["askew.evaluation_key"] == result["key"]
    assert [(to, name) for to, name, _ in ledger.files] == [
        ("evaluation", "report.json"), ("evaluation", "queries.parquet"), ("evaluation", "report.html")
    ]  # fmt: skip
    for _, name, content in ledger.files:
        assert content == (Path(result["artifact"]) / name).read_bytes()
    again = evaluate(settings)
    assert again == {**result, "skipped": True}
    assert len(ledger.files) == 3
    ledger.tags.clear()  # as if it had broken off before the end
    evaluate(settings)
    assert len(ledger.files) == 6
    assert ledger.tags["askew.evaluation_key"] == result["key"]


def test_batches_change_nothing(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    found = [Evaluation(settings.model_copy(update={"batch_size": n}), MadeUp()).numbers for n in (1, 4, 100)]  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2]


def test_min_relevant_is_a_setting(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    lenient = evaluate(settings.model_copy(update={"min_relevant": 1}))
    assert lenient["relevant_from"] == 1
    assert lenient["metrics"]["text"]["RR@10"] == 1
    with pytest.raises(DataError, match=r"grade 4 \(min_relevant\); found grades up to 3"):
        evaluate(settings.model_copy(update={"min_relevant": 4}))
    with pytest.raises(ValidationError):
        EvaluateSettings(**{**settings.model_dump(), "k": 50})  # R@100 would be a lie


def test_what_photos_bring_is_told_from_what_any_photo_would(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    found = Evaluation(settings, MadeUp()).numbers  # type: ignore[arg-type]
    photos = found["modality"]
    assert found["metrics"]["missing"] == found["metrics"]["text"]
    assert photos["gains"]["image"]["difference"] == photos["gains"]["over_missing"]["difference"] > 0
    assert photos["gains"]["shuffled"]["difference"] <= 0 < photos["gains"]["over_shuffled"]["difference"]
    assert photos["queries"] == {"better": 2, "worse": 0}
    assert not photos["hurt"]
    first, second = photos["saved"]
    assert (first["query"], second["query"]) == ("red mug", "green plate")
    assert first["gain"] >= second["gain"] > 0
    best = first["hits"][0]
    assert (best["item_id"], best["text"], best["grade"]) == ("mug-red", "mug", 3)
    # Score 1, of which each word brings half by itself: added last, the photo brings 1 − 1/√2, added first 1/√2.
    assert (best["from_text"], best["from_image"], best["score"]) == pytest.approx((0.5, 0.5, 1.0))
    assert first["by_text"][0]["item_id"] == "mug-blue"
    assert "modality" not in Evaluation(settings.model_copy(update={"modality": False}), MadeUp()).numbers  # type: ignore[arg-type]


def test_splits_of_fewer_items_than_hits_that_are_shown_are_told_together(
    shop: tuple[EvaluateSettings, Ledger], tmp_path: Path
) -> None:
    """9 items can be found in one split, and 18 in the other, of which 10 are shown."""
    settings, ledger = shop
    candidates = {"val": ["val"], "wide": ["val", "train"]}
    triplets = make_triplets(tmp_path / "two", splits=("val", "wide"), candidates=candidates)
    index = make_index(tmp_path / "two", ledger.folder, triplets)
    result = evaluate(settings.model_copy(update={"triplets": triplets, "index": index}))
    assert (result["queries"], result["items"]) == (3, 27)
    hits = {hit["query"]: len(hit["hits"]) for hit in result["modality"]["saved"]}
    assert hits.items() <= {"red mug": 9, "blue lamp": 10, "green plate": 9}.items()
    assert sum(result["modality"]["score_shares"].values()) > 0


def test_with_a_header_the_model_is_what_the_index_answers(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    found = Evaluation(settings.model_copy(update={"text": "title", "index": None}), Adaptive()).numbers  # type: ignore[arg-type]
    assert found["main"] == "adaptive"
    assert set(found["metrics"]) == {
        "text", "image", "fused", "adaptive", "shuffled", "missing", "bm25", "hybrid"
    }  # fmt: skip
    assert set(found["comparisons"]) == {f"adaptive vs {n}" for n in found["metrics"] if n != "adaptive"}
    best = found["modality"]["saved"][0]["hits"][0]
    assert best["item_id"] == "mug-red"
    assert best["score"] == pytest.approx(0.5 / np.sqrt(2) + 0.5)


def test_another_system_s_run_is_scored_beside(shop: tuple[EvaluateSettings, Ledger], tmp_path: Path) -> None:
    settings, _ = shop
    path = tmp_path / "theirs.run"
    path.write_text("q0 Q0 mug-red 1 2.5 x\nq0 Q0 mug-blue 2 0.5 x\nelsewhere Q0 mug-red 1 1 x\n")
    result = evaluate(settings.model_copy(update={"runs": {"theirs": path}}))
    ideal = 3 + 1 / np.log2(3) + 1 / 2
    assert result["metrics"]["theirs"]["nDCG@10"] == pytest.approx((3 + 1 / np.log2(3)) / ideal / 3)
    assert result["comparisons"]["fused vs theirs"]["difference"] > 0
    again = trec.read_run(Path(result["artifact"]) / "runs" / "theirs.run")
    assert again.ranking(0) == ["mug-red", "mug-blue"]
    path.write_text("q0 Q0 mug-red 1 2.5 x\n")
    assert evaluate(settings.model_copy(update={"runs": {"theirs": path}}))["key"] != result["key"]
    path.write_text("q0 Q0 teapot 1 2.5 x\n")
    with pytest.raises(DataError, match=r"items of the catalogue in .*theirs\.run.*teapot"):
        evaluate(settings.model_copy(update={"runs": {"theirs": path}}))
    with pytest.raises(DataError, match="the run 'other'"):
        evaluate(settings.model_copy(update={"runs": {"other": tmp_path / "none"}}))


def test_a_checkpoint_that_never_saw_the_catalogue_is_ranked_beside(
    shop: tuple[EvaluateSettings, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _ = shop
    monkeypatch.setattr(judging, "Model", MadeUp)
    found = Evaluation(settings.model_copy(update={"zero_shot": {"clip": "some/clip"}}), MadeUp()).numbers  # type: ignore[arg-type]
    assert found["metrics"]["clip"] == found["metrics"]["fused"]


def test_what_is_written_tells_each_query(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    result = evaluate(settings)
    folder = Path(result["artifact"])
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    assert [row["query"] for row in rows] == ["red mug", "blue lamp", "green plate"]
    assert [row["slice/query"] for row in rows] == ["seen", "new", "new"]
    assert np.mean([row["fused/nDCG@10"] for row in rows]) == pytest.approx(result["metrics"]["fused"]["nDCG@10"])
    assert trec.read_run(folder / "runs" / "fused.run").ranking(0)[0] == "mug-red"
    assert trec.read_qrels(folder / "qrels.txt")["q0"]["mug-red"] == 3
    page = (folder / "report.html").read_text()
    assert "shop version 3" in page
    assert page.count("data:image/jpeg;base64,") > 10
    assert page.count('class="right"') >= 2
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_an_index_of_another_model_is_refused(shop: tuple[EvaluateSettings, Ledger], tmp_path: Path) -> None:
    settings, ledger = shop
    with artifacts.draft(tmp_path / "other", "model", {"other": True}, {}) as draft:
        (draft.folder / "weights").write_text("none")
    ledger.folder = next((tmp_path / "other").glob("model-*"))
    with pytest.raises(ArtifactError, match="an index made from model"):
        evaluate(settings)


def test_an_index_is_not_held_against_other_texts(shop: tuple[EvaluateSettings, Ledger]) -> None:
    settings, _ = shop
    with pytest.raises(ConfigError, match="no index="):
        evaluate(settings.model_copy(update={"text": "title"}))
    found = evaluate(settings.model_copy(update={"text": "title", "index": None}))
    assert (found["text"], "index" in found) == ("title", False)


def test_queries_with_nothing_to_find_are_left_out_by_name(
    shop: tuple[EvaluateSettings, Ledger], tmp_path: Path
) -> None:
    settings, _ = shop
    triplets = make_triplets(tmp_path / "other", ("red mug", "black mug", "green plate"))
    found = Evaluation(settings.model_copy(update={"triplets": triplets, "index": None}), MadeUp()).numbers  # type: ignore[arg-type]
    assert (found["queries"], found["left_out"], found["left_out_ids"]) == (2, 1, ["q1"])


def test_no_queries_is_an_error(shop: tuple[EvaluateSettings, Ledger], tmp_path: Path) -> None:
    settings, _ = shop
    triplets = make_triplets(tmp_path / "none", queries=())
    with pytest.raises(DataError, match="found 0 queries"):
        Evaluation(settings.model_copy(update={"triplets": triplets}), MadeUp())  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_the_index_is_held_against_the_exact_ranking_of_the_candidates(tmp_path: Path, noise: float) -> None:
    random = np.random.default_rng(0)
    ids = [f"item-{i}" for i in random.permutation(3000)]
    true = random.normal(size=(3000, 8)).astype(np.float32)
    kept = true + noise * random.normal(size=true.shape).astype(np.float32)
    queries = random.normal(size=(70, 8)).astype(np.float32)
    candidates = random.permutation(3000)[:300]
    with artifacts.draft(tmp_path, "index", {}, {}) as draft:
        for name, part in (("a", slice(0, 1000)), ("b", slice(1000, 3000))):
            segments.write(draft.folder / name, kept[part], pa.table({"item_id": ids[part]}))
        segments.tell(draft, ["a", "b"])
    shard = Shard(segments.Plan.read(next(tmp_path.glob("index-*"))))
    exact, given = (np.argsort(-queries @ v[candidates].T)[:, :10] for v in (true, kept))
    expected = np.mean([len(set(e) & set(g)) / 10 for e, g in zip(exact.tolist(), given.tolist(), strict=True)])
    assert (expected == 1) == (noise == 0)
    found = indexed(shard, queries, [ids[i] for i in candidates], 10)
    assert found.rows.tolist() == given.tolist()
    assert recall(exact, found.rows) == pytest.approx(expected)
