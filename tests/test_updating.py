"""Updates of a live index of a registered model: what is sent is found, what is not is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.test_indexing import indexed, registered, untrained

from askew import live
from askew.errors import ArtifactError, DataError, RegistryError
from askew.live import Follower
from askew.models import Model
from askew.updating import UpdateSettings, update


@pytest.fixture(scope="module")
def built(mlflow_uri: str, triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An index of 300 items."""
    made = indexed(mlflow_uri, "updated", triplets_folder, tmp_path_factory.mktemp("updated"))
    return made | {"uri": mlflow_uri}


@pytest.fixture
def base(built: dict[str, Any]) -> UpdateSettings:
    """Settings that change nothing."""
    return UpdateSettings(model="updated", version="1", root=built["root"], tracking_uri=built["uri"])


def found(built: dict[str, Any], text: str, k: int = 3) -> list[dict[str, Any]]:
    """What two shards find that are opened now."""
    model = Model.load(next(built["root"].glob("model-*")))
    hits = []
    for number in range(2):
        shard = Follower(Path(built["artifact"]), number, 2).shard
        hits += shard.hits(shard.search(model.queries([text]), 400))[0]
    return sorted(hits, key=lambda h: -h["score"])[:k] if k else hits


def test_items_are_added_replaced_and_deleted_and_what_is_broken_is_set_aside(
    built: dict[str, Any], base: UpdateSettings, tmp_path: Path
) -> None:
    rows = pq.read_table(built["triplets"] / "items", columns=["item_id", "title", "image"]).to_pylist()
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "photo.jpg").write_bytes(rows[0]["image"])
    (tmp_path / "shop" / "items.csv").write_text(
        "item_id,title,image\n"
        "new-1,Zebra lamp of brass,photo.jpg\n"
        f"{rows[5]['item_id']},Zebra lamp replaced,\n"
        "new-2,,photo.jpg\n"
        "new-3,Zebra lamp without its photo,absent.jpg\n"
    )
    (tmp_path / "gone.txt").write_text(f"{rows[1]['item_id']}\n\n{rows[2]['item_id']}\nunknown\n")
    done = update(base.model_copy(update={"data": str(tmp_path / "shop"), "deleted": tmp_path / "gone.txt"}))
    assert (done["upserted"], done["quarantined"], done["deleted"], done["rows"]) == (3, 2, 3, 6)
    every = {hit["item_id"]: hit for hit in found(built, "lamp", 0)}
    assert len(every) == 300 + 2 - 2
    assert {rows[1]["item_id"], rows[2]["item_id"], "new-2"}.isdisjoint(every)
    assert every[rows[5]["item_id"]]["title"] == "Zebra lamp replaced"
    [quarantine] = base.root.glob("update-*/quarantine/*.parquet")
    assert {(r["id"], r["reason"]) for r in pq.read_table(quarantine).to_pylist()} == {
        ("new-2", "no_text"), ("new-3", "not_found"),
    }  # fmt: skip
    model = Model.load(next(base.root.glob("model-*")))
    size = model.image_size
    blank = np.zeros((1, size, size, 3), np.uint8)
    vector = model.items(["Zebra lamp without its photo"], blank, np.array([False]))["index"]
    expected = float((model.queries(["lamp"]) @ vector.T)[0, 0])
    assert every["new-3"]["score"] == pytest.approx(expected, abs=1e-5)
    before = every
    assert update(base.model_copy(update={"compact": True}))["change"] == done["change"]
    after = {hit["item_id"]: hit for hit in found(built, "lamp", 0)}
    assert after.keys() == before.keys()
    assert live.read(Path(built["artifact"]))[1] == done["change"]
    for item_id, hit in after.items():
        assert hit["title"] == before[item_id]["title"]
        assert hit["score"] == pytest.approx(before[item_id]["score"], abs=1e-5)


def test_what_cannot_be_done_is_said_and_changes_nothing(
    built: dict[str, Any], base: UpdateSettings, tmp_path: Path
) -> None:
    before = live.read(Path(built["artifact"]))
    (tmp_path / "items.csv").write_text("item_id,title\na,\n")
    with pytest.raises(DataError, match="items with an id and a text"):
        update(base.model_copy(update={"data": str(tmp_path)}))
    with pytest.raises(DataError, match="ids, one a line"):
        update(base.model_copy(update={"deleted": tmp_path / "absent.txt"}))
    with pytest.raises(DataError):
        update(base.model_copy(update={"data": str(tmp_path / "absent")}))
    with pytest.raises(RegistryError):
        update(base.model_copy(update={"version": "99"}))
    assert live.read(Path(built["artifact"]))[1] == before[1]


def test_a_version_without_an_index_is_refused(
    built: dict[str, Any], base: UpdateSettings, tmp_path: Path
) -> None:
    registered(built["uri"], "bare", untrained(built["triplets"]), tmp_path)
    with pytest.raises(ArtifactError, match="an index of bare version 1; found none; run the index stage"):
        update(base.model_copy(update={"model": "bare"}))
