from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from askew import artifacts
from askew.encoders import TextSettings
from askew.errors import ArtifactError
from askew.inputs import Tokens
from askew.models import SETTINGS, WEIGHTS, Model
from askew.towers import TowerSettings, TwoTower

TEXTS = ["red striped mug", "blue cap", ""]


def model() -> Model:
    torch.manual_seed(0)
    tokens = Tokens.train(TEXTS * 3, 100)
    settings = TowerSettings(dim=16, text=TextSettings(width=16, heads=2), image_size=32)
    return Model(TwoTower(settings, tokens.size), tokens)


def saved(root: Path) -> Path:
    with artifacts.draft(root, "model", {}, {}) as draft:
        model().save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {}, {}))


def altered(folder: Path, name: str, content: bytes) -> None:
    """Write another file and a manifest that agrees with it, as somebody who made it wrong would have."""
    (folder / name).write_bytes(content)
    manifest = artifacts.read(folder, "model", verify=False)
    file = artifacts.File(bytes=len(content), sha256=artifacts.sha256(folder / name))
    manifest = manifest.model_copy(update={"files": {**manifest.files, name: file}})
    (folder / artifacts.MANIFEST).write_text(manifest.model_dump_json())


def items() -> tuple[list[str], np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    return TEXTS, pixels, np.array([True, False, True])


def test_what_is_loaded_encodes_as_what_was_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    loaded, original = Model.load(folder), model()
    assert loaded.key == artifacts.read(folder, "model").key
    assert np.array_equal(loaded.queries(TEXTS), original.queries(TEXTS))
    for name, vectors in loaded.items(*items()).items():
        assert vectors.dtype == np.float32
        assert vectors.shape == (3, 16)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.array_equal(vectors, original.items(*items())[name])


def test_a_batch_encodes_as_its_members_do() -> None:
    both, (texts, pixels, has_image) = model(), items()
    assert np.allclose(both.queries(TEXTS), np.concatenate([both.queries([t]) for t in TEXTS]), atol=1e-5)
    alone = [both.items([texts[n]], pixels[n : n + 1], has_image[n : n + 1])["fused"] for n in range(3)]
    assert np.allclose(both.items(texts, pixels, has_image)["fused"], np.concatenate(alone), atol=1e-5)


def test_text_is_cleaned_on_the_way_in() -> None:
    assert np.array_equal(model().queries(["  red\tstriped\x00 mug "]), model().queries(["red striped mug"]))


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = load_file(folder / WEIGHTS)
    weights["query.project.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "other")
    altered(folder, WEIGHTS, (tmp_path / "other").read_bytes())
    with pytest.raises(ArtifactError, match=r"query\.project\.weight"):
        Model.load(folder)


def test_settings_with_an_unknown_key_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    altered(folder, SETTINGS, b'{"dim": 16, "colour": "red"}')
    with pytest.raises(ArtifactError, match="colour"):
        Model.load(folder)


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="weights"):
        Model.load(path.parent)
