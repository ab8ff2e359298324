"""What an endpoint remembers of what it served: as it was, or nothing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import release

from askew import releases
from askew.releases import Release

NAMED = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
RELEASES = st.builds(
    lambda name, schema, sizes: release(sizes=sizes, name=name, schema_=schema),
    NAMED, st.binary(max_size=8), st.lists(st.integers(0, 2**40), max_size=3),
)  # fmt: skip


@given(RELEASES, st.none() | RELEASES, NAMED, st.data())
def test_what_is_remembered_comes_back_and_what_is_cut_short_does_not(
    tmp_path_factory: pytest.TempPathFactory,
    now: Release,
    before: Release | None,
    deployed: str,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "served.json"
    releases.remember(path, now, before, deployed)
    kept = releases.remembered(path, deployed)
    assert kept is not None
    assert kept.model_copy(update={"sum": ""}) == releases.Kept(deployed=deployed, now=now, before=before)
    assert releases.remembered(path, deployed + "x") is None
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert releases.remembered(path) is None


@given(st.binary(max_size=60))
def test_any_bytes_are_nothing_that_is_remembered(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "served.json"
    path.write_bytes(data)
    assert releases.remembered(path) is None
