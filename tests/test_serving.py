"""Which release is served, and what the ingress makes of parts that are late or dead; the flow test serves it."""

import asyncio
import itertools
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import yaml
from opentelemetry import trace
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from tests.fakes import FakeSwitch, deployed, handle, measured, release, run

from askew import artifacts, keys, segments
from askew.deployments import NICENESS, ShardServer
from askew.endpoint import Ask
from askew.errors import ArtifactError, ConfigError, DataError
from askew.hits import Packed, packed, shown
from askew.ingress import Ingress
from askew.live import Live
from askew.refusals import ForbiddenError, MissingError, RefusedError, UnavailableError
from askew.registry import Version
from askew.releases import Release, find
from askew.searching import WEIGHED
from askew.segments import Plan
from askew.serving import Scaling, ServingSettings, build
from askew.shards import Found, Shard, streamed


@pytest.fixture
def index(tmp_path: Path) -> Path:
    with artifacts.draft(tmp_path, "index", {}, {"model": "m" * 64, "triplets": "t"}) as draft:
        for n in range(2):
            ids = [f"i{n}{m}" for m in range(5)]
            items = pa.table({"item_id": ids, "title": ids, "fields": [{"price": 1.0}] * 5})
            segments.write(draft.folder / f"segment-{n}", np.ones((5, 2), np.float32), items, None, "r" * 64)
        segments.tell(draft, ["segment-0", "segment-1"])
    return artifacts.place(tmp_path, "index", artifacts.key("index", {}, {"model": "m" * 64, "triplets": "t"}))


def version(**tags: str) -> Version:
    return Version(
        name="shop", version="3", run_id="r", source="s", tags={f"askew.{k}": v for k, v in tags.items()}
    )


def found(version: Version, num_shards: int) -> Release:
    return find(version, num_shards, Path("model"))


def test_a_release_is_a_version_and_its_own_index(index: Path) -> None:
    release = found(version(index=str(index), model_key="m" * 64), 2)
    assert (release.index, release.sizes, release.identity) == (str(index), (5, 5), "r" * 64)
    told = release.told
    assert (told.model.name, told.model.version, told.items, told.shards) == ("shop", "3", 10, 2)
    assert told.index_key == artifacts.read(index, "index").key


def test_a_version_without_an_index_is_refused() -> None:
    with pytest.raises(ArtifactError, match="wanted an index of shop version 3; found none; run the index stage"):
        found(version(model_key="m"), 1)


def test_an_index_of_another_model_is_refused(index: Path) -> None:
    with pytest.raises(ArtifactError, match=r"wanted an index made by model n{12}; found one made by m{12};"):
        found(version(index=str(index), model_key="n" * 64), 1)


def test_an_index_of_another_release_is_refused(index: Path) -> None:
    tags = {"index": str(index), "model_key": "m" * 64}
    assert found(version(**tags, release="r" * 64), 1).sizes == (10,)
    with pytest.raises(ArtifactError, match=r"an index of release s{12} in .*; found one of r{12};"):
        found(version(**tags, release="s" * 64), 1)


def test_an_index_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="gone"):
        found(version(index=str(tmp_path / "gone"), model_key="m"), 1)


def test_more_shards_than_segments_are_refused(index: Path) -> None:
    with pytest.raises(ConfigError, match="at most 2 shards"):
        found(version(index=str(index), model_key="m" * 64), 3)


@pytest.mark.parametrize("wrong", [{"num_shards": 0}, {"timeout_s": 0}, {"modle": "x"}, {"shard": {"cpus": 1}}])
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServingSettings(**{"model": "shop", **wrong})


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas"):
        Scaling(min_replicas=3, max_replicas=2)


CONFIGS = Path(__file__).parent.parent / "serve_configs"
NAMED = re.compile(r"ray_askew_[a-z0-9_]+")
SERVES = 'ray_serve_deployment_processing_latency_ms_bucket{deployment="ingress"'  # all of a search, by Ray Serve


@pytest.mark.parametrize("name", ["search", "search.cluster", "demo"])
def test_the_configs_that_are_shipped_are_taken_by_serve_and_by_us(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    assert ServingSettings.model_validate(application["args"])
    assert (config["http_options"]["host"] == "127.0.0.1") == (name != "search.cluster")


def test_the_config_of_one_machine_has_every_setting_and_its_default() -> None:
    [application] = yaml.safe_load((CONFIGS / "search.yaml").read_text())["applications"]
    told, default = application["args"], ServingSettings(model="search").model_dump(mode="json")
    assert told == {name: value for name, value in default.items() if name not in ("tracking_uri", "cache")}


@pytest.mark.parametrize(
    "how", [{"writes": False}, {"writes": True, "open_writes": True}, {"writes": True, "keys": "keys.yaml"}]
)
def test_writes_are_guarded_or_said_to_be_open(how: dict[str, Any]) -> None:
    assert ServingSettings(model="shop", **how).writes == how["writes"]


def test_writes_that_nobody_guards_are_refused() -> None:
    with pytest.raises(ValidationError, match="whoever reaches the port change the catalogue"):
        ServingSettings(model="shop", writes=True)


@pytest.mark.parametrize(
    ("scopes", "how", "told"),
    [
        ([], {}, "wanted a settings file; found none"),
        (["search"], {"writes": True}, r"a key with the scope write in .*; found none; .*, or writes: false"),
        (["write"], {"writes": True}, r"wanted a key with the scope search in .*; found none; askew keys add"),
    ],
)
def test_without_the_keys_that_it_wants_nothing_is_deployed(
    tmp_path: Path, scopes: list[str], how: dict[str, Any], told: str
) -> None:
    file = tmp_path / "keys.yaml"
    if scopes:
        keys.add(file, "shop", scopes)
    with pytest.raises(ConfigError, match=told):
        build(ServingSettings(model="shop", keys=file, cache=tmp_path, tracking_uri="http://127.0.0.1:1", **how))


def test_an_ingress_wants_the_keys_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="found none"):
        made(shard(*LEFT), keys=file)
    key = keys.add(file, "shop", ["search"])
    app = made(shard(*LEFT), keys=file).__serve_build_asgi_app__()

    async def status(headers: dict[str, str]) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.get("/release", headers=headers)).status_code

    assert run(status({})) == 401
    assert run(status({"authorization": f"Bearer {key}"})) == 200


def test_the_dashboard_and_the_alerts_show_what_is_measured() -> None:
    shown, names = set(NAMED.findall((CONFIGS / "grafana.json").read_text())), measured()
    for name, of in names.items():
        assert shown & {*of}, name
    assert shown <= {*itertools.chain(*names.values())}
    rules = yaml.safe_load((CONFIGS / "alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        found = NAMED.findall(rule["expr"])
        assert found or SERVES in rule["expr"]
        assert {*found} <= shown
        assert not [name for name in found if name.endswith(("_sum", "_count"))]  # of a histogram: its buckets
        assert {"summary", "do"} <= rule["annotations"].keys()


def shard(
    *items: tuple[str, float], after_s: float | Iterator[float] = 0, dies: bool = False,
    asked: list[int] | None = None, changes: Iterator[int] | None = None, keys: list[str] | None = None,
    by: Mapping[str, Any] | None = None, counted: list[str] | None = None,
) -> Any:  # fmt: skip
    """What a shard's handle looks like from the ingress; all its items are red."""
    asked, keys, counted = ([] if one is None else one for one in (asked, keys, counted))
    changes = changes or itertools.repeat(0)
    waits = itertools.repeat(after_s) if isinstance(after_s, (int, float)) else after_s

    async def search(
        key: str, vectors: np.ndarray, k: int, wheres: list[str], ids: list[str]
    ) -> tuple[int, list[Packed]]:
        asked.append(len(vectors))
        keys.append(key)
        own = (by or {}).get(key, items)
        await asyncio.sleep(next(waits))
        if dies:
            raise RuntimeError("gone")
        answers = []
        for row, where in enumerate(wheres):
            there = own[:k] if where in ("", '{"colour":"red"}') else ()
            hits = [{"item_id": i, "title": i, "fields": {"colour": "red"}} for i, _ in there]
            scores = np.array([s for _, s in there], np.float32)
            table = pa.Table.from_pylist(hits) if hits else pa.table({"item_id": []})
            answers.append(packed(shown(table), scores, np.full(len(hits), row), len(wheres)))
        return next(changes), answers

    async def exact(key: str, vector: np.ndarray, k: int, where: str) -> Packed:
        return (await search(key, vector, k, [where], []))[1][0]

    async def found(key: str, item_ids: list[str]) -> tuple[bytes, np.ndarray]:
        await asyncio.sleep(next(waits))
        if dies:
            raise RuntimeError("gone")
        there = [{"item_id": i, "image": b"photo"} for i in item_ids if i in dict(items)]
        return streamed(there), np.ones((len(there), 2), np.float32)

    async def facets(key: str, where: str) -> dict[str, Any]:
        counted.append(where)
        if dies:
            raise RuntimeError("gone")
        red = {"kind": "text", "items": len(items), "distinct": 1, "values": {"red": len(items)}}
        return {"colour": red | {"least": None, "greatest": None}}

    return handle(wired={"search": search, "exact": exact, "items": found, "facets": facets})


def encoder(
    dies: bool = False,
    poison: str | None = None,
    asked: list[list[str]] | None = None,
    traces: list[int] | None = None,
    keys: list[str] | None = None,
    after_s: Iterator[float] | None = None,
) -> Any:
    async def encode(key: str, queries: list[str], ids: list[str]) -> np.ndarray:
        if asked is not None:
            asked.append(queries)
        if keys is not None:
            keys.append(key)
        if traces is not None:
            traces.append(trace.get_current_span().get_span_context().trace_id)
        await asyncio.sleep(next(after_s) if after_s else 0.01)
        if dies or poison in queries:
            raise RuntimeError("gone")
        return np.ones((len(queries), 2), np.float32)

    return handle(wired={"encode": encode})


def made(*shards: Any, encoder: Any = None, items: Any = None, switch: Any = None, **how: Any) -> Ingress:
    settings = {"timeout_s": 30, "cached_results": 0, "report_every_s": 0.02, **how}
    switch = switch or FakeSwitch(release(sizes=(7, 3)[: len(shards)]))
    given = (encoder or globals()["encoder"](), items or writer(), *shards)
    made: Ingress = deployed(Ingress, switch, *given, first=settings)
    return made


def writer(**methods: Any) -> Any:
    """What the handle of `items` looks like."""
    return handle(**{name: methods.get(name) for name in ("upsert", "delete", "explain")})


def ask(*shards: Any, k: int = 3, where: Any = None, **how: Any) -> tuple[list[str], int]:
    answer = run(made(*shards, **how).search(Ask("mug", k=k, where=where)))
    assert set(answer.took) == {"waiting", "encoding", "searching"}
    return [hit["item_id"] for hit in answer.hits], answer.answered


LEFT, RIGHT = [("a", 0.9), ("c", 0.5)], [("b", 0.7), ("d", 0.1)]


def test_the_best_of_all_shards() -> None:
    assert ask(shard(*LEFT), shard(*RIGHT)) == (["a", "b", "c"], 2)


@pytest.mark.parametrize("trouble", [{"after_s": 99}, {"dies": True}])
def test_without_one_shard_the_others_answer(trouble: dict[str, Any]) -> None:
    assert ask(shard(*LEFT), shard(*RIGHT, **trouble), timeout_s=1) == (["a", "c"], 1)


def test_the_first_search_need_not_look_for_who_answers_it() -> None:
    def found_slowly(one: Any) -> Any:
        find = one.address.remote

        async def address() -> Any:
            await asyncio.sleep(1)
            return await find()

        one.address.remote = address
        return one

    parts = (found_slowly(shard(*LEFT)), found_slowly(shard(*RIGHT)))
    assert ask(*parts, encoder=found_slowly(encoder()), timeout_s=0.5) == (["a", "b", "c"], 2)


def test_an_ingress_starts_though_nobody_is_found() -> None:
    async def address() -> Any:
        raise RuntimeError("none is up")

    nobody = handle(address=address)
    assert ask(shard(*LEFT), nobody) == (["a", "c"], 1)


def test_no_shard_is_no_answer() -> None:
    with pytest.raises(UnavailableError, match="no shard answered"):
        ask(shard(dies=True), shard(after_s=99), timeout_s=0.5)


def test_no_encoder_is_no_answer() -> None:
    with pytest.raises(UnavailableError, match="the query encoder did not answer"):
        ask(shard(*LEFT), shard(*RIGHT), encoder=encoder(dies=True))


def all_at_once(ingress: Ingress, *asks: Ask) -> list[Any]:
    async def scenario() -> list[Any]:
        return await asyncio.gather(*(ingress.search(one) for one in asks), return_exceptions=True)

    return run(scenario())


def test_searches_that_come_together_go_on_together_each_with_its_own_k_and_filter() -> None:
    asked: list[list[str]] = []
    ingress = made(shard(*LEFT), shard(*RIGHT), encoder=encoder(asked=asked), max_calls=1)
    wheres = [None, {"colour": "red"}, {"colour": "blue"}, {"not": {"colour": "red"}}]
    asks = [Ask(f"mug {n}", k=1 + n % 3, where=wheres[n % 4]) for n in range(20)]
    for n, answer in enumerate(all_at_once(ingress, *asks)):
        wanted = ["a", "b", "c"][: 1 + n % 3] if n % 4 < 2 else []
        assert ([hit["item_id"] for hit in answer.hits], answer.answered) == (wanted, 2)
    assert [len(batch) for batch in asked] == [1, 19]


def test_one_poisonous_query_fails_alone() -> None:
    ingress = made(shard(*LEFT), shard(*RIGHT), encoder=encoder(poison="mug 7"), max_calls=1)
    found = all_at_once(ingress, *(Ask(f"mug {n}", k=1) for n in range(20)))
    assert [n for n, answer in enumerate(found) if isinstance(answer, Exception)] == [7]
    assert isinstance(found[7], UnavailableError)
    assert all(answer.hits[0]["item_id"] == "a" for n, answer in enumerate(found) if n != 7)


def test_more_than_may_wait_are_refused_at_once() -> None:
    ingress = made(shard(*LEFT), shard(*RIGHT), max_calls=1, max_waiting=5)
    assert not ingress.busy
    refused = [a for a in all_at_once(ingress, *[Ask("mug")] * 20) if isinstance(a, Exception)]
    assert len(refused) == 14
    assert all("too many searches at once" in str(error) for error in refused)


def test_a_filter_that_does_not_fit_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(DataError, match="wanted a filter on one of colour, item_id; found 'color'"):
        ask(shard(dies=True), shard(dies=True), where={"color": "red"})


def test_a_request_may_wait_less_than_the_server_would() -> None:
    slow = made(shard(*LEFT, after_s=0.3), shard(*RIGHT))
    [answer] = all_at_once(slow, Ask("mug", timeout_s=0.05))
    assert isinstance(answer, UnavailableError)
    assert "no answer within 0.05 s" in str(answer)


def test_what_is_like_an_item_is_found_by_its_vector_and_without_itself() -> None:
    asked: list[list[str]] = []
    ingress = made(shard(*LEFT), shard(*RIGHT), encoder=encoder(asked=asked))
    like, text = all_at_once(ingress, Ask(like="b", k=2), Ask("mug", k=2))
    assert [hit["item_id"] for hit in like.hits] == ["a", "c"]
    assert [hit["item_id"] for hit in text.hits] == ["a", "b"]
    assert asked == [["mug"]]


def test_an_item_that_no_shard_has_is_missing_and_one_that_a_dead_shard_may_have_is_not() -> None:
    [missing] = all_at_once(made(shard(*LEFT), shard(*RIGHT)), Ask(like="x"))
    assert isinstance(missing, MissingError)
    ingress = made(shard(*LEFT), shard(dies=True))
    [found, unknown] = all_at_once(ingress, Ask(like="a"), Ask(like="b"))
    assert ([hit["item_id"] for hit in found.hits], found.answered) == (["c"], 1)
    assert isinstance(unknown, UnavailableError)
    assert run(ingress.item("a")) == ({"item_id": "a", "image": b"photo"}, b"photo")


def test_a_query_is_encoded_once_as_long_as_it_is_kept() -> None:
    asked: list[list[str]] = []
    settings = {"cached_queries": 2, "max_calls": 1, "gather_ms": 0}
    ingress = made(shard(*LEFT), shard(*RIGHT), encoder=encoder(asked=asked), **settings)

    async def scenario() -> None:
        for queries in (["mug"], ["mug", "cup", "mug"], ["pan", "pot", "pin"], ["pin", "mug"]):
            await asyncio.gather(*(ingress.search(Ask(query)) for query in queries))

    run(scenario())
    assert asked == [["mug"], ["cup"], ["pan"], ["pot", "pin"], ["mug"]]


def test_the_same_search_is_answered_from_memory_until_something_changes() -> None:
    asked: list[int] = []
    changes = iter([0, 0, 1, 1, 1, 1])
    one = shard(*LEFT, asked=asked, changes=changes)
    ingress = made(one, cached_results=10)

    async def scenario() -> list[Any]:
        red = {"colour": "red"}
        asks = [Ask("mug"), Ask("mug"), Ask("mug", where=red), Ask("mug", where=red), Ask("cup"), Ask("mug")]
        return [await ingress.search(ask) for ask in asks]

    answers = run(scenario())
    assert ["cached" in answer.took for answer in answers] == [False, True, False, True, False, False]
    assert answers[0].hits == answers[1].hits
    assert len(asked) == 4


def test_after_a_change_by_this_endpoint_nothing_from_before_it_is_answered_or_kept() -> None:
    asked: list[int] = []

    async def delete(key: str, item_ids: list[str]) -> int:
        return 1

    ingress = made(
        shard(*LEFT, asked=asked, changes=iter([0, 0, 1])), items=writer(delete=delete), writes=True,
        cached_results=10,
    )  # fmt: skip

    async def scenario() -> list[bool]:
        cached = []
        for n in range(5):
            if n == 1:
                await ingress.delete(["a"])
            cached.append("cached" in (await ingress.search(Ask("mug"))).took)
        return cached

    # kept, changed; then the shard has not taken the change in yet, and it has, and that is kept
    assert run(scenario()) == [False, False, False, True, True]
    assert len(asked) == 3


def test_what_is_degraded_explained_or_asked_afresh_is_never_kept() -> None:
    for trouble, how in (({"dies": True}, {}), ({}, {"fresh": True})):
        asked: list[int] = []
        ingress = made(shard(*LEFT, asked=asked), shard(*RIGHT, **trouble), cached_results=10)

        async def scenario(ingress: Ingress = ingress, how: Any = how) -> None:
            for _ in range(2):
                assert "cached" not in (await ingress.search(Ask("mug", **how))).took

        run(scenario())
        assert len(asked) == 2


def test_the_share_of_the_catalogue_that_is_missing_is_told() -> None:
    for shards, missing in (
        ([shard(*LEFT), shard(*RIGHT)], 0), ([shard(*LEFT), shard(dies=True)], 0.3),
        ([shard(dies=True), shard(*RIGHT)], 0.7),
    ):  # fmt: skip
        [answer] = all_at_once(made(*shards), Ask("mug"))
        assert answer.missing == pytest.approx(missing)


def test_a_shard_that_is_gone_is_not_waited_for_again_and_again() -> None:
    asked: list[int] = []
    ingress = made(shard(*LEFT), shard(*RIGHT, after_s=99, asked=asked), timeout_s=1)

    async def scenario() -> None:
        for n in range(6):
            assert (await ingress.search(Ask(f"mug {n}"))).answered == 1

    run(scenario())
    assert len(asked) < 6


def test_a_slow_replica_of_a_shard_is_not_waited_for() -> None:
    slow_once = shard(*RIGHT, after_s=iter([5.0, 0.0]))
    [answer] = all_at_once(made(shard(*LEFT), slow_once, hedge_after_ms=20), Ask("mug"))
    assert answer.answered == 2


def test_a_slow_replica_of_the_encoder_is_not_waited_for() -> None:
    slow_once = encoder(after_s=iter([5.0, 0.0]))
    started = time.perf_counter()
    [answer] = all_at_once(made(shard(*LEFT), encoder=slow_once, hedge_after_ms=20), Ask("mug"))
    assert answer.answered == 1
    assert time.perf_counter() - started < 4


def test_calls_are_traced_under_the_first_request_that_they_are_for() -> None:
    seen: list[int] = []
    ingress = made(shard(*LEFT), encoder=encoder(traces=seen), max_calls=1)

    async def request(number: int) -> None:
        span = trace.NonRecordingSpan(trace.SpanContext(number, number, is_remote=False))
        with trace.use_span(span):
            await ingress.search(Ask(f"mug {number}"))

    async def scenario() -> None:
        await asyncio.gather(*(request(number) for number in (7, 8, 9)))

    run(scenario())
    assert seen == [7, 8]


def test_hits_are_explained_by_what_wrote_them() -> None:
    told = {"text": 0.1, "without_image": 0.2}
    seen: list[Any] = []

    async def explain(key: str, query: str, items: list[dict[str, Any]]) -> list[dict[str, float]]:
        seen.append((query, [item["item_id"] for item in items]))
        return [told for _ in items]

    ingress = made(shard(*LEFT), shard(*RIGHT), items=writer(explain=explain))
    [answer] = all_at_once(ingress, Ask("mug", k=2, explain=True))
    assert [hit["explanation"] for hit in answer.hits] == [told, told]
    assert seen == [("mug", ["a", "b"])]


def test_where_photo_and_text_are_weighed_the_best_are_put_into_that_order() -> None:
    cosines = {"a": (0.2, 0.6), "b": (0.5, None), "c": (0.4, 0.5), "d": (0.9, 0.1)}
    many = [(f"z{n:02d}", -n / 1000) for n in range(60)]

    async def explain(key: str, query: str, items: list[dict[str, Any]]) -> list[dict[str, float | None]]:
        assert len(items) <= WEIGHED
        found = [cosines.get(item["item_id"], (0, 0)) for item in items]
        return [{"text": text, "image": image, "fused": 0, "without_image": 0} for text, image in found]

    ingress = made(shard(*LEFT, *many), shard(*RIGHT), items=writer(explain=explain), cached_results=9)
    asks = [Ask("mug", k=4, image_weight=weight) for weight in (0.0, 1.0, 0.5)] + [Ask("mug", k=4)]
    found = all_at_once(ingress, *asks)
    assert [[hit["item_id"] for hit in answer.hits] for answer in found] == [
        ["d", "b", "c", "a"], ["a", "c", "d", "b"], ["d", "c", "a", "b"], ["a", "b", "c", "d"],
    ]  # fmt: skip
    assert [hit["score"] for hit in found[2].hits] == pytest.approx([0.5, 0.45, 0.4, 0.25])


def test_another_version_is_searched_where_it_is_held_and_counts_for_nothing_as_a_canary_does() -> None:
    live, other = release(), release(version="4", index_key="other")
    switch = FakeSwitch(live, other)
    by = {other.key: [("x", 0.9)]}
    ingress = made(shard(*LEFT, by=by), shard(*RIGHT, by=by), switch=switch)
    run(until(lambda: ingress.release.held == ["3", "4"]))
    asks = [
        Ask("mug", k=1), Ask("mug", k=1, version="4"), Ask("mug", k=1, version="3"), Ask("mug", k=1, canary=True),
        Ask("mug", version="5"),
    ]  # fmt: skip
    *found, missing = all_at_once(ingress, *asks)
    assert [(answer.hits[0]["item_id"], answer.release.model.version) for answer in found] == [
        ("a", "3"), ("x", "4"), ("a", "3"), ("a", "3"),
    ]  # fmt: skip
    assert isinstance(missing, MissingError)
    assert (str(missing), missing.param) == ("version 5 is not in memory; 3, 4 are", "version")
    assert {key: one["searches"] for key, one in ingress._told().items()} == {live.key: 2}


def test_values_are_counted_over_all_shards_and_kept_a_while() -> None:
    counted: list[str] = []
    ingress = made(shard(*LEFT, counted=counted), shard(*RIGHT, counted=counted))
    for where in (None, {"colour": "red"}, None):
        [colour], told = run(ingress.facets(where, 5))
        assert (colour["name"], colour["values"], told.model.version) == (
            "colour", [{"value": "red", "items": 4}], "3"
        )  # fmt: skip
    assert counted == ["", "", '{"colour":"red"}', '{"colour":"red"}']
    with pytest.raises(DataError, match="wanted a filter on one of"):
        run(ingress.facets({"colur": "red"}, 5))
    with pytest.raises(UnavailableError, match="did not count"):
        run(made(shard(*LEFT), shard(dies=True)).facets(None, 5))


def test_that_an_alias_was_moved_is_told_to_the_switch() -> None:
    switch = FakeSwitch(release())
    run(made(shard(*LEFT), shard(*RIGHT), switch=switch).look())
    assert switch.looks == 1


def test_changes_are_passed_on_where_they_are_allowed_and_their_troubles_told() -> None:
    async def upsert(key: str, items: list[Any]) -> tuple[int, int, list[Any]]:
        if items == ["odd"]:
            raise ArtifactError("fields among colour", "size", "leave it out")
        if items == ["slow"]:
            await asyncio.sleep(9)
        if items == ["broken"]:
            raise RuntimeError("gone")
        return 3, len(items), []

    ingress = made(shard(*LEFT), items=writer(upsert=upsert), writes=True)
    assert run(ingress.upsert(["a"])) == (3, 1, [])  # type: ignore[list-item]
    for item, error in (("odd", RefusedError), ("broken", UnavailableError)):
        with pytest.raises(error):
            run(ingress.upsert([item]))  # type: ignore[list-item]
    ingress = made(shard(*LEFT), items=writer(upsert=upsert), writes=True, write_timeout_s=0.05)
    with pytest.raises(UnavailableError, match=r"not written within 0\.05 s"):
        run(ingress.upsert(["slow"]))  # type: ignore[list-item]
    with pytest.raises(ForbiddenError):
        run(made(shard(*LEFT), items=writer(upsert=upsert)).upsert(["a"]))  # type: ignore[list-item]


def test_over_real_shards_filters_likeness_and_items(tmp_path: Path) -> None:
    """Four segments in two shards, without a cluster between them and the ingress."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = pa.Table.from_pylist([
        {
            "item_id": f"i{n:02d}", "split": "val", "title": f"title {n}", "has_image": n % 2 == 0,
            "fields": {"colour": ["red", "blue"][n % 2], "price": float(n)},
            "image": b"jpeg" if n % 2 == 0 else None,
        }
        for n in range(40)
    ])  # fmt: skip
    with artifacts.draft(tmp_path, "index", {}, {}) as draft:
        for n in range(4):
            rows = pa.array(range(n, 40, 4))
            segments.write(draft.folder / f"segment-{n}", vectors[n::4], items.take(rows), None, "release")
        segments.tell(draft, [f"segment-{n}" for n in range(4)])
    folder = artifacts.place(tmp_path, "index", artifacts.key("index", {}, {}))
    plan = Plan.read(folder)
    assert "image" not in plan.schema.names
    switch = FakeSwitch(release(plan.schema, (20, 20), index=str(folder)))
    servers = [deployed(ShardServer, switch, 0.02, n, 2, 0.01) for n in range(2)]
    ingress = made(*(handle(address=server.address) for server in servers), switch=switch)

    def best(like: int, keep: Any, k: int = 5) -> list[str]:
        order = np.argsort(-vectors @ vectors[like])
        return [f"i{n:02d}" for n in order.tolist() if n != like and keep(n)][:k]

    asks = [
        Ask(like="i07", k=5), Ask(like="i08", k=3, where={"colour": "red"}),
        Ask(like="i08", k=50, where={"price": {"gte": 30}, "has_image": False}),
        Ask(like="i09", where={"price": -1}),
    ]  # fmt: skip
    found = all_at_once(ingress, *asks)
    assert [[hit["item_id"] for hit in answer.hits] for answer in found] == [
        best(7, lambda n: True), best(8, lambda n: n % 2 == 0, 3), best(8, lambda n: n >= 30 and n % 2, 50), [],
    ]  # fmt: skip
    assert found[0].hits[0].keys() == {"item_id", "title", "fields", "score"}
    record, photo = run(ingress.item("i08"))
    assert (record["title"], record["fields"], photo) == ("title 8", {"colour": "red", "price": 8.0}, b"jpeg")
    assert run(ingress.item("i09"))[1] is None
    [colour, price], _ = run(ingress.facets({"price": {"gte": 30}}, 9))
    assert colour["values"] == [{"value": "blue", "items": 5}, {"value": "red", "items": 5}]
    assert (price["kind"], price["items"], price["least"], price["greatest"]) == ("number", 10, 30.0, 39.0)
    with Live(folder) as live:
        live.upsert(vectors[:1], [items.slice(7, 1).to_pylist()[0] | {"title": "mended"}])
        live.delete(["i08"])
    time.sleep(0.02)
    assert run(ingress.item("i07"))[0]["title"] == "mended"
    [like, gone] = all_at_once(ingress, Ask(like="i07", k=1), Ask(like="i08"))
    assert [hit["item_id"] for hit in like.hits] == ["i00"]
    assert isinstance(gone, MissingError)


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a niceness of its own on Linux alone")
def test_every_item_is_scored_behind_what_is_answered(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    niceness = dict[bool, int]()
    search = Shard.search

    def noted(*what: Any, exact: bool = False, **how: Any) -> Found:
        niceness[exact] = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
        return search(*what, exact=exact, **how)

    monkeypatch.setattr(Shard, "search", noted)
    one = release(Plan.read(index).schema, (5, 5), index=str(index), identity="r" * 64)
    server = deployed(ShardServer, FakeSwitch(one), 0.02, 0, 2, 0.5)
    vector, own = np.ones((1, 2), np.float32), os.getpriority(os.PRIO_PROCESS, 0)
    _, [answered] = run(server.search(one.key, vector, 3, [""], [""]))
    assert run(server.exact(one.key, vector, 3, ""))["ids"] == answered["ids"]
    assert niceness == {False: own, True: max(own, NICENESS)}


async def until(true: Any) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def test_a_request_is_answered_by_the_release_that_is_live_when_it_comes() -> None:
    """Each part answers only of the release that it is asked for, so that a mix would fail."""
    old, new = release(version="3", sizes=(7, 3)), release(version="4", sizes=(7, 3))
    switch, asked = FakeSwitch(old, new), list[str]()
    parts = shard(*LEFT, after_s=0.05, keys=asked), shard(*RIGHT, after_s=0.05, keys=asked)
    ingress = made(*parts, encoder=encoder(keys=asked), switch=switch, cached_results=10, cached_queries=10)

    async def scenario() -> None:
        under_way = asyncio.ensure_future(ingress.search(Ask("mug")))
        await until(lambda: asked)
        switch.live = new.key
        await until(lambda: ingress.release.model.version == "4")
        answers = [await under_way, *await asyncio.gather(*(ingress.search(Ask("mug")) for _ in range(5)))]
        assert [answer.release.model.version for answer in answers] == ["3", "4", "4", "4", "4", "4"]
        assert {key: asked.count(key) for key in (old.key, new.key)} == {old.key: 3, new.key: len(asked) - 3}
        assert asked[3:] == [new.key] * len(asked[3:])
        switch.live = old.key
        await until(lambda: ingress.release.model.version == "3")
        answer = await ingress.search(Ask("mug"))
        assert (answer.release.model.version, "cached" in answer.took) == ("3", True)  # by its own cache

    run(scenario())


def test_a_release_that_is_live_again_is_not_judged_by_how_slow_it_was_before() -> None:
    old, new = release(version="3", sizes=(7,)), release(version="4", sizes=(7,))
    switch = FakeSwitch(old, new)
    ingress = made(shard(*LEFT, after_s=iter([0.3, 0, 0])), switch=switch)

    async def scenario() -> None:
        await ingress.search(Ask("mug"))
        assert ingress._told()[old.key]["p99"] > 300
        for live in (new, old):
            switch.live = live.key
            await until(lambda version=live.version: ingress.release.model.version == version)
        assert ingress._told()[old.key] == {"searches": 1, "failed": 0, "p99": 0.0}
        await ingress.search(Ask("cup"))
        assert 0 < ingress._told()[old.key]["p99"] < 300

    run(scenario())


def test_a_release_is_not_searched_before_it_is_in_memory() -> None:
    old, switch = release(version="3"), FakeSwitch(release(version="3"))
    ingress = made(shard(*LEFT), switch=switch)

    async def scenario() -> None:
        switch.live = "4-i"
        await asyncio.sleep(0.1)
        assert ingress.live.release.key == old.key

    run(scenario())


def test_a_share_of_searches_is_made_exactly_and_in_the_shadow_too() -> None:
    live, shadow = release(version="3"), release(version="4")
    switch = FakeSwitch(live, shadow)
    switch.shadow = shadow.key
    parts = shard(*LEFT, by={shadow.key: [("a", 0.9), ("z", 0.2)]}), shard(*RIGHT, by={shadow.key: []})
    ingress = made(*parts, switch=switch, exact_share=1.0, shadow_share=1.0)

    async def scenario() -> None:
        await until(lambda: shadow.key in ingress._holder)
        answer = await ingress.search(Ask("mug", k=4))
        assert [hit["item_id"] for hit in answer.hits] == ["a", "b", "c", "d"]
        await until(lambda: switch.reports["ingress"][2].get(f"shadow {shadow.key}"))
        told = switch.reports["ingress"][2][f"shadow {shadow.key}"]
        assert (told["compared"], told["overlap_at_10"]) == (1, 0.25)
        await until(lambda: ingress._exact.told())
        assert ingress._exact.told()["overlap_at_10"] == 1.0
        assert switch.reports["ingress"][2][live.key]["searches"] == 1

    run(scenario())
