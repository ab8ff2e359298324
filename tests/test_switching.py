"""The switch against a real MLflow, with replicas that load what it tells them; clients are the flow test's."""

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
import uvicorn

from askew import artifacts, endpoint, hooks, releases, segments, switching
from askew.errors import RegistryError
from askew.gates import Verdict
from askew.holding import Holder
from askew.inputs import Tokens
from askew.models import Model
from askew.registry import CHAMPION, Registry, Version
from askew.releases import FORCE, Release, find
from askew.serving import ServingSettings, first
from askew.switching import Switch, Watched
from askew.towers import TowerSettings, TwoTower

KINDS = ("ingress", "encoder", "items", "shard-0")
names = (f"switch-{number}" for number in range(1000))


class World:
    """A registered model with versions and their indexes, a switch, and one replica of each kind."""

    def __init__(self, uri: str, root: Path) -> None:
        self.uri, self.root, self.registry, self.name = uri, root, Registry(uri), next(names)
        self.holders: dict[str, Holder[str]] = {}
        self.loads: list[str] = []
        self.broken: set[str] = set()
        self.seen: dict[str, dict[str, float]] = {}
        self.switch: Any = None

    def version(self, seed: int, **tags: str) -> Version:
        """Register a model of its own weights, and the index that goes with it."""
        with artifacts.draft(self.root, "model", {"seed": seed, "of": self.name}, {}) as draft:
            torch.manual_seed(seed)
            towers = TowerSettings.model_validate({"dim": 8, "text": {"width": 16, "layers": 1, "heads": 2}})
            tokens = Tokens.train(["red mug", "blue cap"], 60)
            Model(TwoTower(towers, tokens.size), tokens).save(draft.folder)
            draft.details["dim"] = 8
        model = artifacts.place(self.root, "model", artifacts.key("model", {"seed": seed, "of": self.name}, {}))
        key = artifacts.read(model, "model").key
        inputs = {"model": key, "triplets": "t"}
        with artifacts.draft(self.root, "index", {}, inputs) as draft:
            items = pa.table({"item_id": [f"i{n}" for n in range(4)]})
            segments.write(draft.folder / "segment-0", np.eye(4, 8, dtype=np.float32), items, None, f"r{seed}")
            segments.tell(draft, ["segment-0"])
        index = artifacts.place(self.root, "index", artifacts.key("index", {}, inputs))
        run = self.registry.start_run("switching", f"seed {seed}", {}, {})
        given = {"askew.index": str(index), "askew.release": f"r{seed}", **tags}
        return self.registry.register(self.name, model, run, {k: v for k, v in given.items() if v})

    def release(self, version: Version) -> Release:
        return find(version, 1, self.registry.download(version, self.root / "cache"))

    async def start(self, version: Version, uri: str = "", deployed: str = "d", **settings: Any) -> None:
        """Start a switch on a version, and the replicas if there are none."""
        (self.root / "cache").mkdir(exist_ok=True)
        watched = Watched(uri or self.uri, self.name, CHAMPION, str(self.root / "cache"), 1, deployed)
        how = {"watch_every_s": 0.05, "watched_s": 0, "previous_s": 60, "slow_for_s": 0, "steady_s": 0, **settings}
        self.switch = Switch.__new__(Switch)
        await self.switch.__init__(how, [*watched], self.release(version).model_dump(), True)  # type: ignore[misc]
        for kind in KINDS if not self.holders else ():
            self.holders[kind] = Holder(kind, self.load, self.report, 0.02)
            await self.holders[kind].start()
        self.holders["ingress"].seen = lambda: self.seen

    def die(self) -> None:
        """End the switch as SIGKILL does: nothing that it had in mind is done."""
        for task in self.switch._tasks:
            task.cancel()

    async def report(self, *what: Any, deadline: float) -> Any:
        return await self.switch.report(*what)

    def load(self, release: Release) -> str:
        self.loads.append(release.version)
        if release.version in self.broken:
            raise OSError("damaged")
        return release.version

    @property
    def live(self) -> str:
        return str(self.switch._live.version)

    @property
    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = self.switch._told()
        return told

    async def until(self, true: Callable[[], Any], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while not true():
                held = {h.orders["serve"] in h for h in self.holders.values()}
                assert held == {True}, "a replica was told to serve what it does not hold"
                await asyncio.sleep(0.01)

    def runs(self) -> list[dict[str, Any]]:
        """What MLflow's history of this model's releases says, oldest first, as anyone reads it."""
        api = f"{self.uri}/api/2.0/mlflow"
        found = httpx.get(
            f"{api}/experiments/get-by-name", params={"experiment_name": f"{self.name}-releases"}
        ).json()
        if "experiment" not in found:
            return []
        body = {"experiment_ids": [found["experiment"]["experiment_id"]], "order_by": ["start_time ASC"]}
        runs = httpx.post(f"{api}/runs/search", json=body).json().get("runs", [])
        return [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]

    def on_the_page(self, version: Version) -> dict[str, Any]:
        """What MLflow says of a version."""
        where = f"{self.uri}/api/2.0/mlflow/model-versions/get"
        told = httpx.get(where, params={"name": self.name, "version": version.version}).json()["model_version"]
        return {"description": told.get("description", ""), **{t["key"]: t["value"] for t in told["tags"]}}


@pytest.fixture
def world(mlflow_uri: str, tmp_path: Path) -> World:
    return World(mlflow_uri, tmp_path)


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


def test_the_alias_makes_a_version_live_with_its_index_and_back_at_once(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        await world.start(one)
        assert (world.live, world.told["candidate"]) == ("1", None)
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")
        assert (world.switch._live.index, world.told["previous"]) == (two.tags["askew.index"], "1")
        assert all(holder[world.switch._live.key] == "2" for holder in world.holders.values())
        await world.until(lambda: {h.orders["serve"] for h in world.holders.values()} == {world.switch._live.key})
        loads = len(world.loads)
        world.registry.promote(one)
        await world.until(lambda: world.live == "1", 5)
        assert len(world.loads) == loads  # it was in memory still
        await world.until(lambda: len(world.runs()) == 2)
        assert [(r["askew.event"], r["askew.version"], r["askew.live"]) for r in world.runs()] == [
            ("live", "2", "2"), ("live", "1", "1"),
        ]  # fmt: skip
        await world.until(lambda: not world.switch._events)
        assert world.on_the_page(two)["askew.endpoint.search"].startswith("not live since 20")
        assert "**Endpoint search**: live since 20" in world.on_the_page(one)["description"]

    run(scenario())


def test_the_release_before_goes_after_its_time(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(two)
        await world.start(one, previous_s=0.3)
        await world.until(lambda: world.live == "2")
        await world.until(lambda: world.told["previous"] is None)
        assert {len(h.orders["hold"]) for h in world.holders.values()} <= {1, 2}
        where = releases.memory(world.root / "cache", world.uri, world.name, "search")
        kept = releases.remembered(where)
        assert kept is not None
        assert (kept.now.version, kept.before) == ("2", None)

    run(scenario())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("none", "wanted an index of .* version 2; found none; run the index stage"),
        ("gone", "index"),
        ("other", "wanted an index made by model"),
        ("identity", "found one of r2"),
        ("corrupt", "segment-0"),
    ],
)
def test_what_does_not_fit_together_is_refused_where_the_person_looks(world: World, what: str, said: str) -> None:
    async def scenario() -> None:
        one = world.version(1)
        tags = {
            "none": {"askew.index": ""}, "gone": {"askew.index": str(world.root / "index-gone")},
            "other": {"askew.index": one.tags["askew.index"]}, "identity": {"askew.release": "r" * 64},
        }.get(what, {})  # fmt: skip
        two = world.version(2, **tags)
        if what == "corrupt":
            flip(Path(two.tags["askew.index"]) / "segment-0")
        world.registry.promote(one)
        await world.start(one)
        world.registry.promote(two)
        await world.until(lambda: (world.told["candidate"] or {}).get("state") == "refused")
        assert world.live == "1"
        await world.until(lambda: "refused since" in world.on_the_page(two).get("askew.endpoint.search", ""))
        assert re.search(said, world.on_the_page(two)["askew.endpoint.search"])
        assert re.search(said, "; ".join(world.told["candidate"]["reasons"]))
        await world.until(lambda: [r["askew.event"] for r in world.runs()] == ["refused"])
        world.registry.promote(one)
        await world.until(lambda: world.told["candidate"] is None)

    run(scenario())


def test_what_a_person_wrote_of_a_version_stays(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.describe(two, "Trained on autumn's clicks.\n\nAsk Ada.")
        world.registry.promote(two)
        await world.start(one)
        for live, alias in (("2", one), ("1", two), ("2", None)):
            await world.until(lambda live=live: world.live == live)
            if alias:
                world.registry.promote(alias)
        await world.until(lambda: len(world.runs()) == 3 and not world.switch._events)
        told = world.on_the_page(two)["description"].split("\n\n")
        assert told[:2] == ["Trained on autumn's clicks.", "Ask Ada."]
        assert [part[:31] for part in told[2:]] == ["**Endpoint search**: live since"]
        told = world.on_the_page(one)["description"].split("\n\n")
        assert [part[:35] for part in told] == ["**Endpoint search**: not live since"]

    run(scenario())


def test_an_endpoint_starts_on_what_it_served_last(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the alias is on now has to pass the gates first; without MLflow there is nothing else."""
    one, two, cache = world.version(1), world.version(2), world.root / "cache"
    cache.mkdir()
    settings = ServingSettings(model=world.name, tracking_uri=world.uri, num_shards=1)
    world.registry.promote(two)
    assert first(settings, cache).version == "2"  # it never served before
    where = releases.memory(cache, world.uri, world.name, "search")
    releases.remember(where, kept := world.release(one), None, "d")
    assert first(settings, cache) == kept
    assert first(settings.model_copy(update={"version": "2"}), cache).version == "2"
    down = settings.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(RegistryError):
        first(down, cache)
    releases.remember(releases.memory(cache, down.tracking_uri, world.name, "search"), kept, None, "d")
    assert first(down, cache) == kept
    assert "version 1, which was served last, is served" in capsys.readouterr().out
    releases.remember(where, kept.model_copy(update={"index": str(world.root / "gone")}), None, "d")
    assert first(settings, cache).version == "2"
    releases.remember(where, kept.model_copy(update={"model_key": "other"}), None, "d")
    assert first(settings, cache).version == "2"
    where.write_text("{")
    assert first(settings, cache).version == "2"


def flip(path: Path) -> None:
    file = max(path.rglob("*"), key=lambda p: p.stat().st_size) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def verdict(holds: bool, hard: bool) -> Verdict:
    return Verdict(gate="recall", holds=holds, hard=hard, wanted="at least 0.95", found="0.9")


@pytest.mark.parametrize("hard", [False, True])
def test_force_goes_past_the_gates_of_quality_alone(
    world: World, hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching.gates, "judge", lambda *_, **__: [verdict(False, hard)])

    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(two)
        await world.start(one)
        await world.until(lambda: (world.told["candidate"] or {}).get("state") == "refused")
        assert world.told["candidate"]["reasons"] == ["recall: wanted at least 0.95; found 0.9"]
        world.registry.tag(two, {FORCE: "1"})
        if not hard:
            await world.until(lambda: world.live == "2")
            await world.until(lambda: len(world.runs()) == 2)
            assert world.runs()[1]["askew.gate.recall"] == "REFUSED: wanted at least 0.95; found 0.9"
            assert "--force" in world.runs()[0]["askew.why"]
        else:
            await asyncio.sleep(1)
            assert world.live == "1"

    run(scenario())


def test_ten_moves_of_the_alias_in_a_hurry_end_on_the_last(world: World) -> None:
    async def scenario() -> None:
        versions = [world.version(seed) for seed in range(4)]
        world.registry.promote(versions[0])
        await world.start(versions[0])
        for number in range(11):
            world.registry.promote(versions[number % 3 if number < 10 else 3])
            await asyncio.sleep(0.1)
        await world.until(lambda: world.live == "4")
        assert {h[world.switch._live.key] for h in world.holders.values()} == {"4"}
        assert world.told["candidate"] is None
        assert max(len(h.orders["hold"]) for h in world.holders.values()) <= 3

    run(scenario())


def test_what_a_replica_cannot_load_does_not_go_live(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.broken.add("2")
        world.registry.promote(two)
        await world.start(one)
        await world.until(lambda: (world.told["candidate"] or {}).get("state") == "refused")
        assert (world.live, "could not load it: OSError: damaged" in world.told["candidate"]["reasons"][0]) == (
            "1", True,
        )  # fmt: skip
        await world.until(lambda: all(len(h.orders["hold"]) == 1 for h in world.holders.values()))

    run(scenario())


def test_an_alias_that_is_taken_away_or_on_nothing_changes_nothing(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        await world.start(one)
        world.registry._client.delete_registered_model_alias(world.name, CHAMPION)
        await asyncio.sleep(0.3)
        assert (world.live, world.told["candidate"], world.told["note"]) == ("1", None, "")
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")
        world.registry._client.delete_model_version(world.name, "2")
        await asyncio.sleep(0.3)
        assert world.live == "2"
        world.registry.promote(one)
        await world.until(lambda: world.live == "1")

    run(scenario())


def test_mlflow_that_is_down_changes_nothing_and_is_said(world: World, mlflow_uri: str) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(two)
        await world.start(one, uri="http://127.0.0.1:9")
        await world.until(lambda: "MLflow" in world.told["note"])
        assert world.live == "1"
        world.switch._watched = world.switch._watched._replace(uri=mlflow_uri)  # it is up again
        await world.until(lambda: world.live == "2")
        await world.until(lambda: world.told["note"] == "")

    run(scenario())


@pytest.mark.parametrize("step", ["preparing", "loading", "half loaded", "live", "rolled back"])
def test_a_switch_that_is_killed_at_any_step_goes_on_where_it_was(world: World, step: str) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        await world.start(one)
        if step == "half loaded":
            slow = world.holders["encoder"]
            load, slow._load = slow._load, lambda release: time.sleep(0.5) or load(release)  # type: ignore[func-returns-value]
        world.registry.promote(two)
        reached = {
            "preparing": lambda: world.told["candidate"],
            "loading": lambda: world.switch._loading,
            "half loaded": lambda: "2" in world.loads,
            "live": lambda: world.live == "2",
            "rolled back": lambda: world.live == "2",
        }[step]
        await world.until(reached)
        world.die()
        if step == "rolled back":
            world.registry.promote(one)
        await asyncio.sleep(0.1)
        served = {holder.orders["serve"] for holder in world.holders.values()}
        await world.start(one)
        if step == "live":
            assert world.live == "2"  # what was live when it died is live when it comes again
        assert served <= {world.switch._live.key, world.release(one).key}
        await world.until(lambda: world.live == ("1" if step == "rolled back" else "2"))

    run(scenario())


def test_a_new_deployment_starts_on_what_it_was_given(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(two)
        await world.start(one)
        await world.until(lambda: world.live == "2")
        world.die()
        world.registry._client.delete_registered_model_alias(world.name, CHAMPION)
        await world.start(one, deployed="another")
        assert world.live == "1"

    run(scenario())


@pytest.mark.parametrize(
    ("searches", "failed", "p99", "why"),
    [
        (1000, 30, 10.0, "30 of 1000 searches failed"), (1000, 20, 10.0, None), (99, 99, 10.0, None),
        (1000, 0, 310.0, "p99 is 310 ms, and was 100 ms before"), (1000, 0, 290.0, None),
    ],
)  # fmt: skip
def test_a_release_that_fails_or_is_slow_gives_way_to_the_one_before(
    world: World, searches: int, failed: int, p99: float, why: str | None
) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        calm = {"searches": 500.0, "failed": 0.0, "p99": 100.0}
        now = {"searches": float(searches), "failed": float(failed), "p99": p99}
        await world.start(one, watched_s=1)
        world.seen = {world.release(one).key: calm}
        await asyncio.sleep(0.1)
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")
        world.seen = {world.release(one).key: calm, world.release(two).key: now}
        if why is None:
            await asyncio.sleep(1.5)
            assert world.live == "2"
            return
        await world.until(lambda: world.live == "1")
        assert world.told["candidate"]["reasons"] == [f"rolled back: {why}"]
        await world.until(lambda: "rolled back" in world.on_the_page(two).get("askew.endpoint.search", ""))
        await asyncio.sleep(0.5)
        assert world.live == "1"  # though the alias is on the other
        world.registry.promote(one)
        await world.until(lambda: world.told["candidate"] is None)
        world.seen = {}
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")  # a person wants it again

    run(scenario())


def test_what_is_slow_for_a_moment_or_while_replicas_come_and_go_stays(world: World) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        calm, slow = ({"searches": n, "failed": 0.0, "p99": p99} for n, p99 in ((500.0, 100.0), (1000.0, 900.0)))
        await world.start(one, watched_s=60, slow_for_s=1.0, steady_s=4.0)
        world.seen = {world.release(one).key: calm}
        await asyncio.sleep(4.5)
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")
        key = world.release(two).key
        world.seen = {world.release(one).key: calm, key: slow}
        await asyncio.sleep(0.5)
        world.seen = {world.release(one).key: calm, key: calm | {"searches": 1000.0}}
        await asyncio.sleep(1.0)
        world.seen = {world.release(one).key: calm, key: slow}
        newcomer = ("shard-0", "newcomer", [key], {}, {})
        for _ in range(5):  # a replica is new there, and is missed three seconds later
            await world.switch.report(*newcomer)
            await asyncio.sleep(0.1)
        await asyncio.sleep(5.2)
        assert world.live == "2"
        await world.until(lambda: world.live == "1")

    run(scenario())


def test_a_release_that_is_not_live_any_more_brings_nothing_back(world: World) -> None:
    async def scenario() -> None:
        versions = [world.version(seed) for seed in range(3)]
        await world.start(versions[0], watched_s=30)
        for number in (1, 2):
            world.registry.promote(versions[number])
            await world.until(lambda number=number: world.live == str(number + 1))
        world.seen = {world.release(versions[1]).key: {"searches": 1e4, "failed": 1e4, "p99": 9e3}}
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert (world.live, world.told["candidate"]) == ("3", None)

    run(scenario())


def test_two_endpoints_on_one_registry_do_not_mind_each_other(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        other = World(world.uri, tmp_path / "other")
        other.root.mkdir()
        other.name, other.broken = world.name, {"2"}
        await world.start(one, endpoint="here")
        await other.start(one, endpoint="there")
        world.registry.promote(two)
        await world.until(lambda: world.live == "2")
        await other.until(lambda: (other.told["candidate"] or {}).get("state") == "refused")
        await world.until(lambda: len(world.runs()) == 2)
        page = world.on_the_page(two)
        assert page["askew.endpoint.here"].startswith("live since")
        assert page["askew.endpoint.there"].startswith("refused since")

    run(scenario())


def test_a_full_disk_while_fetching_refuses_for_now_and_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "RETRY_S", 0.3)
    real = Registry.download

    def full(self: Registry, version: Version, into: Path) -> Path:
        raise OSError(28, "No space left on device")

    async def scenario() -> None:
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        await world.start(one)
        monkeypatch.setattr(Registry, "download", full)
        world.registry.promote(two)
        await world.until(lambda: "No space left" in json.dumps(world.told))
        assert world.live == "1"
        monkeypatch.setattr(Registry, "download", real)
        await world.until(lambda: world.live == "2")

    run(scenario())


def test_mlflow_tells_at_once_where_it_has_a_webhook(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's real path, MLflow's real webhook; the switch alone would look once an hour."""
    monkeypatch.setenv(hooks.SECRET, "what both know")

    class Searcher:
        busy = False

        async def look(self) -> None:
            await world.switch.look()

    async def scenario() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        app: Any = endpoint.endpoint(Searcher(), "what both know")  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        serving = asyncio.create_task(server.serve([listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/hooks/mlflow"
        name = f"{world.name}-end"
        one, two = world.version(1), world.version(2)
        world.registry.promote(one)
        await world.start(one, watch_every_s=3600, webhook=url, endpoint=name)
        client = world.registry._client

        def there() -> bool:
            return [hook.url for hook in client.list_webhooks() if hook.name == f"askew-{name}"] == [url]

        async with asyncio.timeout(30):
            while not await asyncio.to_thread(there):
                await asyncio.sleep(0.2)
        await asyncio.sleep(1.2)  # MLflow keeps for a second that there is none
        await asyncio.to_thread(world.registry.promote, two)
        await world.until(lambda: world.live == "2", 20)
        world.switch._start(world.switch._hooked())  # as after a restart: no second one
        await asyncio.sleep(0.5)
        assert await asyncio.to_thread(there)
        server.should_exit = True
        await serving

    run(scenario())


def test_why_a_version_is_refused_is_told_without_the_folders_of_files() -> None:
    told = "wanted x in /data/shop/index-1; found '/var/lib/y/w.faiss' (/a/b/c), 3/4 of a/b/c"
    wanted = "wanted x in shop/index-1; found 'y/w.faiss' (b/c), 3/4 of a/b/c"
    assert switching._without_folders(told) == wanted
