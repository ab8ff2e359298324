"""Cleaning a few raw files without a cluster: what their fields become, and what is set aside."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from askew import cleaning, photos, register, sources, splits, tables
from askew.cleaning import ALL, Cleaner, CleanSettings
from askew.errors import DataError

PHOTO = photos.draw("mug", "red", "plain", np.random.default_rng(0))
Rows = list[dict[str, Any]]


@dataclass
class Cleaned:
    """What came of a shop's files of items."""

    fields: dict[str, pa.DataType]
    items: Rows
    set_aside: Rows
    register: np.ndarray
    splits: list[str]

    def reasons(self) -> list[tuple[str, str, str]]:
        return [(bad["kind"], bad["id"], bad["reason"]) for bad in self.set_aside]

    def values(self, name: str) -> list[Any]:
        return [item["fields"][name] for item in self.items]


def cleaned(folder: Path, files: dict[str, str | Rows], **values: Any) -> Cleaned:
    """Write files, of text or (Parquet) of rows, and clean them as the stage does."""
    data, out = folder / "data", folder / "out"
    data.mkdir()
    for name, content in files.items():
        if isinstance(content, str):
            (data / name).write_text(content)
        else:
            pq.write_table(pa.Table.from_pylist(content), data / name)
    table = sources.Table(files=tuple(files))
    wanted = CleanSettings(**{"image_size": 8, **values}).model_dump(mode="json")
    fields = cleaning.fields(sources.Layout(items=(table,)), str(data))
    units = sources.units(table, str(data))
    cleaner = Cleaner(table.model_dump(mode="json"), wanted, fields, triplets=False)
    results = [cleaner.clean(unit, out, number) for number, unit in enumerate(units)]
    parts = [Path(part["path"]) for result in results for part in result["parts"]]
    rows = [np.load(part.with_suffix(".npy")) for part in parts]
    return Cleaned(
        {field.name: field.type for field in fields},
        [row for part in parts for row in pq.read_table(part).to_pylist()],
        pq.read_table(out / "quarantine").to_pylist(),
        np.concatenate([np.zeros(0, register.ROW), *rows]),
        cleaning.names_of(results),
    )


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def csv(sizes: list[str]) -> str:
    return "\n".join(["item_id,title,size", *(f"i{n},thing {n},{size}" for n, size in enumerate(sizes)), ""])


def items(**values: list[Any]) -> Rows:
    """Rows of items with these values of other columns."""
    num_rows = len(next(iter(values.values())))
    own = [{"item_id": f"i{n}", "title": f"thing {n}"} for n in range(num_rows)]
    return [row | {name: each[n] for name, each in values.items()} for n, row in enumerate(own)]


# --- types of fields -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "kind", "values"),
    [
        ([1, 2], [3], pa.int64(), [1, 2, 3]),
        ([1, 2], [0.5], pa.float64(), [1.0, 2.0, 0.5]),
        ([1, 2], ["large"], pa.string(), ["1", "2", "large"]),
        ([True], [False], pa.bool_(), [True, False]),
        ([True], [2], pa.string(), ["true", "2"]),
        ([None], [3], pa.int64(), [None, 3]),
        ([None], [None], pa.string(), [None, None]),
        ([["a", "b"]], [[]], pa.string(), ['["a", "b"]', "[]"]),
        ([{"b": 1, "a": None}], [None], pa.string(), ['{"a": null, "b": 1}', None]),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_field_has_one_type_that_fits_all_files(
    tmp_path: Path, suffix: str, one: list[Any], other: list[Any], kind: pa.DataType, values: list[Any]
) -> None:
    rows = {f"{n}.{suffix}": items(size=each) for n, each in enumerate((one, other))}
    files: dict[str, str | Rows] = {n: lines(*r) if suffix == "jsonl" else r for n, r in rows.items()}
    found = cleaned(tmp_path, files)
    assert found.fields == {"size": kind}
    assert found.values("size") == values
    assert found.set_aside == []


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", "", "-3"], pa.int64(), [1, None, -3]),
        (["1", "2.50", ""], pa.float64(), [1.0, 2.5, None]),
        (["0", "10", "20"], pa.int64(), [0, 10, 20]),
        (["0.5", "0"], pa.float64(), [0.5, 0.0]),
        (["10", "007"], pa.string(), ["10", "007"]),
        (["01.50", "2"], pa.string(), ["01.50", "2"]),
        (["-01", "2"], pa.string(), ["-01", "2"]),
        (["10", "M"], pa.string(), ["10", "M"]),
    ],
    ids=str,
)
def test_words_of_a_csv_are_numbers_if_all_are_and_none_has_a_leading_nought(
    tmp_path: Path, cells: list[str], kind: pa.DataType, values: list[Any]
) -> None:
    found = cleaned(tmp_path, {"items.csv": csv(cells)})
    assert found.fields == {"size": kind}
    assert found.values("size") == values


def test_a_number_with_a_leading_nought_in_one_file_keeps_all_files_text(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"0.csv": csv(["10"]), "1.csv": csv(["007"])})
    assert found.values("size") == ["10", "007"]


@pytest.mark.parametrize("cells", [["0x1F", "0x2A"], ["nan", "inf"]], ids=str)
def test_words_that_only_a_programmer_takes_for_numbers_stay_words(tmp_path: Path, cells: list[str]) -> None:
    assert cleaned(tmp_path, {"items.csv": csv(cells)}).values("size") == cells


def test_items_without_other_fields_are_kept(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"items.csv": "item_id,title\ni0,thing\n"})
    assert (found.fields, [item["item_id"] for item in found.items], found.set_aside) == ({}, ["i0"], [])


# --- what is not sampled -------------------------------------------------------------------------


def with_odd_file(**values: Any) -> dict[str, str | Rows]:
    """Three files of items with a whole number as size, the one in the middle with this instead."""
    rows = [items(size=[1]), items(**{name: [value] for name, value in values.items()}), items(size=[3])]
    return {f"{number}.jsonl": lines(*each) for number, each in enumerate(rows)}


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are found in the first two rows of one file."""
    monkeypatch.setattr(cleaning, "SAMPLED_FILES", 1)
    monkeypatch.setattr(cleaning, "SAMPLED_ROWS", 2)


@pytest.mark.usefixtures("few_samples")
def test_a_value_of_another_type_is_set_aside_and_null_and_its_item_kept(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"items.csv": csv(["1", "2", "3", "large", "4.5", " "])})
    assert found.values("size") == [1, 2, 3, None, None, None]
    assert found.reasons() == [("field", "i3", "wrong_type"), ("field", "i4", "wrong_type")]
    assert found.set_aside[0]["message"] == "size is 'large', where the first rows have int64"


@pytest.mark.usefixtures("few_samples")
def test_a_leading_nought_is_never_lost_unseen(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"items.csv": csv(["10", "20", "007"])})
    assert found.reasons() == [("field", "i2", "wrong_type")]


@pytest.mark.usefixtures("few_samples")
@pytest.mark.parametrize("value", ["large", 2**63, -(2**63) - 1, 0.5, 1e30, [1], {"a": 1}], ids=str)
def test_whatever_a_value_is_the_others_are_kept(tmp_path: Path, value: Any) -> None:
    found = cleaned(tmp_path, with_odd_file(size=value))
    assert found.values("size") == [1, None, 3]
    assert found.reasons() == [("field", "i0", "wrong_type")]


@pytest.mark.usefixtures("few_samples")
def test_a_column_that_no_sample_has_is_set_aside_by_its_name(tmp_path: Path) -> None:
    found = cleaned(tmp_path, with_odd_file(size=2, shade=1, hue=2))
    assert found.values("size") == [1, 2, 3]
    assert found.reasons() == [("field", "hue", "unknown_column"), ("field", "shade", "unknown_column")]


# --- texts ---------------------------------------------------------------------------------------

TWO: dict[str, Any] = {"text_fields": ("title", "more")}


def test_a_column_called_text_stays_beside_ours(tmp_path: Path) -> None:
    files: dict[str, str | Rows] = {"items.jsonl": lines(*items(text=["of their own", None]))}
    found = cleaned(tmp_path, files)
    assert found.values("text") == ["of their own", None]
    assert [item["text"] for item in found.items] == ["thing 0", "thing 1"]


def test_the_text_is_of_the_fields_that_are_wanted(tmp_path: Path) -> None:
    rows = items(text=["of their  own", None], size=[1, 2])
    found = cleaned(tmp_path, {"items.jsonl": lines(*rows)}, text_fields=("title", "text", "size"))
    assert [item["text"] for item in found.items] == ["thing 0 of their own 1", "thing 1 2"]
    assert [item["title"] for item in found.items] == ["thing 0", "thing 1"]
    assert found.values("text") == ["of their  own", None]


def test_a_title_may_be_a_list_or_a_number_or_missing_where_there_is_a_text(tmp_path: Path) -> None:
    rows = items(title=[["red", "mug"], None], more=[None, "x\u00a0y"])
    found = cleaned(tmp_path, {"0.parquet": rows, "1.jsonl": lines(*items(title=[42], more=["z"]))}, **TWO)
    assert [item["title"] for item in found.items] == ["red mug", "x y", "42"]
    assert [item["text"] for item in found.items] == ["red mug", "x y", "42 z"]


def test_a_text_field_that_no_file_has_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wanted columns blurb in items.csv.*item_id, title"):
        cleaned(tmp_path, {"items.csv": "item_id,title\ni0,thing\n"}, text_fields=("title", "blurb"))


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"item_id": " "}, "no_id"),
        ({"item_id": None}, "no_id"),
        ({"item_id": "x" * 513}, "id_too_long"),
        ({"item_id": "a\u200bb"}, "unprintable_id"),
        ({"title": " \u0000"}, "no_text"),
        ({"title": "x" * 10_001}, "text_too_long"),
    ],
    ids=["blank id", "no id", "long id", "hidden character", "blank title", "long title"],
)
def test_an_item_that_cannot_be_used_is_set_aside_alone(tmp_path: Path, item: dict[str, Any], reason: str) -> None:
    rows = [{"item_id": "i0", "title": "thing"}, {"item_id": "i1", "title": "thing", **item}]
    found = cleaned(tmp_path, {"items.jsonl": lines(*rows)})
    assert [item["item_id"] for item in found.items] == ["i0"]
    assert [bad["reason"] for bad in found.set_aside] == [reason]


@pytest.mark.parametrize("content", ["", "\n\n", "{broken\n", "[1]\n"])
def test_a_file_without_a_readable_item_does_not_stop_the_others(tmp_path: Path, content: str) -> None:
    found = cleaned(tmp_path, {"0.jsonl": content, "1.jsonl": lines(*items(size=[1]))})
    assert [item["item_id"] for item in found.items] == ["i0"]
    assert len(found.set_aside) == bool(content.strip())


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
VALUES = st.none() | st.text() | NUMBERS | st.lists(st.text())


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.sampled_from(["item_id", "title", "size", "text"]), VALUES)))
def test_every_item_is_cleaned_or_set_aside(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    first: dict[str, Any] = {"item_id": "first", "title": "thing"}
    found = cleaned(tmp_path_factory.mktemp("any"), {"items.jsonl": lines(first, *rows)})
    dropped = [bad for bad in found.set_aside if bad["kind"] == "item"]
    assert len(found.items) + len(dropped) == 1 + len(rows)
    assert len(found.register) == len(found.items)


# --- the register --------------------------------------------------------------------------------


def test_the_register_tells_what_items_have_in_common(tmp_path: Path) -> None:
    rows: Rows = [
        {"item_id": "a", "title": "Red MUG", "split": "val", "kind": "mug", "hue": "red", "size": 1},
        {"item_id": "b", "title": "red mug", "split": None, "kind": "MUG", "hue": "red", "size": 2},
        {"item_id": "c", "title": "red cup", "split": "val", "kind": "cup", "hue": None, "size": None},
        {"item_id": "a", "title": "Red MUG", "split": "train", "kind": "mug", "hue": "red", "size": 1},
    ]
    found = cleaned(tmp_path, {"0.parquet": rows}, kind_field="kind", trait_fields=("hue", "size"))
    a, b, c, again = found.register
    assert found.register["id"].tolist() == register.hashes(["a", "b", "c", "a"]).tolist()
    assert a["title"] == b["title"] != c["title"]
    assert a["kind"] == b["kind"] != c["kind"]
    assert len({a["traits"], b["traits"], c["traits"]}) == 3
    assert a["content"] == again["content"] != b["content"]
    assert found.splits == sorted(["train", "val", ALL])


def test_an_item_with_an_empty_cell_as_split_names_none(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"items.csv": "item_id,title,split\ni0,thing,\ni1,thing,val\n"})
    assert [item["split"] for item in found.items] == [ALL, "val"]


def test_what_has_no_kind_is_of_kind_nought(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"0.parquet": items(kind=[None, "", "mug"])}, kind_field="kind")
    assert (found.register["kind"] == 0).tolist() == [True, True, False]
    assert (found.register["photo"] == 0).all()


def test_a_photo_is_kept_decoded_and_hashed_and_a_broken_one_set_aside(tmp_path: Path) -> None:
    found = cleaned(tmp_path, {"0.parquet": items(image=[None, PHOTO, b"broken", PHOTO])}, image_size=32)
    assert [item["has_image"] for item in found.items] == [False, True, False, True]
    assert [item["image"] for item in found.items] == [None, PHOTO, None, PHOTO]
    assert [(bad["kind"], bad["id"]) for bad in found.set_aside] == [("image", "i2")]
    pixels = tables.pixels(pa.array([item["pixels"] for item in found.items]), 32)
    hashes, details = splits.photo_hashes(pixels[[1, 3]])
    assert found.register["photo"].tolist() == [0, hashes[0], 0, hashes[1]]
    assert found.register["detail"][[1, 3]].tolist() == details.tolist()


# --- final parts ---------------------------------------------------------------------------------

NAMES = ["train", "val", "aside"]


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A part of items 3 to 6 of a catalogue, in two row groups, all of training."""
    cleaned(tmp_path, {"0.parquet": items(size=[3, 4])})
    source = next((tmp_path / "out" / "parts").glob("*.parquet"))
    rows = pq.read_table(source).set_column(1, "split", pa.array(["train", "train"]))
    with tables.opened(tmp_path / "part.parquet", rows.schema) as writer:
        for number in (3, 5):
            ids = pa.array([f"i{number}", f"i{number + 1}"])
            writer.write_table(rows.set_column(0, "item_id", ids))
    return tmp_path / "part.parquet"


def finished(part: Path, keep: list[int], split: list[int]) -> list[tuple[str, str]]:
    """Ids and splits of the final part, where three items stand before it and one after."""
    whole = np.array([1, 0, 1, *keep, 0], dtype=bool), np.array([1, 2, 1, *split, 2], dtype=np.uint8)
    cleaning.finish(part, 3, part.parent / "final.parquet", *whole, NAMES)
    final = pq.read_table(part.parent / "final.parquet")
    assert final.schema.equals(pq.read_schema(part))
    return list(zip(final["item_id"].to_pylist(), final["split"].to_pylist(), strict=True))


def test_a_part_that_stays_as_it_is_is_linked(part: Path) -> None:
    assert finished(part, [1, 1, 1, 1], [0, 0, 0, 0]) == [(f"i{n}", "train") for n in range(3, 7)]
    assert (part.parent / "final.parquet").samefile(part)


@pytest.mark.parametrize(
    ("keep", "split", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 0, 2], ["i3 train", "i4 val", "i5 train", "i6 aside"]),
        ([0, 1, 1, 0], [0, 0, 0, 0], ["i4 train", "i5 train"]),
        ([0, 0, 1, 1], [2, 2, 1, 0], ["i5 val", "i6 train"]),
        ([0, 0, 0, 0], [0, 0, 0, 0], []),
    ],
)
def test_a_part_that_changes_is_written_anew(
    part: Path, keep: list[int], split: list[int], expected: list[str]
) -> None:
    before = part.read_bytes()
    assert [" ".join(row) for row in finished(part, keep, split)] == expected
    assert part.read_bytes() == before


@pytest.mark.parametrize("names", [["train", "aside"], ["new"], [f"s{n}" for n in range(251)]])
def test_splits_that_are_too_many_or_called_as_ours_are_refused(names: list[str]) -> None:
    with pytest.raises(DataError, match="split"):
        cleaning.names_of([{"splits": names}])
    assert cleaning.names_of([{"splits": ["b", "a"]}, {"splits": ["a"]}]) == ["a", "b"]
