"""The objective of a stage; and cached gradients, which are those of the whole batch at once."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from askew.caching import Inputs, backward
from askew.fusion import NAMES
from askew.objective import LossSettings, Meeting, loss_of
from askew.towers import Encoded, TowerSettings, TwoTower, indexed_items, indexed_queries

B, M = 12, 15  # pairs, and their items: three bring a negative


def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(2, 50, (B, 5), generator=generator),
        torch.randint(2, 50, (M, 7), generator=generator),
        torch.randint(0, 255, (M, 32, 32, 3), generator=generator, dtype=torch.uint8),
        torch.arange(M) % 4 != 1,
    )


def meeting() -> Meeting:
    masked = torch.zeros(B, M, dtype=torch.bool)
    masked[0, 5] = masked[3, 14] = True
    brings = torch.arange(B) % 4 == 3
    weight, has_image = torch.linspace(0.5, 1, B), inputs()[3]
    photo = has_image[:B] / has_image[:B].float().mean()
    same = torch.zeros_like(masked)
    return Meeting(torch.arange(B), masked, same, brings, has_image, photo, weight / weight.mean(), torch.zeros(M))


def gradients(settings: TowerSettings, loss: LossSettings, at_once: int) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    towers = TwoTower(settings, 50)

    def objective(encoded: Encoded) -> tuple[Tensor, dict[str, float]]:
        return loss_of(encoded, encoded.items, meeting(), loss)

    value, _ = backward(towers, inputs(), objective, at_once, seed=1)
    return float(value), {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}


def tiny(**other: object) -> TowerSettings:
    text = {"width": 16, "heads": 2}
    given = {"dim": 16, "text": text, "image_size": 32, "query_length": 6, "title_length": 8}
    return TowerSettings.model_validate(given | other)


@pytest.mark.parametrize("at_once", [2, 4, 7, 14])
@pytest.mark.parametrize("name", NAMES)
def test_pieces_give_the_gradients_of_the_whole(name: str, at_once: int) -> None:
    terms = {"text": 0.3, "image": 0.3} if name not in ("text", "image") else {}
    loss = LossSettings.model_validate({"fused": 1.0, "triplet": 0.5, **terms})
    (whole, plain), (value, cached) = (gradients(tiny(fusion=name), loss, n) for n in (100, at_once))
    assert value == pytest.approx(whole, abs=1e-5)
    assert plain.keys() == cached.keys()
    for parameter, gradient in plain.items():
        assert torch.allclose(cached[parameter], gradient, rtol=1e-4, atol=2e-5), parameter


@pytest.mark.parametrize(
    "loss",
    [
        {"domain": 1.0},
        {"adaptive": 1.0, "text": 0.1},
        {"fused": 1.0, "kind": "hinge"},
        {"fused": 1.0, "graded": True, "matryoshka": (4, 8)},
    ],
    ids=str,
)
def test_every_objective_can_be_cached(loss: dict[str, object]) -> None:
    settings = tiny(header=True)
    (whole, plain), (value, cached) = (gradients(settings, LossSettings.model_validate(loss), n) for n in (100, 4))
    assert value == pytest.approx(whole, abs=1e-5)
    for parameter, gradient in plain.items():
        assert torch.allclose(cached.get(parameter, torch.zeros_like(gradient)), gradient, rtol=1e-4, atol=2e-5), (
            parameter
        )


def test_memory_is_that_of_a_piece() -> None:
    seen: list[int] = []
    towers = TwoTower(tiny(), 50)

    def counted(*piece: Tensor) -> Encoded:
        seen.append(len(piece[1]))
        return towers(*piece)

    def objective(encoded: Encoded) -> tuple[Tensor, None]:
        return loss_of(encoded, encoded.items, meeting(), LossSettings(fused=1.0))[0], None

    forward: Callable[..., Encoded] = counted
    backward(towers, inputs(), objective, 4, seed=0, forward=forward)
    assert max(seen) <= 4
    assert sum(seen) == 2 * M


# --- the objective -------------------------------------------------------------------------------


def encoded(**towers: object) -> Encoded:
    torch.manual_seed(0)
    return TwoTower(tiny(**towers), 50)(*inputs())


def test_a_loss_is_the_weighted_sum_of_its_terms() -> None:
    made = encoded()
    alone = {
        name: loss_of(made, made.items, meeting(), LossSettings.model_validate({name: 1.0}))[0].item()
        for name in ("domain", "text", "image", "fused")
    }
    weights = {"domain": 0.5, "text": 2.0, "image": 0.25, "fused": 1.0}
    total, terms = loss_of(made, made.items, meeting(), LossSettings.model_validate(weights))
    assert terms == pytest.approx(alone)
    assert total.item() == pytest.approx(sum(weights[name] * alone[name] for name in weights))


def test_one_index_gives_the_header_s_score() -> None:
    made = encoded(header=True)
    assert made.items.text is not None
    p = made.gate_B[:, None]
    slow = (1 - p) * made.queries_BD @ made.items.text.T + p * made.queries_BD @ made.items.fused.T
    fast = indexed_queries(made.queries_BD, made.gate_B, True) @ indexed_items(made.items, True).T
    assert torch.allclose(fast, slow, atol=1e-6)


def test_a_triplet_term_compares_a_pair_with_the_negative_that_it_brings() -> None:
    made = encoded()
    settings = LossSettings(fused=1.0), LossSettings(fused=1.0, triplet=1.0, margin=5.0)
    plain, total = (loss_of(made, made.items, meeting(), s)[0].item() for s in settings)
    query, item = made.queries_BD, made.items.fused
    by_hand = [
        5.0 - (query[b] @ item[b]).item() + (query[b] @ item[B + n]).item() for n, b in enumerate((3, 7, 11))
    ]
    assert total - plain == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_an_item_without_a_photo_teaches_the_domain_nothing() -> None:
    made = encoded()
    assert made.items.image is not None
    made.items.image.retain_grad()
    loss_of(made, made.items, meeting(), LossSettings(domain=1.0))[0].backward()
    without = ~meeting().has_image_N
    assert made.items.image.grad is not None
    assert (made.items.image.grad[without] == 0).all()
    assert (made.items.image.grad[~without][: B // 2] != 0).any()
    assert len(without) == M


@pytest.mark.parametrize(
    ("loss", "fusion", "header", "says"),
    [
        ({"image": 1.0}, "text", False, "no encoder for the term 'image'"),
        ({"text": 1.0}, "image", False, "no encoder for the term 'text'"),
        ({"domain": 1.0}, "text", False, "'domain'"),
        ({"adaptive": 1.0}, "concat", False, "needs towers.header"),
        ({"adaptive": 1.0}, "text", True, "a fusion of text and image"),
    ],
)
def test_a_loss_that_the_fusion_cannot_serve_is_told(
    loss: dict[str, float], fusion: str, header: bool, says: str
) -> None:
    assert says in LossSettings.model_validate(loss).unusable(fusion, header)  # type: ignore[arg-type]


def test_a_loss_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="no term"):
        LossSettings()
