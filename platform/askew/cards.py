"""Model cards: what a model is, what it was made of and how it did, for people (Hugging Face's form).

Knows nothing of how it was trained beyond what it is told.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from askew import __version__, artifacts
from askew.recipes import TrainSettings

CARD, CURVES, HISTORY, RECIPE = "README.md", "training.png", "history.jsonl", "recipe.yaml"
History = Sequence[tuple[int, dict[str, float]]]


def write(
    folder: Path, settings: TrainSettings, triplets: artifacts.Manifest, draft: artifacts.Draft, history: History
) -> None:
    """Write the card, the plots, the history and the resolved recipe of a training into a model's folder."""
    (folder / RECIPE).write_text(yaml.safe_dump(settings.content(), sort_keys=False), encoding="utf-8")
    (folder / HISTORY).write_text(
        "".join(json.dumps({"step": s, **v}) + "\n" for s, v in history), encoding="utf-8"
    )
    _plot(folder / CURVES, history)
    (folder / CARD).write_text(_card(settings, triplets, draft), encoding="utf-8")


def _plot(path: Path, history: History) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("train/loss", "valid/nDCG_at_10"),
        ("Training loss", "Validation nDCG@10"),
        strict=True,
    ):
        points = [(step, values[name]) for step, values in history if name in values]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="." if len(points) < 50 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _card(settings: TrainSettings, triplets: artifacts.Manifest, draft: artifacts.Draft) -> str:
    towers, made_up = settings.towers, triplets.details.get("made_up")
    stages = "\n".join(
        f"| {name} | {stage.steps:,} | "
        + ", ".join(f"{term} {weight:g}" for term, weight in stage.loss.weights().items() if weight)
        + f" | {stage.learning_rate:g} |"
        for name, stage in settings.stages.items()
    )
    text = towers.text.checkpoint or f"BERT from scratch, {towers.text.layers} layers of width {towers.text.width}"
    photo = towers.photo.checkpoint or f"{towers.photo.backbone}, from scratch"
    commit = draft.details.get("commit")
    source = f"triplets `{triplets.key[:12]}`{' of a made-up shop' if made_up else ''}"
    return f"""---
library_name: askew
tags: [multimodal, product-search, two-tower]
pipeline_tag: feature-extraction
---

# {settings.model}

Two towers for product search: a query is text, an item is a title and a photo. Made by askew {__version__}\
{f", commit {commit}" if commit else ""}.

| | |
|---|---|
| text encoder | {text} |
| vision encoder | {photo}, {towers.image_size} × {towers.image_size} pixels |
| fusion | {towers.fusion}{" with SMAR's header P(q)" if towers.header else ""} |
| vectors | {towers.index_dim} dimensions in the index |
| parameters | {draft.counts["parameters"]:,} |
| trained on | {draft.counts["examples"]:,} pairs of {source} |
| validation nDCG@10 | {draft.details["ndcg"]:.4f} at the last step |

| stage | steps | loss | learning rate |
|---|---|---|---|
{stages}

![Loss and validation over the steps]({CURVES})

**Use**: `Model.load(folder)` of askew; weights are safetensors, and nothing here is a pickle. **Limits**: it knows
the catalogue that it was trained on; measure it on your own judgments before you rely on it.
"""
