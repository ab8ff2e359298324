"""Which release is served, and what the ingress makes of parts that are late or dead; the flow test serves it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from askew import artifacts, segments
from askew.endpoint import UnavailableError
from askew.errors import ArtifactError, ConfigError
from askew.registry import Version
from askew.serving import Ingress, Scaling, ServingSettings, find_release
from askew.shards import packed

RELEASE = {
    "model": {"name": "shop", "version": "3"}, "model_key": "m", "index_key": "i", "items": 10, "shards": 2,
}  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> Path:
    with artifacts.draft(tmp_path, "index", {}, {"model": "m" * 64, "triplets": "t"}) as draft:
        for n in range(2):
            ids = pa.table({"item_id": [f"i{n}{m}" for m in range(5)]})
            segments.write(draft.folder / f"segment-{n}", np.ones((5, 2), np.float32), ids, None, "r" * 64)
        segments.tell(draft, ["segment-0", "segment-1"])
    return artifacts.place(tmp_path, "index", artifacts.key("index", {}, {"model": "m" * 64, "triplets": "t"}))


def version(**tags: str) -> Version:
    return Version(
        name="shop", version="3", run_id="r", source="s", tags={f"askew.{k}": v for k, v in tags.items()}
    )


def test_a_release_is_a_version_and_its_own_index(index: Path) -> None:
    plan, release = find_release(version(index=str(index), model_key="m" * 64), 2)
    assert (plan.folder, list(plan.segments)) == (index, ["segment-0", "segment-1"])
    assert (release.model.name, release.model.version, release.items, release.shards) == ("shop", "3", 10, 2)
    assert release.index_key == artifacts.read(index, "index").key


def test_a_version_without_an_index_is_refused() -> None:
    with pytest.raises(ArtifactError, match="wanted an index of shop version 3; found none; run the index stage"):
        find_release(version(model_key="m"), 1)


def test_an_index_of_another_model_is_refused(index: Path) -> None:
    with pytest.raises(ArtifactError, match=r"wanted an index made by model n{12}; found one made by m{12};"):
        find_release(version(index=str(index), model_key="n" * 64), 1)


def test_an_index_of_another_release_is_refused(index: Path) -> None:
    tags = {"index": str(index), "model_key": "m" * 64}
    assert find_release(version(**tags, release="r" * 64), 1)[1].items == 10
    with pytest.raises(ArtifactError, match=r"an index of release s{12} in .*; found one of r{12};"):
        find_release(version(**tags, release="s" * 64), 1)


def test_an_index_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="gone"):
        find_release(version(index=str(tmp_path / "gone"), model_key="m"), 1)


def test_more_shards_than_segments_are_refused(index: Path) -> None:
    with pytest.raises(ConfigError, match="at most 2 shards"):
        find_release(version(index=str(index), model_key="m" * 64), 3)


@pytest.mark.parametrize("wrong", [{"num_shards": 0}, {"timeout_s": 0}, {"modle": "x"}, {"shard": {"cpus": 1}}])
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServingSettings(**{"model": "shop", **wrong})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas"):
        Scaling(min_replicas=3, max_replicas=2)


def part(method: str, answer: Callable[..., Awaitable[Any]]) -> Any:
    """What a deployment's handle looks like from the ingress."""
    return SimpleNamespace(**{method: SimpleNamespace(remote=answer)}, deployment_name="shard-0")


def shard(*items: tuple[str, float], after_s: float = 0, dies: bool = False) -> Any:
    async def answer(vectors: np.ndarray, k: int) -> bytes:
        await asyncio.sleep(after_s)
        if dies:
            raise RuntimeError("gone")
        hits = [{"item_id": i, "title": i, "fields": {"colour": "red"}} for i, _ in items[:k]] * len(vectors)
        scores = np.tile(np.array([s for _, s in items[:k]], np.float32), len(vectors))
        return packed(
            pa.Table.from_pylist(hits), scores, np.repeat(np.arange(len(vectors)), len(items[:k])), len(vectors)
        )

    return part("search", answer)


def encoder(dies: bool = False, poison: str | None = None, asked: list[list[str]] | None = None) -> Any:
    async def answer(queries: list[str]) -> np.ndarray:
        if asked is not None:
            asked.append(queries)
        await asyncio.sleep(0.01)
        if dies or poison in queries:
            raise RuntimeError("gone")
        return np.ones((len(queries), 2), np.float32)

    return part("encode", answer)


def ask(*shards: Any, timeout_s: float = 0.5, encoder: Any = None, k: int = 3) -> tuple[list[str], int]:
    ingress = Ingress(RELEASE, timeout_s, encoder or globals()["encoder"](), *shards)
    hits, answered = asyncio.run(ingress.search("mug", k))
    return [hit["item_id"] for hit in hits], answered


LEFT, RIGHT = [("a", 0.9), ("c", 0.5)], [("b", 0.7), ("d", 0.1)]


def test_the_best_of_all_shards() -> None:
    assert ask(shard(*LEFT), shard(*RIGHT)) == (["a", "b", "c"], 2)


@pytest.mark.parametrize("trouble", [{"after_s": 5}, {"dies": True}])
def test_without_one_shard_the_others_answer(trouble: dict[str, Any]) -> None:
    assert ask(shard(*LEFT), shard(*RIGHT, **trouble)) == (["a", "c"], 1)


def test_no_shard_is_no_answer() -> None:
    with pytest.raises(UnavailableError, match="no shard answered"):
        ask(shard(dies=True), shard(after_s=5))


def test_no_encoder_is_no_answer() -> None:
    with pytest.raises(UnavailableError, match="the query encoder did not answer"):
        ask(shard(*LEFT), shard(*RIGHT), encoder=encoder(dies=True))


def test_several_queries_at_once_are_answered_each() -> None:
    ingress = Ingress(RELEASE, 1.0, encoder(), shard(*LEFT), shard(*RIGHT))
    answers, answered = asyncio.run(ingress.search_batch(["mug", "cup"], 1))
    assert ([[hit["item_id"] for hit in hits] for hits in answers], answered) == ([["a"], ["a"]], 2)


def test_searches_that_come_together_go_on_together_each_with_its_own_k() -> None:
    asked: list[list[str]] = []
    ingress = Ingress(RELEASE, 1.0, encoder(asked=asked), shard(*LEFT), shard(*RIGHT), max_calls=1)

    async def scenario() -> list[tuple[list[dict[str, Any]], int]]:
        return await asyncio.gather(*(ingress.search(f"mug {n}", 1 + n % 3) for n in range(20)))

    for n, (hits, answered) in enumerate(asyncio.run(scenario())):
        assert ([hit["item_id"] for hit in hits], answered) == (["a", "b", "c"][: 1 + n % 3], 2)
    assert [len(batch) for batch in asked] == [1, 19]


def test_one_poisonous_query_fails_alone() -> None:
    ingress = Ingress(RELEASE, 1.0, encoder(poison="mug 7"), shard(*LEFT), shard(*RIGHT), max_calls=1)

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(ingress.search(f"mug {n}", 1) for n in range(20)), return_exceptions=True)

    found = asyncio.run(scenario())
    assert [n for n, answer in enumerate(found) if isinstance(answer, Exception)] == [7]
    assert isinstance(found[7], UnavailableError)
    assert all(answer[0][0]["item_id"] == "a" for n, answer in enumerate(found) if n != 7)


def test_more_than_may_wait_are_refused_at_once() -> None:
    ingress = Ingress(RELEASE, 1.0, encoder(), shard(*LEFT), shard(*RIGHT), max_calls=1, max_waiting=5)

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(ingress.search("mug", 1) for _ in range(20)), return_exceptions=True)

    refused = [answer for answer in asyncio.run(scenario()) if isinstance(answer, Exception)]
    assert len(refused) == 14
    assert all("too many searches at once" in str(error) for error in refused)


def test_a_query_is_encoded_once_as_long_as_it_is_kept() -> None:
    asked: list[list[str]] = []
    ingress = Ingress(RELEASE, 1.0, encoder(asked=asked), shard(*LEFT), shard(*RIGHT), cached_queries=2)

    async def scenario() -> None:
        for queries in (["mug", "cup", "mug"], ["cup", "mug"], ["pan", "pot", "pin"], ["pin", "mug"]):
            answers, _ = await ingress.search_batch(queries, 1)
            assert [hits[0]["item_id"] for hits in answers] == ["a"] * len(queries)

    asyncio.run(scenario())
    assert asked == [["mug", "cup"], ["pan", "pot", "pin"], ["mug"]]
