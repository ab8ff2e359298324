"""Products that come to the endpoint: cleaned, embedded, found, or refused with a reason; and scores explained."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.test_indexing import indexed

from askew import inputs, items
from askew.errors import ArtifactError
from askew.items import Items
from askew.live import Follower, Live
from askew.models import Model


@pytest.fixture(scope="module")
def built(mlflow_uri: str, triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return indexed(mlflow_uri, "items", triplets_folder, tmp_path_factory.mktemp("items"))


@pytest.fixture
def writer(built: dict[str, Any]) -> Any:
    made = Items(built["model"], built["artifact"], built["release"])
    yield made
    made.close()


def photo(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(stream, "PNG")
    return stream.getvalue()


def new(
    item_id: str, title: str | None = "A zebra lamp", image: bytes | None = None, **fields: Any
) -> dict[str, Any]:
    return {"item_id": item_id, "title": title, "image": image, "fields": fields}


def shown(built: dict[str, Any], item_id: str) -> tuple[dict[str, Any], np.ndarray] | None:
    return Follower(Path(built["artifact"])).shard.item(item_id)


def test_items_are_embedded_as_the_catalogue_is_and_found(built: dict[str, Any], writer: Items) -> None:
    lamp = photo("red")
    change, count, refused = writer.upsert([new("n1", image=lamp, colour="red", price="12.5"), new("n2")])
    assert (count, refused) == (2, [])
    found = shown(built, "n1")
    assert found is not None
    record, vector = found
    assert (record["title"], record["fields"]["colour"], record["image"]) == ("A zebra lamp", "red", lamp)
    assert record["fields"]["price"] == 12.5
    model = Model.load(Path(built["model"]))
    pixels = inputs.pixels(lamp, model.image_size)[None]
    wanted = model.items(["A zebra lamp"], pixels, np.array([True]))["index"][0]
    assert vector == pytest.approx(wanted, abs=1e-5)
    assert writer.delete(["n1", "unknown"]) == change + 1
    assert shown(built, "n1") is None
    assert shown(built, "n2") is not None


def test_what_cannot_be_used_is_told_and_the_rest_counts(built: dict[str, Any], writer: Items) -> None:
    sent = [
        new("ok"), new("nothing", title=" "), new("no\x00print"),
        new("broken", image=b"\xff\xd8\xff\xe0 no photo"), new("bare", image=b""), new("odd", price="cheap"),
        new("x" * 600),
    ]  # fmt: skip
    _, count, refused = writer.upsert(sent)
    assert count == 4
    assert {(one["item_id"], one["reason"]) for one in refused} == {
        ("nothing", "no_text"), ("no\x00print", "unprintable_id"), ("broken", "truncated"), ("bare", "empty"),
        ("odd", "wrong_type"), ("x" * 512, "id_too_long"),
    }  # fmt: skip
    assert all(one["message"] for one in refused)
    broken, odd = shown(built, "broken"), shown(built, "odd")
    assert broken is not None
    assert not broken[0]["has_image"]
    assert odd is not None
    assert odd[0]["fields"]["price"] is None


def test_when_nothing_can_be_used_nothing_is_changed(built: dict[str, Any], writer: Items) -> None:
    before = writer.delete([])
    assert writer.upsert([new("a", title="")])[:2] == (before, 0)


def test_of_one_id_the_last_counts(built: dict[str, Any], writer: Items) -> None:
    writer.upsert([new("same", title="First"), new("other"), new("same", title="Last")])
    found = shown(built, "same")
    assert found is not None
    assert found[0]["title"] == "Last"


def test_an_unknown_field_is_refused(writer: Items) -> None:
    with pytest.raises(ArtifactError, match=r"wanted fields among .*; found smell; leave them out"):
        writer.upsert([new("a", smell="of roses")])


def test_others_may_write_while_nothing_comes(
    built: dict[str, Any], writer: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "HELD_S", 0.2)
    writer.upsert([new("held")])
    with pytest.raises(ArtifactError, match="another that writes it"):
        Live(Path(built["artifact"]))
    time.sleep(0.6)
    with Live(Path(built["artifact"])) as live:
        assert live.last > 0
        with pytest.raises(ArtifactError, match="another that writes it"):
            writer.upsert([new("late")])
    writer.upsert([new("late")])


def test_a_score_is_explained_by_its_parts(built: dict[str, Any], writer: Items) -> None:
    rows = pq.read_table(built["triplets"] / "items").to_pylist()[:3]
    model = Model.load(Path(built["model"]))
    query = "red striped mug"
    told = writer.explain(query, [*rows, {**rows[0], "image": None}])
    asked, plain = model.queries([query])[0], model.plain_queries([query])[0]
    for row, parts in zip(rows, told, strict=False):
        pixels = inputs.pixels(row["image"], model.image_size)[None]
        vectors = model.items([row["text"]], pixels, np.array([True]))
        alone = model.items([row["text"]], pixels, np.array([False]))["index"][0]
        wanted = {name: float(vectors[name][0] @ plain) for name in ("text", "image", "fused")}
        assert parts == pytest.approx({**wanted, "without_image": float(alone @ asked)}, abs=1e-5)
    assert told[3]["image"] is None
    assert told[3]["without_image"] == pytest.approx(told[0]["without_image"], abs=1e-5)
