"""Towers: a query tower over text, an item tower over text and image.

Follows SMAR (JD.com, SIGIR 2023, arXiv 2506.20330) in having one query vector Q and three item vectors
S_t, S_i, S_m in one space. Encoders are small and start from scratch: a BERT of few layers with mean
pooling (our choice: with few steps it learns faster than a CLS token) and a torchvision backbone.
Knows nothing of files, losses or clusters.
Shapes: B batch, L tokens, D dimensions, S image side in pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import ShuffleNetV2
from transformers import BertConfig, BertModel

from askew.config import Settings
from askew.errors import ConfigError
from askew.fusion import MLPFusion

SMALL = "small"


class TowerSettings(Settings):
    """What determines the shape of both towers."""

    dim: int = 128
    text_width: int = 128
    text_layers: int = 1
    text_heads: int = 4
    query_length: int = 16
    title_length: int = 32
    vocabulary: int = 8000
    vision: str = SMALL
    image_size: int = 48


class ItemVectors(NamedTuple):
    """An item batch's vectors, each (B, D) and L2-normalised: S_t, S_i and S_m of SMAR."""

    text: Tensor
    image: Tensor
    fused: Tensor


class TextEncoder(nn.Module):
    """Token ids to a (B, D) hidden vector: BERT, mean over real tokens, linear."""

    def __init__(self, settings: TowerSettings, vocabulary: int, length: int) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=settings.text_heads,
                intermediate_size=4 * settings.text_width,
                max_position_embeddings=length,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self.project = nn.Linear(settings.text_width, settings.dim)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Encode (B, L) ids, 0 being padding."""
        mask_BL = ids_BL != 0
        mask_BL[:, 0] = True  # a text without a token attends to its first padding
        hidden = self.bert(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        weight = mask_BL.to(hidden.dtype)[:, :, None]
        projected: Tensor = self.project((hidden * weight).sum(1) / weight.sum(1))
        return projected


class ImageEncoder(nn.Module):
    """Photos to a (B, D) hidden vector: a torchvision backbone, linear."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: TowerSettings) -> None:
        super().__init__()
        self.backbone, width = backbone(settings.vision)
        self.project = nn.Linear(width, settings.dim)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BSS3: Tensor) -> Tensor:
        """Encode (B, S, S, 3) uint8 photos; the permuted view is channels-last, as convolutions like it."""
        photos = pixels_BSS3.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(self.std)
        projected: Tensor = self.project(self.backbone(photos))
        return projected


class TwoTower(nn.Module):
    """The query tower and the item tower, with a learned temperature (as log of the scale 1/τ)."""

    def __init__(self, settings: TowerSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        self.query = TextEncoder(settings, vocabulary, settings.query_length)
        self.title = TextEncoder(settings, vocabulary, settings.title_length)
        self.photo = ImageEncoder(settings)
        self.fusion = MLPFusion(settings.dim)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())

    def queries(self, ids_BL: Tensor) -> Tensor:
        """Encode queries to Q (B, D), normalised."""
        return F.normalize(self.query(ids_BL).float(), dim=1)

    def items(self, ids_BL: Tensor, pixels_BSS3: Tensor, has_image_B: Tensor) -> ItemVectors:
        """Encode items to S_t, S_i, S_m. Without an image, S_i is the vector of the learned missing token."""
        text, image = self.title(ids_BL).float(), self.photo(pixels_BSS3).float()
        image = torch.where(has_image_B[:, None], image, self.fusion.missing)
        fused = self.fusion(text, image, has_image_B)
        return ItemVectors(*(F.normalize(h.float(), dim=1, eps=1e-6) for h in (text, image, fused)))

    def forward(
        self, query_BL: Tensor, title_BL: Tensor, pixels_BSS3: Tensor, has_image_B: Tensor
    ) -> tuple[Tensor, ItemVectors, Tensor]:
        """Encode a batch of both sides; returns queries, items and the scale 1/τ, kept at or below 100."""
        scale = self.log_scale.clamp(max=4.6052).exp()
        return self.queries(query_BL), self.items(title_BL, pixels_BSS3, has_image_B), scale


def backbone(name: str) -> tuple[nn.Module, int]:
    """Make a vision backbone without its classifier: (module to (B, width), width).

    "small" is a ShuffleNetV2 of 0.35 M parameters that a laptop trains; any other name is torchvision's.
    Raises ConfigError for a name that torchvision does not know.
    """
    if name == SMALL:
        model: nn.Module = ShuffleNetV2([1, 2, 1], [24, 48, 96, 192, 256])
    elif name in torchvision.models.list_models(module=torchvision.models):
        model = torchvision.models.get_model(name, weights=None)
    else:
        raise ConfigError("a vision backbone: 'small' or a name of torchvision.models", repr(name), "mend it")
    for attribute in ("fc", "classifier", "heads", "head"):
        if isinstance(head := getattr(model, attribute, None), nn.Module):
            setattr(model, attribute, nn.Identity())
            return model, _inputs(head, name)
    raise ConfigError("a backbone that ends in a classifier", f"{name!r}", "choose another")


def _inputs(head: nn.Module, name: str) -> int:
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
    raise ConfigError("a backbone whose classifier is linear", f"{name!r}", "choose another")
