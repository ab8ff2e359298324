from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from askew import inputs
from askew.batches import Triplets, lay_out
from askew.errors import ArtifactError
from askew.inputs import Tokens


@pytest.fixture(scope="module")
def tokens(triplets_folder: Path) -> Tokens:
    texts = pq.read_table(triplets_folder / "items", columns=["text"])["text"].to_pylist()
    return Tokens.train(texts, 500)


@pytest.fixture(scope="module")
def triplets(triplets_folder: Path, tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Triplets:
    return Triplets(lay_out(triplets_folder, "train", tokens, (8, 12), tmp_path_factory.mktemp("layout")))


@pytest.fixture(scope="module")
def known(triplets_folder: Path) -> set[tuple[str, str]]:
    rows = pq.read_table(triplets_folder / "pairs").to_pylist()
    return {(row["query_id"], row["item_id"]) for row in rows}


def test_an_epoch_shows_every_query_once_with_a_positive(triplets: Triplets) -> None:
    n = triplets.num_queries
    queries, positives, negatives = triplets.rows(0, n, 2 * n)
    assert sorted(queries) == list(range(n))
    everything = np.arange(triplets.num_items)
    right = triplets.known(queries, everything)
    assert right[np.arange(n), positives].all()
    assert not right[np.arange(n), negatives].any()


def test_examples_depend_on_seed_and_number_alone(triplets: Triplets) -> None:
    n = triplets.num_queries
    whole = np.stack(triplets.rows(0, n - 5, n + 5))
    parts = np.concatenate([np.stack(triplets.rows(0, at, at + 2)) for at in range(n - 5, n + 5, 2)], axis=1)
    assert (whole == parts).all()
    assert (whole != np.stack(triplets.rows(1, n - 5, n + 5))).any()


def test_known_is_what_the_pairs_say(triplets: Triplets, known: set[tuple[str, str]]) -> None:
    matrix = triplets.known(np.arange(triplets.num_queries), np.arange(triplets.num_items))
    assert matrix.sum() == len(known) == triplets.num_pairs


def test_a_batch_holds_what_prepare_wrote(triplets: Triplets, triplets_folder: Path, tokens: Tokens) -> None:
    items = pq.read_table(triplets_folder / "items").to_pylist()
    train = [row for row in items if row["split"] == "train"]
    rows = np.array([3, 0, len(train) - 1])
    batch = triplets.batch(np.array([0]), rows)
    for place, row in enumerate(rows):
        assert batch.pixels_NSS3[place].tobytes() == train[row]["pixels"]
        assert batch.pixels_NSS3[place].tobytes() == inputs.pixels(train[row]["image"], 32).tobytes()
    expected = tokens.ids([train[row]["text"] for row in rows], 12)
    assert (batch.titles_NL == expected).all()
    assert batch.has_image_N.all()


def test_a_layout_is_made_once(triplets_folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    first = lay_out(triplets_folder, "train", tokens, (8, 12), tmp_path)
    stamp = (first / "pixels.npy").stat().st_mtime_ns
    assert lay_out(triplets_folder, "train", tokens, (8, 12), tmp_path) == first
    assert (first / "pixels.npy").stat().st_mtime_ns == stamp
    assert lay_out(triplets_folder, "train", tokens, (8, 13), tmp_path) != first


def test_a_split_without_items_is_refused(triplets_folder: Path, tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'test'"):
        lay_out(triplets_folder, "test", tokens, (8, 12), tmp_path)
    assert list(tmp_path.iterdir()) == []
