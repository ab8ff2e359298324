"""What an earlier version wrote opens, and what a later one wrote is refused with what to do.

`golden` holds a model, an index with changes, and a checkpoint, as `make` below wrote them by the version before
changes and checkpoints said their format. They are not made again: what cannot read them is another format, with a
number and golden files of its own.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from askew import artifacts, checkpoints, live, models, segments
from askew.errors import ArtifactError
from askew.inputs import Tokens
from askew.live import Follower, Live
from askew.models import Model
from askew.segments import Plan
from askew.towers import TowerSettings, TwoTower

GOLDEN = Path(__file__).parent / "golden"
DIM = 4


def make(root: Path) -> None:
    """Write golden files."""
    torch.manual_seed(0)
    with artifacts.draft(root, "model", {"golden": 1}, {}) as draft:
        text = {"width": 8, "layers": 1, "heads": 1}
        towers = TowerSettings.model_validate({"dim": DIM, "text": text, "fusion": "text"})
        tokens = Tokens.train(["red mug", "blue cap"], 40)
        Model(TwoTower(towers, tokens.size), tokens).save(draft.folder)
        draft.details["dim"] = DIM
    key = artifacts.key("model", {"golden": 1}, {})
    with artifacts.draft(root, "index", {"golden": 1}, {"model": key}) as draft:
        items = pa.table({"item_id": [f"i{n}" for n in range(4)], "title": ["red mug", "blue cap", "", "漢"]})
        segments.write(draft.folder / "segment-00000", np.eye(4, DIM, dtype=np.float32), items, None, "r1")
        segments.tell(draft, ["segment-00000"])
    index = artifacts.place(root, "index", artifacts.key("index", {"golden": 1}, {"model": key}))
    with Live(index) as writer:
        writer.upsert(np.eye(1, DIM, dtype=np.float32), [{"item_id": "new", "title": "green mug"}])
        writer.delete(["i1"])
        writer.compact()
        writer.delete(["i2"])
    (live.place(index) / live.LOG / "lock").unlink()
    layer, optimizer = trained()
    (root / "checkpoint").mkdir()
    checkpoints.save(root / "checkpoint", layer, optimizer, {"step": 7})


def trained() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A layer after one step of its optimiser, the same each time."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).view(parameter.shape))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    sum((parameter.sum() for parameter in layer.parameters()), torch.zeros(())).backward()
    optimizer.step()
    return layer, optimizer


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, as who opens them for writing leaves files of its own."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    return tmp_path / "golden"


def one(root: Path, names: str) -> Path:
    [found] = [path for path in root.glob(names) if path.suffix != live.SUFFIX]
    return found


# --- what was written then -----------------------------------------------------------------------


def test_a_model_of_then_gives_the_vectors_of_then(golden: Path) -> None:
    assert models.parity(one(golden, "model-*")) > 0.9999


def test_an_index_of_then_is_searched_and_takes_changes(golden: Path) -> None:
    index = one(golden, "index-*")
    artifacts.read(index, "index")
    assert Plan.read(index, "r1").size == 4
    follower = Follower(index)
    assert (follower.last, follower.shard.size) == (3, 3)
    hits = follower.shard.search(np.eye(1, DIM, dtype=np.float32), 9)
    assert follower.shard.item_ids.take(pa.array(hits.rows[0])).to_pylist() == ["i0", "new", "i3"]
    assert hits.scores.tolist() == [[1.0, 1.0, 0.0]]
    with Live(index) as writer:
        assert writer.upsert(np.eye(1, DIM, dtype=np.float32), [{"item_id": "i3", "title": ""}]) == 4
        writer.compact()
    assert Follower(index).shard.size == 3


def test_a_checkpoint_of_then_is_gone_on_with(golden: Path) -> None:
    folder = golden / "checkpoint"
    assert checkpoints.state_of(folder)["step"] == 7
    (wanted, _), layer = trained(), torch.nn.Linear(3, 2)
    checkpoints.load_weights(folder, layer)
    assert torch.equal(layer.weight, wanted.weight)
    optimizer = torch.optim.AdamW(layer.parameters())
    checkpoints.load_optimizer(folder, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert float(optimizer.state[layer.bias]["step"]) == 1


def test_what_said_no_format_is_of_the_first(golden: Path) -> None:
    """All tests above read such files."""
    for path in (*golden.glob("*.live/state.json"), golden / "checkpoint" / "state.json"):
        assert "format" not in json.loads(path.read_bytes())


# --- what will be written some day ---------------------------------------------------------------


def of_format(names: str, number: int | str = 2, **more: Any) -> Callable[[Path], None]:
    """Make files look as a later version may write them."""

    def change(golden: Path) -> None:
        [path] = golden.glob(names)
        told = {**json.loads(path.read_bytes()), "format": number, "askew": "9.9", **more}
        path.write_text(json.dumps(told))

    return change


def another_log(golden: Path) -> None:
    path = max(golden.glob("*.live/log/*.wal"))
    path.write_bytes(path.read_bytes().replace(b"askL", b"askM"))


def opened(golden: Path) -> None:
    Live(one(golden, "index-*"))


AGAIN = "found format 2, written by askew 9.9; make it again with this version of askew"


@pytest.mark.parametrize(
    ("change", "read", "said"),
    [
        (of_format("model-*/manifest.json", more=1), lambda g: Model.load(one(g, "model-*")), AGAIN),
        (of_format("index-*/manifest.json", more=1), lambda g: Plan.read(one(g, "index-*")), AGAIN),
        (of_format("index-*/segment-00000/manifest.json"), lambda g: Follower(one(g, "index-*")), AGAIN),
        (of_format("index-*.live/changes-*/manifest.json"), lambda g: Follower(one(g, "index-*")), AGAIN),
        (of_format("*.live/state.json", more=1), opened, "state.json; found format 2.*, or build the index"),
        (of_format("checkpoint/state.json"), lambda g: checkpoints.state_of(g / "checkpoint"),
         "state.json; found format 2.*; go on with the version of askew that wrote it, or remove the folder"),
        (another_log, opened, "changes of format L in .*; found format M; open it with the version of askew that"),
        (another_log, lambda g: Follower(one(g, "index-*")), "changes of format L in .*; found format M"),
        (of_format("model-*/manifest.json", "x"), lambda g: Model.load(one(g, "model-*")), "found format x"),
        (of_format("model-*/manifest.json", 1, more=1), lambda g: Model.load(one(g, "model-*")), "1 errors in it"),
    ],
)  # fmt: skip
def test_another_format_is_refused_and_left_as_it_is(
    golden: Path, change: Callable[[Path], None], read: Callable[[Path], object], said: str
) -> None:
    change(golden)
    before = {path: path.read_bytes() for path in golden.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match=said):
        read(golden)
    after = {path: path.read_bytes() for path in golden.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before


def test_every_manifest_and_state_says_its_format(tmp_path: Path) -> None:
    make(tmp_path)
    told = [
        json.loads(path.read_bytes())
        for path in tmp_path.rglob("*.json")
        if path.name in ("manifest.json", "state.json")
    ]
    assert len(told) >= 6
    assert {one.get("format") for one in told} == {1}
    assert next(tmp_path.rglob("*.wal")).read_bytes()[:4] == b"askL"


if __name__ == "__main__":
    make(GOLDEN)
