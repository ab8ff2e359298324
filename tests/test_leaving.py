"""The page of the exit: its code, as it stands, where askew cannot be imported, gives what askew gives."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from askew import artifacts, live, metrics, segments, sources, tables, trec
from askew.ann import Design, Effort, Index
from askew.encoders import TextSettings
from askew.inputs import Tokens
from askew.models import Model
from askew.registry import Registry
from askew.segments import COLUMNS
from askew.shards import Shard
from askew.towers import TowerSettings, TwoTower

PAGE = (Path(__file__).parent.parent / "docs" / "leaving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAME = "askew-demo"  # of the registered model, as the page has it
ASKED = ["red striped mug", "  Größe\t42 ", "ｒｅｄ ｍｕｇ ½", "", "mug " * 40, "赤い縞模様のマグカップ"]
NUM_HITS = 40  # more than the new items, which all queries find
WITHOUT = "import sys\nsys.modules['askew'] = None\n"
TELL = f"""
answers = {{"encode": [encode(q)[0].tolist() for q in {ASKED!r}]}}
answers["search"] = [search(q, {NUM_HITS}) for q in {ASKED!r}]
answers["item_ids"], answers["titles"] = list(items["item_id"]), list(items["title"])
answers["pairs"] = [len(pairs), sorted(set(pairs["query_id"]))]
answers["photo"] = photo.hex()
values = ir_measures.calc_aggregate([nDCG @ 10, R(rel=least) @ 100], judged, run)
answers["measures"] = {{str(measure): value for measure, value in values.items()}}
print(json.dumps(answers))
"""
MUGS = [{"item_id": f"new-{n}", "split": "train", "title": f"Zebra mug {n}", "has_image": False} for n in range(9)]


@dataclass(frozen=True)
class Kind:
    """Towers, and an index of their vectors."""

    towers: TowerSettings
    design: Design
    effort: Effort
    num_segments: int = 3
    changed: bool = False


TEXT = TextSettings(width=16, heads=2, layers=2)
SIZES: dict[str, Any] = {"dim": 16, "image_size": 32, "query_length": 8, "title_length": 12}
KINDS = {
    "plain": Kind(TowerSettings(text=TEXT, **SIZES), Design(kind="flat", dim=16), Effort()),
    "graph": Kind(
        TowerSettings(text=TEXT, shared_text=True, fusion="gated", **SIZES),
        Design(kind="hnsw", dim=16),
        Effort(breadth=300),
    ),
    "header, short codes, changes": Kind(
        TowerSettings(text=TEXT, header=True, **SIZES),
        Design(kind="ivf_rabitq", dim=32, lists=16, refine="fp32"),
        Effort(lists=16, again=300),
        num_segments=1,
        changed=True,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def kept(kind: Kind, triplets_folder: Path, mlflow_uri: str, tmp_path: Path) -> tuple[Path, Model, Path]:
    """A folder where all artifacts have the page's names; the model and the index's own folder."""
    rows = pq.read_table(triplets_folder / "items")
    model = made(kind.towers, rows["text"].to_pylist())
    with artifacts.draft(tmp_path / "made", "model", {}, {}) as draft:
        model.save(draft.folder)
    champion(mlflow_uri, artifacts.place(tmp_path / "made", "model", artifacts.key("model", {}, {})))
    index = indexed(kind, model, rows, tmp_path / "made")
    if kind.changed:
        changed(index, model, rows)
    home = tmp_path / "home"
    home.mkdir()
    (home / "triplets").symlink_to(triplets_folder)
    (home / "index").symlink_to(index)
    (home / "index.live").symlink_to(live.place(index))
    return home, model, index


def made(towers: TowerSettings, titles: list[str]) -> Model:
    """A model of random weights, whose queries lie around the origin, as a trained one's do."""
    torch.manual_seed(0)
    tokens = Tokens.train(titles, 300)
    model = Model(TwoTower(towers, tokens.size), tokens)
    with torch.no_grad():
        hidden = model.towers.query(torch.from_numpy(tokens.ids(titles, towers.query_length))).pooled_BD
        model.towers.query.project.bias -= hidden.mean(dim=0)
        if towers.header:
            model.towers.header.weight.normal_()
            model.towers.header.bias.zero_()
    return model


def champion(uri: str, folder: Path) -> None:
    registry = Registry(uri)
    version = registry.register(NAME, folder, registry.start_run("leaving", "one", {}, {}), {})
    registry.promote(version)


def embedded(model: Model, rows: pa.Table) -> Any:
    photos = tables.pixels(rows["pixels"].combine_chunks(), model.image_size)
    return model.items(rows["text"].to_pylist(), photos, rows["has_image"].to_numpy())["index"]


def indexed(kind: Kind, model: Model, rows: pa.Table, root: Path) -> Path:
    vectors, names = embedded(model, rows), [f"segment-{number:05d}" for number in range(kind.num_segments)]
    empty = Index.trained(kind.design, vectors)
    with artifacts.draft(root, "index", {}, {}) as draft:
        empty.write(draft.folder / segments.EMPTY)
        for number, name in enumerate(names):
            own = rows.select(list(COLUMNS)).take(pa.array(range(number, len(vectors), kind.num_segments)))
            segments.write(draft.folder / name, vectors[number :: kind.num_segments], own, empty, "left")
        segments.tell(draft, names, kind.effort)
    return artifacts.place(root, "index", artifacts.key("index", {}, {}))


def changed(index: Path, model: Model, rows: pa.Table) -> None:
    """New items, one that is changed, and some deleted, all in segments."""
    ids = rows["item_id"].to_pylist()
    with live.Live(index) as written:
        written.upsert(model.queries([item["title"] for item in MUGS]), MUGS)
        written.delete(ids[::5])
        written.compact()
        written.upsert(model.queries(["red striped mug"]), [MUGS[0]])
        written.compact()


def evaluated(folder: Path, triplets: Path, shard: Shard, model: Model) -> dict[str, float]:
    """Write a ranking of the judged queries as the evaluation does; returns what askew makes of it."""
    queries = pq.read_table(triplets / "queries").to_pylist()
    qrels: dict[str, dict[str, int]] = {}
    for row in pq.read_table(triplets / "qrels").to_pylist():
        qrels.setdefault(row["query_id"], {})[row["item_id"]] = row["grade"]
    found = shard.search(model.queries([query["query"] for query in queries]), 100)
    run = metrics.Run([q["query_id"] for q in queries], shard.item_ids.to_pylist(), found.rows, found.scores)
    scores = metrics.score(qrels, run, ["nDCG@10", "R@100"])
    trec.write_qrels(folder / "qrels.txt", {query_id: qrels[query_id] for query_id in scores.query_ids})
    trec.write_run(folder / "runs" / "fused.run", [run], "fused")
    return scores.means()


def ran(home: Path, uri: str) -> dict[str, Any]:
    """Run all blocks of the page, one after the other, and tell what they gave."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT + "\n".join(BLOCKS) + TELL]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_what_is_on_disk_is_used_without_askew(
    kind: Kind, kept: tuple[Path, Model, Path], triplets_folder: Path, mlflow_uri: str
) -> None:
    home, model, index = kept
    shard = Shard(live.read(index)[0])
    measures = evaluated(home / "evaluation", triplets_folder, shard, model)
    answers = ran(home, mlflow_uri)

    queries = model.queries(ASKED)
    np.testing.assert_allclose(answers["encode"], queries, atol=1e-5)
    assert artifacts.read(home / "model", "model").files  # the version as it was registered

    found = shard.search(queries, NUM_HITS)
    for hits, told in zip(shard.hits(found), answers["search"], strict=True):
        assert [item_id for _, item_id, _ in told] == [hit["item_id"] for hit in hits]
        np.testing.assert_allclose([score for score, _, _ in told], [hit["score"] for hit in hits], atol=1e-5)
        assert [title for _, _, title in told] == [hit["title"] for hit in hits]
    assert {re.sub(r"\(.*\)", "", n): v for n, v in answers["measures"].items()} == pytest.approx(measures)

    rows = pq.read_table(triplets_folder / "items")
    pairs = pq.read_table(triplets_folder / "pairs")
    assert (answers["item_ids"], answers["titles"]) == (rows["item_id"].to_pylist(), rows["title"].to_pylist())
    assert answers["pairs"] == [pairs.num_rows, sorted(set(pairs["query_id"].to_pylist()))]
    assert bytes.fromhex(answers["photo"]) == rows["image"][0].as_py()
    comes_back(home / "beir", triplets_folder)


def comes_back(beir: Path, triplets: Path) -> None:
    """What was written as BEIR is read by askew as what it was."""
    layout = sources.recognise(str(beir))
    wanted = {
        "item": (layout.items, "items", ["item_id", "title", "text"]),
        "query": (layout.queries, "queries", ["query_id", "query"]),
        "judgment": (layout.judgments, "qrels", ["query_id", "item_id", "grade"]),
    }
    for kind, ([table], part, columns) in wanted.items():
        chunks = [c for unit in sources.units(table, str(beir)) for c in sources.read(unit, table, kind)]
        assert not [bad for chunk in chunks for bad in chunk.bad]
        back = pa.concat_tables([chunk.table.select(columns) for chunk in chunks])
        there = pq.read_table(triplets / part, columns=columns)
        assert [[str(v) for v in row.values()] for row in back.to_pylist()] == [
            [str(v) for v in row.values()] for row in there.to_pylist()
        ]
