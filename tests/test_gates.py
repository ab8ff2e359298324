"""The gates of a release, each with a release that passes and one that does not; models and indexes are real."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from askew import artifacts, segments
from askew.ann import Design, Index
from askew.encoders import TextSettings
from askew.gates import GateSettings, Verdict, judge, refusals
from askew.inputs import Tokens
from askew.metrics import paired_bootstrap
from askew.models import VECTORS, WEIGHTS, Model
from askew.towers import TowerSettings, TwoTower

TITLES = ["red striped mug", "blue cap", "green lamp", "salon chair", "red lamp", "blue mug"]
MEASURED = {"recall@10": 0.97, "query_ms": 2.5, "item_bytes": 2.0**30}
SUM = re.compile(r'"sum": "\w+"')  # of a manifest, that someone changes by hand
GATES = ["checksums", "identity", "parity", "recall", "quality", "latency", "memory"]


def make_model(root: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokens = Tokens.train(TITLES * 3, 100)
    settings = TowerSettings(dim=16, text=TextSettings(width=16, heads=2), image_size=32)
    with artifacts.draft(root, "model", {"seed": seed}, {}) as draft:
        Model(TwoTower(settings, tokens.size), tokens).save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {"seed": seed}, {}))


def make_index(root: Path, model: Path, kind: str = "flat", measured: Mapping[str, Any] | None = MEASURED) -> Path:
    """An index of the titles by a model, in two segments."""
    loaded = Model.load(model)
    vectors = loaded.items(TITLES, np.zeros((6, 32, 32, 3), np.uint8), np.zeros(6, bool))["index"]
    items = pa.table({"item_id": [f"i{n}" for n in range(6)], "title": TITLES})
    empty = Index.trained(Design.model_validate({"kind": kind, "dim": 16}), vectors, 0)
    settings, inputs = {"kind": kind, "measured": measured}, {"model": loaded.key, "triplets": "t"}
    with artifacts.draft(root, "index", settings, inputs) as draft:
        for n in range(2):
            part = items.slice(3 * n, 3)
            segments.write(draft.folder / f"segment-{n}", vectors[3 * n : 3 * n + 3], part, empty, "r")
        segments.tell(draft, ["segment-0", "segment-1"])
        draft.details |= {} if measured is None else {"measured": measured}
    return artifacts.place(root, "index", artifacts.key("index", settings, inputs))


def evaluation(path: Path, values: Sequence[float], ranking: str = "fused", word: str = "mug") -> Path:
    """The values of each query, as the evaluate stage writes them; by words alone all are found."""
    ids = [f"q{n}" for n in range(len(values))]
    columns = {"query_id": ids, "query": [f"{word} {i}" for i in ids], "bm25/nDCG@10": [1.0] * len(ids)}
    columns |= {"fused/nDCG@10": [0.5] * len(ids), f"{ranking}/nDCG@10": list(values)}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    return (model := make_model(root)), make_index(root, model)


@pytest.fixture
def release(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model and its index, to be broken."""
    model, index = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made)
    return model, index


def of(verdicts: Sequence[Verdict], gate: str) -> Verdict:
    [found] = [verdict for verdict in verdicts if verdict.gate == gate]
    return found


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sealed(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    manifest = artifacts.read(folder, "model", verify=False)
    file = artifacts.File(bytes=(folder / name).stat().st_size, sha256=artifacts.sha256(folder / name))
    manifest = manifest.model_copy(update={"files": {**manifest.files, name: file}, "sum": ""})
    (folder / artifacts.MANIFEST).write_text(manifest.model_dump_json())


def test_a_good_release_passes_every_gate(made: tuple[Path, Path], tmp_path: Path) -> None:
    bounds = GateSettings(max_query_ms=2.5, max_memory_gib=6)
    values = np.random.default_rng(0).random(20).tolist()
    own, champion = (evaluation(tmp_path / name, values) for name in ("own", "champion"))
    verdicts = judge(*made, bounds, own, champion)
    assert [(v.gate, v.holds) for v in verdicts] == [(gate, True) for gate in GATES]
    assert [v.gate for v in verdicts if v.hard] == ["checksums", "identity", "parity"]
    assert refusals(verdicts) == []
    told = {v.gate: v.told for v in verdicts}
    assert told["recall"] == "recall: wanted at least 0.95; found 0.97"
    assert told["latency"] == "latency: wanted at most 2.5 ms a query; found 2.5 ms a query"
    assert told["memory"] == "memory: wanted at most 6 GiB; found 6 GiB"
    assert told["parity"].endswith("found 1.000000")
    assert told["quality"].endswith(": +0.0000, p 1.0000, of 20 queries")


@pytest.mark.parametrize(
    "name", [WEIGHTS, VECTORS, "segment-0/vectors.faiss", "segment-1/items.arrow", "segment-1/manifest.json"]
)
def test_one_byte_that_differs_is_refused_by_name_and_never_forced(release: tuple[Path, Path], name: str) -> None:
    model, index = release
    flip(model / name if (model / name).exists() else index / name)
    verdicts = judge(model, index, GateSettings())
    assert [v.gate for v in verdicts] == ["checksums", "identity"], "files that differ are not read"
    assert not of(verdicts, "checksums").holds
    assert Path(name).name in of(verdicts, "checksums").found
    assert refusals(verdicts, force=True) == refusals(verdicts) == [verdicts[0]]


@pytest.mark.parametrize("part", ["model", "index", "segment-1"])
def test_what_is_gone_is_told(release: tuple[Path, Path], part: str) -> None:
    model, index = release
    shutil.rmtree({"model": model, "index": index, "segment-1": index / "segment-1"}[part])
    verdict = of(judge(model, index, GateSettings()), "checksums")
    assert (verdict.holds, part in verdict.found) == (False, True)


def test_a_segment_that_the_index_was_not_built_with_is_refused(release: tuple[Path, Path]) -> None:
    model, index = release
    path = index / artifacts.MANIFEST
    key = artifacts.read(index / "segment-1", "segment").key
    path.write_text(SUM.sub('"sum": ""', path.read_text().replace(key, "0" * 64)))
    assert "wanted segment 000000000000" in of(judge(model, index, GateSettings()), "checksums").found
    manifest = artifacts.read(index, "index", verify=False)
    files = {name: file for name, file in manifest.files.items() if "segment-1" not in name}
    path.write_text(manifest.model_copy(update={"files": files}).model_dump_json().replace("0" * 64, key))
    assert "wanted a segment segment-1" in of(judge(model, index, GateSettings()), "checksums").found


def test_an_index_of_another_model_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path, seed=1)
    verdicts = judge(other, made[1], GateSettings())
    assert [(v.gate, v.holds) for v in verdicts] == [("checksums", True), ("identity", False)]
    own, by = (artifacts.read(folder, "model").key[:12] for folder in (other, made[0]))
    assert verdicts[1].found == f"model {own} and an index built by {by}"
    assert refusals(verdicts, force=True) == [verdicts[1]]


def test_weights_that_do_not_give_the_canaries_vectors_are_refused(release: tuple[Path, Path]) -> None:
    model, index = release
    weights = {name: weight.clone() for name, weight in load_file(model / WEIGHTS).items()}
    save_file({**weights, "query.project.weight": weights["query.project.weight"].flip(0)}, model / WEIGHTS)
    sealed(model, WEIGHTS)
    verdicts = judge(model, index, GateSettings())
    assert [v.gate for v in verdicts] == GATES
    assert [v.gate for v in refusals(verdicts)] == [v.gate for v in refusals(verdicts, force=True)] == ["parity"]
    assert float(of(verdicts, "parity").found) < 0.999


def test_vectors_that_are_no_numbers_are_refused(release: tuple[Path, Path]) -> None:
    model, index = release
    weights = {name: weight.clone() for name, weight in load_file(model / WEIGHTS).items()}
    save_file({**weights, "query.project.bias": weights["query.project.bias"] * torch.nan}, model / WEIGHTS)
    sealed(model, WEIGHTS)
    assert not of(judge(model, index, GateSettings()), "parity").holds


def test_a_model_without_canaries_is_refused(release: tuple[Path, Path]) -> None:
    model, index = release
    manifest = artifacts.read(model, "model")
    files = {name: file for name, file in manifest.files.items() if name != VECTORS}
    manifest = manifest.model_copy(update={"files": files, "sum": ""})
    (model / artifacts.MANIFEST).write_text(manifest.model_dump_json())
    (model / VECTORS).unlink()
    [refused] = refusals(judge(model, index, GateSettings()), force=True)
    assert refused.gate == "parity"
    assert refused.found.endswith("found none; train or register it again")


@pytest.mark.parametrize(
    ("gate", "bound", "told"),
    [
        ("recall", {"recall": 0.98}, "wanted at least 0.98; found 0.97"),
        ("latency", {"max_query_ms": 2}, "wanted at most 2 ms a query; found 2.5 ms a query"),
        ("memory", {"max_memory_gib": 5.5}, "wanted at most 5.5 GiB; found 6 GiB"),
    ],
)
def test_an_index_beyond_its_bounds_is_refused_unless_by_force(
    made: tuple[Path, Path], gate: str, bound: dict[str, Any], told: str
) -> None:
    verdicts = judge(*made, GateSettings(**bound))
    [refused] = refusals(verdicts)
    assert refused.told == f"{gate}: {told}"
    assert refusals(verdicts, force=True) == []


@pytest.mark.parametrize(("kind", "found"), [("flat", "1, for it is exact"), ("hnsw", "none measured")])
def test_what_was_not_measured_holds_and_is_told(
    made: tuple[Path, Path], tmp_path: Path, kind: str, found: str
) -> None:
    index = make_index(tmp_path, made[0], kind, None)
    verdicts = judge(made[0], index, GateSettings(max_query_ms=0.001, max_memory_gib=0.001))
    assert refusals(verdicts) == []
    assert of(verdicts, "recall").found == found
    assert of(verdicts, "latency").found == of(verdicts, "memory").found == "none measured"


def test_what_has_no_bound_holds_and_is_told(made: tuple[Path, Path]) -> None:
    verdicts = judge(*made, GateSettings())
    assert of(verdicts, "latency").told == "latency: wanted no bound; found 2.5 ms a query"
    assert of(verdicts, "memory").told == "memory: wanted no bound; found 6 GiB"


def test_figures_that_are_no_numbers_are_refused_not_raised(made: tuple[Path, Path], tmp_path: Path) -> None:
    index = make_index(tmp_path, made[0], measured=dict.fromkeys(MEASURED, "much"))
    verdicts = judge(made[0], index, GateSettings(max_query_ms=9, max_memory_gib=9))
    assert [v.gate for v in refusals(verdicts)] == ["recall", "latency", "memory"]


# --- quality -------------------------------------------------------------------------------------


def quality(made: tuple[Path, Path], own: Path | None, champion: Path | None, **settings: Any) -> Verdict:
    return of(judge(*made, GateSettings(**settings), own, champion), "quality")


def drawn(size: int, lead: float = 0.0, seed: int = 1) -> list[float]:
    """Values that differ from query to query, better by `lead` on the mean of many."""
    return (0.5 + lead + 0.2 * np.random.default_rng(seed).standard_normal(size)).tolist()


@pytest.mark.parametrize(("lead", "holds"), [(-0.2, False), (0.0, True), (0.2, True)])
def test_a_model_that_is_surely_worse_than_the_champion_is_refused(
    made: tuple[Path, Path], tmp_path: Path, lead: float, holds: bool
) -> None:
    own = evaluation(tmp_path / "own", drawn(40, lead, seed=2))
    champion = evaluation(tmp_path / "champion", drawn(40))
    verdicts = judge(*made, GateSettings(), own, champion)
    verdict = of(verdicts, "quality")
    wanted = paired_bootstrap(np.array(drawn(40, lead, seed=2)), np.array(drawn(40)))
    assert verdict.found.endswith(f": {wanted['difference']:+.4f}, p {wanted['p']:.4f}, of 40 queries")
    assert refusals(verdicts) == ([] if holds else [verdict])
    assert refusals(verdicts, force=True) == []


def test_a_model_that_is_worse_by_chance_is_not_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    values, champion = drawn(40), evaluation(tmp_path / "champion", drawn(40))
    values[0] -= 0.2
    own = evaluation(tmp_path / "own", values)
    found = quality(made, own, champion)
    assert found.holds
    assert ": -0.0050, p " in found.found
    p = float(found.found.partition(" p ")[2].partition(",")[0])
    assert 0.05 < p < 0.99
    assert not quality(made, own, champion, alpha=0.995).holds


def test_the_model_s_own_ranking_is_compared(made: tuple[Path, Path], tmp_path: Path) -> None:
    """A model with a header is its ranking "adaptive", though it has one by "fused", too."""
    own, champion = evaluation(tmp_path / "own", [0.9] * 20, "adaptive"), evaluation(tmp_path / "c", [0.6] * 20)
    assert quality(made, own, champion).found.startswith("0.9000, where the champion has 0.6000: +0.3000")
    assert not quality(made, champion, own).holds


def test_queries_are_matched_and_too_few_hold(made: tuple[Path, Path], tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", [0.9] * 20)
    for size, holds in ((9, True), (10, False)):
        verdict = quality(made, evaluation(tmp_path / "own", [0.1] * size), champion)
        assert (verdict.holds, f"{size} queries" in verdict.found) == (holds, True)
    others = evaluation(tmp_path / "own", [0.1] * 20, word="cap")
    assert quality(made, others, champion).found == "0 queries in common, too few to tell"


def test_queries_in_another_order_are_compared_one_by_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", drawn(40))
    pq.write_table(pq.read_table(champion).take(np.arange(40)[::-1]), tmp_path / "own")
    assert quality(made, tmp_path / "own", champion).found.endswith(": +0.0000, p 1.0000, of 40 queries")


def test_an_evaluation_is_needed_where_the_champion_has_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", [0.5] * 20)
    missing = quality(made, None, champion)
    assert (missing.holds, missing.found) == (False, "no evaluation of this model")
    assert quality(made, None, champion, needs_evaluation=False).holds
    assert quality(made, None, None).found == "no evaluation of a champion"
    assert quality(made, None, None).holds
    assert quality(made, champion, None).holds


def test_an_evaluation_that_cannot_be_read_is_refused_not_raised(made: tuple[Path, Path], tmp_path: Path) -> None:
    champion = evaluation(tmp_path / "champion", [0.5] * 20)
    (tmp_path / "broken").write_bytes(b"no parquet")
    pq.write_table(pq.read_table(champion).drop_columns(["fused/nDCG@10"]), tmp_path / "other")
    assert "ArrowInvalid" in quality(made, tmp_path / "broken", champion).found
    assert "fused/nDCG@10" in quality(made, tmp_path / "other", champion).found
    assert not quality(made, champion, tmp_path / "gone").holds
