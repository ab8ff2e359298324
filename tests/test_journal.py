"""The journal: what was noted is there after a crash, and what was cut short harms nothing after it."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.journal import Journal

NOTES = st.lists(
    st.tuples(st.integers(0, 3), st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2)),
    min_size=1, max_size=5,
)  # fmt: skip


@given(NOTES, st.data())
def test_cut_anywhere_whole_notes_stay_and_it_goes_on(
    tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[int, dict[str, float]]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    for step, values in notes:
        Journal(folder).write(values, step)
    path = folder / "metrics.jsonl"
    ends = [n + 1 for n, byte in enumerate(path.read_bytes()) if byte == 10]
    at = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, at)
    whole = notes[: sum(end <= at for end in ends)]
    assert Journal(folder).history() == merged(whole)
    Journal(folder).write({"more": 1.0}, 9)
    assert Journal(folder).history() == merged([*whole, (9, {"more": 1.0})])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [step for step, _ in whole] + [
        9
    ]


def merged(notes: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """By step; of a step that was noted twice, the last."""
    found: dict[int, dict[str, float]] = {}
    for step, values in notes:
        found[step] = {**found.get(step, {}), **values}
    return sorted(found.items())
