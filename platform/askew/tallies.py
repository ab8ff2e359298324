"""Tallies: what is counted and timed at each request is added up here, and told to Ray every few seconds.

Telling Ray takes microseconds each time. Ray's own histograms take more: its agent goes through their observations
one by one on the processors that answer searches, and takes the middle of its bucket for each. Here the sums are
exact, and a bucket is one number however often it was observed. Knows nothing of what is counted; not for threads.
"""

import bisect
import itertools
import time
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

TELL_EVERY_S = 2.0  # Ray sends every ten, and forgets a gauge that was not set for twenty

Values = tuple[str, ...]


class Tally:
    """A counter, with tags; `names` has what Prometheus calls it, but for Ray's own prefix."""

    def __init__(self, name: str, description: str, *tags: str) -> None:
        self.names, self._tags = [f"{name}_total"], tags
        self._counter, self._new = Counter(name, description, tag_keys=tags), Count[Values]()

    def add(self, count: int, **tags: str) -> None:
        """Count so many, or none."""
        self._new[tuple(tags[one] for one in self._tags)] += count

    def tell(self) -> None:
        """Tell Ray what was counted since it was told last."""
        for values, count in self._new.items():
            if count:  # Ray refuses to count none
                self._counter.inc(count, dict(zip(self._tags, values, strict=True)))
        self._new.clear()


class Spread:
    """A histogram, with tags: how many values were at most each bound, and their sum; `names` as above."""

    def __init__(self, name: str, description: str, bounds: Sequence[float], *tags: str) -> None:
        self.names = [f"{name}_{of}" for of in ("bucket", "sum", "count")]
        self._tags, self._bounds = tags, bounds
        bucket, *others = self.names
        self._bucket = Gauge(bucket, description, tag_keys=(*tags, "le"))
        self._sum, self._count = (Gauge(one, description, tag_keys=tags) for one in others)
        self._counts = defaultdict[Values, list[int]](lambda: [0] * (len(bounds) + 1))
        self._sums = defaultdict[Values, float](float)

    def observe(self, value: float, **tags: str) -> None:
        """Note a value."""
        values = tuple(tags[one] for one in self._tags)
        self._counts[values][bisect.bisect_left(self._bounds, value)] += 1
        self._sums[values] += value

    def tell(self) -> None:
        """Tell Ray of all values there were."""
        for values, counts in self._counts.items():
            tags, up_to = dict(zip(self._tags, values, strict=True)), [*itertools.accumulate(counts)]
            for bound, count in zip((*map(str, self._bounds), "+Inf"), up_to, strict=True):
                self._bucket.set(count, tags | {"le": bound})
            self._sum.set(self._sums[values], tags)
            self._count.set(up_to[-1], tags)


class Teller:
    """Tells Ray of several, but not too often."""

    def __init__(self, told: Sequence[Tally | Spread], every_s: float = TELL_EVERY_S) -> None:
        self._told, self._every_s, self._due = told, every_s, 0.0

    def tell(self) -> None:
        """Tell what there is, if it is time."""
        if (now := time.monotonic()) >= self._due:
            self._due = now + self._every_s
            for one in self._told:
                one.tell()
