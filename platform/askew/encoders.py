"""Encoders: texts and photos to hidden vectors, from scratch or from a checkpoint of transformers or torchvision.

A checkpoint's architecture is kept in the settings, so that a trained model is built again without it. Knows
nothing of queries, items, fusion or losses.
Shapes: B batch, L text tokens, P image tokens, W the encoder's width, D ours, S image side in pixels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from askew.config import Settings
from askew.errors import ConfigError
from askew.fusion import Hidden
from askew.inputs import PADDING

CONVNETS: Mapping[str, tuple[int, ...]] = {"small": (128,), "medium": (128, 256)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOLED = ("clip", "siglip")  # model types whose own pooled output is what they were trained by
HALVES = {"text": "text_model", "vision": "vision_model"}
ALONE = {"siglip_text_model": SiglipTextModel, "siglip_vision_model": SiglipVisionModel}


class TextSettings(Settings):
    """A text encoder: a BERT from scratch of this shape, or a checkpoint (folder or hub name)."""

    checkpoint: str = ""  # of a BERT-like model, or of CLIP or SigLIP; empty: from scratch
    width: int = Field(default=128, ge=8)  # from scratch: of its layers,
    layers: int = Field(default=1, ge=1)  # of which there are so many,
    heads: int = Field(default=4, ge=1)  # with so many heads of attention
    pooling: Literal["auto", "mean", "cls"] = "auto"  # auto: as CLIP and SigLIP were trained, others by the mean
    config: dict[str, Any] = Field(default_factory=dict)  # the checkpoint's; filled in when it is read


class ImageSettings(Settings):
    """A vision encoder: `small`, `medium` or a backbone of torchvision.models from scratch, or a checkpoint."""

    backbone: str = "small"  # or medium, or a name of torchvision.models
    checkpoint: str = ""  # of ViT, CLIP or SigLIP, a folder or hub name; empty: the backbone
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels, taken off; a checkpoint's own where it has one
    std: tuple[float, float, float] = IMAGENET_STD  # of pixels, divided by
    config: dict[str, Any] = Field(default_factory=dict)  # the checkpoint's; filled in when it is read

    def read(self) -> Self:
        """Fill in what the checkpoint says of itself: architecture and pixel statistics."""
        if not self.checkpoint or self.config:
            return self
        found: dict[str, Any] = {"config": config_of(self.checkpoint)}
        processor = Path(self.checkpoint) / "preprocessor_config.json"
        if processor.is_file():
            stated = json.loads(processor.read_text(encoding="utf-8"))
            found |= {n: tuple(stated[f"image_{n}"]) for n in ("mean", "std") if f"image_{n}" in stated}
        return self.model_copy(update=found)


def config_of(checkpoint: str) -> dict[str, Any]:
    """Read a checkpoint's architecture. Raises ConfigError when there is none."""
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(
            f"a checkpoint of transformers at {checkpoint}", found, "check its path or name"
        ) from error
    return config


def half(model: PreTrainedModel, side: Literal["text", "vision"]) -> PreTrainedModel:
    """Take one side of a checkpoint that has both; another is returned as it is."""
    part: PreTrainedModel = getattr(model, HALVES[side], model)
    return part


def built(config: dict[str, Any], side: Literal["text", "vision"]) -> PreTrainedModel:
    """Build one side of an architecture with random weights and without dropout."""
    made = AutoConfig.for_model(**config)
    kind = ALONE.get(made.model_type)
    return half(kind(made) if kind else AutoModel.from_config(made, trust_remote_code=False), side)


def pretrained(checkpoint: str, side: Literal["text", "vision"]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Read the weights of one side of a checkpoint, and its projection to the common space if it has one.

    Of safetensors alone, and without its code, if it has any: neither runs anything. Raises ConfigError.
    """
    kind = ALONE.get(config_of(checkpoint)["model_type"], AutoModel)
    try:
        whole = kind.from_pretrained(checkpoint, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise ConfigError(f"weights in safetensors at {checkpoint}", found, "convert them") from error
    projection = getattr(whole, "text_projection" if side == "text" else "visual_projection", None)
    weight = projection.weight.detach() if isinstance(projection, nn.Linear) else None
    return dict(half(whole, side).state_dict()), weight


class TextEncoder(nn.Module):
    """Token ids to hidden vectors of width D."""

    def __init__(self, settings: TextSettings, dim: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.settings = settings
        self.body = built(settings.config, "text") if settings.config else _bert(settings, vocabulary, length)
        config = self.body.config
        kind = str(config.model_type)
        self._padding = int(config.pad_token_id or 0)
        # SigLIP was trained on texts that are padded to one length, and not masked
        self._filled = int(config.max_position_embeddings) if kind.startswith("siglip") else 0
        self._pooled = settings.pooling == "auto" and kind.startswith(POOLED)
        self.project = nn.Linear(config.hidden_size, dim)
        if not self._pooled:
            self.body.pooler = None

    def forward(self, ids_BL: Tensor) -> Hidden:
        """Encode (B, L) ids, PADDING where there is none."""
        if self._filled:
            ids_BL = functional.pad(ids_BL, (0, self._filled - ids_BL.shape[1]), value=PADDING)
        mask_BL = ids_BL != PADDING
        mask_BL[:, 0] = True  # a text without a token attends to its first padding
        ids_BL = ids_BL.masked_fill(ids_BL == PADDING, self._padding)
        out = self.body(input_ids=ids_BL, attention_mask=None if self._filled else mask_BL)
        tokens_BLW = out.last_hidden_state
        if self._pooled:
            pooled_BW = out.pooler_output
        elif self.settings.pooling == "cls":
            pooled_BW = tokens_BLW[:, 0]
        else:
            weight = mask_BL.to(tokens_BLW.dtype)[:, :, None]
            pooled_BW = (tokens_BLW * weight).sum(1) / weight.sum(1)
        return Hidden(self.project(pooled_BW), tokens_BLW, mask_BL)


def _bert(settings: TextSettings, vocabulary: int, length: int) -> BertModel:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if not torch.cuda.is_available():  # of so few tokens and heads, the fused kernel is slow on a processor
        config._attn_implementation = "eager"
    return BertModel(config, add_pooling_layer=False)


class ImageEncoder(nn.Module):
    """Photos to hidden vectors of width D."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ImageSettings, dim: int) -> None:
        super().__init__()
        self.settings = settings
        if settings.config:
            self.body: nn.Module = built(settings.config, "vision")
            self.width = int(self.body.config.hidden_size)
            if not str(self.body.config.model_type).startswith(POOLED):
                self.body.pooler = None
        else:
            self.body, self.width = backbone(settings.backbone)
        self.project = nn.Linear(self.width, dim)
        for name, values in (("mean", settings.mean), ("std", settings.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BSS3: Tensor) -> Hidden:
        """Encode (B, S, S, 3) uint8 photos; the permuted view is channels-last, as convolutions like it."""
        photos = pixels_BSS3.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(self.std)
        if isinstance(self.body, PreTrainedModel):
            out = self.body(pixel_values=photos, interpolate_pos_encoding=True)
            tokens_BPW = out.last_hidden_state
            pooled_BW = getattr(out, "pooler_output", None)
            if pooled_BW is None or not str(self.body.config.model_type).startswith(POOLED):
                pooled_BW = tokens_BPW[:, 0]
        else:
            out = self.body(photos)
            tokens_BPW = out.flatten(2).mT if out.dim() == 4 else out[:, None]
            pooled_BW = tokens_BPW.mean(1)
        mask_BP = torch.ones(tokens_BPW.shape[:2], dtype=torch.bool, device=tokens_BPW.device)
        return Hidden(self.project(pooled_BW), tokens_BPW, mask_BP)


class ConvNet(nn.Module):
    """Strided convolutions, and a residual block at each width: (B, 3, S, S) to (B, W, S/8, S/8), or less.

    What a laptop's cores do fast in bfloat16. Normalised by groups, so that photos do not see each other.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        first = widths[0]
        layers: list[nn.Module] = [_convolution(3, first // 4, 2), _convolution(first // 4, first // 2, 2)]
        for before, width in zip((first // 2, *widths), widths, strict=False):
            layers += [_convolution(before, width, 2), _Residual(width)]
        self.layers, self.width = nn.Sequential(*layers), widths[-1]

    def forward(self, photos: Tensor) -> Tensor:
        """Encode photos."""
        features: Tensor = self.layers(photos)
        return features


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(_convolution(width, width, 1), _convolution(width, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        refined = features
        for layer in self:
            refined = layer(refined)
        return features + refined


def _convolution(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.GroupNorm(1, out), nn.ReLU())


def without_batches(module: nn.Module) -> nn.Module:
    """Replace batch normalisation by group normalisation, in place.

    By batches, a photo's vector would depend on the others with it: on the number of workers, and on the pieces
    that gradient caching cuts.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))
        else:
            without_batches(child)
    return module


def backbone(name: str) -> tuple[nn.Module, int]:
    """Make a vision backbone without its classifier: (module to (B, W) or (B, W, h, w), W).

    "small" and "medium" are a `ConvNet` of 0.4 or 1.9 M parameters; any other name is torchvision's, with group
    instead of batch normalisation.
    Raises ConfigError for a name that torchvision does not know.
    """
    if name in CONVNETS:
        net = ConvNet(CONVNETS[name])
        return net, net.width
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError("a backbone: small, medium or a name of torchvision.models", repr(name), "mend it")
    model = without_batches(torchvision.models.get_model(name, weights=None))
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


def load_pretrained(encoder: TextEncoder | ImageEncoder, side: Literal["text", "vision"]) -> None:
    """Give an encoder its checkpoint's weights; its projection too where the widths agree."""
    checkpoint = encoder.settings.checkpoint
    if not checkpoint:
        return
    weights, projection = pretrained(checkpoint, side)
    wanted = encoder.body.state_dict()
    encoder.body.load_state_dict({name: weights[name] for name in wanted})
    if projection is None and encoder.project.in_features == encoder.project.out_features:
        projection = torch.eye(encoder.project.in_features)
    if projection is not None and projection.shape == encoder.project.weight.shape:
        with torch.no_grad():
            encoder.project.weight.copy_(projection)
            encoder.project.bias.zero_()
