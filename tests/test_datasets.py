"""Units of work on a real Ray cluster: order, actors, and errors in their own words."""

from typing import Any

import pytest

from askew import datasets
from askew.errors import DataError


def square(unit: dict[str, Any]) -> dict[str, Any]:
    if unit["n"] == 13:
        raise DataError("any number but 13", "13", "leave it out")
    if unit["n"] == 99:
        raise RuntimeError("a bug")
    return {"n": unit["n"] ** 2}


class Adder:
    def __init__(self, much: int) -> None:
        if much < 0:
            raise DataError("a number to add", str(much), "give a larger one")
        self.much = much

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        return {"n": unit["n"] + self.much}


def units(*numbers: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in numbers]


def test_results_come_in_the_order_of_the_units(cluster: None) -> None:
    assert datasets.spread(units(*range(12)), square, "squared") == units(*(n * n for n in range(12)))


@pytest.mark.parametrize("num_actors", [1, 3, 50])
def test_any_number_of_actors_gives_the_same(cluster: None, num_actors: int) -> None:
    found = datasets.spread(units(1, 2, 3, 4), Adder, "added", (10,), num_actors)
    assert found == units(11, 12, 13, 14)


def test_what_a_worker_refuses_is_raised_here(cluster: None) -> None:
    with pytest.raises(DataError, match="wanted any number but 13; found 13; leave it out"):
        datasets.spread(units(1, 13, 2), square, "squared")


def test_what_an_actor_refuses_when_it_is_made_is_raised_here(cluster: None) -> None:
    with pytest.raises(DataError, match="found -1; give a larger one"):
        datasets.spread(units(1, 2), Adder, "added", (-1,), 2)


def test_a_bug_is_no_sentence(cluster: None) -> None:
    with pytest.raises(Exception, match="a bug"):
        datasets.spread(units(99), square, "squared")


def test_progress_is_printed_at_the_end_at_least(capsys: pytest.CaptureFixture[str]) -> None:
    progress = datasets.Progress("drawn", 2000)
    for _ in range(2000):
        progress.step()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "askew: drawn 2,000/2,000"
    assert len(lines) <= 3
