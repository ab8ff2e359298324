import pytest
import torch
from pydantic import ValidationError

from askew.errors import ConfigError
from askew.losses import info_nce
from askew.towers import TowerSettings, TwoTower, backbone

TINY = TowerSettings(dim=16, text_width=16, text_heads=2, image_size=32, query_length=6, title_length=8)


def batch(n: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(2, 50, (n, 5), generator=generator),
        torch.randint(2, 50, (n, 7), generator=generator),
        torch.randint(0, 255, (n, 32, 32, 3), generator=generator, dtype=torch.uint8),
        torch.ones(n, dtype=torch.bool),
    )


def towers() -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(TINY, 50)


def test_every_vector_has_length_one() -> None:
    queries, items, scale = towers()(*batch())
    assert scale.item() == pytest.approx(20)
    for vectors in (queries, *items):
        assert vectors.shape == (4, 16)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)


def test_padding_changes_nothing() -> None:
    model = towers().eval()
    ids = batch()[0]
    padded = torch.cat([ids, torch.zeros(4, 1, dtype=ids.dtype)], dim=1)
    assert torch.allclose(model.queries(ids), model.queries(padded), atol=1e-5)


def test_an_empty_text_and_a_missing_image_give_finite_vectors() -> None:
    model = towers().eval()
    nothing = model.items(torch.zeros(2, 1).long(), torch.zeros(2, 32, 32, 3).byte(), torch.zeros(2).bool())
    assert all(torch.isfinite(v).all() for v in nothing)


def test_pixels_of_a_missing_image_are_not_read() -> None:
    model = towers().eval()
    _, titles, pixels, _ = batch()
    absent = torch.zeros(4, dtype=torch.bool)
    one, other = model.items(titles, pixels, absent), model.items(titles, 255 - pixels, absent)
    assert torch.equal(one.fused, other.fused)
    assert torch.equal(one.image, other.image)


def test_every_parameter_learns() -> None:
    # a parameter without gradient would stop two workers, and only two
    model = towers()
    ids, titles, pixels, has_image = batch()
    has_image[0] = False
    queries, items, scale = model(ids, titles, pixels, has_image)
    loss = sum(info_nce(queries, i, torch.arange(4), scale, torch.zeros(4, 4).bool()) for i in items)
    loss.backward()  # type: ignore[union-attr]
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_towers_overfit_64_pairs() -> None:
    model, (ids, titles, pixels, has_image) = towers(), batch(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        queries, items, scale = model(ids, titles, pixels, has_image)
        loss = info_nce(queries, items.fused, torch.arange(64), scale, torch.zeros(64, 64).bool())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        queries, items, _ = model(ids, titles, pixels, has_image)
    assert ((queries @ items.fused.T).argmax(1) == torch.arange(64)).float().mean() > 0.95


@pytest.mark.parametrize("name", ["small", "resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_backbones_end_before_their_classifier(name: str) -> None:
    model, width = backbone(name)
    side = 224 if name.startswith("vit") else 64
    assert model.eval()(torch.zeros(1, 3, side, side)).shape == (1, width)


def test_an_unknown_backbone_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="resnet19"):
        backbone("resnet19")


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="txt_width"):
        TowerSettings(txt_width=3)  # type: ignore[call-arg]
