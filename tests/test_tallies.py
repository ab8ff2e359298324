"""What is added up and told to Ray now and then is what Prometheus' own client would have counted."""

import random
from collections import Counter as Count
from typing import Any

import prometheus_client
import pytest

from askew import tallies, telemetry
from askew.tallies import Spread, Tally, Teller

BOUNDS = [1, 2, 5, 10]


class Ray:
    """Takes what Ray is told in place of one of its metrics."""

    def __init__(self) -> None:
        self.told = Count[tuple[tuple[str, str], ...]]()
        self.times = 0

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # as Ray does
        self.times += 1
        self.told[tuple(tags.items())] += value  # type: ignore[assignment]

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.times += 1
        self.told[tuple(tags.items())] = value  # type: ignore[assignment]


def test_a_histogram_is_what_prometheus_makes_of_the_same_values() -> None:
    spread, chance = Spread("test_spread", "of a test", BOUNDS, "part"), random.Random(3)
    spread._bucket, spread._sum, spread._count = told = Ray(), Ray(), Ray()  # type: ignore[assignment]
    wanted = prometheus_client.Histogram("test", "", ["part"], buckets=BOUNDS, registry=None)
    for _ in range(3):
        for value in [chance.uniform(0, 14) for _ in range(50)] + [float(bound) for bound in BOUNDS]:
            part = chance.choice(["a", "b"])
            spread.observe(value, part=part)
            wanted.labels(part).observe(value)
        spread.tell()
        samples = [one for family in wanted.collect() for one in family.samples]
        for ray, name in zip(told, ("bucket", "sum", "count"), strict=True):
            theirs = {
                (one.labels["part"], float(one.labels.get("le", 0))): one.value
                for one in samples
                if one.name == f"test_{name}"
            }
            found = [(dict(tags), value) for tags, value in ray.told.items()]
            assert {(of["part"], float(of.get("le", 0))): value for of, value in found} == pytest.approx(theirs)


def test_a_counter_is_told_once_of_what_is_new() -> None:
    tally = Tally("test_tally", "of a test", "what", "of")
    tally._counter = ray = Ray()  # type: ignore[assignment]
    for _ in range(7):
        tally.add(2, of="1", what="a")
    tally.add(0, what="b", of="1")
    tally.tell()
    tally.tell()
    assert (ray.told, ray.times) == ({(("what", "a"), ("of", "1")): 14}, 1)
    tally.add(1, what="a", of="1")
    tally.tell()
    assert ray.told == {(("what", "a"), ("of", "1")): 15}
    with pytest.raises(KeyError):
        tally.add(1, what="a")


def test_ray_is_not_told_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally("test_seldom", "of a test")
    times = iter((100.0, 101.9, 102.0, 103.9))
    monkeypatch.setattr(tallies.time, "monotonic", lambda: next(times))
    tally._counter = ray = Ray()  # type: ignore[assignment]
    teller = Teller([tally], every_s=2)
    for _ in range(4):
        tally.add(1)
        teller.tell()
    assert (ray.told, ray.times) == ({(): 3}, 2)


def test_all_that_is_added_up_is_told() -> None:
    kept: list[Any] = [one for one in vars(telemetry).values() if isinstance(one, Tally | Spread)]
    assert kept == telemetry.teller._told
