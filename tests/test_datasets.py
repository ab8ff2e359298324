"""Units of work on a real Ray cluster: order, actors, and errors in their own words."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from askew import datasets
from askew.errors import ArtifactError, DataError


def square(unit: dict[str, Any]) -> dict[str, Any]:
    if unit["n"] == 13:
        raise DataError("any number but 13", "13", "leave it out")
    if unit["n"] == 28:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def test_a_worker_whose_disk_is_full_says_so(cluster: None) -> None:
    with pytest.raises(ArtifactError, match=r"wanted room on the disk of .*; found none left; free some"):
        datasets.spread(units(1, 28), square, "squared")


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


def noted(unit: dict[str, Any]) -> dict[str, Any]:
    with open(unit["log"], "a") as log:  # noqa: PTH123
        log.write(f"{unit['n']}\n")
    if unit["n"] == unit["bad"]:
        raise DataError("another", "this", "mend it")
    return {"n": -unit["n"]}


def test_what_is_marked_as_done_is_not_done_again(cluster: None, tmp_path: Path) -> None:
    def work(bad: int) -> list[dict[str, Any]]:
        every = [{"n": n, "log": str(tmp_path / "log"), "bad": bad} for n in range(6)]
        return datasets.spread(every, noted, "noted", marks=tmp_path / "marks")

    with pytest.raises(DataError):
        work(bad=3)
    before = [int(n) for n in (tmp_path / "log").read_text().split()]
    marked = {int(p.stem) for p in (tmp_path / "marks").glob("*.json")}
    assert 3 not in marked
    assert work(bad=-1) == units(0, -1, -2, -3, -4, -5)
    after = [int(n) for n in (tmp_path / "log").read_text().split()][len(before) :]
    assert sorted(after) == sorted(set(range(6)) - marked)
    assert work(bad=-1) == units(0, -1, -2, -3, -4, -5)
    assert len((tmp_path / "log").read_text().split()) == len(before) + len(after)


ON_GPUS = """
import json, ray
from askew import datasets

class Where:
    def __call__(self, unit):
        return {"gpus": ray.get_gpu_ids()}

ray.init("local", num_cpus=3, num_gpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
each = [{"n": n} for n in range(4)]
print(json.dumps([datasets.spread(each, Where, "asked", (), 2, None, num_gpus)[0]["gpus"] for num_gpus in (1, 0)]))
"""


def test_actors_that_want_a_gpu_have_one_of_their_own() -> None:
    """Ray believes what it is told of GPUs: none is there."""
    done = subprocess.run([sys.executable, "-c", ON_GPUS], capture_output=True, text=True, check=True)
    with_one, without = json.loads(done.stdout.splitlines()[-1])
    assert (len(with_one), without) == (1, [])
