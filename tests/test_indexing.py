"""Indexing on a real Ray cluster, of a model (untrained) that a real MLflow server holds."""

import json
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from askew import artifacts, datasets, indexing, tables
from askew.ann import Vectors
from askew.encoders import TextSettings
from askew.errors import ArtifactError, ConfigError, RegistryError
from askew.indexing import Embedder, IndexSettings, index
from askew.inputs import Tokens
from askew.models import Model
from askew.registry import Registry, Version
from askew.segments import COLUMNS, ITEMS, VECTORS, Plan
from askew.shards import Shard
from askew.towers import TowerSettings, TwoTower

TOWERS = TowerSettings(
    dim=16, text=TextSettings(width=16, heads=2), image_size=32, query_length=8, title_length=12
)
SEGMENTS = 7  # of 300 items: they cannot all be of one size
ORDER = [row for n in range(SEGMENTS) for row in range(n, 300, SEGMENTS)]  # each has a like share of all


def titles(triplets: Path) -> list[str]:
    return [str(t) for t in tables.column(tables.parts(triplets / "items"), "text").to_pylist()]


def untrained(triplets: Path) -> Model:
    torch.manual_seed(0)
    tokens = Tokens.train(titles(triplets), 300)
    return Model(TwoTower(TOWERS, tokens.size), tokens)


def registered(mlflow_uri: str, name: str, model: Model, root: Path) -> Version:
    with artifacts.draft(root, "model", {"name": name}, {}) as draft:
        model.save(draft.folder)
    folder = artifacts.place(root, "model", artifacts.key("model", {"name": name}, {}))
    registry = Registry(mlflow_uri)
    return registry.register(name, folder, registry.start_run("search", name, {}, {}), {})


def indexed(mlflow_uri: str, name: str, triplets: Path, root: Path) -> dict[str, Any]:
    """Register an untrained model and index the catalogue by it."""
    registered(mlflow_uri, name, untrained(triplets), root)
    settings = IndexSettings(
        model=name, version="1", triplets=triplets, root=root, tracking_uri=mlflow_uri, batch_size=64,
    )  # fmt: skip
    return {**index(settings), "model": str(next(root.glob("model-*"))), "root": root, "triplets": triplets}


@pytest.fixture(scope="module")
def version(mlflow_uri: str, triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Version 1 of model `indexed`."""
    return registered(mlflow_uri, "indexed", untrained(triplets_folder), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(
    mlflow_uri: str, version: Version, triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> IndexSettings:
    """Settings that index the catalogue of 300 items in batches that cross the parts' borders."""
    return IndexSettings(
        model=version.name, version=version.version, triplets=triplets_folder,
        root=tmp_path_factory.mktemp("index"), tracking_uri=mlflow_uri, num_segments=SEGMENTS, batch_size=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(base: IndexSettings) -> dict[str, Any]:
    """What the stage gave the first time."""
    return index(base)


@pytest.fixture
def few(triplets_folder: Path, base: IndexSettings, tmp_path: Path) -> IndexSettings:
    """Settings that index 3 items, the second without a photo."""
    rows = pq.read_table(triplets_folder / "items").slice(0, 3).to_pylist()
    rows[1] |= {"image": None, "pixels": None, "has_image": False}
    schema = pq.read_schema(tables.parts(triplets_folder / "items")[0])
    with artifacts.draft(tmp_path, "triplets", {}, {}) as draft:
        tables.write(draft.folder / "items" / "part-00000.parquet", pa.Table.from_pylist(rows, schema))
        tables.write(draft.folder / "queries" / "part-00000.parquet", pa.table({"query": ["red mug", "bag"]}))
    triplets = artifacts.place(tmp_path, "triplets", artifacts.key("triplets", {}, {}))
    values = {"triplets": triplets, "root": tmp_path / "root", "num_segments": 2, "num_workers": 1}
    return base.model_copy(update=values)


def one_after_another(
    units: Any, work: Any, doing: str, arguments: Any, num_actors: int, marks: Path, num_gpus: float
) -> Any:
    """`datasets.spread` in this process alone."""
    actor, results = work(*arguments), []
    for number, unit in enumerate(units):
        mark = marks / f"{number}.json"
        if not mark.exists():
            artifacts.write_text(mark, json.dumps(actor(dict(unit))))
        results.append(json.loads(mark.read_bytes()))
    return results


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process alone an index is built: where it matters what comes of it, and not who does it."""
    monkeypatch.setattr(indexing.datasets, "spread", one_after_another)


def version_of(settings: IndexSettings) -> Version:
    return Registry(settings.tracking_uri).resolve(settings.model, settings.version)


def opened(folder: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """All vectors and items of an index, in the order of its segments."""
    names = [s["name"] for s in artifacts.read(folder, "index").details["segments"]]
    vectors = [faiss.read_index(str(folder / n / VECTORS)) for n in names]
    items = [pa.ipc.open_file(pa.memory_map(str(folder / n / ITEMS))).read_all() for n in names]
    return np.concatenate([v.reconstruct_n(0, v.ntotal) for v in vectors]), pa.concat_tables(items).to_pylist()


def by_one(model: Model, triplets: Path) -> np.ndarray:
    """The model's item vectors, an item at a time."""
    vectors = []
    for row in pq.read_table(triplets / "items").to_pylist():
        photo = np.frombuffer(row["pixels"] or bytes(32 * 32 * 3), dtype=np.uint8).reshape(1, 32, 32, 3)
        vectors.append(model.items([row["text"]], photo, np.array([row["has_image"]]))["fused"][0])
    return np.array(vectors)


def test_every_item_stands_once_in_as_many_segments_as_asked(built: dict[str, Any], triplets_folder: Path) -> None:
    assert (built["rows"], built["segments"], built["skipped"]) == (300, SEGMENTS, False)
    folder = Path(built["artifact"])
    manifest = artifacts.read(folder, "index")
    assert manifest.counts == {"items": 300, "quarantined": 0}
    assert [s["name"] for s in manifest.details["segments"]] == [f"segment-{n:05d}" for n in range(SEGMENTS)]
    sizes = [s["items"] for s in manifest.details["segments"]]
    assert {300 // SEGMENTS, 300 // SEGMENTS + 1} == set(sizes)
    assert [Shard(Plan.read(folder), [s["name"]]).size for s in manifest.details["segments"]] == sizes
    every = pq.read_table(triplets_folder / "items", columns=list(COLUMNS)).to_pylist()
    assert opened(folder)[1] == [
        item for n in range(SEGMENTS) for item in every[n::SEGMENTS]
    ]  # a like share of all


def test_vectors_are_those_of_the_model_an_item_at_a_time(built: dict[str, Any], triplets_folder: Path) -> None:
    model = untrained(triplets_folder)
    exact = by_one(model, triplets_folder)[ORDER]
    np.testing.assert_allclose(opened(Path(built["artifact"]))[0], exact, atol=1e-5)
    shard = Shard(Plan.read(Path(built["artifact"])))
    queries = model.queries(titles(triplets_folder)[::10])
    found, scores = shard.search(queries, 10), queries @ exact.T
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :10], atol=1e-5)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, found.rows, 1), atol=1e-5)


def test_gpus_that_are_not_there_are_refused(base: IndexSettings, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"wanted 9 GPUs, one for each worker; found \d in the cluster; .* or device=cpu"
    ):
        index(base.model_copy(update={"device": "cuda", "num_workers": 9, "root": tmp_path}))


def test_the_same_again_is_found_done_and_noted_on_the_version_anew(
    base: IndexSettings, built: dict[str, Any], version: Version
) -> None:
    registry = Registry(base.tracking_uri)
    noted = {"askew.index": built["artifact"], "askew.index_key": built["key"]}
    registry.tag(version, dict.fromkeys(noted, "lost"))
    before = Path(built["artifact"]).stat().st_ino
    assert index(base) == {**built, "skipped": True}
    assert Path(built["artifact"]).stat().st_ino == before
    assert noted.items() <= registry.resolve("indexed", "1").tags.items()


def test_the_number_of_workers_changes_no_byte(base: IndexSettings, built: dict[str, Any], tmp_path: Path) -> None:
    other = index(base.model_copy(update={"num_workers": base.num_workers + 1, "root": tmp_path}))
    assert not other["skipped"]
    one, another = (artifacts.read(Path(r["artifact"]), "index") for r in (built, other))
    one.details["measured"]["query_ms"] = another.details["measured"]["query_ms"] = 0  # is a matter of the machine
    assert one.model_copy(update={"sum": ""}) == another.model_copy(update={"sum": ""})


@pytest.mark.usefixtures("alone")
def test_more_segments_than_items_become_one_for_each(few: IndexSettings) -> None:
    result = index(few.model_copy(update={"num_segments": 8}))
    assert (result["rows"], result["segments"]) == (3, 3)
    vectors, items = opened(Path(result["artifact"]))
    assert [i["has_image"] for i in items] == [True, False, True]
    model = Model.load(Registry(few.tracking_uri).download(version_of(few), few.root))
    np.testing.assert_allclose(vectors, by_one(model, few.triplets), atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_a_damaged_index_is_built_again(few: IndexSettings) -> None:
    result = index(few)
    path = Path(result["artifact"]) / "segment-00001" / VECTORS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    again = index(few)
    assert (again["artifact"], again["key"], again["skipped"]) == (result["artifact"], result["key"], False)
    assert path.read_bytes() == whole


def test_a_worker_that_dies_is_replaced_and_its_segment_written_again(
    few: IndexSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    died = tmp_path / "died"

    class Mortal(Embedder):
        def __call__(self, unit: datasets.Unit) -> datasets.Unit:
            result = super().__call__(unit)
            if unit["start"] and not died.exists():
                died.touch()
                os._exit(1)
            return result

    monkeypatch.setattr(indexing, "Embedder", Mortal)
    result = index(few)
    assert died.exists()
    assert (result["rows"], result["segments"]) == (3, 2)
    assert len(opened(Path(result["artifact"]))[0]) == 3


@pytest.mark.usefixtures("alone")
def test_vectors_that_are_not_finite_leave_no_index(few: IndexSettings, tmp_path: Path) -> None:
    model = untrained(few.triplets)
    with torch.no_grad():
        model.towers.title.project.bias.fill_(torch.nan)
    version = registered(few.tracking_uri, "broken", model, tmp_path)
    with pytest.raises(ArtifactError, match="a vector of one item at least; found none of 3"):
        index(few.model_copy(update={"model": "broken", "version": version.version}))
    assert not list(few.root.glob("index-*"))
    assert "askew.index" not in Registry(few.tracking_uri).resolve("broken", "1").tags


@pytest.mark.usefixtures("alone")
def test_items_without_a_vector_go_to_the_quarantine_and_too_many_fail_the_stage(
    few: IndexSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind(Embedder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            whole = self._model.items

            def items(*given: Any) -> Any:
                vectors = dict(whole(*given))
                vectors["index"][~given[2]] = np.nan  # those without a photo
                return vectors

            self._model.items = items  # type: ignore[method-assign]

    monkeypatch.setattr(indexing, "Embedder", Blind)
    with pytest.raises(ArtifactError, match=r"at most 5 % of items without a vector; found 1 of 3"):
        index(few)
    result = index(few.model_copy(update={"max_quarantined_fraction": 0.5, "num_segments": 3}))
    folder = Path(result["artifact"])
    assert artifacts.read(folder, "index").counts == {"items": 2, "quarantined": 1}
    assert result["segments"] == 2
    [bad] = pq.read_table(folder / "quarantine").to_pylist()
    every = pq.read_table(few.triplets / "items").to_pylist()
    assert (bad["id"], bad["reason"]) == (every[1]["item_id"], "not_finite")
    assert [i["item_id"] for i in opened(folder)[1]] == [every[0]["item_id"], every[2]["item_id"]]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["ivf_rabitq", "hnsw"])
def test_the_recall_in_the_manifest_is_what_a_shard_gives(base: IndexSettings, tmp_path: Path, kind: str) -> None:
    texts = sorted({str(q) for q in pq.read_table(base.triplets / "queries")["query"].to_pylist()})
    wanted = {
        "kind": kind,
        "root": tmp_path,
        "num_queries": len(texts),
        "num_segments": 3,
    }  # the very same queries
    result = index(base.model_copy(update=wanted))
    plan = Plan.read(Path(result["artifact"]))
    told = plan.details["measured"]
    assert (plan.design.kind, result["kind"], told["recall_target"]) == (kind, kind, 0.99)
    assert told["recall@10"] >= 0.99
    assert told["query_ms"] > 0
    model = Model.load(Registry(base.tracking_uri).download(version_of(base), tmp_path))
    queries, exact = model.queries(texts), by_one(model, base.triplets)
    shard = Shard(plan)
    ids = np.array(shard.item_ids.to_pylist())[shard.search(queries, 10).rows]
    every = np.array(pq.read_table(base.triplets / "items")["item_id"].to_pylist())
    best = every[np.argsort(-queries @ exact.T, axis=1)[:, :10]]
    recall = np.mean([len({*w} & {*f}) / 10 for w, f in zip(best.tolist(), ids.tolist(), strict=True)])
    assert recall >= 0.97  # ties among titles that are alike


def build_alone(settings: IndexSettings, model: Path, root: Path) -> None:
    """Build an index in this process alone."""
    torch.set_num_threads(1)
    indexing.datasets.spread = one_after_another
    triplets = artifacts.read(settings.triplets, "triplets")
    with artifacts.draft(root, "index", {}, {}, resume=True) as draft:
        indexing.Build(settings, model, triplets, draft).run()


def test_a_builder_killed_at_any_moment_goes_on_and_leaves_nothing_that_is_taken_for_whole(
    base: IndexSettings, tmp_path: Path
) -> None:
    model = Registry(base.tracking_uri).download(version_of(base), tmp_path)
    settings = base.model_copy(update={"kind": "ivf_rabitq", "num_segments": 5, "num_queries": 20})
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["askew.indexing", "tests.test_indexing"])

    def built(root: Path, random: np.random.Generator | None) -> tuple[artifacts.Manifest, int]:
        """Build, killed again and again if `random` is given; returns the manifest and how often it was."""
        kills = 0
        while not (done := list(root.glob("index-*"))):
            process = processes.Process(target=build_alone, args=(settings, model, root))
            process.start()
            # ever longer, so that a slow machine comes to an end too
            process.join(120 if random is None else 0.02 + 0.3 * random.random() * (1 + kills / 5))
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
            assert process.exitcode in ((0,) if random is None else (0, -signal.SIGKILL))
            for left in (path for path in root.glob(".index-*") if path.is_dir()):
                with pytest.raises(ArtifactError):
                    Plan.read(left)
        manifest = artifacts.read(done[0], "index")
        measured = manifest.details["measured"]  # by the effort that was the fastest just then, of those that do
        assert measured["recall@10"] >= measured["recall_target"]
        manifest.details["measured"] = manifest.details["effort"] = {}
        return manifest.model_copy(update={"sum": ""}), kills

    calm, _ = built(tmp_path / "calm", None)
    assert calm.counts == {"items": 300, "quarantined": 0}
    kills, number = 0, 0
    while kills < 25:
        told, more = built(tmp_path / f"killed-{number}", np.random.default_rng(number))
        kills, number = kills + more, number + 1
        assert told == calm


@pytest.mark.usefixtures("alone")
def test_a_build_that_ends_while_it_writes_its_queries_writes_them_again(
    base: IndexSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Registry(base.tracking_uri).download(version_of(base), tmp_path)
    save = np.save

    def torn(to: Path | IO[bytes], array: Vectors) -> None:
        path = Path(to if isinstance(to, Path) else to.name)
        if path.stem == "queries":
            path.write_bytes(b"")
            raise KeyboardInterrupt
        save(to, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            build_alone(base, model, tmp_path)
    build_alone(base, model, tmp_path)
    assert artifacts.read(next(tmp_path.glob("index-*")), "index").counts["items"] == 300


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kilobytes", [32, 64, 128])
def test_a_full_disk_is_said_and_with_room_the_build_goes_on(
    base: IndexSettings, tmp_path: Path, kilobytes: int
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    model = Registry(base.tracking_uri).download(version_of(base), tmp_path)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk that is full can be made by root alone")
    try:
        with pytest.raises(
            ArtifactError, match=r"wanted room on the disk of .*none left; free some, and run it again"
        ):
            build_alone(base, model, small)
        assert not list(small.glob("index-*"))
        subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
        build_alone(base, model, small)
        assert artifacts.read(next(small.glob("index-*")), "index").counts["items"] == 300
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_two_builders_of_one_index_are_one_too_many(base: IndexSettings, tmp_path: Path) -> None:
    settings = base.model_copy(update={"root": tmp_path})
    inputs = {
        "model": artifacts.read(Registry(base.tracking_uri).download(version_of(base), tmp_path), "model").key,
        "triplets": artifacts.read(base.triplets, "triplets").key,
    }
    with (
        artifacts.draft(tmp_path, "index", settings.content(), inputs, resume=True),
        pytest.raises(ArtifactError, match="another process at work in it"),
    ):
        index(settings)


@pytest.mark.usefixtures("alone")
def test_a_relative_root_is_noted_whole(few: IndexSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(few.root.parent)
    result = index(few.model_copy(update={"root": Path("root"), "triplets": Path(few.triplets.name)}))
    tags = version_of(few).tags
    assert result["artifact"] == tags["askew.index"] == str(next(few.root.glob("index-*")))
    assert result["key"] == tags["askew.index_key"] == artifacts.read(Path(result["artifact"]), "index").key
    assert len(opened(Path(result["artifact"]))[0]) == 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"version": "99"}, "'99' of model 'indexed'; found versions 1"),
        ({"version": "champion"}, "aliases none"),
        ({"model": "unheard-of"}, "found models .*indexed"),
        ({"tracking_uri": "http://127.0.0.1:9"}, "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_version_that_is_not_there_is_told_and_nothing_is_written(
    base: IndexSettings, tmp_path: Path, wanted: dict[str, str], message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        index(base.model_copy(update={"root": tmp_path, **wanted}))
    assert list(tmp_path.iterdir()) == []


def test_triplets_that_are_not_whole_are_refused(few: IndexSettings) -> None:
    (few.triplets / "items" / "part-00000.parquet").write_bytes(b"half")
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet"):
        index(few)


@pytest.mark.parametrize("name", ["num_segments", "num_workers", "batch_size"])
def test_a_setting_of_nought_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        IndexSettings(model="indexed", version="1", triplets=tmp_path, root=tmp_path, **{name: 0})  # type: ignore[arg-type]


def test_triplets_of_another_photo_size_are_refused(few: IndexSettings, tmp_path: Path) -> None:
    larger = TwoTower(TOWERS.model_copy(update={"image_size": 64}), untrained(few.triplets).tokens.size)
    version = registered(few.tracking_uri, "larger", Model(larger, untrained(few.triplets).tokens), tmp_path)
    with pytest.raises(ArtifactError, match=r"wanted photos of 64 × 64 pixels.*found 32 × 32"):
        index(few.model_copy(update={"model": "larger", "version": version.version}))
