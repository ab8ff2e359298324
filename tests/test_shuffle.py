import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.shuffle import permuted, uniform


@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_a_permutation_holds_every_number_once(n: int, key: int) -> None:
    assert sorted(permuted(np.arange(n), n, key)) == list(range(n))


def test_a_place_does_not_depend_on_which_others_are_asked() -> None:
    whole = permuted(np.arange(1000), 1000, 7)
    assert (permuted(np.array([500, 3, 999]), 1000, 7) == whole[[500, 3, 999]]).all()


def test_keys_give_other_orders_and_none_keeps_the_order() -> None:
    one, other = (permuted(np.arange(10_000), 10_000, key) for key in (1, 2))
    assert (one == other).sum() < 20
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.05


def test_a_hundred_million_cost_no_more_than_the_places_asked() -> None:
    assert permuted(np.arange(10), 10**8, 0).max() < 10**8


def test_uniform_numbers_are_uniform() -> None:
    drawn = uniform(np.arange(200_000), 3)
    counts, _ = np.histogram(drawn, 20, (0, 1))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert counts == pytest.approx(10_000, rel=0.05)
