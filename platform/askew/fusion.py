"""Fusions: how an item's text and photo become one vector.

Each works on hidden vectors of one width and is made by name; knows nothing of encoders. Where a photo is
missing, its pooled vector is a learned token, and its other tokens are not read; for `text` and `mean` the text
stands alone.
Shapes: B items, L text tokens, P image tokens, D width.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

FusionName = Literal["text", "image", "mean", "concat", "gated", "cross_attention", "moe_bilinear"]
NAMES: tuple[FusionName, ...] = get_args(FusionName)


class Hidden(NamedTuple):
    """What an encoder gives of B texts or photos: a vector each, and one for each token."""

    pooled_BD: Tensor
    tokens_BLD: Tensor
    mask_BL: Tensor  # true where there is a token


class Fusion(nn.Module):
    """An item's two modalities to one hidden vector (B, D), not normalised."""

    reads_tokens = False  # whether token vectors are wanted; pooled ones always are

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Fuse."""
        raise NotImplementedError


class Text(Fusion):
    """The text alone: the control, and DPSR's tower."""

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Return the text's vector."""
        return text.pooled_BD


class Image(Fusion):
    """The photo alone."""

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Return the photo's vector."""
        return image.pooled_BD


class Mean(Fusion):
    """The mean of both, as weighted sums of CLIP vectors are in use; of the text alone without a photo."""

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Average."""
        both = (text.pooled_BD + image.pooled_BD) / 2
        return torch.where(has_image_B[:, None], both, text.pooled_BD)


class Concat(Fusion):
    """Sum of both plus an MLP over [t; v; t ⊙ v].

    The residual sum lets training start from "both count alike"; the MLP's last layer starts at nought (our
    choice: a plain MLP over [t; v] learns more slowly).
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mlp = _from_nought(3 * dim, 2 * dim, dim)

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Add the MLP's correction to the sum."""
        t, v = text.pooled_BD, image.pooled_BD
        mixed: Tensor = t + v + self.mlp(torch.cat([t, v, t * v], dim=1))
        return mixed


class Gated(Fusion):
    """g ⊙ t + (1 − g) ⊙ v, g = σ(W [t; v]) (gated multimodal units: Arevalo et al., arXiv 1702.01992)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.gate = nn.Linear(2 * dim, dim)

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Mix by a gate for each dimension."""
        t, v = text.pooled_BD, image.pooled_BD
        gate = torch.sigmoid(self.gate(torch.cat([t, v], dim=1)))
        mixed: Tensor = gate * t + (1 - gate) * v
        return mixed


class CrossAttention(Fusion):
    """SMAR's S_m: text tokens, led by a CLS token, attend to the image's tokens; the CLS vector is the item's.

    The paper's depth and direction were not seen. Our choice: one layer in which [CLS; text] attends to itself
    and then to the image's tokens; CLS starts as the sum of both pooled vectors, which trains faster than one
    vector learned for all.
    """

    reads_tokens = True

    def __init__(self, dim: int, layers: int = 1, heads: int = 4) -> None:
        super().__init__(dim)
        layer = nn.TransformerDecoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, layers)
        for part in self.layers.layers:
            nn.init.zeros_(part.linear2.weight)

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Attend, and return the CLS vector."""
        cls_BD = text.pooled_BD + image.pooled_BD
        tokens_BLD = torch.cat([cls_BD[:, None], text.tokens_BLD], dim=1)
        absent_BL = ~torch.cat([torch.ones_like(text.mask_BL[:, :1]), text.mask_BL], dim=1)
        photo_BPD = torch.cat([image.pooled_BD[:, None], image.tokens_BLD], dim=1)
        unseen_BP = ~torch.cat(
            [torch.ones_like(image.mask_BL[:, :1]), image.mask_BL & has_image_B[:, None]], dim=1
        )
        photo_BPD = photo_BPD.masked_fill(unseen_BP[:, :, None], 0.0)
        out: Tensor = self.layers(
            tokens_BLD, photo_BPD, tgt_key_padding_mask=absent_BL, memory_key_padding_mask=unseen_BP
        )
        return out[:, 0]


class MoEBilinear(Fusion):
    """Beyond Text's fusion: a mixture of experts, and a low-rank bilinear term.

    g = softmax(W_g [t; v; t ⊙ v]), mix = Σ_m g_m · Expert_m([t; v]), item = MLP([mix; P((Uᵀt) ⊙ (Vᵀv))]). The
    rank, the number of experts, and the residual sum that training starts from are our choice.
    """

    def __init__(self, dim: int, experts: int = 4, rank: int = 64) -> None:
        super().__init__(dim)
        self.gate = nn.Linear(3 * dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(experts)
        )
        self.text_factor, self.image_factor = nn.Linear(dim, rank, bias=False), nn.Linear(dim, rank, bias=False)
        self.bilinear = nn.Linear(rank, dim)
        self.mlp = _from_nought(2 * dim, 2 * dim, dim)

    def forward(self, text: Hidden, image: Hidden, has_image_B: Tensor) -> Tensor:
        """Mix experts by the gate, add the bilinear term, and correct the sum."""
        t, v = text.pooled_BD, image.pooled_BD
        gate_BM = torch.softmax(self.gate(torch.cat([t, v, t * v], dim=1)), dim=1)
        both = torch.cat([t, v], dim=1)
        mix_BD = (gate_BM[:, :, None] * torch.stack([expert(both) for expert in self.experts], dim=1)).sum(1)
        product_BD = self.bilinear(self.text_factor(t) * self.image_factor(v))
        fused: Tensor = t + v + self.mlp(torch.cat([mix_BD, product_BD], dim=1))
        return fused


def _from_nought(width: int, hidden: int, dim: int) -> nn.Sequential:
    last = nn.Linear(hidden, dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)


KINDS: Mapping[FusionName, type[Fusion]] = {
    "text": Text, "image": Image, "mean": Mean, "concat": Concat, "gated": Gated,
    "cross_attention": CrossAttention, "moe_bilinear": MoEBilinear,
}  # fmt: skip
