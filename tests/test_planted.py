"""A pickle that somebody planted where a file of ours is read: it is refused, and what is in it never runs.

Each is also sealed into its manifest, as by somebody who may write whole artifacts: checksums alone don't save us.
"""

import contextlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.test_models import altered, saved

from askew import artifacts, checkpoints, wire
from askew.ann import Design, Index
from askew.batches import Triplets
from askew.encoders import pretrained
from askew.errors import ArtifactError, AskewError, ConfigError
from askew.inputs import Tokens
from askew.models import SETTINGS, TOKENIZER, VECTORS, WEIGHTS, Model, parity


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def _npy(path: Path, mark: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([Payload(mark)], dtype=object), allow_pickle=True)


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "pickle": lambda path, mark: path.write_bytes(pickle.dumps(Payload(mark))) and None,
    "torch": lambda path, mark: torch.save(Payload(mark), path),
    "npy": _npy,
}


@pytest.fixture(params=FORMS)
def plant(request: pytest.FixtureRequest, mark: Path) -> Callable[[Path], bytes]:
    """Write a pickle in one of its forms; returns its bytes."""

    def write(path: Path) -> bytes:
        FORMS[request.param](path, mark)
        return path.read_bytes()

    return write


def test_the_payload_does_run_where_it_is_unpickled(
    plant: Callable[[Path], bytes], tmp_path: Path, mark: Path
) -> None:
    plant(tmp_path / "planted")
    for load in (
        lambda path: pickle.loads(path.read_bytes()),  # noqa: S301
        lambda path: torch.load(path, weights_only=False),
        lambda path: np.load(path, allow_pickle=True),
    ):
        with contextlib.suppress(Exception):
            load(tmp_path / "planted")
    assert mark.exists()


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS, TOKENIZER])
def test_in_the_place_of_a_models_file(
    plant: Callable[[Path], bytes], tmp_path: Path, mark: Path, name: str
) -> None:
    folder = saved(tmp_path)
    altered(folder, name, plant(tmp_path / "planted"))
    with pytest.raises(ArtifactError):
        Model.load(folder)
    assert not mark.exists()


def test_in_the_place_of_its_canaries(plant: Callable[[Path], bytes], tmp_path: Path, mark: Path) -> None:
    folder = saved(tmp_path)
    altered(folder, VECTORS, plant(tmp_path / "planted"))
    with pytest.raises(ArtifactError):
        parity(folder)
    assert not mark.exists()


def load(folder: Path, towers: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    checkpoints.load_weights(folder, towers)
    checkpoints.load_optimizer(folder, optimizer)


@pytest.mark.parametrize("name", [checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE])
def test_in_the_place_of_a_checkpoints(
    plant: Callable[[Path], bytes], tmp_path: Path, mark: Path, name: str
) -> None:
    towers, folder = torch.nn.Linear(2, 2), tmp_path / "saved"
    folder.mkdir()
    optimizer = torch.optim.AdamW(towers.parameters())
    checkpoints.save(folder, towers, optimizer, {"step": 1})
    plant(folder / name)
    with pytest.raises(AskewError):
        checkpoints.state_of(folder)
    if name != checkpoints.STATE:  # and with checksums that agree
        state = json.loads((folder / checkpoints.STATE).read_bytes())
        state["files"][name] = artifacts.sha256(folder / name)
        (folder / checkpoints.STATE).write_text(json.dumps(state))
        with pytest.raises(ArtifactError):
            load(folder, towers, optimizer)
    assert not mark.exists()


def test_in_the_place_of_an_index(plant: Callable[[Path], bytes], tmp_path: Path, mark: Path) -> None:
    plant(tmp_path / "index.faiss")
    with pytest.raises(ArtifactError):
        Index.read(tmp_path / "index.faiss", Design(kind="flat", dim=2))
    assert not mark.exists()


def test_in_the_place_of_laid_out_triplets(plant: Callable[[Path], bytes], tmp_path: Path, mark: Path) -> None:
    plant(tmp_path / "queries.npy")
    with pytest.raises((ValueError, KeyError)):  # a zip is an archive of arrays, and has none of ours
        Triplets(tmp_path)
    assert not mark.exists()


def test_in_a_frame_between_replicas(plant: Callable[[Path], bytes], tmp_path: Path, mark: Path) -> None:
    with contextlib.suppress(ValueError):
        wire.unpacked(plant(tmp_path / "planted"))
    assert not mark.exists()


# --- checkpoints of others -----------------------------------------------------------------------


def test_weights_of_a_checkpoint_that_are_pickled(tmp_path: Path, mark: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"embeddings": Payload(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights in safetensors"):
        pretrained(str(tmp_path), "text")
    assert not mark.exists()


CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path({mark!r}).touch()
class Own(PretrainedConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("kind", ["own", "bert"])
def test_a_checkpoint_that_brings_code_of_its_own(tmp_path: Path, mark: Path, kind: str) -> None:
    (tmp_path / "own.py").write_text(CODE.format(mark=str(mark)))
    auto = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.OwnTokenizer", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": auto["AutoTokenizer"]}})
    )
    for read in (lambda: pretrained(str(tmp_path), "text"), lambda: Tokens.of_checkpoint(str(tmp_path))):
        with pytest.raises(ConfigError):
            read()
    assert not mark.exists()
