"""Train: triplets become a model, by Ray Train on any number of workers, registered in MLflow.

The driver lays the data out, starts the workers, and makes of their last checkpoint a model, its card and its
plots. What was done is found done; a run that was interrupted goes on. Without MLflow a training goes on too, and
is logged and registered when it is run again.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from askew import artifacts, cards, checkpoints, datasets, layouts
from askew.errors import ArtifactError, ConfigError, RegistryError, TrainingError
from askew.inputs import Tokens
from askew.journal import Journal
from askew.models import Model
from askew.recipes import TrainSettings
from askew.registry import CHALLENGER, Registry, Version
from askew.steps import NDCG, work
from askew.towers import TwoTower

ALLOCATOR = {  # keep a step's memory for the next: glibc gives it back, and each page of it costs a fault again
    "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


def train(settings: TrainSettings) -> dict[str, Any]:
    """Train a model on triplets and register it.

    Raises ConfigError, ArtifactError, TrainingError when the loss is no number any more, or RegistryError when
    MLflow does not answer: the model stands on disk then, and running it again registers it.
    """
    settings = settings.model_copy(update={"towers": settings.towers.read(), "root": settings.root.absolute()})
    triplets = artifacts.read(settings.triplets, "triplets")
    _check(settings, triplets)
    folder = artifacts.place(
        settings.root, "model", artifacts.key("model", settings.content(), {"triplets": triplets.key})
    )
    journal = Journal(settings.root / "runs" / f"{folder.name}.journal")
    started = time.monotonic()
    try:
        manifest, skipped = artifacts.read(folder, "model"), True
    except ArtifactError:
        manifest, skipped = _fit(settings, triplets, journal, folder), False
    trained = time.monotonic()
    version = _register(settings, folder, manifest, journal)
    return {
        "artifact": str(folder), "key": manifest.key, "rows": manifest.counts["examples"],
        "model": version.name, "version": version.version, "skipped": skipped,
        "workers": settings.num_workers, "nodes": manifest.counts["nodes"],
        "seconds": {"train": trained - started, "register": time.monotonic() - trained},
    }  # fmt: skip


def _check(settings: TrainSettings, triplets: artifacts.Manifest) -> None:
    """Refuse what cannot be trained before anything is started."""
    if (size := triplets.details["image_size"]) != settings.towers.image_size:
        found = f"triplets of {size}, towers.image_size {settings.towers.image_size}"
        raise ConfigError("photos of one size", found, f"prepare them anew, or set towers.image_size={size}")
    datasets.connect()
    if settings.use_gpu:
        datasets.check_gpus(settings.num_workers, "use_gpu=false")


def _tokens(settings: TrainSettings) -> Tokens:
    """The tokenizer of the text checkpoint, or one that is learned from the catalogue."""
    text = settings.towers.text
    if not text.checkpoint:
        return Tokens.train(_texts(settings), settings.towers.vocabulary)
    tokens = Tokens.of_checkpoint(text.checkpoint)
    config = text.config.get("text_config", text.config)
    if tokens.size > (known := int(config["vocab_size"])):
        found = f"a tokenizer of {tokens.size:,} entries for an encoder of {known:,}"
        raise ConfigError(f"a vocabulary that fits {text.checkpoint}", found, "take both from one checkpoint")
    return tokens


def _texts(settings: TrainSettings) -> Iterator[str]:
    """Stream the texts that the vocabulary is learned from: training items and training queries."""
    items = ds.dataset(settings.triplets / "items", format="parquet")
    for batch in items.to_batches(columns=["text"], filter=ds.field("split") == settings.train_split):
        yield from batch["text"].to_pylist()
    pairs = ds.dataset(settings.triplets / "pairs", format="parquet")
    for batch in pairs.to_batches(columns=["query"]):
        yield from pc.unique(batch["query"]).to_pylist()


def _fit(
    settings: TrainSettings, triplets: artifacts.Manifest, journal: Journal, folder: Path
) -> artifacts.Manifest:
    tokens = _tokens(settings)
    layout = layouts.lay_out(settings.triplets, settings.layout(), tokens, settings.root / "layouts")
    _start(settings, triplets, journal, folder.name)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    workers = (settings.min_workers, settings.num_workers) if settings.min_workers else settings.num_workers
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={
            "settings": settings.model_dump(mode="json"), "tokens": tokens.text, "layout": str(layout),
            "journal": str(journal.folder),
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=settings.use_gpu, resources_per_worker=_resources(settings)
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(settings.root / "runs"),
            worker_runtime_env={"env_vars": ALLOCATOR},
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=NDCG),
        ),
    )  # fmt: skip
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(
            f"workers that fail at most {settings.max_failures} times", _cause(error),
            "mend that, and run it again: it goes on from its last checkpoint",
        ) from error  # fmt: skip
    if refused := journal.refused():
        raise _refusal(refused, settings, result.checkpoint)
    assert result.checkpoint is not None  # the last step reports one
    with artifacts.draft(settings.root, "model", settings.content(), {"triplets": triplets.key}) as draft:
        towers = TwoTower(settings.towers, tokens.size)
        with result.checkpoint.as_directory() as saved:
            state = checkpoints.state_of(Path(saved))
            checkpoints.load_result(Path(saved), towers)
        Model(towers, tokens).save(draft.folder)
        draft.counts |= {"steps": settings.steps, "examples": settings.steps * settings.batch_size}
        draft.counts |= {"nodes": datasets.nodes(), "parameters": sum(p.numel() for p in towers.parameters())}
        draft.details |= {
            "dim": settings.towers.index_dim,
            "ndcg": state[NDCG],
            "commit": os.environ.get("ASKEW_COMMIT", ""),
        }
        cards.write(draft.folder, settings, triplets, draft, journal.history())
    return artifacts.read(folder, "model", verify=False)


def _cause(error: TrainingFailedError) -> str:
    """What a worker died of, in a line."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _resources(settings: TrainSettings) -> dict[str, float]:
    return {"CPU": float(settings.cpus_per_worker)} | ({"GPU": 1.0} if settings.use_gpu else {})


def _refusal(refused: dict[str, Any], settings: TrainSettings, last: ray.train.Checkpoint | None) -> TrainingError:
    ids = layouts.query_ids(settings.triplets, refused["queries"])
    note = settings.root / "runs" / "refused.json"
    artifacts.write_text(note, json.dumps(refused | {"query_ids": ids}))
    some = ", ".join(ids[:3])
    found = f"a loss of {refused['loss']:.4g} at step {refused['step']:,}, on queries {some} … (all in {note})"
    kept = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint before it"
    return TrainingError("a loss that stays a number, and falls", found, f"lower learning_rate; {kept}")


def _start(settings: TrainSettings, triplets: artifacts.Manifest, journal: Journal, name: str) -> None:
    """Start the MLflow run, or go on with the one that an interrupted training of the same key started."""
    if journal.run_id:
        return
    try:
        registry = Registry(settings.tracking_uri)
        params = _flat(settings.content()) | {"triplets": triplets.key}
        tags = {"askew.triplets_key": triplets.key, "mlflow.source.git.commit": os.environ.get("ASKEW_COMMIT", "")}
        journal.start(settings.tracking_uri, registry.start_run(settings.model, name, params, tags))
    except RegistryError as error:
        print(f"askew: warning: training goes on unlogged: {error}", flush=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Name settings as MLflow's parameters; a group with a name that it does not take (a pattern) stays whole."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and all(re.fullmatch(r"[\w.-]+", inner) for inner in value):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, dict) else value
    return flat


def _register(settings: TrainSettings, folder: Path, manifest: artifacts.Manifest, journal: Journal) -> Version:
    """Log what is not logged yet, and register the model as the challenger, unless it is registered already."""
    registry = Registry(settings.tracking_uri)
    if (version := registry.find(settings.model, {"askew.model_key": manifest.key})) is not None:
        return version
    _start(settings, artifacts.read(settings.triplets, "triplets", verify=False), journal, folder.name)
    journal.send()
    tags = {"askew.triplets_key": manifest.inputs["triplets"], "askew.recipe": "+".join(settings.stages)}
    version = registry.register(settings.model, folder, journal.run_id, tags)
    registry.promote(version, CHALLENGER)
    registry.end_run(journal.run_id)
    return version
