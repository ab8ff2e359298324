"""Modalities: what an item's text and photo each bring to a ranking.

Encodes items whole, with another's photo, without one, and without text. Knows nothing of queries' judgments.
Shapes: N items, D dimensions, Q queries, K hits, S image side.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Photos = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # pixels (N, S, S, 3), and which there are (N,)
WITHOUT_TEXT = ""


class Encoder(Protocol):
    """What encodes items: a `models.Model`."""

    header: bool

    def items(
        self, texts: Sequence[str], pixels: NDArray[np.uint8], has_image: NDArray[np.bool_]
    ) -> Mapping[str, Vectors]:
        """Encode N items to "text", "image" and "fused", and "index"."""


def ways(model: Encoder, texts: Sequence[str], photos: Photos, others: Photos | None) -> dict[str, Vectors]:
    """Encode N items in each way that they are ranked by: vectors (N, D).

    "text", "image", "fused"; "adaptive" with a header; and, if there are `others` and the model reads both
    modalities, what the index would hold with the photo of another item ("shuffled") and with none ("missing").
    """
    found = dict(model.items(texts, *photos))
    whole = found.pop("index")
    if model.header:
        found["adaptive"] = whole
    if others is not None and {"text", "image"} <= set(found):
        pixels, there = photos
        found["shuffled"] = model.items(texts, *others)["index"]
        found["missing"] = model.items(texts, pixels, np.zeros_like(there))["index"]
    return found


class Shares(NamedTuple):
    """What brought the score of each of K hits of Q queries, each (Q, K): they add up to the score."""

    text: Vectors
    image: Vectors
    neither: Vectors  # what an item without text and photo would have


def lacking(model: Encoder, texts: Sequence[str], photos: Photos) -> dict[str, Vectors]:
    """Encode N items as they are indexed: "whole", without photo, without text, and with "neither"."""
    pixels, there = photos
    nothing, blank = np.zeros_like(there), [WITHOUT_TEXT] * len(texts)
    return {
        "whole": model.items(texts, pixels, there)["index"],
        "text": model.items(texts, pixels, nothing)["index"],
        "image": model.items(blank, pixels, there)["index"],
        "neither": model.items(blank, pixels, nothing)["index"],
    }


def shares(scores: Mapping[str, Vectors]) -> Shares:
    """Part scores (Q, K) of hits that were encoded as `lacking` does into what text and photo brought.

    Each modality's share is what it adds, averaged over being added first and last (Shapley's value for two).
    """
    whole, text, image, neither = (scores[name] for name in ("whole", "text", "image", "neither"))
    half = np.float32(0.5)
    return Shares(half * (text - neither + whole - image), half * (image - neither + whole - text), neither)
