"""What embedding by the index stage costs beyond the model: Ray Data's actor against a loop, in processor time.

Both embed the same made-up items over and over, by small towers of random weights (photos of 128 pixels), one
thread each. The stage's time is that of all of Ray's processes; the loop has its texts and photos in memory.
"""

import contextlib
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
from prepare import say

from askew import artifacts, catalogue, datasets, tables, triplets
from askew.indexing import Embedder
from askew.inputs import Tokens
from askew.models import Model
from askew.towers import TowerSettings, TwoTower

NUM_DRAWN, BATCH, IMAGE_SIZE = 2_000, 256, 128


def embedded(num_items: int) -> dict[str, float]:
    """Embed `num_items` both ways; returns the processor seconds of each."""
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        ray.init("local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
        try:
            drawn = catalogue.draw(catalogue.DrawSettings(root=root, num_items=NUM_DRAWN))["artifact"]
            made = Path(
                triplets.prepare(triplets.PrepareSettings(data=drawn, root=root, image_size=IMAGE_SIZE))[
                    "artifact"
                ]
            )
            model = _model(root, made)
            rounds = -(-num_items // NUM_DRAWN)
            loop_s = _loop(model, made, rounds)
            stage_s = _stage(model, made, root, rounds)
        finally:
            ray.shutdown()
    say(f"embedding: loop {loop_s:.1f} s, stage {stage_s:.1f} s")
    return {"loop_s": loop_s, "stage_s": stage_s, "items": rounds * NUM_DRAWN}


def _model(root: Path, made: Path) -> Path:
    torch.manual_seed(0)
    titles = [str(t) for t in tables.column(tables.parts(made / "items"), "text").to_pylist()]
    tokens = Tokens.train(titles, 2000)
    with artifacts.draft(root, "model", {}, {}) as draft:
        Model(TwoTower(TowerSettings(image_size=IMAGE_SIZE), tokens.size), tokens).save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {}, {}))


def _loop(folder: Path, made: Path, rounds: int) -> float:
    torch.set_num_threads(1)
    model, table = Model.load(folder), pq.read_table(made / "items")
    texts = table["text"].to_pylist()
    photos = tables.pixels(table["pixels"].combine_chunks(), model.image_size)
    has = table["has_image"].to_numpy()
    started = time.process_time()
    for _ in range(rounds):
        for at in range(0, len(texts), BATCH):
            model.items(texts[at : at + BATCH], photos[at : at + BATCH], has[at : at + BATCH])
    return time.process_time() - started


def _stage(folder: Path, made: Path, root: Path, rounds: int) -> float:
    rows = pq.read_table(made / "items", columns=["has_image"]).num_rows
    units = [
        {
            "number": n, "group": [n], "start": 0, "stop": rows, "parts": str(root),
            "bad": str(root / f"{n}.parquet"),
        }
        for n in range(rounds)
    ]  # fmt: skip
    with Watched() as watched:
        datasets.spread(units, Embedder, "embedded", (str(folder), str(made), BATCH), 1)
    if len(np.load(root / "00000-00000.npy")) != rows:
        raise RuntimeError("other vectors than items")
    return watched.processor_s


class Watched:
    """Adds up the processor time of this process and of all of Ray's, those too that end meanwhile."""

    def __enter__(self) -> "Watched":
        self._before, self._last = _times(), dict[int, float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self._last |= _times()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._last |= _times()
        self.processor_s = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._last.items())


def _times() -> dict[int, float]:
    me, found = psutil.Process(), {}
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found
