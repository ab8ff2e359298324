"""Clients that search through every proxy in turn, hold each answer against the truth, and write as they search.

A search that a proxy does not answer is asked of the next one, and of each once, as a client that knows several
addresses does.
An answer of all shards must be the best of the release in their order, with nothing between but what was upserted
meanwhile; a degraded one, those of some shard alone. Knows nothing of what becomes of the processes behind.
"""

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

RIGHT, DEGRADED, FAILED, WRONG = "right", "degraded", "failed", "wrong"
OUTCOMES = (RIGHT, DEGRADED, FAILED, WRONG)
OK = 200
K, NEW = 10, "new-"  # how an id begins that is upserted here
TRY_S = 3.0  # in which a proxy has to answer
SLOWEST_S = 3 * TRY_S + 0.5
WRITE_EVERY_S = 1.0
Truth = Mapping[str, Sequence[Sequence[str]]]  # of a query: the best of all shards, then those of each alone


class Asked(NamedTuple):
    """A search: when it was due and done (seconds), what became of it, and what each proxy had to do with it."""

    due: float
    done: float
    outcome: str
    tries: tuple[tuple[int, str], ...]  # the proxy's number, and what came of it


@dataclass
class Seen:
    """What clients saw, and what they wrote."""

    asked: list[Asked] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)  # tries, by what came of them
    unanswered: list[str] = field(default_factory=list)
    written: dict[str, float] = field(default_factory=dict)  # acknowledged: when
    writes_failed: Counter[str] = field(default_factory=Counter)

    def between(self, start: float, stop: float) -> list[Asked]:
        """The searches that were due in a span of time."""
        return [one for one in self.asked if start <= one.due < stop]


class Clients(threading.Thread):
    """Clients in a thread of their own, until they are told that it is over."""

    def __init__(self, proxies: Sequence[str], truth: Truth, rate: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.proxies, self._truth, self._rate = proxies, truth, rate
        self._queries, self._chance = list(truth), random.Random(seed)
        self._next = itertools.count()
        self.seen, self.over = Seen(), threading.Event()

    def run(self) -> None:
        """Search until it is over."""
        asyncio.run(self._all())

    async def _all(self) -> None:
        async with httpx.AsyncClient(timeout=TRY_S, trust_env=False) as client:
            tasks = {asyncio.create_task(self._writing(client))}
            due = time.monotonic()
            while not self.over.is_set():
                due += self._chance.expovariate(self._rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.add(task := asyncio.create_task(self._search(client, due)))
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    async def _search(self, client: httpx.AsyncClient, due: float) -> None:
        """Ask one proxy, the next if it has no answer, and so each once."""
        query, first, tries = self._chance.choice(self._queries), next(self._next), list[tuple[int, str]]()
        whys = []
        for number in range(first, first + len(self.proxies)):
            proxy = number % len(self.proxies)
            outcome, why = await self._tried(client, self.proxies[proxy], query)
            tries.append((proxy, outcome))
            if outcome != FAILED:
                break
            self.seen.failed[why] += 1
            whys.append(f"proxy {proxy}: {why}")
        if outcome == FAILED:
            self.seen.unanswered.append("; ".join(whys))
        self.seen.asked.append(Asked(due, time.monotonic(), outcome, tuple(tries)))

    async def _tried(self, client: httpx.AsyncClient, proxy: str, query: str) -> tuple[str, str]:
        """What came of asking a proxy, and why where nothing did."""
        try:
            async with asyncio.timeout(TRY_S):
                answer = await client.post(f"{proxy}/search", json={"query": query, "k": K})
        except (httpx.HTTPError, TimeoutError) as error:
            return FAILED, type(error).__name__
        if answer.status_code != OK:
            return FAILED, f"{answer.status_code} {answer.text[:120]}"
        return self._judged(query, answer.json()), ""

    def _judged(self, query: str, answer: Mapping[str, Any]) -> str:
        """Hold an answer against the truth."""
        ids = [hit["item_id"] for hit in answer["hits"]]
        old = [one for one in ids if not one.startswith(NEW)]
        whole, *parts = self._truth[query]
        bests = parts if answer["degraded"] else [whole]
        if len({*ids}) != K or not any(old == list(best[: len(old)]) for best in bests):
            self.seen.wrong.append(f"{query!r}{' degraded' * answer['degraded']}: {ids}")
            return WRONG
        return DEGRADED if answer["degraded"] else RIGHT

    async def _writing(self, client: httpx.AsyncClient) -> None:
        """Upsert an item now and then, each under an id of its own."""
        for number in itertools.count():
            if self.over.is_set():
                return
            item_id, proxy = f"{NEW}{number}", self.proxies[number % len(self.proxies)]
            item = {"item_id": item_id, "title": f"{self._chance.choice(self._queries)} {number}"}
            try:
                async with asyncio.timeout(2 * TRY_S):
                    answer = await client.post(f"{proxy}/items:upsert", json={"items": [item]}, timeout=2 * TRY_S)
                if answer.status_code == OK and not answer.json()["refused"]:
                    self.seen.written[item_id] = time.monotonic()
                else:
                    self.seen.writes_failed[f"{answer.status_code} {answer.text[:120]}"] += 1
            except (httpx.HTTPError, TimeoutError) as error:
                self.seen.writes_failed[type(error).__name__] += 1
            await asyncio.sleep(WRITE_EVERY_S)


def lost(proxies: Sequence[str], written: Sequence[str]) -> list[str]:
    """Which of the items that were acknowledged are not there."""
    with httpx.Client(timeout=10, trust_env=False) as client:
        return [one for one in written if not any(_has(client, proxy, one) for proxy in proxies)]


def _has(client: httpx.Client, proxy: str, item_id: str) -> bool:
    with suppress(httpx.HTTPError):
        return client.get(f"{proxy}/items/{item_id}").status_code == OK
    return False
