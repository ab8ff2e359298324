"""Layouts and the batches that are read from them, against the triplets that they were made of."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew import artifacts, inputs, layouts
from askew.batches import BatchSettings, Triplets
from askew.errors import ArtifactError, ConfigError
from askew.inputs import PADDING, Tokens
from askew.recipes import LayoutSettings

pytestmark = pytest.mark.usefixtures("cluster")
PLAIN = BatchSettings()


def shape(**other: Any) -> LayoutSettings:
    return LayoutSettings.model_validate(
        {"query_length": 8, "title_length": 12, "texts": ("text", "colour")} | other
    )


@pytest.fixture(scope="module")
def tokens(triplets_folder: Path) -> Tokens:
    texts = pq.read_table(triplets_folder / "items", columns=["text"])["text"].to_pylist()
    return Tokens.train(texts, 500)


@pytest.fixture(scope="module")
def layout(triplets_folder: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.lay_out(triplets_folder, shape(), tokens, tmp_path_factory.mktemp("layout"))


@pytest.fixture(scope="module")
def triplets(layout: Path) -> Triplets:
    return Triplets(layout)


@pytest.fixture(scope="module")
def pairs(triplets_folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(triplets_folder / "pairs").to_pylist()
    return sorted(rows, key=lambda row: (row["query_id"], row["item_id"]))


@pytest.fixture(scope="module")
def items(triplets_folder: Path) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(triplets_folder / "items").to_pylist() if row["split"] == "train"]


def test_an_epoch_shows_every_query_once_with_a_positive(triplets: Triplets) -> None:
    n = triplets.num_queries
    found = triplets.examples(0, n, 2 * n, BatchSettings(negatives=1))
    assert sorted(found.queries) == list(range(n))
    right = triplets.known(found.queries, np.arange(triplets.num_items))
    assert right[np.arange(n), found.items[:n]].all()
    assert found.brings.all()
    assert not right[np.arange(n), found.items[n:]].any()


def test_queries_that_are_repeated_are_asked_as_often(
    triplets_folder: Path, triplets: Triplets, pairs: list[dict[str, Any]], tokens: Tokens, tmp_path: Path
) -> None:
    ids = sorted({pair["query_id"] for pair in pairs})
    repeats = {ids[0]: 5, ids[1]: 0, "*1": 3}  # the first that fits counts
    times = [next((n for one, n in repeats.items() if one in (q, f"*{q[-1]}")), 1) for q in ids]
    often = Triplets(layouts.lay_out(triplets_folder, shape(repeats=repeats), tokens, tmp_path))
    assert often.epoch == sum(times)
    assert set(times) == {0, 1, 3, 5}
    found = often.examples(0, 0, often.epoch, PLAIN)
    assert np.bincount(found.queries, minlength=len(ids)).tolist() == times
    assert often.known(found.queries, found.items)[np.arange(often.epoch), found.targets()].all()
    further = often.examples(0, 0, 4000, BatchSettings(queries_per_item=2)).queries[4000:]
    whole = triplets.examples(0, 0, 4000, BatchSettings(queries_per_item=2)).queries[4000:]
    asked, before = (np.bincount(q, minlength=len(ids)) for q in (further, whole))
    assert asked[1] == 0 < before[1]
    assert asked[0] > 2 * before[0]
    drawn = np.concatenate([often.examples(s, 0, often.epoch, PLAIN).items for s in range(200)])
    share = np.bincount(drawn, minlength=often.num_items) / len(drawn)
    most = np.argsort(-share)[:20]
    assert np.exp(often.log_q(most)) == pytest.approx(share[most], rel=0.35)


def test_examples_depend_on_seed_and_number_alone(triplets: Triplets) -> None:
    n, how = triplets.num_queries, BatchSettings(negatives=0.5, modality_dropout=0.3)
    whole = triplets.examples(0, n - 4, n + 4, how)
    parts = [triplets.examples(0, at, at + 2, how) for at in range(n - 4, n + 4, 2)]
    for name in ("queries", "brings", "weights"):
        assert (getattr(whole, name) == np.concatenate([getattr(part, name) for part in parts])).all()
    assert (whole.items[:8] == np.concatenate([part.items[:2] for part in parts])).all()
    assert (whole.items[8:] == np.concatenate([part.items[2:] for part in parts])).all()
    assert (whole.queries != triplets.examples(1, n - 4, n + 4, how).queries).any()


@given(share=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]), start=st.integers(0, 10**6))
def test_any_worker_s_share_brings_as_many_negatives(triplets: Triplets, share: float, start: int) -> None:
    found = triplets.examples(0, start * 8, start * 8 + 8, BatchSettings(negatives=share))
    assert found.brings.sum() == 8 * share == len(found.items) - 8


def test_further_queries_are_right_for_their_items(triplets: Triplets, pairs: list[dict[str, Any]]) -> None:
    settings = BatchSettings(queries_per_item=3, negatives=0.5)
    plain, found = (triplets.examples(1, 40, 72, how) for how in (BatchSettings(negatives=0.5), settings))
    assert np.array_equal(found.queries[:32], plain.queries)
    assert np.array_equal(found.items, plain.items)
    assert np.array_equal(found.targets(), np.tile(np.arange(32), 3))
    assert triplets.known(found.queries, found.items)[np.arange(96), found.targets()].all()
    assert not found.brings[32:].any()
    asked = np.bincount(triplets._arrays["positives"], minlength=triplets.num_items)[found.items[:32]]
    for row in range(32):  # none twice, where there are enough
        assert len(set(found.queries[row + 32 :: 32].tolist())) == min(2, asked[row])
    halves = [triplets.examples(1, start, start + 16, settings).queries.reshape(3, 16) for start in (40, 56)]
    assert np.array_equal(np.concatenate(halves, axis=1).ravel(), found.queries)
    grades = {(p["query"], p["item_id"]): p["grade"] for p in pairs}
    assert set(found.weights.tolist()) <= {grade / max(grades.values()) for grade in grades.values()}


def test_positives_and_negatives_are_those_of_the_pairs(
    triplets: Triplets, pairs: list[dict[str, Any]], items: list[dict[str, Any]]
) -> None:
    ids = sorted({pair["query_id"] for pair in pairs})
    known = {(pair["query_id"], pair["item_id"]): pair for pair in pairs}
    found = triplets.examples(3, 0, 500, BatchSettings(negatives=1))
    for query, positive, negative in zip(found.queries, found.items[:500], found.items[500:], strict=True):
        pair = known[ids[query], items[positive]["item_id"]]
        assert items[negative]["item_id"] in {n["item_id"] for n in pair["negatives"]}
    matrix = triplets.known(np.arange(triplets.num_queries), np.arange(triplets.num_items))
    assert {(ids[q], items[i]["item_id"]) for q, i in np.argwhere(matrix)} == set(known)


@given(st.lists(st.integers(0, 20), max_size=12), st.lists(st.integers(0, 60), max_size=30))
def test_known_is_what_a_loop_over_all_finds(triplets: Triplets, queries: list[int], items: list[int]) -> None:
    everything = triplets.known(np.arange(triplets.num_queries), np.arange(triplets.num_items))
    found = triplets.known(np.array(queries, np.int64), np.array(items, np.int64))
    assert found.tolist() == [[bool(everything[q, i]) for i in items] for q in queries]


def test_a_batch_holds_what_prepare_wrote(triplets: Triplets, items: list[dict[str, Any]], tokens: Tokens) -> None:
    found = triplets.examples(0, 0, 40, PLAIN)
    batch = triplets.batch(found, PLAIN)
    assert set(found.variants) == {0, 1}
    for place, (number, variant) in enumerate(zip(found.items, found.variants, strict=True)):
        row = items[number]
        assert batch.pixels_MSS3[place].tobytes() == row["pixels"]
        assert batch.pixels_MSS3[place].tobytes() == inputs.pixels(row["image"], 32).tobytes()
        text = row["fields"]["colour"] if variant else row["text"]
        read = batch.titles_ML[place]
        assert read[read != PADDING].tolist() == tokens.ids([text], 12)[0].tolist()
    assert batch.has_image_M.all()


def test_modality_dropout_hides_as_many_photos_as_it_says(triplets: Triplets) -> None:
    found = triplets.examples(0, 0, 4000, BatchSettings(modality_dropout=0.25))
    assert 1 - triplets.batch(found, PLAIN).has_image_M.mean() == pytest.approx(0.25, abs=0.03)


def test_log_q_is_the_chance_to_be_drawn(triplets: Triplets) -> None:
    drawn = np.concatenate([triplets.examples(s, 0, triplets.num_queries, PLAIN).items for s in range(200)])
    share = np.bincount(drawn, minlength=triplets.num_items) / len(drawn)
    often = np.argsort(-share)[:20]
    assert np.exp(triplets.log_q(often)) == pytest.approx(share[often], rel=0.35)


def test_validation_ranks_judged_items_among_others(
    triplets: Triplets, triplets_folder: Path, tokens: Tokens
) -> None:
    queries = pq.read_table(triplets_folder / "queries").to_pylist()
    assert len(triplets.validation_queries()) == len(queries)
    assert triplets.num_validation_items == artifacts.read(triplets_folder, "triplets").counts["items"]
    words = {tuple(tokens.ids([q["query"]], 8)[0].tolist()) for q in queries}
    assert {tuple(row[row != PADDING].tolist()) for row in triplets.validation_queries()} == words
    qrels = pq.read_table(triplets_folder / "qrels").to_pylist()
    assert sorted(triplets.validation_qrels()[:, 2]) == sorted(row["grade"] for row in qrels)
    batch = triplets.validation_items(3, 7)
    assert len(batch.titles_ML) == len(batch.pixels_MSS3) == 4


def test_a_bounded_validation_keeps_the_judged(triplets_folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    qrels = pq.read_table(triplets_folder / "qrels").to_pylist()
    few = Triplets(
        layouts.lay_out(
            triplets_folder, shape(validation={"queries": 1, "items": len(qrels) + 5}), tokens, tmp_path
        )
    )
    asked = len(few.validation_qrels())
    assert len(few.validation_queries()) == 1
    assert 0 < asked <= few.num_validation_items <= len(qrels) + 5


def test_queries_are_found_by_number(triplets_folder: Path, pairs: list[dict[str, Any]]) -> None:
    ids = sorted({pair["query_id"] for pair in pairs})
    assert layouts.query_ids(triplets_folder, [4, 0]) == [ids[4], ids[0]]


def test_a_layout_is_made_once(triplets_folder: Path, tokens: Tokens, layout: Path) -> None:
    stamp = (layout / "pixels.npy").stat().st_mtime_ns
    assert layouts.lay_out(triplets_folder, shape(), tokens, layout.parent) == layout
    assert (layout / "pixels.npy").stat().st_mtime_ns == stamp
    assert not (layout / artifacts.WORK).exists()


def test_a_damaged_layout_is_told_and_made_anew(
    triplets_folder: Path, tokens: Tokens, layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(layout, tmp_path / layout.name))
    content = bytearray((other / "pixels.npy").read_bytes())
    content[len(content) // 2] ^= 1
    (other / "pixels.npy").write_bytes(content)
    assert layouts.lay_out(triplets_folder, shape(), tokens, tmp_path) == other
    assert "pixels.npy as its manifest states it; found other content" in capsys.readouterr().out
    assert (other / "pixels.npy").read_bytes() == (layout / "pixels.npy").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"split": "test"}, ArtifactError, "'test'"),
        ({"texts": ("text", "colr")}, ConfigError, "colr"),
        ({"validation": {"split": "tset"}}, ConfigError, "tset"),
        ({"repeats": {"trian*": 2}}, ConfigError, r"trian\*, which fits none of \d+ queries"),
        ({"repeats": {"*": 0}}, ConfigError, "a query that is asked"),
    ],
    ids=["split", "text", "validation", "pattern", "nothing"],
)
def test_what_is_not_in_the_triplets_is_refused(
    triplets_folder: Path, tokens: Tokens, tmp_path: Path, wrong: dict[str, Any], kind: type, says: str
) -> None:
    with pytest.raises(kind, match=says):
        layouts.lay_out(triplets_folder, shape(**wrong), tokens, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_photos_are_mirrored_moved_and_zoomed_a_little(triplets: Triplets) -> None:
    found = triplets.examples(0, 0, 200, PLAIN)
    plain, moved = (triplets.batch(found, how).pixels_MSS3 for how in (PLAIN, BatchSettings(augment=1e-9)))
    mirrored = (moved == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    assert 70 < mirrored.sum() < 130
    assert (moved[~mirrored] == plain[~mirrored]).all()
    far = triplets.batch(found, BatchSettings(augment=0.1)).pixels_MSS3
    assert (far != plain).any(axis=(1, 2, 3)).mean() > 0.9
    assert abs(far.mean() - plain.mean()) < 3
    assert (far == triplets.batch(found, BatchSettings(augment=0.1)).pixels_MSS3).all()


def test_word_dropout_leaves_out_words_in_order(triplets: Triplets) -> None:
    found = triplets.examples(0, 0, 300, PLAIN)
    plain, thin = (triplets.batch(found, how).titles_ML for how in (PLAIN, BatchSettings(word_dropout=0.5)))
    lengths = [(row != PADDING).sum() for row in plain], [(row != PADDING).sum() for row in thin]
    assert sum(lengths[1]) / sum(lengths[0]) == pytest.approx(0.5 + 0.5 * 300 / sum(lengths[0]), abs=0.06)
    for before, after in zip(plain, thin, strict=True):
        left, words = iter(before.tolist()), after[after != PADDING].tolist()
        assert all(word in left for word in words)  # a subsequence
        assert words[0] == before[0]
