"""The register against dictionaries, and its hashes against what they were."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.register import ROW, Register, hashes

Rows = list[tuple[int, int]]  # id and content of items, so few that they repeat
rows_of_items = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), max_size=30)


def gathered(parts: list[Rows], folder: Path) -> Register:
    paths = [folder / f"{number}.npy" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        rows = np.zeros(len(part), ROW)
        rows["id"], rows["content"] = np.array(part, dtype=np.uint64).reshape(-1, 2).T
        np.save(path, rows)
    return Register.gather(paths, folder / "register", [np.zeros(1, np.uint8)] * len(parts))


def test_hashes_are_those_of_every_machine_and_every_day() -> None:
    assert hashes(["", "i0", "Größe 42", "商品"]).tolist() == [
        0x186DA64456263A46,
        0xA2C7E3866F3FD6E3,
        0x45DA056ADA11A071,
        0xE764D92CB946236C,
    ]


def test_a_column_hashes_as_its_list_and_a_null_as_an_empty_string() -> None:
    assert hashes(pa.array(["i0", None, ""])).tolist() == hashes(["i0", "", ""]).tolist()
    assert hashes(pa.array([], pa.string())).tolist() == hashes([]).tolist() == []


@given(st.sets(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=50))
def test_other_strings_have_other_hashes(texts: set[str]) -> None:
    assert len(set(hashes(sorted(texts)).tolist())) == len(texts)


@given(rows_of_items, st.lists(st.integers(0, 12)))
def test_an_id_finds_the_first_item_that_has_it(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, asked: list[int]
) -> None:
    register = gathered([rows], tmp_path_factory.mktemp("register"))
    ids = [item_id for item_id, _ in rows]
    expected = [ids.index(a) if a in ids else -1 for a in asked]
    assert register.find(np.array(asked, dtype=np.uint64)).tolist() == expected


@given(rows_of_items)
def test_repeated_tells_every_later_item_of_an_id_and_whether_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows
) -> None:
    numbers, same = gathered([rows], tmp_path_factory.mktemp("register")).repeated()
    ids = [item_id for item_id, _ in rows]
    expected = [(n, rows[ids.index(i)] == rows[n]) for n, i in enumerate(ids) if ids.index(i) < n]
    assert list(zip(numbers.tolist(), same.tolist(), strict=True)) == expected


@given(st.lists(rows_of_items, max_size=4))
def test_parts_are_gathered_in_order(tmp_path_factory: pytest.TempPathFactory, parts: list[Rows]) -> None:
    register = gathered(parts, tmp_path_factory.mktemp("register"))
    assert register.rows[["id", "content"]].tolist() == [row for part in parts for row in part]


def test_each_part_has_numbers_of_its_own_for_the_splits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = np.zeros(3, ROW)
        rows["split"] = [0, 1, 0]
        np.save(tmp_path / f"{name}.npy", rows)
    recode = [np.array([0, 1], np.uint8), np.array([2, 0], np.uint8)]
    register = Register.gather([tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "register", recode)
    assert register.rows["split"].tolist() == [0, 1, 0, 2, 0, 2]


def test_what_is_kept_is_found_under_its_new_number_in_its_new_split(tmp_path: Path) -> None:
    everything = gathered([[(7, 0), (5, 0)], [(5, 1), (3, 0)]], tmp_path)
    keep, split = np.array([True, False, True, True]), np.array([4, 5, 6, 7], np.uint8)
    register = everything.kept(keep, split, tmp_path / "kept")
    assert register.find(np.array([7, 5, 3], np.uint64)).tolist() == [0, 1, 2]
    assert register.rows[["content", "split"]].tolist() == [(0, 4), (1, 6), (0, 7)]
    assert everything.rows["split"].tolist() == [0, 0, 0, 0]


def test_a_register_opened_again_is_the_same(tmp_path: Path) -> None:
    gathered([[(7, 0), (5, 1)]], tmp_path)
    register = Register(tmp_path / "register")
    assert len(register) == 2
    assert register.find(np.array([5, 6], np.uint64)).tolist() == [1, -1]


def test_nothing_is_found_in_an_empty_register(tmp_path: Path) -> None:
    register = gathered([], tmp_path)
    assert len(register) == 0
    assert register.find(np.array([0, 1], np.uint64)).tolist() == [-1, -1]
    assert [found.tolist() for found in register.repeated()] == [[], []]
