import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from askew import artifacts
from askew.encoders import TextSettings
from askew.errors import ArtifactError
from askew.inputs import Tokens
from askew.models import CANARIES, SETTINGS, TITLES, VECTORS, WEIGHTS, Model, parity
from askew.towers import TowerSettings, TwoTower

TEXTS = ["red striped mug", "blue cap", ""]


def model(**settings: Any) -> Model:
    torch.manual_seed(0)
    tokens = Tokens.train(TEXTS * 3, 100)
    settings = {"dim": 16, "text": TextSettings(width=16, heads=2), "image_size": 32} | settings
    return Model(TwoTower(TowerSettings.model_validate(settings), tokens.size), tokens)


def saved(root: Path, **settings: Any) -> Path:
    with artifacts.draft(root, "model", {}, {}) as draft:
        model(**settings).save(draft.folder)
    return artifacts.place(root, "model", artifacts.key("model", {}, {}))


def altered(folder: Path, name: str, content: bytes) -> None:
    """Write another file and a manifest that agrees with it, as somebody who made it wrong would have."""
    (folder / name).write_bytes(content)
    manifest = artifacts.read(folder, "model", verify=False)
    file = artifacts.File(bytes=len(content), sha256=artifacts.sha256(folder / name))
    manifest = manifest.model_copy(update={"files": {**manifest.files, name: file}, "sum": ""})
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


@pytest.mark.parametrize("change", ["missing", "more"])
def test_weights_of_other_names_are_refused(tmp_path: Path, change: str) -> None:
    folder = saved(tmp_path)
    weights = load_file(folder / WEIGHTS)
    if change == "more":
        weights["query.other"] = torch.zeros(1)
    else:
        del weights["query.project.weight"]
    save_file(weights, tmp_path / "other")
    altered(folder, WEIGHTS, (tmp_path / "other").read_bytes())
    with pytest.raises(ArtifactError, match=r"query\.other|query\.project\.weight"):
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


def test_a_saved_model_holds_the_vectors_of_its_canaries(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    kept = load_file(folder / VECTORS)
    assert {name: (vectors.shape, vectors.dtype) for name, vectors in kept.items()} == {
        "queries": ((len(CANARIES), 16), torch.float32), "items": ((len(TITLES), 16), torch.float32),
    }  # fmt: skip
    assert np.array_equal(kept["queries"].numpy(), model().queries(CANARIES))
    assert VECTORS in artifacts.read(folder, "model").files
    assert parity(folder) == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"header": True}, {"fusion": "text"}, {"fusion": "image"}], ids=str)
def test_models_of_every_make_hold_what_is_indexed_and_searched(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = saved(tmp_path, **settings)
    assert parity(folder) == pytest.approx(1.0)
    kept, made = load_file(folder / VECTORS), model(**settings)
    assert np.array_equal(kept["queries"].numpy(), made.queries(CANARIES))
    assert kept["items"].shape == (len(TITLES), made.dim)


def test_canaries_are_always_the_same_and_some_have_photos() -> None:
    photos, there = [], []

    class Watched(Model):
        def items(self, texts, pixels, has_image):  # type: ignore[no-untyped-def]
            photos.append(pixels)
            there.append(has_image)
            return super().items(texts, pixels, has_image)

    made = model()
    Watched(made.towers, made.tokens).canaries()
    told = json.dumps([CANARIES, TITLES]).encode() + photos[0].tobytes() + there[0].tobytes()
    assert hashlib.sha256(told).hexdigest()[:16] == "a2a96705bac20e8f", "models hold the vectors of these"
    assert photos[0].shape == (8, 32, 32, 3)
    assert there[0].sum() == 4


def test_a_model_that_gives_other_vectors_has_no_parity(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}
    for name in ("query.project.weight", "photo.project.weight"):
        other = {**weights, name: weights[name].flip(0)}
        save_file(other, tmp_path / "other")
        altered(folder, WEIGHTS, (tmp_path / "other").read_bytes())
        assert parity(folder) < 0.999, name
    save_file({**weights, "query.project.bias": weights["query.project.bias"] * torch.nan}, tmp_path / "other")
    altered(folder, WEIGHTS, (tmp_path / "other").read_bytes())
    assert np.isnan(parity(folder))


def test_a_model_without_canaries_or_with_others_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    kept = load_file(folder / VECTORS)
    save_file({**kept, "queries": kept["queries"][:5].contiguous()}, tmp_path / "other")
    altered(folder, VECTORS, (tmp_path / "other").read_bytes())
    with pytest.raises(ArtifactError, match=r"this version's canaries .* train or register it again"):
        parity(folder)
    (folder / VECTORS).unlink()
    with pytest.raises(ArtifactError, match=r"canaries\.safetensors; found none; train or register it again"):
        parity(folder)


def test_saving_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    both = model()
    both.towers.train().bfloat16()
    both.towers.query.eval()
    both.towers.log_scale.grad = torch.ones((), dtype=torch.bfloat16)
    modes, state = [module.training for module in both.towers.modules()], torch.get_rng_state()
    np.random.seed(7)
    both.save(tmp_path)
    assert [module.training for module in both.towers.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.randint(1 << 30) == np.random.RandomState(7).randint(1 << 30)
    assert both.towers.log_scale.grad == 1
    assert {p.dtype for p in both.towers.parameters()} == {torch.bfloat16}
    assert all(
        p.requires_grad and (p.grad is None or p is both.towers.log_scale) for p in both.towers.parameters()
    )
    assert load_file(tmp_path / VECTORS)["items"].dtype == torch.float32
