"""Negatives: for each pair of a query and a positive item, items that do not fit, of several kinds.

    judged       judged worse for the same query
    random       any other item of the training
    same_kind    of the positive's kind, with other traits (kind_field, trait_fields)
    bm25         found by BM25 for the query, yet no positive
    model        found by a trained model's index

A proposal is masked, and counted, when it is a known positive of the query, has the title or the photo of
one, or (if mined) scores too close to the positive: false negatives teach the wrong thing. Range and margin
are those of sentence-transformers' `mine_hard_negatives`. Works on numbers of items; knows nothing of texts.
"""

from collections import Counter
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from askew.config import Settings
from askew.shuffle import mixed

Numbers = NDArray[np.int64]
Kind = Literal["judged", "random", "same_kind", "bm25", "model"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NONE = -1
OVERSAMPLE = 4  # proposals for each negative that is wanted and drawn by chance


class NegativeSettings(Settings):
    """How many negatives of each kind a pair gets, and which mined ones are believed."""

    per_pair: dict[Kind, int] = Field(default={"judged": 1, "random": 1})
    range_min: int = Field(default=5, ge=0)  # mined: the best so many are passed over
    range_max: int = Field(default=50, ge=1)  # mined: no deeper than this
    relative_margin: float | None = Field(
        default=0.05, ge=0, lt=1
    )  # mined: at most (1 − margin) × the positive's score
    max_score: float | None = None
    model: str = ""  # kind `model`: name of the registered model,
    version: str = "champion"  # and its version or alias; its index is searched


class Mined(NamedTuple):
    """What a search found: for each of P pairs the best k items and their scores, and the positive's own score.

    `items` and `scores` are (P, k), best first, padded with −1; `positive` is (P,): where the positive was not
    among the k, the score of the last, which its own does not exceed.
    """

    items: Numbers
    scores: NDArray[np.float32]
    positive: NDArray[np.float32]


class Pairs(NamedTuple):
    """P pairs, the rows of their queries ascending, and all that is known positive.

    `known_query` and `known_item` are the (query, item) of every positive judgment, also of items that are
    not trained on.
    """

    query: Numbers
    item: Numbers
    known_query: Numbers
    known_item: Numbers


def choose(
    pairs: Pairs,
    proposals: dict[Kind, tuple[Numbers, NDArray[np.bool_]]],
    rows: NDArray[np.void],
    settings: NegativeSettings,
) -> tuple[Numbers, list[Kind], dict[str, Counter[str]]]:
    """Choose each pair's negatives from proposals of each kind, (P, n) items (−1: none) and which are too close.

    Returns (P, m) items, −1 where too few were left; the kind of each of the m columns; and the ledger: of
    each kind how many were proposed, masked (by reason) and kept.
    """
    known = _Known(pairs, rows)
    chosen, kinds, ledger = list[Numbers](), list[Kind](), dict[str, Counter[str]]()
    for kind in KINDS:
        if not (wanted := settings.per_pair.get(kind, 0)):
            continue
        items, close = proposals[kind]
        reasons = {"known_positive": known.item, "same_title": known.title, "same_photo": known.photo}
        left, count = items != NONE, Counter(proposed=int((items != NONE).sum()))
        for reason, check in reasons.items():
            masked = left & check(items)
            count[f"masked_{reason}"], left = int(masked.sum()), left & ~masked
        count["masked_margin"], left = int((left & close).sum()), left & ~close
        left &= ~_repeated(items)
        for other in chosen:
            left &= ~(items[:, :, None] == other[:, None, :]).any(axis=2)
        kept = _first(items, left, wanted)
        count["kept"] = int((kept != NONE).sum())
        ledger[kind] = count
        chosen.append(kept)
        kinds += [kind] * wanted
    empty = np.empty((len(pairs.query), 0), dtype=np.int64)
    return np.concatenate([empty, *chosen], axis=1), kinds, ledger


class _Known:
    """Answers whether an item is, or looks like, a positive of a pair's query."""

    def __init__(self, pairs: Pairs, rows: NDArray[np.void]) -> None:
        self._query, self._rows = pairs.query.astype(np.uint64)[:, None], rows
        query, item = pairs.known_query.astype(np.uint64), pairs.known_item
        self._items = np.sort(_mixed(query, item.astype(np.uint64)))
        self._titles = np.sort(_mixed(query, rows["title"][item]))
        self._photos = np.sort(_mixed(query, rows["photo"][item]))

    def item(self, items: Numbers) -> NDArray[np.bool_]:
        return _within(_mixed(self._query, items.astype(np.uint64)), self._items)

    def title(self, items: Numbers) -> NDArray[np.bool_]:
        return _within(_mixed(self._query, self._rows["title"][items]), self._titles)

    def photo(self, items: Numbers) -> NDArray[np.bool_]:
        photo = self._rows["photo"][items]
        alike: NDArray[np.bool_] = _within(_mixed(self._query, photo), self._photos) & (photo != 0)
        return alike


def _mixed(query: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for a query and a key (the query scrambled, added): two differ but by a chance of 2⁻⁶⁴."""
    with np.errstate(over="ignore"):
        return np.asarray(mixed(query, 0) + key)


def _within(keys: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(keys.shape, dtype=np.bool_)
    found: NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)] == keys
    return found


def _repeated(items: Numbers) -> NDArray[np.bool_]:
    """Tell which items stand earlier in their row already."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros(items.shape, dtype=np.bool_)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.empty_like(again)
    np.put_along_axis(out, order, again, axis=1)
    return out


def _first(items: Numbers, left: NDArray[np.bool_], wanted: int) -> Numbers:
    """Take the first `wanted` that are left in each row, padded with −1."""
    order = np.argsort(~left, axis=1, kind="stable")[:, :wanted]
    kept = np.where(np.take_along_axis(left, order, axis=1), np.take_along_axis(items, order, axis=1), NONE)
    return np.pad(kept, ((0, 0), (0, wanted - kept.shape[1])), constant_values=NONE)


# --- proposals -----------------------------------------------------------------------------------


def random(pairs: Pairs, pool: Numbers, wanted: int, generator: np.random.Generator) -> Numbers:
    """Propose (P, 4·wanted) items of the pool."""
    if not len(pool):
        return np.empty((len(pairs.query), 0), dtype=np.int64)
    return pool[generator.integers(len(pool), size=(len(pairs.query), OVERSAMPLE * wanted))]


def judged(
    pairs: Pairs, worse_query: Numbers, worse_item: Numbers, wanted: int, generator: np.random.Generator
) -> Numbers:
    """Propose items judged worse for the pair's query; `worse_query` is ascending."""
    first, last = (np.searchsorted(worse_query, pairs.query, side=s) for s in ("left", "right"))
    return _drawn(worse_item, first, last, wanted, generator)


def same_kind(
    pairs: Pairs, pool: Numbers, rows: NDArray[np.void], wanted: int, generator: np.random.Generator
) -> Numbers:
    """Propose items of the positive's kind with other traits; `pool` is sorted by kind."""
    kinds = rows["kind"][pool]
    kind = rows["kind"][pairs.item]
    first, last = (np.searchsorted(kinds, kind, side=s) for s in ("left", "right"))
    items = _drawn(pool, first, np.where(kind == 0, first, last), wanted, generator)
    same = rows["traits"][items] == rows["traits"][pairs.item][:, None]
    return np.where(same, NONE, items)


def _drawn(items: Numbers, first: Numbers, last: Numbers, wanted: int, generator: np.random.Generator) -> Numbers:
    """Draw from items[first:last] for each row; −1 where that is empty."""
    share = generator.random((len(first), OVERSAMPLE * wanted))
    at = first[:, None] + (share * (last - first)[:, None]).astype(np.int64)
    if not len(items):
        return np.full(at.shape, NONE, dtype=np.int64)
    return np.where((last > first)[:, None], items[np.minimum(at, len(items) - 1)], NONE)


def mined(found: Mined, settings: NegativeSettings, kind: Kind) -> tuple[Numbers, NDArray[np.bool_]]:
    """Propose what a search found in the range, and tell which of it scores too close to the positive.

    The margin is of a model's scores alone: those of BM25 have no scale.
    """
    span = slice(settings.range_min, settings.range_max)
    items, scores = found.items[:, span], found.scores[:, span]
    close = np.zeros(items.shape, dtype=np.bool_)
    if kind == "model" and settings.relative_margin is not None:
        close |= scores > (1 - settings.relative_margin) * found.positive[:, None]
    if settings.max_score is not None:
        close |= scores > settings.max_score
    return items, close
