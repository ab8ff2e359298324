"""Towers: a query tower over text, an item tower over text and photo.

Follows SMAR (JD.com, SIGIR 2023, arXiv 2506.20330) in having one query vector Q and three item vectors S_t, S_i,
S_m in one space, and its header P(q), which says how much of S_m a query wants. Knows nothing of files, losses or
clusters.
Shapes: B queries, N items, L tokens, D dimensions, S image side in pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from askew.config import Settings
from askew.encoders import ImageEncoder, ImageSettings, TextEncoder, TextSettings, config_of, load_pretrained
from askew.fusion import KINDS, FusionName, Hidden

MAX_LOG_SCALE = 4.6052  # a temperature of 0.01, as in CLIP


class TowerSettings(Settings):
    """What determines the shape of both towers."""

    dim: int = Field(default=128, ge=2)  # width of Q, S_t, S_i and S_m
    text: TextSettings = TextSettings()
    photo: ImageSettings = ImageSettings()
    shared_text: bool = False  # one text encoder for queries and titles
    fusion: FusionName = "concat"
    header: bool = False  # SMAR's P(q): the index then holds [S_t; S_m]
    query_length: int = Field(default=16, ge=1)  # tokens; the rest of a query is not read
    title_length: int = Field(default=32, ge=1)  # tokens
    vocabulary: int = Field(
        default=8000, ge=260
    )  # entries that are learned from the catalogue, without a checkpoint
    image_size: int = Field(default=48, ge=8)  # pixels a side, as the triplets have it

    def read(self) -> "TowerSettings":
        """Fill in what checkpoints say of themselves. Raises ConfigError when one cannot be read."""
        text = self.text
        if text.checkpoint and not text.config:
            text = text.model_copy(update={"config": config_of(text.checkpoint)})
        return self.model_copy(update={"text": text, "photo": self.photo.read()})

    @property
    def index_dim(self) -> int:
        """Width of the vectors that are indexed."""
        return 2 * self.dim if self.header else self.dim


class Items(NamedTuple):
    """An item batch's vectors, each (N, D) and L2-normalised: S_t, S_i and S_m; None where there is no encoder."""

    text: Tensor | None
    image: Tensor | None
    fused: Tensor


class Encoded(NamedTuple):
    """A batch of both sides: Q (B, D), P(q) (B,), the items' vectors, and the scale 1/τ."""

    queries_BD: Tensor
    gate_B: Tensor
    items: Items
    scale: Tensor


class TwoTower(nn.Module):
    """The query tower and the item tower, with a learned temperature (as log of the scale 1/τ)."""

    def __init__(self, settings: TowerSettings, vocabulary: int) -> None:
        super().__init__()
        self.settings = settings
        longest = max(settings.query_length, settings.title_length)
        self.query = TextEncoder(settings.text, settings.dim, vocabulary, longest)
        self.title: TextEncoder | None = None
        self.photo: ImageEncoder | None = None
        if settings.fusion != "image" and not settings.shared_text:
            self.title = TextEncoder(settings.text, settings.dim, vocabulary, longest)
        if settings.fusion != "text":
            self.photo = ImageEncoder(settings.photo, settings.dim)
            self.missing = nn.Parameter(0.02 * torch.randn(settings.dim))
        self.fusion = KINDS[settings.fusion](settings.dim)
        if self.fusion.reads_tokens:
            self.text_tokens = nn.Linear(self.query.project.in_features, settings.dim)
            self.photo_tokens = nn.Linear(self.photo.width if self.photo else 1, settings.dim)
        if settings.header:
            self.header = nn.Linear(settings.dim, 1)
            nn.init.zeros_(self.header.weight)
            nn.init.constant_(self.header.bias, 4.0)  # at first as good as all of S_m
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())

    def start(self) -> None:
        """Load the weights of the checkpoints that the settings name."""
        for text in (self.query, self.title):
            if text is not None:
                load_pretrained(text, "text")
        if self.photo is not None:
            load_pretrained(self.photo, "vision")

    def queries(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Encode queries to Q (B, D), normalised, and P(q) (B,): the share of S_m in the score (1: no header)."""
        hidden_BD = self.query(ids_BL).pooled_BD.float()
        gate_B = torch.ones_like(hidden_BD[:, 0])
        if self.settings.header:
            gate_B = torch.sigmoid(self.header(hidden_BD))[:, 0]
        return F.normalize(hidden_BD, dim=1), gate_B

    def items(self, ids_NL: Tensor, pixels_NSS3: Tensor, has_image_N: Tensor) -> Items:
        """Encode items to S_t, S_i, S_m. Without an image, S_i is the vector of the learned missing token."""
        text = image = None
        if self.settings.fusion != "image":
            text = (self.query if self.title is None else self.title)(ids_NL)
        if self.photo is not None:
            image = self.photo(pixels_NSS3)
            there = has_image_N[:, None]
            image = image._replace(pooled_BD=torch.where(there, image.pooled_BD.float(), self.missing))
        fused = self.fusion(*self._for_fusion(text, image), has_image_N)
        return Items(
            None if text is None else _normal(text.pooled_BD),
            None if image is None else _normal(image.pooled_BD),
            _normal(fused),
        )

    def _for_fusion(self, text: Hidden | None, image: Hidden | None) -> tuple[Hidden | None, Hidden | None]:
        if text is None or image is None or not self.fusion.reads_tokens:
            return text, image
        photo_tokens = self.photo_tokens(image.tokens_BLD)
        return text._replace(tokens_BLD=self.text_tokens(text.tokens_BLD)), image._replace(tokens_BLD=photo_tokens)

    def forward(self, query_BL: Tensor, title_NL: Tensor, pixels_NSS3: Tensor, has_image_N: Tensor) -> Encoded:
        """Encode a batch of both sides; the scale is kept at or below 100."""
        scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp()
        return Encoded(*self.queries(query_BL), self.items(title_NL, pixels_NSS3, has_image_N), scale)


def _normal(hidden_BD: Tensor) -> Tensor:
    return F.normalize(hidden_BD.float(), dim=1, eps=1e-6)


def indexed_queries(queries_BD: Tensor, gate_B: Tensor, header: bool) -> Tensor:
    """The query's side of SMAR's one-index trick, [(1−p)·Q ; p·Q]; Q alone without a header."""
    if not header:
        return queries_BD
    p = gate_B[:, None]
    return torch.cat([(1 - p) * queries_BD, p * queries_BD], dim=1)


def indexed_items(items: Items, header: bool) -> Tensor:
    """The item's side, [S_t ; S_m]: an inner product is (1−p)·⟨Q, S_t⟩ + p·⟨Q, S_m⟩ then. No header: S_m."""
    if not header or items.text is None:
        return items.fused
    return torch.cat([items.text, items.fused], dim=1)
