"""Tuning: what kind of index a catalogue gets, and how hard it is searched so that a recall holds.

Segments are measured one by one, by anyone who has one: what a search of each effort finds in it, and what is
there to be found. Put together, that is the recall over the whole catalogue, which no process need hold. Knows
nothing of models or clusters.
Shapes: Q queries, N vectors, D dimensions, K hits.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from askew import ann
from askew.ann import Design, Effort, Index, Kind, Refine, Rows, Vectors
from askew.config import Settings
from askew.errors import ConfigError

K = 100  # hits by which efforts are measured: recall@100, and @10 from the first of them
BATCH = 32  # queries searched at once
ENOUGH = 0.9995  # of a segment's own best; more effort would find nothing more
STALLED = 0.0005  # less gain than this over two rungs
EXACT_UPTO = 50_000  # vectors that are searched exactly, if nothing else is asked


class IndexKindSettings(Settings):
    """What an index must hold to, or what it shall be."""

    kind: Kind | Literal["auto"] = "auto"
    lists: int = Field(default=0, ge=0)  # inverted lists; 0: by the catalogue's size
    refine: Refine | Literal["auto"] = "auto"  # precision in which the best of short codes are scored again
    recall_target: float = Field(default=0.99, gt=0, le=1)  # of the exact 10 and 100 best
    memory_gib: float | None = Field(default=None, gt=0)  # that all shards' vectors may take together


def design(settings: IndexKindSettings, size: int, dim: int) -> Design:
    """Choose the design of an index of `size` vectors; the settings' own kind if they name one.

    Raises ConfigError when no design fits the memory.
    """
    every = _designs(settings, size, dim)
    bound = float("inf") if settings.memory_gib is None else settings.memory_gib * 2**30
    for found in every:
        if found.item_bytes * size <= bound:
            return found
    least = min(every, key=lambda d: d.item_bytes)
    wanted = (
        f"memory_gib of at least {least.item_bytes * size / 2**30:.3g} for {size:,} vectors of {dim} dimensions"
    )
    raise ConfigError(wanted, f"{settings.memory_gib:g}", "raise it, or train vectors of fewer dimensions")


def _designs(settings: IndexKindSettings, size: int, dim: int) -> list[Design]:
    """The designs that may be taken, the best first."""
    lists = settings.lists or ann.lists_of(size)
    flat = Design(kind="flat", dim=dim)
    if settings.kind != "auto":
        inverted = settings.kind.startswith("ivf")
        refine: Refine = "none"
        if settings.kind in ann.REFINED:
            refine = "fp16" if settings.refine == "auto" else settings.refine
        return [Design(kind=settings.kind, dim=dim, lists=lists if inverted else 0, refine=refine)]
    short = [Design(kind="ivf_rabitq", dim=dim, lists=lists, refine=r) for r in ("fp16", "sq8")]
    if settings.recall_target == 1:
        return [flat]
    return [flat, *short] if size <= EXACT_UPTO else short


# --- measuring -----------------------------------------------------------------------------------


class Rung(NamedTuple):
    """What searches of one effort found in a segment, and the processor seconds that a query took."""

    effort: Effort
    scores: Vectors
    rows: Rows
    seconds: float


class Measured(NamedTuple):
    """A segment's exact best for Q queries, and what each ladder's rungs found of them."""

    exact_scores: Vectors
    exact_rows: Rows
    ladders: Sequence[Sequence[Rung]]


def measure(index: Index, vectors: Vectors, queries: Vectors) -> Measured:
    """Search a segment by every effort up to where more finds nothing more, and exactly, in its own vectors."""
    flat = Index.flat(index.design.dim)
    flat.add(vectors)
    scores, rows = _found(flat, queries, Effort())
    return Measured(scores, rows, [_climbed(index, ladder, queries, rows) for ladder in ann.ladders(index.design)])


def _found(index: Index, queries: Vectors, effort: Effort) -> tuple[Vectors, Rows]:
    parts = [index.search(queries[i : i + BATCH], K, effort) for i in range(0, len(queries), BATCH)]
    scores, rows = zip(*parts, strict=True)
    return np.concatenate([part[:, :K] for part in scores]), np.concatenate([part[:, :K] for part in rows])


def _climbed(index: Index, ladder: Sequence[Effort], queries: Vectors, wanted: Rows) -> list[Rung]:
    rungs: list[Rung] = []
    recalls: list[float] = []
    for effort in ladder:
        started = time.process_time()
        scores, rows = _found(index, queries, effort)
        seconds = (time.process_time() - started) / len(queries)
        rungs.append(Rung(effort, scores, rows, seconds))
        recalls.append(_hit(wanted, rows))
        if recalls[-1] >= ENOUGH or (len(recalls) > 4 and recalls[-1] - recalls[-3] < STALLED):
            break
    return rungs


def save(path: Path, measured: Measured) -> None:
    """Keep what was measured of a segment as an .npz file."""
    arrays: dict[str, NDArray[Any]] = {"exact_scores": measured.exact_scores, "exact_rows": measured.exact_rows}
    for number, ladder in enumerate(measured.ladders):
        arrays[f"{number}.scores"] = np.stack([rung.scores for rung in ladder])
        arrays[f"{number}.rows"] = np.stack([rung.rows for rung in ladder])
        arrays[f"{number}.seconds"] = np.array([rung.seconds for rung in ladder])
    np.savez(path, **arrays)  # type: ignore[arg-type]


class Setting(NamedTuple):
    """An effort with what it gives over the whole catalogue, and the processor seconds that a query takes."""

    effort: Effort
    recall: Mapping[int, float]  # at 10 and at 100
    seconds: float


def settings(design: Design, paths: Sequence[Path]) -> list[Setting]:
    """Put together what was measured of all segments: the recall and the cost of every effort."""
    parts = [np.load(path) for path in paths]
    truth = _merged([(part["exact_scores"], part["exact_rows"]) for part in parts])
    found = []
    for number, ladder in enumerate(ann.ladders(design)):
        lengths = [len(part[f"{number}.seconds"]) for part in parts]
        for step in range(max(lengths)):  # a segment that needed fewer rungs has at its last what it has at all
            at = [min(step, length - 1) for length in lengths]
            hits = [(p[f"{number}.scores"][a], p[f"{number}.rows"][a]) for p, a in zip(parts, at, strict=True)]
            seconds = sum(float(p[f"{number}.seconds"][a]) for p, a in zip(parts, at, strict=True))
            rows = _merged(hits)
            recall = {k: _hit(truth[:, :k], rows[:, :k]) for k in (10, K)}
            found.append(Setting(ladder[step], recall, seconds))
    return found


def cheapest(every: Sequence[Setting], target: float) -> Setting:
    """The cheapest setting that holds the recall at 10 and at 100. Raises ConfigError when none does."""
    holding = [one for one in every if min(one.recall.values()) >= target]
    if not holding:
        best = max(every, key=lambda one: min(one.recall.values()))
        do = "lower recall_target, or choose a kind with a finer refine, or exact search (kind=flat)"
        raise ConfigError(
            f"a recall of {target:g} at 10 and at {K}", f"{min(best.recall.values()):.4f} at most", do
        )
    return min(holding, key=lambda one: one.seconds)


def _merged(parts: Sequence[tuple[Vectors, Rows]]) -> Rows:
    """The K best of all segments, (Q, K), each row told from those of other segments."""
    scores = np.concatenate([scores for scores, _ in parts], axis=1)
    rows = np.concatenate([np.where(rows < 0, -1, rows + (n << 40)) for n, (_, rows) in enumerate(parts)], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    merged: Rows = np.take_along_axis(rows, order, 1)
    return merged


def _hit(wanted: Rows, found: Rows) -> float:
    """The mean share of each query's wanted rows that are among those found."""
    shares = [np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]
    return float(np.mean(shares))
