"""The objective of a training stage: which vectors are drawn together, how, and by what weights.

Pure tensors: knows nothing of workers, files or schedules.
Shapes: B queries and M items of this worker (P positives, then M − P mined negatives; each positive has B / P
queries, and the first P queries are one of each), N items of all workers.
"""

from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from askew import losses
from askew.config import Settings
from askew.fusion import FusionName
from askew.towers import Encoded, Items, indexed_items, indexed_queries

Term = Literal["domain", "text", "image", "fused", "adaptive"]


class LossSettings(Settings):
    """What a stage minimises: a weighted sum of terms, each a contrastive loss.

    SMAR's stage 1 is α `text` + β `image` + γ `fused`, its stage 2 `adaptive`; Beyond Text is `domain`, then
    `text` and `image`, then `fused` with little of both. The papers' weights were not seen.
    """

    domain: float = Field(default=0.0, ge=0)  # an item's text and its photo with each other, both ways, as CLIP
    text: float = Field(default=0.0, ge=0)  # Q with S_t
    image: float = Field(default=0.0, ge=0)  # Q with S_i
    fused: float = Field(default=0.0, ge=0)  # Q with S_m
    adaptive: float = Field(default=0.0, ge=0)  # Q with (1−p)·S_t + p·S_m
    kind: Literal["info_nce", "hinge"] = "info_nce"  # with a learned temperature, or DPSR's
    margin: float = Field(default=0.1, ge=0)  # of hinge and triplet
    triplet: float = Field(default=0.0, ge=0)  # weight, in each term with Q, of max(0, margin − f⁺ + f(mined))
    graded: bool = False  # weigh pairs by their grade (GCL)
    log_q: bool = False  # correct for items that are drawn often
    matryoshka: tuple[int, ...] = ()  # the first so many dimensions must do as well

    @model_validator(mode="after")
    def _something(self) -> "LossSettings":
        if not any(self.weights().values()):
            raise ValueError("no term of the loss has a weight: give one of domain, text, image, fused, adaptive")
        return self

    def weights(self) -> dict[Term, float]:
        """Weight of each term."""
        return {
            "domain": self.domain, "text": self.text, "image": self.image, "fused": self.fused,
            "adaptive": self.adaptive,
        }  # fmt: skip

    def unusable(self, fusion: FusionName, header: bool) -> str:
        """Say why towers of this fusion cannot be trained so; empty if they can."""
        none: dict[FusionName, tuple[Term, ...]] = {"text": ("image", "domain"), "image": ("text", "domain")}
        missing = none.get(fusion, ())
        for term in missing:
            if self.weights()[term]:
                return f"the fusion {fusion!r} has no encoder for the term {term!r}"
        if self.adaptive and (not header or fusion in ("text", "image")):
            return "the term 'adaptive' needs towers.header, and a fusion of text and image"
        return ""

    def trains(self) -> set[str]:
        """Name the parts that get a gradient: query, title, photo, fusion, header."""
        joint = bool(self.fused or self.adaptive)
        asked = bool(self.text or self.image or joint)
        parts: dict[str, float | bool] = {"query": asked, "fusion": joint, "header": self.adaptive}
        parts |= {"title": self.text or self.domain or joint, "photo": self.image or self.domain or joint}
        return {name for name, trained in parts.items() if trained}


class Meeting(NamedTuple):
    """Who is whose: what a loss must know beside the vectors."""

    target_B: Tensor  # each query's positive among the N
    masked_BN: Tensor  # items known to be right for the query, but for the target
    same_BN: Tensor  # copies of the query's positive among the N, but for the target
    brings_B: Tensor  # queries that bring a mined negative: these are the last of the worker's items, in order
    has_image_N: Tensor
    photo_P: Tensor  # 1 for positives with a photo, 0 for others; relative to its mean over all workers' positives
    weight_B: Tensor  # grade of the pair; relative to its mean over all workers' pairs
    log_q_N: Tensor  # logarithm of each item's chance to be drawn


def loss_of(
    encoded: Encoded, everywhere: Items, meeting: Meeting, settings: LossSettings
) -> tuple[Tensor, dict[str, float]]:
    """This worker's loss, and its terms.

    `encoded` holds the worker's own queries and items, `everywhere` the items of all workers. The mean over
    workers is the loss over the global batch.
    """
    terms: dict[str, Tensor] = {}
    for name, weight in settings.weights().items():
        if not weight:
            continue
        if name == "domain":
            terms[name] = _domain(encoded, everywhere, meeting)
            continue
        header = name == "adaptive"
        queries = indexed_queries(encoded.queries_BD, encoded.gate_B, header)
        own, items = (
            indexed_items(side, header) if name in ("fused", "adaptive") else getattr(side, name)
            for side in (encoded.items, everywhere)
        )
        terms[name] = _asked(queries, own, items, encoded.scale, meeting, settings)
    weights = settings.weights()
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()  # type: ignore[index]
    return total, {name: float(term.detach()) for name, term in terms.items()}


def _asked(
    queries_BD: Tensor, own_MD: Tensor, items_ND: Tensor, scale: Tensor, meeting: Meeting, settings: LossSettings
) -> Tensor:
    """The loss of queries against items, with its triplet term if it has one."""
    weight_B = meeting.weight_B if settings.graded else None
    if settings.kind == "hinge":
        base = partial(
            losses.hinge, target_B=meeting.target_B, margin=settings.margin, masked_BN=meeting.masked_BN,
            weight_B=weight_B,
        )  # fmt: skip
    else:
        base = partial(
            losses.info_nce, target_B=meeting.target_B, scale=scale, masked_BN=meeting.masked_BN,
            weight_B=weight_B, log_q_N=meeting.log_q_N if settings.log_q else None,
        )  # fmt: skip
    loss = base(queries_BD, items_ND)
    if settings.matryoshka:
        loss = loss + losses.matryoshka(base, queries_BD, items_ND, settings.matryoshka)
    brings = meeting.brings_B
    if settings.triplet and brings.any():
        mined = own_MD[len(own_MD) - int(brings.sum()) :]
        positives = items_ND[meeting.target_B[brings]]
        there = torch.ones_like(mined[:, :1], dtype=torch.bool)
        loss = loss + settings.triplet * losses.triplet(
            queries_BD[brings], positives, mined[:, None], there, settings.margin
        )
    return loss


def _domain(encoded: Encoded, everywhere: Items, meeting: Meeting) -> Tensor:
    """CLIP's loss over items that have a photo: the text finds its photo, and the photo its text."""
    own, num = encoded.items, len(meeting.photo_P)
    target_P, same_PN = meeting.target_B[:num], meeting.same_BN[:num]
    assert own.text is not None
    assert own.image is not None
    assert everywhere.text is not None
    assert everywhere.image is not None
    masked = same_PN | ~meeting.has_image_N[None, :]
    masked = masked.scatter(1, target_P[:, None], False)
    pairs = ((own.text[:num], everywhere.image), (own.image[:num], everywhere.text))
    ways = [losses.info_nce(a, b, target_P, encoded.scale, masked, meeting.photo_P) for a, b in pairs]
    return (ways[0] + ways[1]) / 2
