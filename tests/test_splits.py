"""Splits against loops over all pairs, on photos drawn, saved again and scaled."""

import io
import math
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from askew import inputs, photos, splits
from askew.register import ROW
from askew.splits import COLOUR, FINE_BITS, HASH_BITS, MAX_BAND, SplitSettings

SIZE = 48
KINDS = sorted(photos.SHAPES)
DRAWN = [photos.draw(kind, "red", "plain", np.random.default_rng(n)) for n, kind in enumerate(KINDS)]
Pairs = set[tuple[int, int]]


def rows_of(pictures: list[bytes]) -> NDArray[np.void]:
    """Register rows of items with these photos, each with a title of its own."""
    pixels = np.stack([inputs.pixels(photo, SIZE) for photo in pictures])
    rows = np.zeros(len(pictures), ROW)
    rows["title"] = np.arange(len(rows))
    rows["photo"], rows["detail"] = splits.photo_hashes(pixels)
    rows["colour"] = splits.mean_colours(pixels)
    return rows


def saved(photo: bytes, quality: int = 90, scale: float = 1.0) -> bytes:
    image, out = Image.open(io.BytesIO(photo)), io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return out.getvalue()


def flipped(bits: int, generator: np.random.Generator, width: int = 64) -> list[int]:
    """Words of 64 bits, `bits` of all of them set."""
    where = generator.choice(width, bits, replace=False)
    return [sum(1 << int(b % 64) for b in where if b // 64 == word) for word in range(width // 64)]


def lookalikes(seed: int, num_rows: int = 60) -> NDArray[np.void]:
    """Rows around a few photos, which differ from them by about as much as near-identical ones may."""
    generator = np.random.default_rng(seed)
    rows = np.zeros(num_rows, ROW)
    first = generator.integers(2**64, size=(5, 5), dtype=np.uint64)
    for row in rows:
        model = first[generator.integers(5)]
        row["photo"] = model[0] ^ np.uint64(flipped(int(generator.integers(HASH_BITS + 1)), generator)[0])
        differ = flipped(int(generator.integers(FINE_BITS)), generator, 256)
        row["detail"] = model[1:] ^ np.array(differ, dtype=np.uint64)
        row["colour"] = 100 + generator.integers(COLOUR + 3, size=3)
    rows["photo"][generator.random(num_rows) < 0.1] = 0
    return rows


def slow_pairs(rows: NDArray[np.void]) -> Pairs:
    """Near-identical photos by their definition, each compared with each."""

    def differing(one: int, other: int) -> int:
        return (one ^ other).bit_count()

    near = set()
    for (i, one), (j, other) in combinations(enumerate(rows.tolist()), 2):
        (photo, detail, colour), (photo2, detail2, colour2) = one[3:6], other[3:6]
        near |= {(i, j)} if (
            photo and photo2 and differing(photo, photo2) <= HASH_BITS
            and sum(map(differing, detail.tolist(), detail2.tolist())) <= FINE_BITS
            and all(abs(a - b) <= COLOUR for a, b in zip(colour.tolist(), colour2.tolist(), strict=True))
        ) else set()  # fmt: skip
    return near


def slow_groups(num_rows: int, pairs: Pairs) -> list[int]:
    """The least row that each can be reached from."""
    least = list(range(num_rows))
    while any(least[i] != least[j] for i, j in pairs):
        for i, j in pairs:
            least[i] = least[j] = min(least[i], least[j])
    return least


def partition(labels: NDArray[np.int64]) -> list[int]:
    """Labels as the first row that has each."""
    return [labels.tolist().index(label) for label in labels.tolist()]


# --- photos --------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [{"quality": 60}, {"scale": 2}, {"scale": 0.75, "quality": 80}], ids=str)
def test_a_photo_saved_again_is_the_same(again: dict[str, float]) -> None:
    copies = [saved(photo, **again) for photo in DRAWN]  # type: ignore[arg-type]
    labels = splits.groups(rows_of([*DRAWN, *copies]), SplitSettings())
    assert copies != DRAWN
    assert np.mean(labels[: len(DRAWN)] == labels[len(DRAWN) :]) >= 0.9


def test_photos_of_different_products_are_not_the_same() -> None:
    colours = [photos.draw(KINDS[0], colour, "plain", np.random.default_rng(0)) for colour in ("red", "blue")]
    labels = splits.groups(rows_of([*DRAWN, colours[1]]), SplitSettings())
    assert len(set(labels.tolist())) == len(DRAWN) + 1


@pytest.mark.parametrize("size", [8, 32, 48, 100])
def test_photos_of_any_size_have_hashes_alone_as_among_others(size: int) -> None:
    pixels = np.stack([inputs.pixels(photo, size) for photo in DRAWN])
    photo, detail = splits.photo_hashes(pixels)
    for number in range(len(pixels)):
        alone = splits.photo_hashes(pixels[number : number + 1])
        assert (photo[number], detail[number].tolist()) == (alone[0][0], alone[1][0].tolist())
    assert [found.shape for found in splits.photo_hashes(pixels[:0])] == [(0,), (0, 4)]


def test_no_photo_hashes_to_what_stands_for_none() -> None:
    assert splits.photo_hashes(np.zeros((1, SIZE, SIZE, 3), np.uint8))[0][0] != 0


# --- groups --------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_the_banded_search_finds_what_comparing_each_with_each_does(seed: int) -> None:
    rows = lookalikes(seed)
    found = {(min(pair), max(pair)) for pair in splits._near(rows).T.tolist()}
    assert found == slow_pairs(rows)


@pytest.mark.parametrize(
    ("photo", "detail", "colour", "joined"),
    [
        (HASH_BITS, FINE_BITS, COLOUR, True),
        (HASH_BITS + 1, 0, 0, False),
        (0, FINE_BITS + 1, 0, False),
        (0, 0, COLOUR + 1, False),
    ],
)
def test_photos_are_near_up_to_each_of_three_bounds(photo: int, detail: int, colour: int, joined: bool) -> None:
    rows, generator = np.zeros(2, ROW), np.random.default_rng(0)
    rows["photo"] = [1 << 63, (1 << 63) ^ sum(1 << (20 * n) for n in range(photo))]  # one bit a band
    rows["detail"][1] = flipped(detail, generator, 256)
    rows["colour"][1, 1] = colour
    assert (splits._near(rows).shape[1] > 0) == joined


def test_a_crowd_of_one_photo_is_one_group() -> None:
    rows = np.zeros(MAX_BAND * 5, ROW)
    rows["photo"], rows["title"] = 12345, np.arange(len(rows))
    assert set(splits.groups(rows, SplitSettings()).tolist()) == {0}


def test_groups_are_what_links_lead_to_however_indirectly() -> None:
    rows = np.zeros(4, ROW)
    rows["title"], rows["photo"] = [1, 1, 2, 3], [0, 7, 7, 0]
    assert partition(splits.groups(rows, SplitSettings())) == [0, 0, 0, 3]
    assert partition(splits.groups(rows, SplitSettings(same_title=False))) == [0, 1, 1, 3]
    assert partition(splits.groups(rows, SplitSettings(same_photo=False))) == [0, 0, 2, 3]
    assert partition(splits.groups(rows, SplitSettings(same_photo=False, same_title=False))) == [0, 1, 2, 3]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 40), min_size=30, max_size=30))
def test_groups_are_those_of_a_walk_over_all_pairs(seed: int, titles: list[int]) -> None:
    rows = lookalikes(seed, len(titles))
    rows["title"] = titles
    alike = {(i, j) for i, j in combinations(range(len(rows)), 2) if titles[i] == titles[j]}
    assert partition(splits.groups(rows, SplitSettings())) == slow_groups(len(rows), alike | slow_pairs(rows))


def test_no_rows_make_no_groups() -> None:
    assert splits.groups(np.zeros(0, ROW), SplitSettings()).tolist() == []


# --- sides ---------------------------------------------------------------------------------------


@given(st.data())
def test_evaluation_keeps_a_group_before_training_and_the_first_split_by_name_before_others(
    data: st.DataObject,
) -> None:
    names = data.draw(st.permutations(["train", "test", "val", "aside"]))
    members = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30))
    labels, split = np.array(members, dtype=np.int64).reshape(-1, 2).T
    expected = []
    for label, number in members:
        rivals = {names[n] for other, n in members if other == label}
        keeper = min(rivals - {"train"}, default="train")
        expected.append(names[number] != keeper)
    assert splits.set_aside(labels, split.astype(np.uint8), names, "train").tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 5)), min_size=1, max_size=30), st.randoms())
def test_the_key_of_a_group_is_its_least_id_in_whatever_order(
    items: list[tuple[int, int]], random: Random
) -> None:
    random.shuffle(items)
    ids, labels = np.array([i for i, _ in items], np.uint64), np.array([g for _, g in items])
    expected = [min(i for i, other in items if other == group) for _, group in items]
    assert splits.group_keys(ids, labels).tolist() == expected


# --- shares --------------------------------------------------------------------------------------

KEYS = np.arange(100_000, dtype=np.uint64)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_share_is_about_what_was_asked(share: float) -> None:
    found = splits.chosen(KEYS, share, 0, 0).mean()
    assert abs(found - share) <= 5 * math.sqrt(share * (1 - share) / len(KEYS))


def test_a_choice_depends_on_the_key_alone() -> None:
    whole = splits.chosen(KEYS, 0.3, 7, 1)
    order = np.random.default_rng(0).permutation(len(KEYS))
    assert (splits.chosen(KEYS[order], 0.3, 7, 1) == whole[order]).all()
    assert splits.chosen(KEYS[5:6], 0.3, 7, 1) == whole[5]


def test_a_larger_share_chooses_more_and_loses_none() -> None:
    shares = [splits.chosen(KEYS, share, 0, 0) for share in (0.1, 0.2, 0.8)]
    assert (shares[0] <= shares[1]).all()
    assert (shares[1] <= shares[2]).all()


@pytest.mark.parametrize(("seed", "salt"), [(0, 1), (1, 0), (-1, 0), (2**40, 3)])
def test_choices_of_another_seed_or_salt_are_independent(seed: int, salt: int) -> None:
    one, other = splits.chosen(KEYS, 0.5, 0, 0), splits.chosen(KEYS, 0.5, seed, salt)
    assert abs((one & other).mean() - 0.25) < 0.01


@pytest.mark.parametrize("place", range(3))
def test_keys_are_hashed_as_splitmix64_does(place: int) -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F][place] / 2**64  # of the seed 0
    below, above = (splits.chosen(KEYS[:1], published + by, 0, place) for by in (-1e-9, 1e-9))
    assert (below[0], above[0]) == (False, True)
