"""Candidates, streamed and numbered, and the control that gives each another's columns."""

from pathlib import Path

import pyarrow as pa
import pytest

from askew import tables
from askew.candidates import Candidates

IDS = [f"{n:02d}" for n in (5, 3, 9, 1, 7, 0, 2, 8, 6, 4, 10)]


@pytest.fixture
def candidates(tmp_path: Path) -> Candidates:
    """Eleven items in three parts, among those of another split."""
    for number, ids in enumerate((IDS[:4], IDS[4:5], IDS[5:])):
        rows = [{"item_id": i, "split": "val"} for i in ids] + [{"item_id": f"x{number}", "split": "train"}]
        tables.write(tmp_path / "items" / f"part-{number}.parquet", pa.Table.from_pylist(rows))
    return Candidates.of(tmp_path, ["val"])


def test_candidates_are_numbered_by_id_and_streamed_with_their_numbers(candidates: Candidates) -> None:
    assert candidates.item_ids == sorted(IDS)
    streamed = {}
    for rows, batch in candidates.batches(["item_id"], 2):
        assert len(batch) <= 2
        streamed |= dict(zip(rows.tolist(), batch["item_id"].to_pylist(), strict=True))
    assert [streamed[row] for row in range(len(IDS))] == candidates.item_ids


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_others_are_those_half_the_way_on(candidates: Candidates, size: int) -> None:
    sizes = [len(rows) for rows, _ in candidates.batches([], size)]
    parts = list(candidates.others(["item_id"], size))
    assert [part.num_rows for part in parts] == sizes
    found = [item for part in parts for item in part["item_id"].to_pylist()]
    assert found == [*IDS[5:], *IDS[:5]]
