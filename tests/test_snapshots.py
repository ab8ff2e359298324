"""Snapshots: whole or absent, checked by sha256sum, and linked to the one before."""

import os
from pathlib import Path

import pytest

from askew import artifacts, snapshots
from askew.errors import ArtifactError
from askew.snapshots import SUMS, Snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text(name * 1000)
    return folder


def taken(to: Path, source: Path, *names: str) -> Path:
    with snapshots.draft(to) as draft:
        for name in names:
            draft.take(f"in/{name}", source / name)
    return draft.folder


def test_the_second_links_what_the_first_has(tmp_path: Path, source: Path) -> None:
    first = taken(tmp_path / "to", source, "a", "b")
    (source / "b").write_text("other")
    second = taken(tmp_path / "to", source, "a", "b", "c")
    assert snapshots.newest(tmp_path / "to") == second
    same = {name: (first / name).samefile(second / name) for name in ("in/a", "in/b")}
    assert same == {"in/a": True, "in/b": False}
    assert (first / "in/b").read_text() == "b" * 1000
    for folder in (first, second):
        assert set(snapshots.verify(folder)) == set(snapshots.listed(folder)) - {SUMS}


def test_what_the_first_has_need_not_be_read(tmp_path: Path, source: Path) -> None:
    taken(tmp_path / "to", source, "a")
    sum_ = artifacts.sha256(source / "a")
    with snapshots.draft(tmp_path / "to") as draft:
        assert draft.has("again", sum_)
        assert not draft.has("b", artifacts.sha256(source / "b"))
        draft.take("gone", tmp_path / "nowhere", sum_)
        assert draft.copied == 0
    assert {name: sum_ for name in ("again", "gone")} == snapshots.verify(draft.folder)


def test_without_hard_links_they_are_copies(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    first, second = (taken(tmp_path / "to", source, "a", "b") for _ in range(2))
    assert not (first / "in/a").samefile(second / "in/a")
    assert snapshots.verify(first) == snapshots.verify(second)


def test_what_fails_is_not_seen_and_the_next_goes_on_with_it(tmp_path: Path, source: Path) -> None:
    def fail() -> None:
        with snapshots.draft(tmp_path / "to") as draft:
            for name in ("a", "b"):
                draft.take(name, source / name)
            raise ArtifactError("a", "b", "c")

    with pytest.raises(ArtifactError):
        fail()
    assert snapshots.newest(tmp_path / "to") is None
    with snapshots.draft(tmp_path / "to") as draft:
        draft.take("a", tmp_path / "nowhere", artifacts.sha256(source / "a"))
    assert list(snapshots.verify(draft.folder)) == ["a"]  # b was not taken this time


def test_a_file_that_a_kill_cut_short_is_copied_again(tmp_path: Path, source: Path) -> None:
    hidden = tmp_path / "to" / ".backup.draft"
    hidden.mkdir(parents=True)
    (hidden / "a").write_text("a" * 10)
    with snapshots.draft(tmp_path / "to") as draft:
        draft.take("a", source / "a", artifacts.sha256(source / "a"))
    assert (draft.folder / "a").read_text() == "a" * 1000


def test_a_damaged_snapshot_does_not_keep_another_from_being_made(tmp_path: Path, source: Path) -> None:
    damaged = taken(tmp_path / "to", source, "a")
    (damaged / SUMS).write_text("damage")
    with snapshots.draft(tmp_path / "to") as draft:
        draft.take("in/a", source / "a")
    [line] = draft.told
    assert line.startswith(f"nothing is linked to {damaged}: wanted a line for each file in ")
    assert set(snapshots.verify(draft.folder)) == {"in/a"}


def test_two_at_a_time_are_one_too_many(tmp_path: Path) -> None:
    with (
        snapshots.draft(tmp_path),
        pytest.raises(ArtifactError, match="another process at work in it"),
        snapshots.draft(tmp_path),
    ):
        pass


def test_what_was_taken_can_be_left_out(tmp_path: Path, source: Path) -> None:
    with snapshots.draft(tmp_path / "to") as draft:
        for name in ("in/a", "inner/a", "b"):
            draft.take(name, source / name[-1])
        draft.forget("in")
    assert set(snapshots.listed(draft.folder)) == {"inner/a", "b", SUMS}


def test_other_content_and_no_file_are_refused(tmp_path: Path, source: Path) -> None:
    snapshot = Snapshot(tmp_path / "draft")
    with pytest.raises(ArtifactError, match=r"source/a as its manifest states it; found other content"):
        snapshot.take("a", source / "a", "0" * 64)
    with pytest.raises(ArtifactError, match=r"the file .*source/d; found none"):
        snapshot.take("d", source / "d")
    for name in ("two\nlines", "back\\slash"):
        with pytest.raises(ArtifactError, match="a file's name on one line"):
            snapshot.take(name, source / "a")


NAMED = ("../a", "/a", "a/../b", "a/..", "..", ".", "a//b", "./a", "a/", "a/./b")


@pytest.mark.parametrize("name", ["a", "a/b", ".a/..b/c...", "a b/…", "a/.b", "..."])
def test_a_name_in_the_folder_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / SUMS).write_text(f"{'0' * 64}  {name}\n", encoding="utf-8")
    assert snapshots.sums(tmp_path) == {name: "0" * 64}


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "0" * 64 + "  a", f"{'0' * 64} a\n", f"{'0' * 64}  a\n" * 2, "\xff\n",
        *(f"{'0' * 64}  {name}\n" for name in NAMED),
    ],
)  # fmt: skip
def test_sums_that_are_damaged_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SUMS).write_text(text, encoding="latin-1")
    if text:
        with pytest.raises(ArtifactError, match=SUMS):
            snapshots.sums(tmp_path)
    else:
        assert snapshots.sums(tmp_path) == {}
