"""How much two answers agree, and that comparing them costs nobody anything."""

import asyncio
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.comparing import Comparison, overlap, rbo

lists = st.lists(st.sampled_from("abcdefghijkl"), unique=True, max_size=10)


def test_overlap_and_rank_biased_overlap_of_known_lists() -> None:
    assert overlap(list("abcd"), list("dcbx")) == 0.75
    assert (overlap(list("ab"), []), overlap([], [])) == (0.0, 1.0)
    # (1−p)/p · Σ p^d · X_d/d + X_k/k · p^k with X = 0, 2 and p = 0.9
    assert math.isclose(rbo(list("ab"), list("ba")), 0.1 / 0.9 * 0.9**2 * 1 + 0.9**2)
    assert rbo(list("abc"), list("xyz")) == 0
    assert rbo([], []) == 1
    assert rbo([], ["a"]) == 0
    assert rbo(list("abcd"), list("abdc")) > rbo(list("abcd"), list("bacd"))  # what is high up counts more


@given(lists, lists)
def test_agreement_is_even_handed_between_none_and_all(one: list[str], other: list[str]) -> None:
    for measure in (overlap, rbo):
        assert measure(one, other) == pytest.approx(measure(other, one))
        assert 0 <= measure(one, other) <= 1 + 1e-12
        assert measure(one, one) == pytest.approx(1)


def hits(ids: str) -> list[dict[str, Any]]:
    return [{"item_id": one} for one in ids]


def test_one_at_a_time_is_compared_and_what_fails_is_counted() -> None:
    async def scenario() -> None:
        comparison, asked = Comparison("exact", 1.0), []

        async def slow(ids: str) -> list[dict[str, Any]]:
            asked.append(ids)
            await asyncio.sleep(0.05)
            if not ids:
                raise OSError("gone")
            return hits(ids)

        assert comparison.told() == {}
        for ids in ("abcx", "abcd", "abcd"):
            comparison.offer(hits("abcd"), 7.0, lambda ids=ids: slow(ids))
        await asyncio.sleep(0.2)
        assert asked == ["abcx"]
        told = comparison.told()
        assert (told["compared"], told["overlap_at_10"], told["ms_live"]) == (1, 0.75, 7.0)
        assert told["ms"] >= 50
        comparison.offer(hits("abcd"), 7.0, lambda: slow(""))
        await asyncio.sleep(0.2)
        assert (comparison.told()["failed"], comparison.told()["compared"]) == (1, 1)

    asyncio.run(scenario())


def test_a_share_of_nothing_compares_nothing() -> None:
    async def scenario() -> None:
        comparison = Comparison("exact", 0.0)
        for _ in range(100):
            comparison.offer(hits("a"), 1.0, lambda: asyncio.sleep(0, hits("a")))
        await asyncio.sleep(0.01)
        assert comparison.told() == {}

    asyncio.run(scenario())


def test_what_takes_long_rests_between() -> None:
    async def scenario() -> None:
        comparison, asked = Comparison("exact", 1.0, rests=4.0), 0

        async def slow() -> list[dict[str, Any]]:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0.1)
            return hits("a")

        started = time.monotonic()
        while asked < 3:
            comparison.offer(hits("a"), 1.0, slow)
            await asyncio.sleep(0.005)
        assert time.monotonic() - started >= 2 * (0.1 + 0.4)

    asyncio.run(scenario())
