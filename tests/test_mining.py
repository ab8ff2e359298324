"""Mining against BM25 in memory and against the vectors of a small model, both over a few trained items."""

import functools
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from askew import artifacts, mining, register, segments, tables
from askew.bm25 import BM25
from askew.encoders import TextSettings
from askew.errors import ArtifactError
from askew.inputs import Tokens
from askew.mining import Miner
from askew.models import Model
from askew.negatives import NONE, Kind, Mined, NegativeSettings, Pairs
from askew.pairing import Catalogue
from askew.register import ROW, Register
from askew.registry import Registry, Version
from askew.towers import TowerSettings, TwoTower

COLOURS, THINGS = ["red", "green", "blue", "black", "white"], ["mug", "plate", "lamp", "jar", "vase", "sofa"]
TITLES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
IDS = [f"i{number}" for number in range(len(TITLES))]
TRAINED = [number % 3 != 2 for number in range(len(TITLES))]  # the others are of evaluation
QUERIES = ["mug", "blue", "white lamp", "sofa black", "nothing"]
ASKED = Pairs(np.array([0, 0, 1, 2, 3]), np.array([0, 6, 13, 24, 3]), np.empty(0, np.int64), np.empty(0, np.int64))
DEPTH = 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The items in three parts."""
    folder = tmp_path_factory.mktemp("items")
    split = ["train" if trained else "val" for trained in TRAINED]
    rows = pa.table({"item_id": IDS, "split": split, "text": TITLES})
    for number, start in enumerate((0, 7, 8)):
        stop = (7, 8, len(IDS))[number]
        tables.write(folder / f"part-{number:05d}.parquet", rows.slice(start, stop - start))
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The items by their register."""
    folder, rows = tmp_path_factory.mktemp("register"), np.zeros(len(IDS), ROW)
    rows["id"], rows["split"] = register.hashes(IDS), [0 if trained else 1 for trained in TRAINED]
    np.save(folder / "rows-0.npy", rows)
    found = Register.gather([folder / "rows-0.npy"], folder / "all", [np.arange(2, dtype=np.uint8)])
    return Catalogue(found, pa.chunked_array([IDS]), ["train", "val"], ["train"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was never trained."""
    torch.manual_seed(0)
    tokens = Tokens.train(TITLES, 100)
    shape = TowerSettings(
        dim=16, text=TextSettings(width=16, heads=2), image_size=32, query_length=8, title_length=8
    )
    root = tmp_path_factory.mktemp("model")
    with artifacts.draft(root, "model", {}, {}) as draft:
        Model(TwoTower(shape, tokens.size), tokens).save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {}, {}))


@functools.cache
def vectors(model: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The vectors of the queries and of the items."""
    loaded, num_items = Model.load(model), len(TITLES)
    photos, none = np.zeros((num_items, 32, 32, 3), np.uint8), np.zeros(num_items, bool)
    return loaded.queries(QUERIES), loaded.items(TITLES, photos, none)["fused"]


def indexed(root: Path, model: Path, ids: list[str]) -> Path:
    """An index of the first items, under these ids, in two segments."""
    rows, cut = pa.table({"item_id": ids, "title": ids, "fields": ids}), len(ids) // 2
    exact = vectors(model)[1]
    with artifacts.draft(root, "index", {"ids": ids}, {}) as draft:
        segments.write(draft.folder / "one", exact[:cut], rows[:cut])
        segments.write(draft.folder / "two", exact[cut : len(ids)], rows[cut:])
        segments.tell(draft, ["one", "two"])
    return artifacts.place(root, "index", artifacts.key("index", {"ids": ids}, {}))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The index of all items."""
    return indexed(tmp_path_factory.mktemp("index"), model, IDS)


def by_model(model: Path, index: Path, range_max: int = DEPTH) -> Miner:
    return Miner(NegativeSettings(per_pair={"model": 1}, range_max=range_max), {}, model, index)


def by_words(parts: Path, work: Path) -> Miner:
    miner = Miner(NegativeSettings(per_pair={"bm25": 1}, range_max=DEPTH))
    miner.ready(parts, ["train"], work)
    return miner


# --- bm25 ----------------------------------------------------------------------------------------


def test_words_find_the_trained_items_that_bm25_finds_among_them(
    parts: Path, items: Catalogue, tmp_path: Path
) -> None:
    found = by_words(parts, tmp_path).search(items, "bm25", QUERIES, ASKED)
    rows, scores = BM25([title for title, trained in zip(TITLES, TRAINED, strict=True) if trained]).search(
        QUERIES, DEPTH
    )
    numbers = np.append(np.flatnonzero(TRAINED), NONE)  # the last for the padding, −1
    assert found.items.tolist() == numbers[rows][ASKED.query].tolist()
    np.testing.assert_allclose(found.scores, scores[ASKED.query])


def test_an_index_of_words_that_is_there_is_used_and_half_of_one_is_not(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "words-draft").mkdir()
    (tmp_path / "words-draft" / "half").touch()
    miner = by_words(parts, tmp_path)
    assert miner.words == tmp_path / "words"
    assert not (tmp_path / "words" / "half").exists()
    made = {path.name: path.stat().st_mtime_ns for path in miner.words.iterdir()}
    by_words(parts, tmp_path)
    assert made == {path.name: path.stat().st_mtime_ns for path in miner.words.iterdir()}


def test_no_words_are_indexed_for_a_model(parts: Path, model: Path, index: Path, tmp_path: Path) -> None:
    by_model(model, index).ready(parts, ["train"], tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- model ---------------------------------------------------------------------------------------


def test_a_model_finds_the_nearest_items_of_which_those_not_trained_on_are_none(
    items: Catalogue, model: Path, index: Path
) -> None:
    found = by_model(model, index).search(items, "model", QUERIES, ASKED)
    queries, exact = vectors(model)
    scores = queries[ASKED.query] @ exact.T
    nearest = np.argsort(-scores, axis=1)[:, :DEPTH]
    assert found.items.tolist() == np.where(np.array(TRAINED)[nearest], nearest, NONE).tolist()
    assert NONE in found.items
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, nearest, 1), atol=1e-5)


def test_the_positive_has_its_own_score(items: Catalogue, model: Path, index: Path) -> None:
    found = by_model(model, index, len(IDS)).search(items, "model", QUERIES, ASKED)
    queries, exact = vectors(model)
    np.testing.assert_allclose(found.positive, (queries @ exact.T)[ASKED.query, ASKED.item], atol=1e-5)


def test_queries_are_the_same_however_many_are_encoded_at_once(
    items: Catalogue, model: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = by_model(model, index).search(items, "model", QUERIES, ASKED)
    monkeypatch.setattr(mining, "QUERIES_AT_ONCE", 3)
    other = by_model(model, index).search(items, "model", QUERIES, ASKED)
    assert one.items.tolist() == other.items.tolist()
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_an_item_of_the_index_that_the_catalogue_does_not_know_is_none(
    items: Catalogue, model: Path, tmp_path: Path
) -> None:
    strange = indexed(tmp_path, model, [f"of another shop {number}" for number in range(12)])
    found = by_model(model, strange).search(items, "model", QUERIES, ASKED)
    assert (found.items == NONE).all()
    np.testing.assert_allclose(found.positive, found.scores[:, -1])


def test_an_index_of_fewer_items_than_the_range_is_searched_whole(
    items: Catalogue, model: Path, tmp_path: Path
) -> None:
    few = indexed(tmp_path, model, IDS[: DEPTH - 2])
    found = by_model(model, few).search(items, "model", QUERIES, ASKED)
    assert {number for number in found.items.ravel().tolist() if number != NONE} == {0, 1, 3, 4}


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bm25", "model"])
def test_a_miner_that_was_sent_to_another_process_finds_the_same(
    parts: Path, items: Catalogue, model: Path, index: Path, tmp_path: Path, kind: Kind
) -> None:
    miner = by_words(parts, tmp_path) if kind == "bm25" else by_model(model, index)
    one, other = (m.search(items, kind, QUERIES, ASKED) for m in (miner, pickle.loads(pickle.dumps(miner))))  # noqa: S301
    assert one.items.tolist() == other.items.tolist()


@pytest.mark.parametrize("kind", ["bm25", "model"])
def test_nothing_is_found_for_no_pairs(
    parts: Path, items: Catalogue, model: Path, index: Path, tmp_path: Path, kind: Kind
) -> None:
    nothing = Pairs(*[np.empty(0, np.int64)] * 4)
    miner = by_words(parts, tmp_path) if kind == "bm25" else by_model(model, index)
    assert [len(part) for part in miner.search(items, kind, QUERIES, nothing)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("found", "scores", "positive"),
    [
        ([5, 7, 9], [3.0, 2.0, 1.0], 2.0),  # item 7 is the positive
        ([5, 6, 9], [3.0, 2.0, 1.0], 1.0),  # not among the best: its own score is no higher than the last
        ([5, 6, NONE], [3.0, 2.0, -np.inf], 2.0),
        ([NONE, NONE, NONE], [-np.inf, -np.inf, -np.inf], np.inf),
    ],
)
def test_a_positive_that_is_not_found_has_the_score_of_the_last(
    items: Catalogue, monkeypatch: pytest.MonkeyPatch, found: list[int], scores: list[float], positive: float
) -> None:
    answer = np.array([found]), np.array([scores], dtype=np.float32)
    monkeypatch.setattr(Miner, "_by_words", lambda self, queries: answer)
    one = Pairs(np.array([0]), np.array([7]), np.array([0]), np.array([7]))
    mined: Mined = Miner(NegativeSettings()).search(items, "bm25", QUERIES, one)
    assert mined.positive.tolist() == [positive]


# --- what is mined with --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def version(mlflow_uri: str, model: Path) -> Version:
    """The model as version 1 of `mined`."""
    registry = Registry(mlflow_uri)
    return registry.register("mined", model, registry.start_run("mined", "mined", {}, {}), {})


@pytest.mark.parametrize("per_pair", [{}, {"random": 2}, {"model": 0, "bm25": 0}])
def test_without_mined_negatives_there_is_no_miner(per_pair: dict[Kind, int], tmp_path: Path) -> None:
    assert Miner.of(NegativeSettings(per_pair=per_pair), "http://127.0.0.1:9", tmp_path) is None


def test_words_need_no_registry(tmp_path: Path) -> None:
    miner = Miner.of(NegativeSettings(per_pair={"bm25": 1}), "http://127.0.0.1:9", tmp_path)
    assert miner is not None
    assert miner.inputs == {}


def test_a_model_is_fetched_with_the_index_that_its_version_names(
    mlflow_uri: str, version: Version, model: Path, index: Path, items: Catalogue, tmp_path: Path
) -> None:
    wanted = NegativeSettings(per_pair={"model": 1}, range_max=DEPTH, model="mined", version="1")
    with pytest.raises(ArtifactError, match=r"an index of mined version 1.*run the index stage"):
        Miner.of(wanted, mlflow_uri, tmp_path)
    Registry(mlflow_uri).tag(version, {"askew.index": str(index)})
    miner = Miner.of(wanted, mlflow_uri, tmp_path)
    assert miner is not None
    assert miner.inputs == {
        "negatives/model": artifacts.read(model, "model").key,
        "negatives/index": artifacts.read(index, "index").key,
    }
    expected = by_model(model, index).search(items, "model", QUERIES, ASKED)
    assert miner.search(items, "model", QUERIES, ASKED).items.tolist() == expected.items.tolist()
