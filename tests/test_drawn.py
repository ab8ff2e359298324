import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from askew import drawn, photos
from askew.drawn import Catalogue, Item, Query
from askew.errors import DataError


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return drawn.plan(seed=3, num_items=600)


def decoded(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def grade(item: Item, query: Query) -> int:
    missed = [name for name, value in query.wants.items() if getattr(item, name) != value]
    if "kind" not in missed:
        return {0: 3, 1: 2}.get(len(missed), 0)
    return int(item.kind in drawn.KINDS[query.wants["kind"]].goes_with and "colour" not in missed)


def exact_items(catalogue: Catalogue, query: Query) -> list[Item]:
    return [item for item in catalogue.items if grade(item, query) == 3]


def test_every_kind_has_a_shape_and_known_companions() -> None:
    assert list(drawn.KINDS) == list(photos.SHAPES)
    assert len(drawn.KINDS) >= 24
    assert {other for kind in drawn.KINDS.values() for other in kind.goes_with} <= set(drawn.KINDS)


def test_no_word_means_two_things() -> None:
    words = [word for alternatives in drawn.SYNONYMS.values() for word in alternatives]
    words += [value for name in ("kind", "colour", "pattern") for value in drawn.VALUES[name]]
    assert len(words) == len(set(words))
    assert all(value in words for value in drawn.SYNONYMS)


def test_same_seed_same_catalogue(catalogue: Catalogue) -> None:
    again, other = drawn.plan(seed=3, num_items=600), drawn.plan(seed=4, num_items=600)
    assert (again.items, again.queries) == (catalogue.items, catalogue.queries)
    assert np.array_equal(again.judgments, catalogue.judgments)
    assert other.items != catalogue.items


def test_the_smallest_catalogue_stands_and_a_smaller_one_is_refused() -> None:
    for seed in range(5):
        assert {query.segment for query in drawn.plan(seed, 300).queries} == {"train", *drawn.SEGMENTS}
    with pytest.raises(DataError, match="at least 300 items"):
        drawn.plan(0, 299)


def test_full_size_keeps_its_counts() -> None:
    full = drawn.plan()
    segments = [query.segment for query in full.queries]
    assert len(full.items) >= 6500
    assert segments.count("train") == 1500
    assert [segments.count(segment) for segment in drawn.SEGMENTS] == [200, 200, 200]
    assert 0.17 < len(full.items_of("val")) / len(full.items) < 0.23
    assert len(full.judgments) < 400_000


def test_splits_share_no_item_and_val_holds_whole_combinations(catalogue: Catalogue) -> None:
    train, val = catalogue.items_of("train"), catalogue.items_of("val")
    assert len(train) + len(val) == len({item.item_id for item in (*train, *val)}) == 600
    seen = {(item.kind, item.colour, item.pattern) for item in train}
    assert sum((item.kind, item.colour, item.pattern) not in seen for item in val) > 40


def test_segments_hold_what_they_promise(catalogue: Catalogue) -> None:
    train_texts = {query.text for query in catalogue.queries if query.split == "train"}
    for query in catalogue.queries:
        splits = {item.split for item in exact_items(catalogue, query)}
        if query.split == "val":
            assert (query.text in train_texts) == (query.segment == "seen")
            assert (splits == {"val"}) == (query.segment == "new_item")
    ids = [query.query_id for query in catalogue.queries]
    assert len(ids) == len(set(ids))


def test_red_striped_mug_is_asked_and_for_sale(catalogue: Catalogue) -> None:
    asked = [query for query in catalogue.queries if query.text == "red striped mug"]
    assert [query.segment for query in asked] == ["train", "seen"]
    assert len(exact_items(catalogue, asked[0])) >= 3


def test_grades_follow_from_attributes(catalogue: Catalogue) -> None:
    for place, number, given in catalogue.judgments.tolist():
        assert grade(catalogue.items[number], catalogue.queries[place]) == given


def test_all_exact_items_of_the_pool_are_judged_and_no_item_twice(catalogue: Catalogue) -> None:
    rows = catalogue.judgments
    assert len(np.unique(rows[:, :2], axis=0)) == len(rows)
    for place, query in enumerate(catalogue.queries):
        judged = rows[rows[:, 0] == place]
        pool = [item for item in exact_items(catalogue, query) if query.split in ("val", item.split)]
        assert judged[judged[:, 2] == 3][:, 1].tolist() == [item.number for item in pool] != []
        assert np.count_nonzero(judged[:, 2] == 0) == 5
        assert all(np.count_nonzero(judged[:, 2] == mark) <= most for mark, most in drawn.MOST_JUDGED.items())


def test_train_queries_know_train_items_alone(catalogue: Catalogue) -> None:
    for place, number, _ in catalogue.judgments.tolist():
        assert catalogue.queries[place].split == "val" or catalogue.items[number].split == "train"


def test_titles_name_what_they_say_they_name_and_nothing_else(catalogue: Catalogue) -> None:
    for item in catalogue.items:
        title = item.title.lower()
        for name in drawn.ATTRIBUTES:
            value = getattr(item, name)
            told = any(word.lower() in title for word in (value, *drawn.SYNONYMS.get(value, ())))
            assert told or name not in item.named, (name, item)
            if name == "colour":
                assert told == (name in item.named), item
        if "kind" not in item.named:
            assert not any(size.lower() in title for size in drawn.KINDS[item.kind].sizes if len(size) > 2)


def test_omission_rates_are_near_those_stated() -> None:
    rates = drawn.plan(seed=5, num_items=4000).omission_rates()
    assert rates == pytest.approx(drawn.OMITTED, abs=0.03)


def test_photo_is_a_jpeg_that_depends_on_seed_and_item_alone(catalogue: Catalogue) -> None:
    item = catalogue.items[0]
    image = decoded(drawn.photo(item, seed=0))
    assert (image.format, image.size, image.mode) == ("JPEG", (128, 128), "RGB")
    assert drawn.photo(item, seed=0) == drawn.photo(item, seed=0) != drawn.photo(item, seed=1)
    assert drawn.photo(replace(item, title="", brand="", price=0.0), seed=0) == drawn.photo(item, seed=0)


def test_items_of_equal_attributes_look_different(catalogue: Catalogue) -> None:
    first, second = (np.asarray(decoded(drawn.photo(catalogue.items[n], 0)), dtype=float) for n in (0, 1))
    assert np.abs(first - second).mean() > 5


@pytest.mark.parametrize("kind", photos.SHAPES)
def test_every_shape_fills_the_photo_and_shows_its_colour_when_small(kind: str) -> None:
    def small(colour: str, pattern: str) -> np.ndarray:
        jpeg = photos.draw(kind, colour, pattern, np.random.default_rng(1))
        return np.asarray(decoded(jpeg).resize((48, 48)), dtype=float)

    red, blue = small("red", "plain"), small("blue", "plain")
    recoloured = (red - blue)[..., 0] - (red - blue)[..., 2] > 100
    assert 0.04 < recoloured.mean() < 0.7
    for pattern in photos.PATTERNS[1:]:
        changed = np.abs(small("red", pattern) - red).max(axis=-1) > 60
        assert 0.1 < changed[recoloured].mean() < 0.8, pattern


def test_written_files_have_the_layout_and_the_same_bytes(tmp_path: Path) -> None:
    catalogue = drawn.plan(seed=1, num_items=300)
    for name in ("one", "two"):
        drawn.write(catalogue, tmp_path / name, rows_per_file=200)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for split in ("train", "val"):
        table = pq.read_table(tmp_path / "one" / "items" / split)
        items = catalogue.items_of(split)
        assert table.column_names == ["item_id", "title", *drawn.ATTRIBUTES, "price", "image"]
        assert table["item_id"].to_pylist() == [item.item_id for item in items]
        assert table["image"][7].as_py() == drawn.photo(items[7], catalogue.seed)


def test_query_files_hold_every_query_and_judgment(tmp_path: Path, catalogue: Catalogue) -> None:
    drawn.write_queries(catalogue, tmp_path)
    queries = {split: (tmp_path / f"{split}.queries.jsonl").read_text().splitlines() for split in ("train", "val")}
    qrels = [line for split in queries for line in (tmp_path / f"{split}.qrels.tsv").read_text().splitlines()]
    first = json.loads(queries["train"][0])
    assert first == {"query_id": "train-0000", "query": "red striped mug", "segment": "train"}
    assert [len(lines) for lines in queries.values()] == [136, 54]
    assert len(qrels) == len(catalogue.judgments)
    assert all(line.split("\t")[1] == "0" and line.split("\t")[2].startswith("item-") for line in qrels)


def test_text_ceiling_leaves_room_for_photos(catalogue: Catalogue) -> None:
    ceiling = drawn.text_ceiling(catalogue)
    assert set(ceiling) == {"val", *drawn.SEGMENTS}
    assert all(0 < value < 0.97 for value in ceiling.values())


def test_text_ceiling_is_one_when_titles_tell_all(catalogue: Catalogue) -> None:
    told = tuple(replace(item, named=frozenset(drawn.ATTRIBUTES)) for item in catalogue.items)
    assert drawn.text_ceiling(replace(catalogue, items=told))["val"] == pytest.approx(1, abs=0.01)


def test_equal_scores_count_as_broken_at_random() -> None:
    gains = np.eye(10)[4] * 3
    discounts = 1 / np.log2(np.arange(2, 12))
    assert drawn._ndcg(np.zeros(10), gains) == pytest.approx(discounts.mean())
