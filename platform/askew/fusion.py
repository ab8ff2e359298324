"""Fusion: how an item's text and image become one vector.

Works on hidden vectors of one width; knows nothing of encoders.
Shapes: B items, D width.
"""

import torch
from torch import Tensor, nn


class MLPFusion(nn.Module):
    """Sum of both modalities plus an MLP over [text; image; text ⊙ image]; a missing image is a learned token.

    The residual sum lets training start from "both count alike"; the MLP's last layer starts at nought.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.missing = nn.Parameter(0.02 * torch.randn(dim))
        last = nn.Linear(2 * dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(3 * dim, 2 * dim), nn.GELU(), last)

    def forward(self, text_BD: Tensor, image_BD: Tensor, has_image_B: Tensor) -> Tensor:
        """Fuse to (B, D), not normalised. Where `has_image_B` is false the image's values are not read."""
        image_BD = torch.where(has_image_B[:, None], image_BD, self.missing.to(image_BD.dtype))
        joint = torch.cat([text_BD, image_BD, text_BD * image_BD], dim=1)
        fused: Tensor = text_BD + image_BD + self.mlp(joint)
        return fused
