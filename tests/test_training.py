"""Training on a real Ray cluster; tracking goes to a real MLflow server in the flow test."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from askew import inputs
from askew.batches import Triplets, lay_out
from askew.errors import ConfigError, RegistryError
from askew.towers import TowerSettings, TwoTower
from askew.training import TrainSettings, loss_of, rate, train

TOWERS = TowerSettings(dim=16, text_width=16, text_heads=2, image_size=32, query_length=8, title_length=12)


def settings(folder: Path, root: Path, **other: Any) -> TrainSettings:
    values = {"steps": 8, "batch_size": 16, "bf16": False, "tracking_uri": "http://127.0.0.1:9"} | other
    return TrainSettings(triplets=folder, root=root, towers=TOWERS, **values)


def test_the_rate_warms_up_and_comes_down(tmp_path: Path) -> None:
    s = settings(tmp_path, tmp_path, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [rate(step, s) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.95
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 16, num_workers 3"):
        train(settings(tmp_path, tmp_path, num_workers=3))


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"steps": 0}, {"learning_rate": 0}, {"stepz": 3}])
def test_a_wrong_setting_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        settings(tmp_path, tmp_path, **wrong)


def test_no_mlflow_is_said_before_anything_is_trained(triplets_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"):
        train(settings(triplets_folder, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_loss_comes_down(triplets_folder: Path, tmp_path: Path) -> None:
    s = settings(triplets_folder, tmp_path, judged_negatives=0.5)
    tokens = inputs.Tokens.train(["red striped mug", "blue dotted cushion"] * 5, 200)
    triplets = Triplets(lay_out(triplets_folder, "train", tokens, (8, 12), tmp_path))
    torch.manual_seed(0)
    towers = TwoTower(TOWERS, tokens.size)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss, negatives = loss_of(towers, triplets, step, s, torch.device("cpu"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert 0 < negatives <= 16 + 8 - 1
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
