"""Train: triplets become a model, by Ray Train on any number of workers, registered in MLflow.

Each worker encodes its share of the global batch; item vectors are gathered from all workers with
gradients, so that every query meets the whole batch's items. What a step holds depends on the seed and
the step alone, and a checkpoint is all that a step needs: an interrupted run goes on as if it had not been.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from pydantic import Field
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from askew import artifacts, datasets
from askew.batches import Triplets, lay_out
from askew.config import Settings
from askew.errors import ArtifactError, ConfigError, RegistryError
from askew.gather import gathered, gathered_rows, mean, rank, world
from askew.inputs import Tokens
from askew.losses import info_nce
from askew.models import WEIGHTS, Model
from askew.registry import Registry
from askew.towers import ItemVectors, TowerSettings, TwoTower

OPTIMIZER, STATE = "optimizer.pt", "state.json"


class TrainSettings(Settings):
    """Settings of the train stage (`jobs/train.*.yaml`)."""

    triplets: Path
    root: Path
    model: str = "askew"
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    cache: Path | None = None
    num_workers: int = Field(default=2, ge=1)
    use_gpu: bool = False
    bf16: bool | None = None
    report_every: int = Field(default=20, ge=1)
    checkpoint_every: int = Field(default=200, ge=1)
    max_failures: int = 2

    train_split: str = "train"
    towers: TowerSettings = TowerSettings()
    steps: int = Field(ge=1)
    batch_size: int = Field(default=256, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    auxiliary: float = Field(default=0.3, ge=0)
    judged_negatives: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0

    def content(self) -> dict[str, Any]:
        """What of the settings determines the model: all but places, names and intervals."""
        where = {"triplets", "root", "model", "tracking_uri", "cache", "max_failures"}
        return self.model_dump(mode="json", exclude=where | {"report_every", "checkpoint_every"})


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a model on triplets and register it. Raises ConfigError, ArtifactError or RegistryError."""
    if settings.batch_size % settings.num_workers:
        found = f"batch_size {settings.batch_size}, num_workers {settings.num_workers}"
        raise ConfigError("a batch_size that num_workers divides", found, "change one of them")
    registry = Registry(settings.tracking_uri)
    triplets = artifacts.read(settings.triplets, "triplets")
    inputs = {"triplets": triplets.key}
    folder = artifacts.place(settings.root, "model", artifacts.key("model", settings.content(), inputs))
    started = time.monotonic()
    try:
        manifest, skipped = artifacts.read(folder, "model"), True
    except ArtifactError:
        manifest, skipped = _fit(settings, triplets, registry, folder), False
    trained = time.monotonic()
    version = _register(settings, registry, folder, manifest)
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["examples"],
        "model": version.name, "version": version.version, "skipped": skipped,
        "workers": settings.num_workers, "nodes": manifest.counts["nodes"],
        "seconds": {"train": trained - started, "register": time.monotonic() - trained},
    }  # fmt: skip


def _fit(
    settings: TrainSettings, triplets: artifacts.Manifest, registry: Registry, folder: Path
) -> artifacts.Manifest:
    datasets.connect()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    tokens = Tokens.train(_texts(settings), settings.towers.vocabulary)
    runs = settings.root / "runs"
    run_id = _run(registry, settings, triplets, runs / folder.name)
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"settings": settings.model_dump(mode="json"), "tokens": tokens.text, "run_id": run_id},
        scaling_config=ScalingConfig(num_workers=settings.num_workers, use_gpu=settings.use_gpu),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(runs.absolute()),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    assert checkpoint is not None  # the last step reports one
    towers = TwoTower(settings.towers, tokens.size)
    with artifacts.draft(settings.root, "model", settings.content(), {"triplets": triplets.key}) as draft:
        with checkpoint.as_directory() as saved:
            towers.load_state_dict(load_file(Path(saved) / WEIGHTS))
            draft.details["last"] = json.loads((Path(saved) / STATE).read_text())
        Model(towers, tokens).save(draft.folder)
        draft.counts |= {"steps": settings.steps, "examples": settings.steps * settings.batch_size}
        draft.counts |= {"nodes": datasets.nodes(), "parameters": sum(p.numel() for p in towers.parameters())}
        draft.details["run_id"] = run_id
    return artifacts.read(folder, "model", verify=False)


def _texts(settings: TrainSettings) -> Iterator[str]:
    """Stream the texts that the vocabulary is learned from: training items and training queries."""
    items = ds.dataset(settings.triplets / "items", format="parquet")
    for batch in items.to_batches(columns=["text"], filter=ds.field("split") == settings.train_split):
        yield from batch["text"].to_pylist()
    pairs = ds.dataset(settings.triplets / "pairs", format="parquet")
    for batch in pairs.to_batches(columns=["query"]):
        yield from pc.unique(batch["query"]).to_pylist()


def _run(registry: Registry, settings: TrainSettings, triplets: artifacts.Manifest, folder: Path) -> str:
    """Start the MLflow run, or go on with the one that an interrupted training of the same key started."""
    memo = folder.with_suffix(".run")
    if memo.is_file():
        return memo.read_text()
    params = _flat(settings.content()) | {"triplets": triplets.key}
    run_id = registry.start_run(settings.model, folder.name, params, {"askew.triplets_key": triplets.key})
    artifacts.write_text(memo, run_id)
    return run_id


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _register(settings: TrainSettings, registry: Registry, folder: Path, manifest: artifacts.Manifest) -> Any:
    tags = {"askew.model_key": manifest.key, "askew.triplets_key": manifest.inputs["triplets"]}
    version = registry.find(settings.model, {"askew.model_key": manifest.key})
    if version is None:
        version = registry.register(settings.model, folder, manifest.details["run_id"], tags)
        registry.end_run(manifest.details["run_id"])
    return version


# --- on each worker ------------------------------------------------------------------------------


def work(config: dict[str, Any]) -> None:
    """Run the training loop of one worker (called by Ray Train)."""
    settings = TrainSettings.model_validate(config["settings"])
    tokens = Tokens.parse(config["tokens"])
    triplets = Triplets(_layout(settings, tokens))
    torch.manual_seed(settings.seed)
    device = ray.train.torch.get_device()
    towers = TwoTower(settings.towers, tokens.size).to(device)
    towers.to(memory_format=torch.channels_last)  # as convolutions like it best
    optimizer = torch.optim.AdamW(towers.parameters(), weight_decay=settings.weight_decay, fused=True)
    first = _resume(towers, optimizer)
    model = ray.train.torch.prepare_model(towers, move_to_device=False)
    reporter = Reporter(settings, config["run_id"], first)
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        loss, negatives = loss_of(model, triplets, step, settings, device)
        if not math.isfinite(value := mean(loss.item())):
            raise ArithmeticError(f"the loss is {value} at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        reporter.step(step + 1, value, negatives)
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            _checkpoint(towers, optimizer, step + 1, value)


def rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to nought."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def loss_of(
    model: nn.Module, triplets: Triplets, step: int, settings: TrainSettings, device: torch.device
) -> tuple[Tensor, float]:
    """This worker's loss of a step, and the mean number of true negatives that each of its queries met.

    L = L_m + auxiliary · (L_t + L_i), SMAR's stage 1 with α = β = `auxiliary`, γ = 1 (our choice; the
    paper's weights were not seen). The mean over workers is the loss over the global batch.
    """
    share = settings.batch_size // world()
    start = step * settings.batch_size + rank() * share
    queries, positives, negatives = triplets.rows(settings.seed, start, start + share)
    items = np.concatenate([positives, negatives[: int(settings.judged_negatives * share)]])
    batch = triplets.batch(queries, items)
    arrays = (batch.queries_BL, batch.titles_NL, batch.pixels_NSS3, batch.has_image_N)
    bf16 = settings.bf16 if settings.bf16 is not None else _bf16(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        vectors, items_of, scale = model(*(torch.from_numpy(a).to(device) for a in arrays))
    all_items = gathered_rows(torch.from_numpy(items)).numpy()
    target = torch.arange(share, device=device) + rank() * len(items)
    masked = torch.from_numpy(triplets.known(queries, all_items)).to(device)
    masked[torch.arange(share), target] = False
    text, image, fused = gathered(torch.cat(items_of, dim=1)).split(vectors.shape[1], dim=1)
    losses = [info_nce(vectors, side, target, scale, masked) for side in ItemVectors(text, image, fused)]
    loss = losses[2] + settings.auxiliary * (losses[0] + losses[1])
    return loss, float(len(all_items) - 1 - masked.sum().item() / share)


def _bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()


def _layout(settings: TrainSettings, tokens: Tokens) -> Path:
    """Lay the triplets out once on each node (and once in all where the cache is shared)."""
    cache = settings.cache or settings.root / "layouts"
    lengths = (settings.towers.query_length, settings.towers.title_length)
    context = ray.train.get_context()
    for turn in (context.get_world_rank() == 0, context.get_local_rank() == 0):
        if turn:
            lay_out(settings.triplets, settings.train_split, tokens, lengths, cache)
        if world() > 1:
            dist.barrier()
    return lay_out(settings.triplets, settings.train_split, tokens, lengths, cache)


def _resume(towers: TwoTower, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest checkpoint if there is one; returns the step to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as saved:
        towers.load_state_dict(load_file(Path(saved) / WEIGHTS))
        optimizer.load_state_dict(torch.load(Path(saved) / OPTIMIZER, weights_only=True))
        return int(json.loads((Path(saved) / STATE).read_text())["step"])


def _checkpoint(towers: TwoTower, optimizer: torch.optim.Optimizer, step: int, loss: float) -> None:
    metrics = {"step": step, "loss": loss}
    if rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in towers.state_dict().items()}, Path(folder) / WEIGHTS)
        torch.save(optimizer.state_dict(), Path(folder) / OPTIMIZER)
        (Path(folder) / STATE).write_text(json.dumps(metrics))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


class Reporter:
    """Prints progress and logs it to MLflow, from the first worker; a tracking outage never ends a training."""

    def __init__(self, settings: TrainSettings, run_id: str, first: int) -> None:
        self._settings, self._run_id = settings, run_id
        self._first, self._started = first, time.monotonic()
        self._registry: Registry | None = None

    def step(self, done: int, loss: float, negatives: float) -> None:
        """Report a finished step when it is its turn."""
        s = self._settings
        if rank() != 0 or (done % s.report_every and done != s.steps):
            return
        seconds = (time.monotonic() - self._started) / (done - self._first)
        left, speed = seconds * (s.steps - done), s.batch_size / seconds
        print(
            f"askew: train step {done:,}/{s.steps:,} loss {loss:.3f} {speed:,.0f} pairs/s, "
            f"{negatives:,.0f} negatives a query, {left:,.0f} s left",
            flush=True,
        )
        self._log({"train/loss": loss, "train/pairs_per_s": speed, "train/negatives": negatives}, done)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        try:
            self._registry = self._registry or Registry(self._settings.tracking_uri)
            self._registry.log_metrics(self._run_id, metrics, step)
        except RegistryError as error:
            print(f"askew: warning: step {step} not logged: {error}", flush=True)
