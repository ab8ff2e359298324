import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from askew.encoders import backbone
from askew.errors import ConfigError
from askew.fusion import NAMES
from askew.inputs import PADDING, Tokens
from askew.losses import info_nce
from askew.models import Model
from askew.towers import TowerSettings, TwoTower

SMALL = {"dim": 16, "text": {"width": 16, "heads": 2}, "image_size": 32, "query_length": 6, "title_length": 8}


def settings(**other: Any) -> TowerSettings:
    return TowerSettings.model_validate(SMALL | other)


def batch(n: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(2, 50, (n, 5), generator=generator),
        torch.randint(2, 50, (n, 7), generator=generator),
        torch.randint(0, 255, (n, 32, 32, 3), generator=generator, dtype=torch.uint8),
        torch.ones(n, dtype=torch.bool),
    )


def towers(**other: Any) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(settings(**other), 50)


@pytest.mark.parametrize("fusion", NAMES)
def test_every_vector_has_length_one(fusion: str) -> None:
    encoded = towers(fusion=fusion)(*batch())
    assert encoded.scale.item() == pytest.approx(20)
    assert (encoded.gate_B == 1).all()
    for vectors in (encoded.queries_BD, *(part for part in encoded.items if part is not None)):
        assert vectors.shape == (4, 16)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize(("fusion", "without"), [("text", "image"), ("image", "text")])
def test_a_fusion_of_one_modality_has_no_encoder_of_the_other(fusion: str, without: str) -> None:
    assert getattr(towers(fusion=fusion)(*batch()).items, without) is None


@pytest.mark.parametrize("fusion", NAMES)
def test_padding_changes_nothing(fusion: str) -> None:
    model = towers(fusion=fusion).eval()
    queries, titles, pixels, has_image = batch()
    padding = torch.full((4, 1), PADDING)
    assert torch.allclose(
        model.queries(queries)[0], model.queries(torch.cat([queries, padding], dim=1))[0], atol=1e-5
    )
    one, other = (
        model.items(ids, pixels, has_image).fused for ids in (titles, torch.cat([titles, padding], dim=1))
    )
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("fusion", NAMES)
def test_an_empty_text_and_a_missing_image_give_finite_vectors(fusion: str) -> None:
    nothing = torch.full((2, 1), PADDING), torch.zeros(2, 32, 32, 3).byte(), torch.zeros(2).bool()
    found = towers(fusion=fusion).eval().items(*nothing)
    assert all(torch.isfinite(v).all() for v in found if v is not None)


@pytest.mark.parametrize("fusion", NAMES)
def test_pixels_of_a_missing_image_are_not_read(fusion: str) -> None:
    model = towers(fusion=fusion).eval()
    _, titles, pixels, _ = batch()
    absent = torch.zeros(4, dtype=torch.bool)
    one, other = model.items(titles, pixels, absent), model.items(titles, 255 - pixels, absent)
    assert torch.equal(one.fused, other.fused)
    if one.image is not None and other.image is not None:
        assert torch.equal(one.image, other.image)


@pytest.mark.parametrize("shared", [False, True], ids=["separate texts", "shared text"])
@pytest.mark.parametrize("fusion", NAMES)
def test_every_parameter_learns(fusion: str, shared: bool) -> None:
    # a parameter without gradient would stop two workers, and only two
    model = towers(fusion=fusion, shared_text=shared)
    ids, titles, pixels, has_image = batch()
    has_image[0] = False
    encoded = model(ids, titles, pixels, has_image)
    masked = torch.zeros(4, 4).bool()
    info_nce(encoded.queries_BD, encoded.items.fused, torch.arange(4), encoded.scale, masked).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("fusion", NAMES)
def test_towers_overfit_64_pairs(fusion: str) -> None:
    model, (ids, titles, pixels, has_image) = towers(fusion=fusion), batch(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    masked = torch.zeros(64, 64).bool()
    for _ in range(150):
        encoded = model(ids, titles, pixels, has_image)
        loss = info_nce(encoded.queries_BD, encoded.items.fused, torch.arange(64), encoded.scale, masked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    with torch.no_grad():
        encoded = model(ids, titles, pixels, has_image)
    found = (encoded.queries_BD @ encoded.items.fused.T).argmax(1) == torch.arange(64)
    assert found.float().mean() > 0.95


def test_the_header_begins_with_nearly_all_of_the_fused_score() -> None:
    model = towers(header=True)
    gate = model.queries(batch()[0])[1]
    assert gate.detach().numpy() == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item(), abs=1e-6)


@pytest.mark.parametrize("name", ["small", "medium", "resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_backbones_end_before_their_classifier(name: str) -> None:
    model, width = backbone(name)
    side = 224 if name.startswith("vit") else 64
    out = model.eval()(torch.zeros(1, 3, side, side))
    assert out.shape[:2] == (1, width)


@pytest.mark.parametrize("name", ["small", "medium", "resnet18", "shufflenet_v2_x0_5"])
def test_photos_do_not_see_each_other(name: str) -> None:
    model, photos = backbone(name)[0].train(), torch.rand(3, 3, 64, 64)
    assert torch.allclose(model(photos)[:1], model(photos[:1]), atol=1e-3)


def test_an_unknown_backbone_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="resnet19"):
        backbone("resnet19")


@pytest.mark.parametrize("wrong", [{"txt_width": 3}, {"fusion": "sum"}, {"dim": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        settings(**wrong)


# --- checkpoints ---------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "mug", "cap", "striped"]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
TEXT = {**SHAPE, "vocab_size": 9, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
VISION = {**SHAPE, "image_size": 32, "patch_size": 16}
KINDS = ("bert", "vit", "clip", "siglip")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints of each kind, as `save_pretrained` writes them."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    text, vision = {**TEXT, "pad_token_id": 0}, VISION
    made = {
        "bert": BertModel(BertConfig(**{k: v for k, v in text.items() if not k.startswith(("bos", "eos"))})),
        "vit": ViTModel(ViTConfig(**vision)),
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
        "siglip": SiglipModel(SiglipConfig(text_config=text, vision_config=vision)),
    }
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
        )
    return root


def of_checkpoints(root: Path, text: str, photo: str, **other: Any) -> tuple[TwoTower, Tokens]:
    shape = settings(
        text={"checkpoint": str(root / text)}, photo={"checkpoint": str(root / photo)}, **other
    ).read()
    tokens = Tokens.of_checkpoint(str(root / text))
    torch.manual_seed(0)
    model = TwoTower(shape, tokens.size)
    model.start()
    return model, tokens


@pytest.mark.parametrize(("text", "photo"), [("bert", "vit"), ("clip", "clip"), ("siglip", "siglip")])
def test_a_checkpoint_gives_weights_and_a_saved_model_needs_it_no_more(
    saved: Path, tmp_path: Path, text: str, photo: str
) -> None:
    made, tokens = of_checkpoints(saved, text, photo)
    assert made.photo is not None
    assert made.photo.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    again, _ = of_checkpoints(saved, text, photo)
    for name, parameter in made.query.body.named_parameters():
        assert torch.equal(parameter, dict(again.query.body.named_parameters())[name])
    model = Model(made, tokens)
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    shape = TowerSettings.model_validate_json((tmp_path / "model" / "towers.json").read_bytes())
    moved = shape.model_copy(
        update={
            "text": shape.text.model_copy(update={"checkpoint": "gone"}),
            "photo": shape.photo.model_copy(update={"checkpoint": "gone"}),
        }
    )
    rebuilt = TwoTower(moved, tokens.size)
    rebuilt.load_state_dict(made.state_dict())
    assert torch.equal(rebuilt.eval()(*batch_of(tokens))[0], made.eval()(*batch_of(tokens))[0])


def batch_of(tokens: Tokens) -> tuple[torch.Tensor, ...]:
    ids = torch.from_numpy(tokens.ids(["red mug", "blue striped cap"], 6))
    photos = torch.randint(0, 255, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ids, ids, photos, torch.ones(2, dtype=torch.bool)


def test_clip_s_own_vectors_come_out(saved: Path) -> None:
    """Zero-shot: where widths agree, both projections are the checkpoint's, and so is the common space."""
    made, tokens = of_checkpoints(saved, "clip", "clip", fusion="mean")
    ids, titles, pixels, has_image = batch_of(tokens)
    clip = CLIPModel.from_pretrained(saved / "clip").eval()
    photos = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    padded = ids.masked_fill(ids == PADDING, 0)
    wanted = clip(input_ids=padded, attention_mask=ids != PADDING, pixel_values=photos)
    with torch.no_grad():
        items = made.eval().items(titles, pixels, has_image)
    assert items.image is not None
    assert torch.allclose(items.image, wanted.image_embeds, atol=1e-5)
    assert torch.allclose(made.queries(ids)[0], wanted.text_embeds, atol=1e-5)


@pytest.mark.parametrize(("text", "photo"), [("bert", "vit"), ("clip", "clip"), ("siglip", "siglip")])
def test_every_parameter_of_a_checkpoint_learns(saved: Path, text: str, photo: str) -> None:
    made, tokens = of_checkpoints(saved, text, photo, fusion="cross_attention")
    encoded = made.train()(*batch_of(tokens))
    masked = torch.zeros(2, 2).bool()
    sides = (encoded.items.fused, encoded.items.image, encoded.items.text)
    losses = [
        info_nce(encoded.queries_BD, side, torch.arange(2), encoded.scale, masked)
        for side in sides
        if side is not None
    ]
    torch.stack(losses).sum().backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None and n != "missing"]
    assert missing == []


def test_photos_of_another_size_than_the_checkpoint_s_are_read(saved: Path) -> None:
    made, tokens = of_checkpoints(saved, "clip", "vit", image_size=48)
    ids, titles, _, has_image = batch_of(tokens)
    photos = torch.zeros(2, 48, 48, 3, dtype=torch.uint8)
    assert made(ids, titles, photos, has_image).items.fused.shape == (2, 16)


def test_a_text_that_is_cut_keeps_its_marks(saved: Path) -> None:
    tokens = Tokens.of_checkpoint(str(saved / "bert"))
    assert tokens.ids(["red mug striped cap blue"], 4).tolist() == [[2, 4, 6, 3]]
    assert tokens.ids(["red", "red mug"], 6).tolist() == [[2, 4, 3, PADDING], [2, 4, 6, 3]]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        settings(text={"checkpoint": str(tmp_path / "nowhere")}).read()
    with pytest.raises(ConfigError, match="nowhere"):
        Tokens.of_checkpoint(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_is_the_checkpoint_itself(saved: Path, kind: str) -> None:
    whole = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(saved / kind).eval()
    model = Model.zero_shot(str(saved / kind))
    assert (model.image_size, model.dim) == (32, 16)
    texts, random = ["red mug", "blue striped cap"], np.random.default_rng(0)
    pixels = random.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    photos = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    ids = torch.from_numpy(model.tokens.ids(texts, 16))
    ids = torch.nn.functional.pad(ids, (0, 16 - ids.shape[1]), value=PADDING)  # as SigLIP was trained
    padded, mask = ids.masked_fill(ids < 0, 0), {"attention_mask": (ids >= 0).long()}
    with torch.no_grad():
        text = whole.get_text_features(input_ids=padded, **(mask if kind == "clip" else {}))
        image = whole.get_image_features(pixel_values=photos)
    pooled = (getattr(found, "pooler_output", found) for found in (text, image))
    wanted = [torch.nn.functional.normalize(one, dim=1).numpy() for one in pooled]
    found = model.items(texts, pixels, np.ones(2, np.bool_))
    assert np.allclose(found["text"], wanted[0], atol=1e-5)
    assert np.allclose(found["image"], wanted[1], atol=1e-5)
    assert np.allclose(model.queries(texts), wanted[0], atol=1e-5)


def test_zero_shot_needs_both_modalities(saved: Path) -> None:
    with pytest.raises(ConfigError, match="text and vision"):
        Model.zero_shot(str(saved / "bert"))


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip"])
def test_a_text_has_the_vector_that_it_has_alone_beside_longer_ones(saved: Path, kind: str) -> None:
    model = Model(*of_checkpoints(saved, kind, "vit"))
    alone, together = model.queries(["red"]), model.queries(["red", "red blue striped mug cap"])
    assert np.allclose(alone[0], together[0], atol=1e-5)
