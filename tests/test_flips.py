"""A flipped bit in any file that is loaded is refused by its name; `make chaos` flips more of them."""

from pathlib import Path

import pytest


def test_flipped_bits_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    import flips

    found = flips.flipped(tmp_path, seed=4, flips=90)
    assert found["not_refused"] == []
    assert (found["refused"], len(found["by_kind"])) == (90, 6)
