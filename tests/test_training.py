"""Training on a real Ray cluster, tracked by a real MLflow server."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tests.flipping import flips
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import askew
from askew import artifacts, checkpoints
from askew.errors import ArtifactError, ConfigError, RegistryError, TrainingError
from askew.journal import Journal
from askew.models import Model
from askew.recipes import StageSettings, TrainSettings
from askew.registry import Registry
from askew.towers import TwoTower
from askew.training import train

pytestmark = pytest.mark.usefixtures("cluster")
TOWERS = {"dim": 16, "text": {"width": 16, "heads": 2}, "image_size": 32, "query_length": 8, "title_length": 12}
JOINT = {"steps": 10, "loss": {"text": 0.3, "image": 0.3, "fused": 1.0}, "warmup_steps": 2}
NOWHERE = "http://127.0.0.1:9"


def settings(triplets: Path, root: Path, **other: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "triplets": triplets, "root": root, "tracking_uri": NOWHERE, "towers": TOWERS, "stages": {"joint": JOINT},
        "batch_size": 16, "bf16": False, "num_workers": 1, "report_every": 1, "checkpoint_every": 3,
        "validation": {"every": 3},
    }  # fmt: skip
    return TrainSettings.model_validate(values | other)


def losses(root: Path) -> list[float]:
    [folder] = (root / "runs").glob("*.journal")
    return [values["train/loss"] for _, values in Journal(folder).history() if "train/loss" in values]


def trained(*arguments: Any, **other: Any) -> list[float]:
    """Train without MLflow, which leaves the model on disk, and return the loss of each step."""
    with pytest.raises(RegistryError):
        train(settings(*arguments, **other))
    return losses(arguments[1])


# --- settings ------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_comes_down() -> None:
    stage = StageSettings.model_validate({**JOINT, "steps": 100, "warmup_steps": 10, "learning_rate": 1.0})
    rates = [stage.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.95
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"stepz": 3}, "stepz"),
        ({"stages": {}}, "stages"),
        ({"stages": {"joint": {**JOINT, "steps": 0}}}, "steps"),
        ({"stages": {"joint": {**JOINT, "rates": {"query": -1}}}}, "at least 0"),
        ({"stages": {"joint": {**JOINT, "loss": {}}}}, "no term"),
        ({"stages": {"joint": {"steps": 1, "loss": {"adaptive": 1}}}}, "towers.header"),
        ({"stages": {"joint": {"steps": 1, "loss": {"domain": 1}, "rates": {"title": 0, "photo": 0}}}}, "frozen"),
        ({"num_workers": 3}, "3 workers cannot share batch_size 16"),
        ({"min_workers": 2}, "min_workers 2 is more than num_workers 1"),
        ({"stages": {"joint": {**JOINT, "batch": {"negatives": 0.1}}}}, "negatives evenly"),
        ({"at_once": 1}, "at_once"),
        ({"repeats": {"a*": -1}}, "repeats"),
        ({"stages": {"joint": {**JOINT, "average": 1}}}, "average"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"towers": {**TOWERS, "image_size": 48}}, "triplets of 32, towers.image_size 48"),
        ({"use_gpu": True, "num_workers": 2}, "2 GPUs"),
        ({"texts": ["text", "colr"]}, "colr"),
        ({"towers": {**TOWERS, "text": {"checkpoint": "/nowhere"}}}, "nowhere"),
    ],
    ids=["size", "gpus", "texts", "checkpoint"],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    triplets_folder: Path, tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        train(settings(triplets_folder, tmp_path, **wrong))
    assert not list(tmp_path.glob("model-*"))


def test_triplets_of_another_format_are_refused(triplets_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "triplets"
    other.mkdir()
    manifest = json.loads((triplets_folder / artifacts.MANIFEST).read_text()) | {"format": 99}
    (other / artifacts.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="format 99"):
        train(settings(other, tmp_path))


# --- training ------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "joint": {},
    "smar": {
        "towers": {**TOWERS, "fusion": "cross_attention", "header": True},
        "stages": {
            "pretrain": {**JOINT, "steps": 5},
            "adapt": {"steps": 5, "loss": {"adaptive": 1.0}, "rates": {"header": 10, "photo": 0}},
        },
    },
    "beyond_text": {
        "towers": {**TOWERS, "fusion": "moe_bilinear", "shared_text": True},
        "stages": {
            "domain": {"steps": 3, "loss": {"domain": 1.0}},
            "align": {"steps": 3, "loss": {"text": 1.0, "image": 1.0}},
            "fuse": {"steps": 4, "loss": {"text": 0.3, "fused": 1.0}, "rates": {"query": 0.3, "photo": 0.3}},
        },
    },
    "mined": {
        "stages": {
            "joint": {
                **JOINT, "batch": {"negatives": 0.5, "modality_dropout": 0.2, "queries_per_item": 3},
                "loss": {
                    "fused": 1.0, "domain": 0.1, "triplet": 0.5, "graded": True, "log_q": True, "matryoshka": [8],
                },
            }
        }
    },
    "averaged": {
        "stages": {
            "first": {**JOINT, "steps": 5, "average": 0.9},
            "second": {**JOINT, "steps": 5, "average": 0.9, "batch": {"queries_per_item": 2}},
        }
    },
    "text": {"towers": {**TOWERS, "fusion": "text"}, "stages": {"joint": {"steps": 10, "loss": {"fused": 1.0}}}},
    "hinge": {"stages": {"joint": {**JOINT, "loss": {"fused": 1.0, "kind": "hinge"}}}},
}  # fmt: skip


GOLDEN: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden_losses.json").read_text())


@pytest.fixture(scope="module")
def of_two(triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of a recipe on two workers; each is trained once."""
    return functools.cache(
        lambda name: trained(triplets_folder, tmp_path_factory.mktemp(name), num_workers=2, **RECIPES[name])
    )


@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_train_as_one_did(of_two: Callable[[str], list[float]], name: str) -> None:
    """One worker's losses were written down; another processor adds in another order."""
    assert of_two(name) == pytest.approx(GOLDEN[name], rel=2e-3)


@pytest.mark.parametrize("name", ["beyond_text", "mined"])
def test_two_workers_are_one_of_twice_the_share(
    triplets_folder: Path, tmp_path: Path, of_two: Callable[[str], list[float]], name: str
) -> None:
    one = trained(triplets_folder, tmp_path, **RECIPES[name])
    assert one == pytest.approx(GOLDEN[name], rel=2e-3)
    assert of_two(name) == pytest.approx(one, rel=2e-4)


def test_the_model_is_the_running_mean_of_its_weights(triplets_folder: Path, tmp_path: Path) -> None:
    """Each step's weights are those of a training that ends there, when the rate does not fall."""

    def weights(name: str, steps: int, average: float) -> dict[str, torch.Tensor]:
        stage = {**JOINT, "steps": steps, "schedule": "constant", "average": average}
        trained(triplets_folder, tmp_path / name, stages={"joint": stage})
        [folder] = (tmp_path / name).glob("model-*")
        return load_file(folder / "weights.safetensors")

    each = [weights(f"plain-{steps}", steps, 0.0) for steps in (1, 2, 3)]
    found = weights("averaged", 3, 0.2)
    for name, mean in found.items():
        one, two, three = (step[name] for step in each)
        second = one.lerp(two, 1 - min(0.2, 2 / 11))  # the first step's weights are the first mean
        assert torch.allclose(mean, second.lerp(three, 1 - min(0.2, 3 / 12)), atol=1e-6)


def test_cached_gradients_train_the_same(
    triplets_folder: Path, tmp_path: Path, of_two: Callable[[str], list[float]]
) -> None:
    cached = trained(triplets_folder, tmp_path, num_workers=2, at_once=3)
    assert cached == pytest.approx(of_two("joint"), rel=2e-4)


def test_a_loss_that_explodes_stops_with_its_step_and_queries(triplets_folder: Path, tmp_path: Path) -> None:
    wild = {**JOINT, "steps": 30, "learning_rate": 1e18, "clip": 1e9, "warmup_steps": 0}
    with pytest.raises(TrainingError, match=r"at step \d+, on queries \w+") as caught:
        train(settings(triplets_folder, tmp_path, stages={"joint": wild}))
    noted = json.loads((tmp_path / "runs" / "refused.json").read_text())
    assert f"at step {noted['step']}" in str(caught.value)
    assert len(noted["query_ids"]) == 16
    assert not list(tmp_path.glob("model-*"))


def test_without_mlflow_a_training_is_kept_and_logged_later(
    triplets_folder: Path, tmp_path: Path, mlflow_uri: str
) -> None:
    repeats = {"train-0*": 2}  # a name that MLflow does not take for a parameter's
    first = trained(triplets_folder, tmp_path, repeats=repeats)
    [folder] = tmp_path.glob("model-*")
    stamp = (folder / "weights.safetensors").stat().st_mtime_ns
    result = train(settings(triplets_folder, tmp_path, tracking_uri=mlflow_uri, model="later", repeats=repeats))
    assert result["skipped"]
    assert (folder / "weights.safetensors").stat().st_mtime_ns == stamp
    registry = Registry(mlflow_uri)
    version = registry.resolve("later", "challenger")
    assert version.version == result["version"]
    logged = registry.history(version.run_id, "train/loss")
    assert [value for _, value in sorted(logged)] == pytest.approx(first)
    fetched = Model.load(registry.download(version, tmp_path / "fetched"))
    local = Model.load(folder)
    assert np.array_equal(fetched.queries(["red mug"]), local.queries(["red mug"]))
    card = (folder / "README.md").read_text()
    assert "validation nDCG@10" in card
    assert "made-up shop" in card

    assert yaml.safe_load((folder / "recipe.yaml").read_text())["stages"]["joint"]["steps"] == JOINT["steps"]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, check=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow_uri, "PYTHONPATH": str(Path(askew.__path__[0]).parent)},
    )  # fmt: skip
    assert np.allclose(json.loads(loaded.stdout), local.queries(["red mug", "cap"]), atol=1e-6)


LOAD = """
import json, pickle, sys
def no(*_, **__): raise AssertionError("a pickle was read")
import mlflow, pandas, torch
pickle.load = pickle.loads = torch.load = no
model = mlflow.pyfunc.load_model("models:/later@challenger")
vectors = model.predict(pandas.DataFrame({"query": ["red mug", "cap"]}))
training = {"askew.training", "askew.steps", "askew.recipes", "askew.objective", "ray.train"} & set(sys.modules)
assert not training, training
assert model.metadata.get_input_schema().input_names() == ["query"]
print(json.dumps(vectors.tolist()))
"""


def test_a_full_disk_is_said_and_nothing_half_written_is_taken_for_a_model(
    triplets_folder: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a disk that is full can be made by root alone")
    large = {**TOWERS, "photo": {"backbone": "resnet18"}}  # 45 MB, and as much twice for the optimiser
    try:
        with pytest.raises(TrainingError, match="No space left on device"):
            train(settings(triplets_folder, small, towers=large, max_failures=0))
        assert not list(small.glob("model-*"))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_vocabulary_of_another_encoder_is_refused(triplets_folder: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=4, **text)).save_pretrained(tmp_path / "bert")
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["[UNK]", *"abcdef"])}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(tmp_path / "bert")
    towers = {**TOWERS, "text": {"checkpoint": str(tmp_path / "bert")}}
    with pytest.raises(ConfigError, match="7 entries for an encoder of 4"):
        train(settings(triplets_folder, tmp_path / "root", towers=towers))


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoint(folder: Path) -> tuple[TwoTower, torch.optim.Optimizer]:
    torch.manual_seed(0)
    towers = TwoTower(settings(folder, folder).towers, 50)
    optimizer = torch.optim.AdamW(towers.parameters())
    sum(p.sum() for p in towers.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    folder.mkdir(exist_ok=True)
    checkpoints.save(folder, towers, optimizer, {"step": 7})
    return towers, optimizer


def test_a_checkpoint_gives_back_all_of_it(tmp_path: Path) -> None:
    towers, optimizer = checkpoint(tmp_path / "saved")
    other = TwoTower(towers.settings, 50)
    fresh = torch.optim.AdamW(other.parameters(), lr=7.0)
    assert checkpoints.state_of(tmp_path / "saved")["step"] == 7
    checkpoints.load_weights(tmp_path / "saved", other)
    checkpoints.load_optimizer(tmp_path / "saved", fresh)
    for one, two in zip(towers.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(fresh.state[two][name]), torch.as_tensor(value))
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_an_optimiser_goes_on_in_its_parameters_memory_format(tmp_path: Path) -> None:
    def stepped(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        weight.grad = torch.arange(float(weight.numel())).view(weight.shape).to(memory_format=torch.channels_last)
        optimizer.step()
        return weight.detach().clone()

    def made() -> tuple[torch.nn.Conv2d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    layer, optimizer = made()
    stepped(layer.weight, optimizer)
    checkpoints.save(tmp_path, layer, optimizer, {"step": 1})
    again, fresh = made()
    checkpoints.load_weights(tmp_path, again)
    checkpoints.load_optimizer(tmp_path, fresh)
    for _ in range(3):
        assert torch.equal(stepped(layer.weight, optimizer), stepped(again.weight, fresh))


@pytest.mark.parametrize("name", [checkpoints.WEIGHTS, checkpoints.OPTIMIZER])
def test_an_altered_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        checkpoints.state_of(tmp_path / "saved")


def test_every_flipped_bit_of_a_checkpoints_state_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "saved")
    for _ in flips(tmp_path / "saved" / checkpoints.STATE, every=3):
        with pytest.raises(ArtifactError, match=r"state\.json"):
            checkpoints.state_of(tmp_path / "saved")


def test_a_checkpoint_from_before_there_were_sums_is_read(tmp_path: Path) -> None:
    checkpoint(tmp_path / "saved")
    path = tmp_path / "saved" / checkpoints.STATE
    told = json.loads(path.read_bytes())
    assert len(told.pop("sum")) == 64
    path.write_text(json.dumps(told))
    assert checkpoints.state_of(tmp_path / "saved")["step"] == 7


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    towers, _ = checkpoint(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / checkpoints.WEIGHTS)
    weights["query.project.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "saved" / checkpoints.WEIGHTS)
    with pytest.raises(ArtifactError, match=r"query\.project\.bias"):
        checkpoints.load_weights(tmp_path / "saved", towers)
