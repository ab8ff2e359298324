"""Splits that do not leak: what shares a title or a photo stands on one side.

Two photos are near-identical when their perceptual hashes (signs of the low frequencies of the luminance:
Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010) are close: 64 bits find
them, 256 bits and the mean colour confirm. Measured on 1,500 photos of 60 × 80: 95 to 99.9 % of those saved
again at another quality or scale are found; the closest of 12 pairs of different products that 64 bits alone
would join differ in 42 of the 256. Knows nothing of files or queries.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.nn.functional import interpolate

from askew.config import Settings
from askew.shuffle import mixed

Numbers = NDArray[np.int64]
SIDE, LOW, FINE = 32, 8, 16  # photos are averaged to SIDE a side; of the transform LOW and FINE a side are kept
HASH_BITS, FINE_BITS, COLOUR = 2, 16, 8  # in how much near-identical photos may differ
MAX_BAND = 200  # photos of one band that are compared with each other: beyond it, with the next ones alone
ASIDE, NEW = "aside", "new"


class SplitSettings(Settings):
    """How items and queries are told apart for training and evaluation."""

    make: Literal["auto", "given", "four"] = "auto"  # the data's own, or Marqo-GS's four; auto: the own, if any
    new_items: float = Field(default=0.1, ge=0, lt=1)  # share of groups of items kept from the training
    new_queries: float = Field(default=0.1, ge=0, lt=1)
    in_domain: float = Field(default=0.05, ge=0, lt=1)  # share of the training's queries evaluated as well
    same_title: bool = True  # titles make groups
    same_photo: bool = True  # near-identical photos make groups


def thumbnails(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average n photos, (n, size, size, 3), to (n, SIDE, SIDE, 3)."""
    if pixels.shape[1] == SIDE or not len(pixels):
        return pixels
    photos = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return interpolate(photos, size=(SIDE, SIDE), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def photo_hashes(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hash n photos, (n, size, size, 3), to 64 bits each, (n,), and to 256 bits each, (n, 4)."""
    if not len(pixels):
        return np.empty(0, dtype=np.uint64), np.empty((0, 4), dtype=np.uint64)
    grey = thumbnails(pixels).astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    waves = dctn(grey, axes=(1, 2), norm="ortho")
    coarse = np.maximum(_signs(waves[:, :LOW, :LOW])[:, 0], np.uint64(1))  # 0 is no photo, not a black one
    return coarse, _signs(waves[:, :FINE, :FINE])


def _signs(waves: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Tell of each wave but the constant one whether it is above the median: (n, side, side) to (n, words)."""
    flat = waves.reshape(len(waves), -1)
    bits = flat > np.median(flat[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


def mean_colours(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average n photos, (n, size, size, 3), to (n, 3)."""
    mean: NDArray[np.uint8] = thumbnails(pixels).mean(axis=(1, 2)).round().astype(np.uint8)
    return mean


def groups(rows: NDArray[np.void], settings: SplitSettings) -> Numbers:
    """Number the group of each of n register rows: items linked by a title or a photo, however indirectly."""
    links = [_same(rows["title"])] if settings.same_title else []
    if settings.same_photo:
        links.append(_near(rows))
    pairs = np.concatenate([np.empty((2, 0), dtype=np.int64), *links], axis=1)
    graph = coo_array((np.ones(pairs.shape[1], dtype=np.bool_), (pairs[0], pairs[1])), shape=(len(rows),) * 2)
    labels: Numbers = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _same(keys: NDArray[np.uint64]) -> Numbers:
    """Link each row to the next one with the same key: (2, m)."""
    order = np.argsort(keys, kind="stable")
    follows = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return np.stack([order[follows], order[follows + 1]]).astype(np.int64)


def _near(rows: NDArray[np.void]) -> Numbers:
    """Link rows with near-identical photos. Of one band more than bits may differ, one must be equal."""
    with_photo = np.flatnonzero(rows["photo"])
    photo, fine = rows["photo"][with_photo], rows["detail"][with_photo]
    mean = rows["colour"][with_photo].astype(np.int16)
    edges = np.linspace(0, 64, HASH_BITS + 2).astype(int)
    found = []
    for low, high in pairwise(edges):
        band = (photo >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.lexsort((photo, band))
        band, at, step = band[order], np.arange(len(order)), 1
        while len(at := at[at + step < len(order)]) and len(at := at[band[at] == band[at + step]]):
            one, other = order[at], order[at + step]
            near = np.bitwise_count(photo[one] ^ photo[other]) <= HASH_BITS
            one, other = one[near], other[near]
            near = np.bitwise_count(fine[one] ^ fine[other]).sum(axis=1) <= FINE_BITS
            near &= (np.abs(mean[one] - mean[other]) <= COLOUR).all(axis=1)
            found.append(np.stack([with_photo[one[near]], with_photo[other[near]]]))
            if (step := step + 1) > MAX_BAND:
                break
    return np.concatenate([np.empty((2, 0), dtype=np.int64), *found], axis=1).astype(np.int64)


def set_aside(labels: Numbers, split: NDArray[np.uint8], names: Sequence[str], train: str) -> NDArray[np.bool_]:
    """Tell which of n items leak: their group stands on another side too, which keeps it.

    A group stays with evaluation before training (so that the judged items stay as they were given), and of
    two evaluation splits with the first by name.
    """
    rank = np.array([(name == train, name) for name in names], dtype=[("train", "?"), ("name", "U64")])
    order = np.argsort(np.argsort(rank, order=("train", "name"), kind="stable"), kind="stable")
    side = order[split]
    first = np.full(int(labels.max(initial=-1)) + 1, len(names), dtype=np.int64)
    np.minimum.at(first, labels, side)
    leaks: NDArray[np.bool_] = side != first[labels]
    return leaks


def group_keys(ids: NDArray[np.uint64], labels: Numbers) -> NDArray[np.uint64]:
    """Give each of n items the least id hash of its group, which does not depend on the items' order."""
    least = np.full(int(labels.max(initial=-1)) + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, labels, ids)
    return least[labels]


def chosen(keys: NDArray[np.uint64], share: float, seed: int, salt: int) -> NDArray[np.bool_]:
    """Choose about `share` of n keys by a hash of each, the same for the same seed and salt."""
    return mixed(keys, seed * 1_000_003 + salt) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
