"""Comparing: a share of what is searched is searched in another way too, once it was answered.

By every item, which tells the recall that searches have; and in a release that may be promoted, which tells how
other its answers are. Nobody waits for it, at most one such search of a kind is under way, and what takes long may
rest between, so that it takes little from those that people wait for.
"""

import asyncio
import contextvars
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from askew import telemetry

LAST = 500  # comparisons of which the mean is told
PERSISTENCE = 0.9  # of rank-biased overlap: how far down a list people look
Hits = Sequence[Mapping[str, Any]]


class Comparison:
    """Compares answers with those of another way of searching.

    After one is compared none is for `rests` times as long as that took.
    """

    def __init__(self, name: str, share: float, rests: float = 0.0) -> None:
        self._name, self._share, self._rests = name, share, rests
        self._under_way: asyncio.Task[None] | None = None
        self._rests_until = 0.0
        self._last: deque[dict[str, float]] = deque(maxlen=LAST)
        self.number, self.failed = 0, 0

    def offer(self, hits: Hits, ms: float, again: Callable[[], Awaitable[Hits]]) -> None:
        """Compare an answer, by chance, if none is being compared, and none was lately."""
        busy = self._under_way is not None and not self._under_way.done()
        if not busy and time.perf_counter() >= self._rests_until and random.random() < self._share:
            loop = asyncio.get_running_loop()
            self._under_way = loop.create_task(self._compare(hits, ms, again), context=contextvars.Context())

    async def _compare(self, hits: Hits, ms: float, again: Callable[[], Awaitable[Hits]]) -> None:
        started = time.perf_counter()
        try:
            other = [str(hit["item_id"]) for hit in await again()]
        except Exception as error:
            self.failed += 1
            telemetry.warner.warn(self._name, f"{self._name}: {error!r}")
            return
        finally:
            self._rests_until = (now := time.perf_counter()) + self._rests * (now - started)
        own = [str(hit["item_id"]) for hit in hits]
        self.number += 1
        self._last.append({
            "overlap_at_10": overlap(own, other), "rbo": rbo(own, other), "ms_live": ms,
            "ms": 1000 * (now - started),
        })  # fmt: skip

    def told(self) -> dict[str, float]:
        """How many were compared, and the means of the last of them; nothing before the first."""
        if not self._last:
            return {}
        means = {name: sum(one[name] for one in self._last) / len(self._last) for name in self._last[0]}
        return {"compared": self.number, "failed": self.failed, **means}


def overlap(own: Sequence[str], other: Sequence[str], k: int = 10) -> float:
    """The share of the first k that both have; 1 where neither has any."""
    first, second = set(own[:k]), set(other[:k])
    return len(first & second) / max(len(first), len(second), 1) if first or second else 1.0


def rbo(own: Sequence[str], other: Sequence[str], p: float = PERSISTENCE) -> float:
    """Rank-biased overlap, extrapolated from the depth that both reach (Webber, Moffat and Zobel 2010, eq. 32)."""
    depth = min(len(own), len(other))
    if not depth:
        return float(len(own) == len(other))
    agreed = [len(set(own[:d]) & set(other[:d])) for d in range(1, depth + 1)]
    weighted = sum(p**d * agreed[d - 1] / d for d in range(1, depth + 1))
    return (1 - p) / p * weighted + agreed[-1] / depth * p**depth
