"""Flip bits of files, at random from a seed, and load what they are of: `make chaos OPTIONS='--only flips'`.

Every kind of file that askew loads is there: a model, an index with segments and changes, a checkpoint, triplets,
what an endpoint served last. Each flip is of one bit of one file, and is loaded as the endpoint, a training or a
stage loads it. It counts as refused when that raises askew's own error, and the error names the file.
"""

import contextlib
import io
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from askew import artifacts, checkpoints, layouts, models, releases, segments, tuning
from askew.ann import Index
from askew.encoders import TextSettings
from askew.errors import AskewError
from askew.inputs import Tokens
from askew.live import Follower, Live
from askew.recipes import LayoutSettings
from askew.releases import Release
from askew.towers import TowerSettings, TwoTower

TITLES = ("red striped mug", "blue cap", "green lamp", "salon chair", "red lamp", "blue mug")
DIM, ITEMS, NUM_SEGMENTS, FLIPS = 16, 600, 3, 500


class UnknownError(AskewError):
    """What was served last can't be told; what is said of it is on stdout."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and what loads them. Raises when they are not as they were written."""

    name: str
    files: tuple[Path, ...]
    load: Callable[[], object]


def kinds(root: Path) -> list[Kind]:
    """Make something of every kind below a folder."""
    model, index, rng = _model(root), _index(root), np.random.default_rng(0)
    _changed(index, rng)
    live = index.with_name(f"{index.name}.live")
    checkpoint, towers, optimizer = _checkpoint(root / "checkpoint")
    triplets, served = _triplets(root, rng), root / "served.json"
    releases.remember(served, _release(model, index), None, "here")
    tokens = Tokens.load(model / models.TOKENIZER)

    def changes() -> None:
        Follower(index)
        Live(index).close()  # reads the log's older files too

    def resumed() -> None:
        checkpoints.state_of(checkpoint)
        checkpoints.load_result(checkpoint, towers)
        checkpoints.load_weights(checkpoint, towers)
        checkpoints.load_optimizer(checkpoint, optimizer)

    return [
        Kind("model", _files(model), lambda: models.parity(model)),
        Kind("index", _files(index), lambda: (Follower(index), segments.Plan.read(index).empty())),
        Kind("changes", _files(live), changes),
        Kind("checkpoint", _files(checkpoint), resumed),
        Kind("triplets", _files(triplets), lambda: _laid_out(triplets, tokens, root / "layouts")),
        Kind("served", (served,), lambda: _remembered(served)),
    ]


def flipped(root: Path, seed: int, flips: int = FLIPS) -> dict[str, Any]:
    """Flip bits and count what is refused by name; returns figures."""
    chance, every = random.Random(seed), kinds(root)
    for kind in every:
        kind.load()  # as it was written it loads
    tried, refused, missed = Counter[str](), Counter[str](), list[str]()
    for number in range(flips):
        kind = every[number % len(every)]
        path = chance.choice(kind.files)
        told = _of(kind, path, bit := chance.randrange(8 * path.stat().st_size))
        tried[kind.name] += 1
        refused[kind.name] += told is None
        missed += [] if told is None else [f"{path.relative_to(root)}, bit {bit}: {told}"]
    for kind in every:
        kind.load()
    by = {name: f"{refused[name]} of {count}" for name, count in tried.items()}
    return {"flips": flips, "refused": refused.total(), "by_kind": by, "not_refused": missed[:20]}


def _of(kind: Kind, path: Path, bit: int) -> str | None:
    """Load with one bit flipped; returns what came of it, None where it was refused by name."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        kind.load()
    except AskewError as error:
        return None if path.name in str(error) else f"not named in: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "loaded"
    finally:
        path.write_bytes(whole)


# --- what is flipped -----------------------------------------------------------------------------


def _files(folder: Path) -> tuple[Path, ...]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return tuple(sorted(path for path in found if path.name != "lock"))


def _towers() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(TowerSettings(dim=DIM, text=TextSettings(width=16, heads=2), image_size=32), 60)


def _model(root: Path) -> Path:
    tokens, towers = Tokens.train(TITLES * 3, 60), _towers()
    towers = TwoTower(towers.settings, tokens.size)
    with artifacts.draft(root, "model", {}, {}) as draft:
        models.Model(towers, tokens).save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {}, {}))


def _items(ids: list[str]) -> list[dict[str, Any]]:
    return [{"item_id": i, "title": TITLES[n % 6], "fields": {"price": float(n)}} for n, i in enumerate(ids)]


def _index(root: Path) -> Path:
    """An index of inverted lists and codes."""
    vectors = np.random.default_rng(1).normal(size=(ITEMS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    empty = Index.trained(tuning.design(tuning.IndexKindSettings(kind="ivf_rabitq"), ITEMS, DIM), vectors)
    names = [f"segment-{number:05d}" for number in range(NUM_SEGMENTS)]
    with artifacts.draft(root, "index", {}, {"model": "m", "triplets": "t"}) as draft:
        empty.write(draft.folder / segments.EMPTY)
        for name, rows in zip(names, np.array_split(np.arange(ITEMS), NUM_SEGMENTS), strict=True):
            table = pa.Table.from_pylist(_items([f"i{n}" for n in rows]), SCHEMA)
            segments.write(draft.folder / name, vectors[rows], table, empty, "r")
        segments.tell(draft, names)
    return artifacts.place(root, "index", artifacts.key("index", {}, {"model": "m", "triplets": "t"}))


SCHEMA = pa.schema({
    "item_id": pa.string(), "title": pa.string(), "has_image": pa.bool_(),
    "fields": pa.struct({"price": pa.float64()}),
})  # fmt: skip


def _changed(index: Path, rng: np.random.Generator) -> None:
    """Change an index: what is in segments by now, and what is in the log alone."""
    with Live(index) as live:
        for number in range(6):
            live.upsert(rng.normal(size=(5, DIM)), _items([f"i{n}" for n in rng.choice(700, 5, replace=False)]))
            live.delete([f"i{number}"])
            if number in (1, 3):
                live.compact()
    Live(index).close()  # removes what readers of the state before were in need of


def _checkpoint(folder: Path) -> tuple[Path, TwoTower, torch.optim.Optimizer]:
    """A checkpoint of a stage that keeps the weights' running mean, after a step."""
    folder.mkdir()
    towers = _towers()
    optimizer = torch.optim.AdamW(towers.parameters())
    sum(parameter.sum() for parameter in towers.parameters()).backward()
    optimizer.step()
    checkpoints.save(folder, towers, optimizer, {"step": 7, "ndcg": 0.5}, _towers())
    return folder, towers, optimizer


def _triplets(root: Path, rng: np.random.Generator) -> Path:
    with artifacts.draft(root, "triplets", {}, {}) as draft:
        draft.details |= {"image_size": 32, "candidates": {}}
        for name in ("items", "queries", "pairs", "qrels"):
            (draft.folder / name).mkdir()
            table = pa.table({"item_id": [f"i{n}" for n in range(50)], "number": rng.normal(size=50)})
            pq.write_table(table, draft.folder / name / "00000.parquet")
    return artifacts.place(root, "triplets", artifacts.key("triplets", {}, {}))


def _laid_out(triplets: Path, tokens: Tokens, root: Path) -> None:
    """Lay triplets out, as a training begins: they are checked first; these are none that it could go on with."""
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(KeyError, TypeError, ValueError, pa.ArrowInvalid, RuntimeError):
        layouts.lay_out(triplets, LayoutSettings(), tokens, root)


def _release(model: Path, index: Path) -> Release:
    about: Mapping[str, Any] = {"name": "shop", "version": "3", "model": str(model), "index": str(index)}
    keys = {"identity": "r", "model_key": "m", "index_key": "i", "sizes": (300, 300)}
    return Release.model_validate({**about, **keys, "schema_": SCHEMA.serialize().to_pybytes()})


def _remembered(path: Path) -> None:
    """Read what was served last, as an endpoint starts: it goes by the alias where that is not known."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kept = releases.remembered(path)
    if kept is None:
        raise UnknownError("what was served last", said.getvalue(), "go by the alias")
