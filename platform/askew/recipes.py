"""Recipes: what a training consists of, as settings: towers, and stages one after the other.

A recipe is a YAML file (`jobs/train.*.yaml`). Knows nothing of how a stage is run.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from askew.batches import BatchSettings
from askew.config import Settings
from askew.objective import LossSettings
from askew.towers import TowerSettings

Part = Literal["query", "title", "photo", "fusion", "header"]
PARTS: tuple[Part, ...] = get_args(Part)


class ValidationSettings(Settings):
    """What is ranked while training: so many queries of an evaluation split, over their items and others."""

    split: str = ""  # the first by name
    queries: int = Field(default=300, ge=0)  # 0: none
    items: int = Field(default=3000, ge=1)  # that they are ranked over, the right ones among them
    every: int = Field(default=500, ge=1)  # steps


class LayoutSettings(Settings):
    """What determines a layout, beside the triplets and the tokenizer."""

    split: str = "train"
    texts: tuple[str, ...] = ("text",)  # `text`, or names of fields, that stand for a title in turn
    repeats: dict[str, int] = Field(default_factory=dict)
    query_length: int = 16
    title_length: int = 32
    validation: ValidationSettings = ValidationSettings()


class StageSettings(Settings):
    """One stage: so many steps towards one objective, from the weights that the stage before ended with."""

    steps: int = Field(ge=1)  # of batch_size pairs each
    loss: LossSettings
    batch: BatchSettings = BatchSettings()
    learning_rate: float = Field(default=2e-3, gt=0)  # of AdamW, at its highest
    rates: dict[Part, float] = Field(default_factory=dict)  # factors for parts: 0.1 is a tenth, 0 freezes
    warmup_steps: int = Field(default=100, ge=0)  # in which the rate rises from nought
    schedule: Literal["cosine", "constant"] = "cosine"  # how it falls after that: to nought at the end, or not
    weight_decay: float = Field(default=0.01, ge=0)  # of AdamW
    clip: float = Field(default=1.0, gt=0)  # longest gradient
    average: float = Field(default=0.0, ge=0, lt=1)  # decay of the weights' running mean, which is kept; 0: none

    @field_validator("rates")
    @classmethod
    def _no_less_than_nought(cls, rates: dict[Part, float]) -> dict[Part, float]:
        if wrong := [name for name, rate in rates.items() if rate < 0]:
            raise ValueError(f"{', '.join(wrong)}: a rate is at least 0")
        return rates

    def trained(self) -> set[str]:
        """Name the parts that this stage changes."""
        return {part for part in self.loss.trains() if self.rates.get(part, 1.0)}  # type: ignore[call-overload]

    def rate(self, step: int) -> float:
        """The learning rate of a step of the stage: linear warm-up, then a cosine down to nought or no change."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return self.learning_rate * warm * fall


class TrainSettings(Settings):
    """Settings of the train stage (`jobs/train.*.yaml`)."""

    triplets: Path
    root: Path
    model: str = "askew"
    tracking_uri: str = Field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))

    num_workers: int = Field(default=2, ge=1)
    min_workers: int = Field(default=0, ge=0)  # elastic: go on with no fewer than these; 0: num_workers
    use_gpu: bool = False  # one for each worker
    cpus_per_worker: int = Field(default=1, ge=1)  # that Ray sets aside for it
    bf16: bool | None = None  # empty: where the device has units for it
    compile: bool = False  # by torch.compile
    at_once: int = Field(default=0, ge=0)  # items encoded at a time by a worker (gradient caching); 0: all
    report_every: int = Field(default=20, ge=1)  # steps
    checkpoint_every: int = Field(default=200, ge=1)  # steps
    max_failures: int = 2  # of workers, after each of which the training goes on; -1: any number

    train_split: str = "train"  # the triplets' split that is trained on
    texts: tuple[str, ...] = ("text",)  # fields that stand for a title in turn, or `text`
    repeats: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)  # how often an epoch asks the
    # queries whose ids fit a pattern, as "clicked-*"; the first that fits counts, others are asked once
    towers: TowerSettings = TowerSettings()
    batch_size: int = Field(default=256, ge=2)  # over all workers
    stages: dict[str, StageSettings] = Field(min_length=1)  # by name, one after the other
    validation: ValidationSettings = ValidationSettings()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fitting(self) -> "TrainSettings":
        for name, stage in self.stages.items():
            if why := stage.loss.unusable(self.towers.fusion, self.towers.header):
                raise ValueError(f"stages.{name}.loss: {why}")
            if not stage.trained():
                raise ValueError(f"stages.{name}: every part that its loss reaches is frozen; give one a rate")
        for count in range(self.min_workers or self.num_workers, self.num_workers + 1):
            share = self.batch_size / count
            for name, stage in self.stages.items():
                if share % 1 or stage.batch.negatives * share % 1:
                    raise ValueError(
                        f"{count} workers cannot share batch_size {self.batch_size} and "
                        f"stages.{name}.batch.negatives evenly; choose numbers that they can"
                    )
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if self.at_once == 1:
            raise ValueError("at_once must be 0 or at least 2")
        return self

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages.values())

    def stage_of(self, step: int) -> tuple[str, StageSettings, int]:
        """Tell which stage a step of the run belongs to, and which step of that it is."""
        for name, stage in self.stages.items():
            if step < stage.steps:
                return name, stage, step
            step -= stage.steps
        raise AssertionError("beyond the last stage")

    def layout(self) -> LayoutSettings:
        """What of the settings determines how triplets are laid out."""
        return LayoutSettings(
            split=self.train_split, texts=self.texts, repeats=self.repeats, validation=self.validation,
            query_length=self.towers.query_length, title_length=self.towers.title_length,
        )  # fmt: skip

    def content(self) -> dict[str, Any]:
        """What of the settings determines the model: not places, names, intervals, or what failures are borne."""
        where = {"triplets", "root", "model", "tracking_uri", "max_failures", "report_every", "checkpoint_every"}
        return self.model_dump(mode="json", exclude=where | {"cpus_per_worker"})
