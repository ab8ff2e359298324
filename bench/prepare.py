"""Measure the prepare stage: its speed a core against plain decoding, and its memory against ten times the items.

`make bench-prepare`; progress goes to stderr, and the last line of stdout is one JSON object of figures and
targets. Speeds are photos a core-second of processor time (children too), each the median of interleaved rounds.
`stage_photos` and `stage_items` alone name what is measured of prepare.
"""

import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from askew import cleaning, inputs, published, sources

REPOSITORY = Path(__file__).parent.parent
SIZE, SPEED_SIDE, MEMORY_SIDE = 224, 800, 500  # pixels: what comes out, and the photos that go in
NUM_DRAWN, NUM_PHOTOS, NUM_ROUNDS = 24, 240, 7
NUM_ITEMS, GROWTH = 2_000, 10
ROWS_A_GROUP = 500
SAMPLE_EVERY_S = 0.05
BILINEAR = Image.Resampling.BILINEAR


def stage_photos(photos: list[bytes]) -> None:
    """Decode and resize photos as the stage does, in the chunks that it reads."""
    rows = cleaning.rows_at_once(SIZE)
    for start in range(0, len(photos), rows):
        cleaning.Photos.decoded(photos[start : start + rows], SIZE)


def stage_items(data: Path, out: Path) -> None:
    """Take a catalogue of one unit through all that the stage does to items: read, check, decode, hash, write."""
    layout = published.recognise(str(data))
    [unit] = sources.units(layout.items[0], str(data))
    settings, fields = cleaning.CleanSettings(image_size=SIZE), cleaning.fields(layout, str(data))
    cleaner = cleaning.Cleaner(layout.items[0].model_dump(), settings.model_dump(), fields, triplets=False)
    cleaner.clean(unit, out, 0)


# --- photos --------------------------------------------------------------------------------------


def drawn(side: int, seed: int) -> bytes:
    """Draw what a product photo is like to a decoder: a thing of natural (1/f) texture and shapes, on white."""
    random = np.random.default_rng(seed)
    thing = Image.fromarray(np.clip(128 + 30 * _texture(side, random), 0, 255).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(thing)
    for x, y, across in random.integers(0, side, (25, 3)).tolist():
        colour = tuple(random.integers(0, 255, 3).tolist())
        (draw.ellipse if across % 2 else draw.rectangle)((x, y, x + across // 5, y + across // 5), fill=colour)
    outline = Image.new("L", (side, side))
    ImageDraw.Draw(outline).ellipse((0.15 * side, 0.1 * side, 0.85 * side, 0.9 * side), fill=255)
    stream = io.BytesIO()
    Image.composite(thing, Image.new("RGB", thing.size, "white"), outline).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _texture(side: int, random: np.random.Generator) -> NDArray[np.float64]:
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    texture: NDArray[np.float64] = np.fft.irfft2(
        np.fft.rfft2(random.normal(size=(side, side))) / frequency**1.2, (side, side)
    )
    texture /= texture.std()
    return texture


def write_catalogue(folder: Path, num_items: int, side: int, rows_a_group: int) -> Path:
    """Write a catalogue of `num_items` photos, a few of them drawn and the rest repeats; returns its Parquet."""
    path = folder / "items" / "train" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    photos = [drawn(side, seed) for seed in range(NUM_DRAWN)]
    schema = pa.schema([(n, pa.string()) for n in ("item_id", "title", "colour")] + [("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_items, rows_a_group):
            numbers = range(start, min(start + rows_a_group, num_items))
            columns = [[f"i{n}" for n in numbers], [f"red mug {n}" for n in numbers], ["red"] * len(numbers)]
            images = [photos[n % NUM_DRAWN] for n in numbers]
            writer.write_table(pa.table([*columns, images], schema=schema), row_group_size=rows_a_group)
    (folder / "train.queries.jsonl").write_text('{"query_id": "q0", "query": "red mug"}\n')
    (folder / "train.qrels.tsv").write_text("q0\t0\ti0\t3\nq0\t0\ti1\t0\n")
    return path


# --- speed ---------------------------------------------------------------------------------------


def naive(data: bytes) -> NDArray[np.uint8]:
    """Decode the whole photo, then resize it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), BILINEAR))


def bare(data: bytes) -> NDArray[np.uint8]:
    """Decode scaled and resize by the fastest kernels at hand, with none of prepare's care."""
    least = math.ceil(inputs.SPARE * SIZE)
    rgb = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
    photo = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)
    return interpolate(photo, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def each(decode: Callable[[bytes], Any], photos: list[bytes]) -> None:
    """Decode one photo after the other."""
    for photo in photos:
        decode(photo)


def decoded(batch: list[bytes]) -> list[NDArray[np.uint8]]:
    """Decode a batch as prepare does."""
    return [inputs.pixels(photo, SIZE) for photo in batch]


def loaded(photos: list[bytes], num_workers: int) -> None:
    """Decode all photos in torch's DataLoader, its workers ended with it."""
    for _ in DataLoader(photos, batch_size=32, num_workers=num_workers, collate_fn=decoded):  # type: ignore[arg-type]
        pass


def speeds(folder: Path) -> dict[str, float]:
    """Measure photos a core-second of every way, in interleaved rounds, each on one thread."""
    torch.set_num_threads(1)
    catalogue = write_catalogue(folder, NUM_PHOTOS, SPEED_SIDE, NUM_PHOTOS)
    photos = pq.read_table(catalogue)["image"].to_pylist()
    ways: dict[str, Callable[[], None]] = {
        "stage_photos": partial(stage_photos, photos),
        "stage_items": partial(stage_items, folder, folder / "out"),
        "bare": partial(each, bare, photos),
        "naive_pil": partial(each, naive, photos),
        "dataloader_0_workers": partial(loaded, photos, 0),
        "dataloader_2_workers": partial(loaded, photos, 2),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(NUM_ROUNDS + 1):
        for name, way in ways.items():
            start = _processor_s()
            way()
            taken[name].append(_processor_s() - start)
        say(f"round {number} of {NUM_ROUNDS}")
    return {name: NUM_PHOTOS / statistics.median(times[1:]) for name, times in taken.items()}  # the first warms up


def _processor_s() -> float:
    return sum(os.times()[:4])


# --- memory --------------------------------------------------------------------------------------


def prepare_peak(num_items: int) -> int:
    """Run the prepare job in a fresh process with its own Ray; returns the peak memory of its tree, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "catalogue"
        write_catalogue(data, num_items, MEMORY_SIDE, ROWS_A_GROUP)
        settings = Path(folder) / "prepare.yaml"
        settings.write_text(f"data: {data}\nroot: {folder}/artifacts\nimage_size: {SIZE}\n")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY / "platform")}
        command = [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), str(settings)]
        with (Path(folder) / "log").open("w+b") as log:
            job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            peak = max(_samples(job), default=0)
            if job.wait():
                log.seek(0)
                raise RuntimeError(f"the prepare job failed: {log.read()[-2000:].decode(errors='replace')}")
        return peak


def _samples(job: subprocess.Popen[bytes]) -> Iterator[int]:
    """Sample the proportional memory of a process and all under it, in bytes, until it ends."""
    while job.poll() is None:
        yield sum(map(_proportional, _tree(job.pid)))
        time.sleep(SAMPLE_EVERY_S)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


# --- report --------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def at_least(value: float, bound: float) -> dict[str, Any]:
    """Judge a figure that is to be large."""
    return {"value": round(value, 3), "bound": bound, "holds": value >= bound}


def at_most(value: float, bound: float) -> dict[str, Any]:
    """Judge a figure that is to be small."""
    return {"value": round(value, 3), "bound": bound, "holds": value <= bound}


def main() -> None:
    """Measure all and print it."""
    with tempfile.TemporaryDirectory() as folder:
        speed = speeds(Path(folder))
    peaks = []
    for num_items in (NUM_ITEMS, GROWTH * NUM_ITEMS):
        peaks.append(prepare_peak(num_items))
        say(f"peak at {num_items:,} items: {peaks[-1] / 2**20:,.0f} MiB")
    bits = 8 * sum(len(drawn(SPEED_SIDE, seed)) for seed in range(NUM_DRAWN)) / (NUM_DRAWN * SPEED_SIDE**2)
    figures = {
        "photos_a_core_second": {name: round(value, 1) for name, value in speed.items()},
        "peak_bytes": {str(NUM_ITEMS): peaks[0], str(GROWTH * NUM_ITEMS): peaks[1]},
        "photos": {"side": SPEED_SIDE, "to": SIZE, "bits_a_pixel": round(bits, 3), "memory_side": MEMORY_SIDE},
        "num_cores": os.cpu_count(),
    }
    targets = {
        "ratio": at_least(speed["stage_photos"] / speed["bare"], 0.8),
        "vs_naive_pil": at_least(speed["stage_photos"] / speed["naive_pil"], 3.0),
        "memory_growth": at_most(peaks[1] / peaks[0], 1.15),
    }
    print(json.dumps({"figures": figures, "targets": targets}), flush=True)


if __name__ == "__main__":
    main()
