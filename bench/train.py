"""Measure the train stage against what others train the same towers by.

`make bench-train`; progress goes to stderr, and the last line of stdout is one JSON object of figures and targets.
Every contender is a process that does a round of steps when it is told to, and notes what that took, so that the
rounds of all interleave: each figure is the median of its rounds, the first of which warm up and do not count.
All train the same towers (in bfloat16 where the stage does, one thread a worker, as Ray gives it) on the same
pairs, in batches of 256 by InfoNCE of fused vectors at a learned temperature, by AdamW, and clip gradients.

    ours                   `askew.training.train`, one Ray Train worker; from_disk: after its files left the memory
    ours_2_workers         the same by two, who share the batch
    bare_loop              a loop of plain PyTorch over tensors that lie ready in memory
    two_bare_loops         two of these at a time, which know nothing of each other
    open_clip              its `train_one_epoch`, fed by a DataLoader of one process: examples one by one, texts
                           padded to the context's length, collated
    sentence_transformers  its trainer, collator and MultipleNegativesRankingLoss on a dataset of texts and photos,
                           the photos as PNG of the towers' size
    sentence_transformers_fed  the same, given our batches: tokens and pixels lie ready in memory

Speeds are judged by processor time (children's too), which a busy machine blurs least; wall time stands beside;
the cost of the disk is judged by wall time, as waiting takes no processor.
What no round counts: Ray's start, its controller, checkpoints and registration.
"""

import io
import json
import math
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_worker_niceness": "0",  # as the others have; by Ray's own 15, a busy machine holds its workers back alone
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from PIL import Image
from prepare import at_least, at_most, say
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from askew import caching, catalogue, layouts, tables, training, triplets
from askew.batches import BatchSettings, Examples, Triplets
from askew.errors import RegistryError
from askew.inputs import Tokens
from askew.recipes import StageSettings, TrainSettings
from askew.steps import AHEAD, Made, Worker, bf16
from askew.towers import MAX_LOG_SCALE, Encoded, TowerSettings, TwoTower

NUM_ITEMS, BATCH, STEPS = 2_000, 256, 20  # steps of a round, as many as the stage reports at a time
WARM_UP, NUM_ROUNDS = 1, 5
STAGE = StageSettings.model_validate({"steps": 1, "loss": {"fused": 1.0}, "schedule": "constant"})
CPU = torch.device("cpu")
NOWHERE = "http://127.0.0.1:9"  # no MLflow: the stage ends in a RegistryError then, its model on disk
LIMIT_S = 900
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}  # dense bf16, as NVIDIA says


class Shared(NamedTuple):
    """What contenders are told."""

    folder: Path
    triplets: Path
    layout: Path
    vocabulary: int
    address: str  # of the Ray cluster


def settings(triplets_folder: Path, root: Path, num_workers: int = 1, rounds: int = 1) -> TrainSettings:
    """Settings of the stage for so many rounds, and the one step that ends the last."""
    return TrainSettings.model_validate({
        "triplets": triplets_folder, "root": root, "tracking_uri": NOWHERE, "batch_size": BATCH,
        "num_workers": num_workers, "report_every": STEPS, "checkpoint_every": 10**6, "max_failures": 0,
        "stages": {"joint": {**STAGE.model_dump(), "steps": rounds * STEPS + 1}}, "validation": {"queries": 0},
    })  # fmt: skip


# --- rounds --------------------------------------------------------------------------------------


class Gate:
    """Holds a contender at the start of each round, and notes what the round took, in `<name>.<round>.<rank>`."""

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self._folder, self._name, self._rank, self._step = folder, name, rank, 0
        self._began = (0.0, 0.0, 0)

    def step(self, ready: Callable[[bool], None] | None = None) -> None:
        """Call before each step. `ready` is called before a round begins, with whether files are to be fresh."""
        number, at = divmod(self._step, STEPS)
        self._step += 1
        if at:
            return
        if number:
            self._note(number - 1)
        go = self._folder / f"{self._name}.{number}.go"
        while not go.exists():
            if (self._folder / f"{self._name}.end").exists():
                return
            time.sleep(0.02)
        if ready:
            ready(go.read_text() == "fresh")
        self._began = (time.perf_counter(), processor_s(), read_bytes())

    def _note(self, number: int) -> None:
        now = (time.perf_counter(), processor_s(), read_bytes())
        wall, processor, read = (after - before for after, before in zip(now, self._began, strict=True))
        note = {"wall_s": wall, "processor_s": processor, "read_bytes": read, "threads": torch.get_num_threads()}
        note["niceness"] = psutil.Process().nice()
        path = self._folder / f"{self._name}.{number}.{self._rank}"
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(note))
        part.rename(path)


def processor_s() -> float:
    """Processor time of this process and its children."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def read_bytes() -> int:
    """What this process had to read from the disk."""
    return int(psutil.Process().io_counters().read_bytes)


# --- contenders ----------------------------------------------------------------------------------


class GatedWorker(Worker):
    """The stage's worker, held at each round's start with the batches ahead made, whenever that is."""

    gate: Gate
    layout: Path
    num_made = 0

    def made(self, step: int) -> Made:
        """Count what is made."""
        made = super().made(step)
        self.num_made += 1
        return made

    def step(self, made: Made, stage: StageSettings, at: int, step: int) -> tuple[Tensor, dict[str, float]]:
        """Pass the gate, and take the step."""
        while step % STEPS == 0 and self.num_made < min(step + AHEAD + 1, self.settings.steps):
            time.sleep(0.001)
        self.gate.step(self._ready)
        return super().step(made, stage, at, step)

    def _ready(self, fresh: bool) -> None:
        for path in self.layout.glob("*.npy"):
            if not fresh:
                path.read_bytes()
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
                mapped = getattr(self.triplets._arrays[path.stem], "_mmap", None)
                if mapped is not None:
                    mapped.madvise(mmap.MADV_DONTNEED)  # mapped pages would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(shared: Shared, name: str, rounds: int, num_workers: int = 1) -> None:
    """Run the whole stage, its workers gated."""
    ray.init(shared.address, configure_logging=False, log_to_driver=False)

    def work(config: dict[str, Any]) -> None:
        told = TrainSettings.model_validate(config["settings"])
        layout = Path(config["layout"])
        worker = GatedWorker(told, Tokens.parse(config["tokens"]).size, layout, Path(config["journal"]))
        rank = ray.train.get_context().get_world_rank()
        worker.gate, worker.layout = Gate(shared.folder, name, rank), layout
        worker.run()

    told = settings(shared.triplets, shared.folder / name, num_workers, rounds)
    with mock.patch.object(training, "work", work):
        try:
            training.train(told)
        except RegistryError:
            say(f"{name} has trained")


def ours_2_workers(shared: Shared, name: str, rounds: int) -> None:
    """Run the whole stage by two workers."""
    ours(shared, name, rounds, num_workers=2)


def two_bare_loops(shared: Shared, name: str, rounds: int) -> None:
    """Run the bare loop twice at a time: what this machine's cores take from each other."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for done in [pool.submit(bare_loop, shared, name, rounds, rank) for rank in range(2)]:
            done.result()


def bare_loop(shared: Shared, name: str, rounds: int, rank: int = 0) -> None:
    """Train as a loop without anything else would."""
    towers, optimizer, autocast = begun(shared)
    data = Triplets(shared.layout)
    batches = [tensors(data, chosen(data, step)) for step in range(STEPS)]
    target, gate, losses = torch.arange(BATCH), Gate(shared.folder, name, rank), []
    for step in range(rounds * STEPS + 1):
        gate.step()
        for group in optimizer.param_groups:
            group["lr"] = STAGE.rate(step)
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            encoded = towers(*batches[step % STEPS])
        loss = info_nce(encoded, target)
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), STAGE.clip)
        optimizer.step()
        losses.append(loss.detach())
    ended(name, losses)


class Singles(Dataset[tuple[Any, ...]]):
    """Examples one by one, as a dataset of open_clip gives them: pixels and texts of the context's length."""

    def __init__(self, layout: Path, num_examples: int) -> None:
        self.data = Triplets(layout)
        self.chosen = self.data.examples(0, 0, num_examples, BatchSettings())

    def __len__(self) -> int:
        return len(self.chosen.queries)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        arrays, item = self.data._arrays, self.chosen.items[number]
        parts = (arrays["queries"][self.chosen.queries[number]], arrays["titles"][0, item], arrays["pixels"][item])
        return (*(torch.from_numpy(part.copy()) for part in parts), bool(arrays["has_image"][item]))


def open_clip(shared: Shared, name: str, rounds: int) -> None:
    """Train as open_clip's `train_one_epoch` does, without its gradient accumulation, scaler and logging."""
    towers, optimizer, autocast = begun(shared)
    singles = Singles(shared.layout, (rounds * STEPS + 1) * BATCH)
    loader = DataLoader(singles, BATCH, num_workers=1, persistent_workers=True, drop_last=True)
    gate, losses = Gate(shared.folder, name), []
    gate.step()  # a batch is waited for between the steps: the round holds as many waits as steps
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = STAGE.rate(step)
        batch = [part.to(device=CPU, non_blocking=True) for part in batch]
        optimizer.zero_grad()
        with autocast():
            encoded = towers(*batch)
            loss = info_nce(encoded, torch.arange(BATCH))
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), STAGE.clip, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            towers.log_scale.clamp_(0, math.log(100))
        losses.append(loss.detach())
        gate.step()
    ended(name, losses)


class Column(nn.Module):
    """The towers as a module of sentence-transformers: each column is read and encoded by its side."""

    def __init__(self, towers: TwoTower, tokens: Tokens) -> None:
        super().__init__()
        self.towers, self.tokens, self.longest = towers, tokens, towers.settings

    def preprocess(self, inputs: Sequence[Any], *_: Any, **__: Any) -> dict[str, Tensor]:
        """Tokenize texts, each batch padded to its longest, and read photos."""
        if isinstance(inputs[0], str):
            return {"input_ids": torch.from_numpy(self.tokens.ids(inputs, self.longest.query_length))}
        pixels = np.stack([np.asarray(item["image"]) for item in inputs])
        titles = self.tokens.ids([item["text"] for item in inputs], self.longest.title_length)
        features = {"input_ids": torch.from_numpy(titles), "pixel_values": torch.from_numpy(pixels)}
        return features | {"has_image": torch.tensor([item["has_image"] for item in inputs])}

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Encode anchors or positives."""
        if "pixel_values" in features:
            parts = (features[name] for name in ("input_ids", "pixel_values", "has_image"))
            return features | {"sentence_embedding": self.towers.items(*parts).fused}
        return features | {"sentence_embedding": self.towers.queries(features["input_ids"])[0]}


def sentence_transformers(shared: Shared, name: str, rounds: int) -> None:
    """Train by SentenceTransformerTrainer on a dataset of texts and photos, by its own collator."""
    import datasets

    data, (queries, items) = Triplets(shared.layout), readable(shared)
    everything = data.examples(0, 0, (rounds * STEPS + 1) * BATCH, BatchSettings())
    rows = {
        "anchor": [queries[number] for number in everything.queries.tolist()],
        "positive": [items[number] for number in everything.items.tolist()],
    }
    item = {"text": datasets.Value("string"), "image": datasets.Image(), "has_image": datasets.Value("bool")}
    features = datasets.Features({"anchor": datasets.Value("string"), "positive": item})
    by_its_trainer(shared, name, rounds, datasets.Dataset.from_dict(rows, features), None)


def sentence_transformers_fed(shared: Shared, name: str, rounds: int) -> None:
    """Train by SentenceTransformerTrainer, whose batches are gathered from memory as ours are."""
    import datasets

    data = Triplets(shared.layout)

    def collate(rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        everything = data.examples(0, rows[0]["number"], rows[-1]["number"] + 1, BatchSettings())
        names = ("anchor_input_ids", "positive_input_ids", "positive_pixel_values", "positive_has_image")
        return dict(zip(names, tensors(data, everything), strict=True)) | {"return_loss": True}

    collate.valid_label_columns = []  # type: ignore[attr-defined]
    numbers = datasets.Dataset.from_dict({"number": list(range((rounds * STEPS + 1) * BATCH))})
    by_its_trainer(shared, name, rounds, numbers, collate)


def by_its_trainer(
    shared: Shared, name: str, rounds: int, dataset: Any, collate: Callable[..., Any] | None
) -> None:
    """Train as its documentation has it, in our order and by the optimiser that all have."""
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    towers, _, _ = begun(shared)
    gate = Gate(shared.folder, name)

    class Gated(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.step()

    class Loss(MultipleNegativesRankingLoss):  # type: ignore[misc]
        def forward(self, features: Any, labels: Any) -> Tensor:
            self.scale = towers.log_scale.clamp(max=MAX_LOG_SCALE).exp()
            loss: Tensor = super().forward(features, labels)
            return loss

    arguments = Arguments(
        output_dir=str(shared.folder / name), max_steps=rounds * STEPS + 1, per_device_train_batch_size=BATCH,
        learning_rate=STAGE.learning_rate, lr_scheduler_type="constant_with_warmup", optim="adamw_torch_fused",
        warmup_steps=STAGE.warmup_steps, weight_decay=STAGE.weight_decay, max_grad_norm=STAGE.clip, use_cpu=True,
        bf16=in_bf16(shared), logging_steps=STEPS, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = SentenceTransformer(modules=[Column(towers, tokens_of(shared))], device="cpu")
    own = {"data_collator": collate} if collate else {}
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, loss=Loss(model), callbacks=[Gated()], train_dataset=dataset, **own
    )
    with mock.patch.object(trainer, "get_batch_sampler", in_order):
        trainer.train()
    ended(name, [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def readable(shared: Shared) -> tuple[list[str], list[dict[str, Any]]]:
    """Read what the layout was made of, as people keep it: queries as texts, items as texts and PNG photos."""
    data, texts = Triplets(shared.layout), {}
    for row in pq.read_table(shared.triplets / "pairs", columns=["query_id", "query"]).to_pylist():
        texts[row["query_id"]] = row["query"]
    queries = [texts[one] for one in layouts.query_ids(shared.triplets, range(data.num_queries))]
    items = []
    columns = ["text", "split", "has_image"]
    rows = (
        row
        for path in tables.parts(shared.triplets / "items")
        for row in pq.read_table(path, columns=columns).to_pylist()
    )
    for number, row in enumerate(row for row in rows if row["split"] == "train"):
        photo = io.BytesIO()
        Image.fromarray(np.asarray(data._arrays["pixels"][number])).save(photo, "PNG")
        items.append({"text": row["text"], "image": {"bytes": photo.getvalue()}, "has_image": row["has_image"]})
    return queries, items


def in_order(dataset: Any, batch_size: int, drop_last: bool, *_: Any, **__: Any) -> torch.utils.data.BatchSampler:
    """Sample rows as they come, which is a shuffled order already."""
    return torch.utils.data.BatchSampler(range(len(dataset)), batch_size, drop_last)


def in_bf16(shared: Shared) -> bool:
    """Whether the stage would compute in bfloat16 here."""
    return bf16(settings(shared.triplets, shared.folder), CPU)


def begun(shared: Shared) -> tuple[TwoTower, torch.optim.Optimizer, Callable[[], Any]]:
    """Make what all loops have in common: towers, optimiser and autocast."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told = settings(shared.triplets, shared.folder)
    towers = TwoTower(told.towers, shared.vocabulary).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(towers.parameters(), weight_decay=STAGE.weight_decay, fused=True)
    enabled = in_bf16(shared)
    return towers.train(), optimizer, lambda: torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def tokens_of(shared: Shared) -> Tokens:
    """Learn the vocabulary again, which comes out the same."""
    return training._tokens(settings(shared.triplets, shared.folder))


def chosen(data: Triplets, step: int) -> Examples:
    """Choose the pairs that the stage shows at a step."""
    return data.examples(0, step * BATCH, (step + 1) * BATCH, BatchSettings())


def tensors(data: Triplets, examples: Examples) -> tuple[Tensor, ...]:
    """Gather the tensors of pairs."""
    return tuple(map(torch.from_numpy, data.batch(examples, BatchSettings())))


def info_nce(encoded: Encoded, target: Tensor) -> Tensor:
    """The loss of queries against the batch's fused vectors."""
    return F.cross_entropy(encoded.scale * encoded.queries_BD @ encoded.items.fused.T, target)


def ended(name: str, losses: list[Tensor]) -> None:
    """Tell that a contender has learned something."""
    say(f"{name} began at a loss of {float(losses[0]):.3f} and ended at {float(losses[-1]):.3f}")


CONTENDERS: dict[str, Callable[[Shared, str, int], None]] = {
    "ours": ours, "bare_loop": bare_loop, "open_clip": open_clip, "sentence_transformers": sentence_transformers,
    "sentence_transformers_fed": sentence_transformers_fed, "ours_2_workers": ours_2_workers,
    "two_bare_loops": two_bare_loops,
}  # fmt: skip


# --- a GPU, where there is one -------------------------------------------------------------------


def mfu(device: torch.device, towers: TowerSettings, batch: int, at_once: int, num_steps: int) -> dict[str, float]:
    """Measure steps with gradient caching: seconds each, and the model's FLOPs a second, none counted twice."""
    model = TwoTower(towers, 30_522).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def forward(*inputs: Tensor) -> Encoded:
        with torch.autocast(device.type, torch.bfloat16):
            encoded: Encoded = model(*inputs)
        return encoded

    def loss_of(encoded: Encoded) -> tuple[Tensor, None]:
        return info_nce(encoded, torch.arange(len(encoded.queries_BD), device=device)), None

    side = towers.image_size
    inputs = (
        torch.randint(5, 30_522, (batch, towers.query_length), device=device),
        torch.randint(5, 30_522, (batch, towers.title_length), device=device),
        torch.randint(0, 255, (batch, side, side, 3), dtype=torch.uint8, device=device),
        torch.ones(batch, dtype=torch.bool, device=device),
    )
    with FlopCounterMode(display=False) as counter:
        loss_of(forward(*(part[:at_once] for part in inputs)))[0].backward()
    taken = []
    for _ in range(num_steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss, _ = caching.backward(model, inputs, loss_of, at_once, 0, forward)
        optimizer.step()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - start)
    step_s = statistics.median(taken[num_steps // 3 :])
    return {"step_s": step_s, "flops_a_second": counter.get_total_flops() * batch / at_once / step_s}


def mfu_of_a_gpu() -> dict[str, Any] | None:
    """Measure ViT-B/16 and BERT-base at batch 1,024 on a GPU whose peak is known; None without one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for known, flops in PEAKS.items() if known in name), None)
    towers = TowerSettings.model_validate({
        "dim": 512, "text": {"width": 768, "layers": 12, "heads": 12}, "photo": {"backbone": "vit_b_16"},
        "image_size": 224,
    })  # fmt: skip
    found = mfu(torch.device("cuda"), towers, batch=1024, at_once=256, num_steps=12)
    return {"device": name, **found, "mfu": found["flops_a_second"] / peak if peak else None}


# --- all of it -----------------------------------------------------------------------------------


@contextmanager
def running(shared: Shared, rounds: dict[str, int]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Start every contender, and end it and all that it started."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    told = [str(part) for part in shared]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    try:
        for name, count in rounds.items():
            with (shared.folder / f"{name}.log").open("wb") as log:
                command = [sys.executable, __file__, name, str(count), *told]
                started[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        yield started
        for name in started:
            (shared.folder / f"{name}.end").touch()
        for name, process in started.items():
            if process.wait(LIMIT_S):
                raise RuntimeError(last_words(shared, name))
    finally:
        for process in started.values():
            if process.poll() is None:
                under = psutil.Process(process.pid).children(recursive=True)
                for one in (process, *under):
                    one.kill()
                process.wait()


def last_words(shared: Shared, name: str) -> str:
    """Say what a contender that failed said last."""
    return f"{name} failed: {(shared.folder / f'{name}.log').read_text(errors='replace')[-3000:]}"


def play(
    shared: Shared, process: subprocess.Popen[bytes], name: str, number: int, workers: int, how: str
) -> dict[str, Any]:
    """Let a contender do one round; returns what it took."""
    (shared.folder / f".{name}").write_text(how)
    (shared.folder / f".{name}").rename(shared.folder / f"{name}.{number}.go")
    notes = [shared.folder / f"{name}.{number}.{rank}" for rank in range(workers)]
    until = time.monotonic() + LIMIT_S
    while not all(note.exists() for note in notes):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(last_words(shared, name))
        time.sleep(0.02)
    told = [json.loads(note.read_text()) for note in notes]
    return {
        "wall_s": max(one["wall_s"] for one in told), "processor_s": sum(one["processor_s"] for one in told),
        "read_bytes": sum(one["read_bytes"] for one in told), "threads": [one["threads"] for one in told],
        "niceness": [one["niceness"] for one in told],
    }  # fmt: skip


def measured(shared: Shared) -> dict[str, list[dict[str, Any]]]:
    """Play all rounds, every other one backwards; returns what each took that counts."""
    ways = {name: name for name in CONTENDERS} | {"ours_from_disk": "ours"}
    counts = dict.fromkeys(CONTENDERS, 0)
    rounds = {name: (WARM_UP + NUM_ROUNDS) * sum(name == whose for whose in ways.values()) for name in CONTENDERS}
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with running(shared, rounds) as processes:
        for number in range(WARM_UP + NUM_ROUNDS):
            for way in list(ways)[:: -1 if number % 2 else 1]:
                name = ways[way]
                how = "fresh" if way != name else "warm"
                workers = 2 if name in ("ours_2_workers", "two_bare_loops") else 1
                took = play(shared, processes[name], name, counts[name], workers, how)
                counts[name] += 1
                if number >= WARM_UP:
                    taken[way].append(took)
                spent = f"{took['wall_s']:.2f} s, processor {took['processor_s']:.2f} s"
                say(f"round {number} of {NUM_ROUNDS}: {way} {spent}")
    for name in CONTENDERS:
        sys.stderr.write("".join(line for line in told_by(shared, name) if line.startswith("bench:")))
    return taken


def told_by(shared: Shared, name: str) -> list[str]:
    """Read what a contender said."""
    return (shared.folder / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)


@contextmanager
def cluster() -> Iterator[str]:
    """Start a Ray cluster for contenders that train or data that is prepared; yields its address."""
    ray.init("local", num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def made_ready(folder: Path) -> tuple[Path, Path, int]:
    """Draw and prepare a catalogue, and lay it out; returns triplets, layout and size of the vocabulary."""
    drawn = catalogue.draw(catalogue.DrawSettings(root=folder, num_items=NUM_ITEMS))
    prepared = triplets.prepare(triplets.PrepareSettings(data=drawn["artifact"], root=folder))
    told = settings(Path(prepared["artifact"]), folder)
    tokens = training._tokens(told)
    layout = layouts.lay_out(told.triplets, told.layout(), tokens, folder / "layouts")
    for name in ("ours", "ours_2_workers"):  # a copy each: what one has mapped stays in memory
        shutil.copytree(layout.parent, folder / name / "layouts")
    return told.triplets, layout, tokens.size


def report(taken: dict[str, list[dict[str, Any]]], load: Sequence[float], gpu: dict[str, Any] | None) -> str:
    """Put figures and targets together."""
    wall, processor = (
        {way: statistics.median(one[key] for one in rounds) for way, rounds in taken.items()}
        for key in ("wall_s", "processor_s")
    )
    num = {way: BATCH * STEPS * (2 if way == "two_bare_loops" else 1) for way in taken}
    figures = {
        "triplets_a_second": {way: round(num[way] / seconds, 1) for way, seconds in wall.items()},
        "triplets_a_core_second": {way: round(num[way] / seconds, 1) for way, seconds in processor.items()},
        "ours_over_theirs_by_wall_time": {
            way: round(wall[way] / wall["ours"], 3) for way in taken if not way.startswith(("ours", "two"))
        },
        "two_bare_loops_efficiency": round(2 * processor["bare_loop"] / processor["two_bare_loops"], 3),
        "from_disk_by_processor_time": round(processor["ours_from_disk"] / processor["ours"], 3),
        "read_bytes_a_round": {
            way: statistics.median(one["read_bytes"] for one in rounds) for way, rounds in taken.items()
        },
        "threads": {way: rounds[0]["threads"] for way, rounds in taken.items()},
        "niceness": {way: rounds[0]["niceness"] for way, rounds in taken.items()},
        "wall_and_processor_s": {
            way: [[round(one["wall_s"], 2), round(one["processor_s"], 2)] for one in rounds]
            for way, rounds in taken.items()
        },
        "batch_size": BATCH, "steps_a_round": STEPS, "num_cores": os.cpu_count(), "load_average": load, "gpu": gpu,
    }  # fmt: skip
    targets = {
        "vs_sentence_transformers": at_least(processor["sentence_transformers"] / processor["ours"], 1.2),
        "vs_open_clip": at_least(processor["open_clip"] / processor["ours"], 1.2),
        "vs_bare_loop": at_least(processor["bare_loop"] / processor["ours"], 0.97),
        "two_workers_efficiency": at_least(processor["ours"] / processor["ours_2_workers"], 0.9),
        "from_disk_cost": at_most(wall["ours_from_disk"] / wall["ours"], 1.05),
    }
    if gpu and gpu["mfu"]:
        targets["mfu"] = at_least(gpu["mfu"], 0.5)
    return json.dumps({"figures": figures, "targets": targets})


def main() -> None:
    """Measure all and print it."""
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as folder:
        with cluster():
            ready = made_ready(Path(folder))
        say(f"triplets of {NUM_ITEMS:,} items are prepared")
        with cluster() as address:
            before = os.getloadavg()
            taken = measured(Shared(Path(folder), *ready, address))
    print(report(taken, [round(load, 1) for load in before], mfu_of_a_gpu()), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _, contender, count, *rest = sys.argv
        given, at_triplets, at_layout, size, address = rest
        CONTENDERS[contender](
            Shared(Path(given), Path(at_triplets), Path(at_layout), int(size), address), contender, int(count)
        )
    else:
        main()
