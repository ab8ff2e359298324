import pytest
import torch
from torch import Tensor

from askew.fusion import KINDS, NAMES, Fusion, Hidden

B, L, P, D = 6, 5, 4, 8


def hidden(length: int, seed: int, dtype: torch.dtype = torch.float32) -> Hidden:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, length, D, generator=generator, dtype=dtype)
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[0, 2:] = False
    return Hidden(torch.randn(B, D, generator=generator, dtype=dtype), tokens, mask)


def made(name: str) -> Fusion:
    torch.manual_seed(0)
    fusion = KINDS[name](D)  # type: ignore[index]
    for parameter in fusion.parameters():  # what starts from nought must be tried away from it
        torch.nn.init.normal_(parameter, std=0.3)
    return fusion


HAS = torch.tensor([True, True, False, True, False, True])


@pytest.mark.parametrize("name", NAMES)
def test_a_fusion_passes_a_gradient_check(name: str) -> None:
    fusion = made(name).double()
    text, image = hidden(L, 1, torch.float64), hidden(P, 2, torch.float64)

    def fused(text_BD: Tensor, image_BD: Tensor) -> Tensor:
        return fusion(text._replace(pooled_BD=text_BD), image._replace(pooled_BD=image_BD), HAS)

    inputs = [part.pooled_BD.clone().requires_grad_() for part in (text, image)]
    assert torch.autograd.gradcheck(fused, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_items_do_not_see_each_other(name: str) -> None:
    fusion, text, image = made(name), hidden(L, 1), hidden(P, 2)
    whole = fusion(text, image, HAS)
    for row in range(B):
        here = slice(row, row + 1)
        alone = fusion(Hidden(*(part[here] for part in text)), Hidden(*(part[here] for part in image)), HAS[here])
        assert torch.allclose(alone, whole[here], atol=1e-5)


def test_tokens_that_are_not_there_are_not_read() -> None:
    fusion, text, image = made("cross_attention"), hidden(L, 1), hidden(P, 2)
    before = fusion(text, image, HAS)
    tokens_text, tokens_image = text.tokens_BLD.clone(), image.tokens_BLD.clone()
    tokens_text[0, 2:] = tokens_image[0, 2:] = 100.0  # beyond the mask
    tokens_image[~HAS] = 100.0  # of photos that are missing
    after = fusion(text._replace(tokens_BLD=tokens_text), image._replace(tokens_BLD=tokens_image), HAS)
    assert torch.allclose(before, after, atol=1e-6)
    tokens_image[1, 0] = -3.0
    assert not torch.allclose(before[1], fusion(text, image._replace(tokens_BLD=tokens_image), HAS)[1], atol=1e-3)


def test_the_simple_fusions_are_their_formulas() -> None:
    text, image = hidden(L, 1), hidden(P, 2)
    t, v = text.pooled_BD, image.pooled_BD
    assert torch.equal(made("text")(text, image, HAS), t)
    assert torch.equal(made("image")(text, image, HAS), v)
    mean = made("mean")(text, image, HAS)
    assert torch.allclose(mean, torch.where(HAS[:, None], (t + v) / 2, t))
    gated = made("gated")
    g = torch.sigmoid(torch.cat([t, v], 1) @ gated.gate.weight.T + gated.gate.bias)
    assert torch.allclose(gated(text, image, HAS), g * t + (1 - g) * v, atol=1e-6)


def test_the_mixture_is_its_formula() -> None:
    fusion, text, image = made("moe_bilinear"), hidden(L, 1), hidden(P, 2)
    t, v = text.pooled_BD, image.pooled_BD
    g = torch.softmax(fusion.gate(torch.cat([t, v, t * v], 1)), 1)
    mix = sum(g[:, m, None] * expert(torch.cat([t, v], 1)) for m, expert in enumerate(fusion.experts))
    low_rank = (t @ fusion.text_factor.weight.T) * (v @ fusion.image_factor.weight.T)
    product = low_rank @ fusion.bilinear.weight.T + fusion.bilinear.bias
    expected = t + v + fusion.mlp(torch.cat([mix, product], 1))
    assert torch.allclose(fusion(text, image, HAS), expected, atol=1e-5)
