"""Tuning: what kind of index a catalogue gets, and how hard it is searched so that a recall holds.

Segments are measured one by one, by anyone who has one: what a search of each effort finds in it, and what is
there to be found. Put together, that is the recall over the whole catalogue joined to one index, which no process
need hold. Knows nothing of models or clusters.
Shapes: Q queries, N vectors, D dimensions, K hits, M that may be among them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
TIMED = 128  # queries by which time is taken
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
        if found.served_bytes * size <= bound:
            return found
    least = min(every, key=lambda d: d.served_bytes)
    wanted = (
        f"memory_gib of at least {least.served_bytes * size / 2**30:.3g} for {size:,} vectors of {dim} dimensions"
    )
    raise ConfigError(wanted, f"{settings.memory_gib:g}", "raise it, or train vectors of fewer dimensions")


def _designs(settings: IndexKindSettings, size: int, dim: int) -> list[Design]:
    """The designs that may be taken, the best first."""
    lists = settings.lists or ann.lists_of(size)
    flat = Design(kind="flat", dim=dim)
    if settings.kind != "auto":
        refine: Refine = "none"
        if settings.kind in ann.REFINED:
            refine = "fp16" if settings.refine == "auto" else settings.refine
        lists = lists if settings.kind.startswith("ivf") else 0
        return [Design(kind=settings.kind, dim=dim, lists=lists, refine=refine)]
    if settings.recall_target == 1:
        return [flat]
    half = Design(kind="ivf_fp16", dim=dim, lists=lists)
    short = Design(kind="ivf_rabitq", dim=dim, lists=lists, refine="sq8")
    return [flat, half, short] if size <= EXACT_UPTO else [half, short]


# --- measuring -----------------------------------------------------------------------------------


class Rung(NamedTuple):
    """What Q queries find in a segment at one width of search: as many as may count over the whole catalogue."""

    scores: Vectors  # (Q, M)
    rows: Rows  # (Q, M)
    codes: Vectors | None  # (Q, M) scores by short codes, by which it is chosen what is scored again
    seconds: Sequence[float]  # of the processor, of a query, for each number that are scored again
    idle: float  # of them, what a search of an empty index takes


class Measured(NamedTuple):
    """A segment's exact best for Q queries, and what searches find of them, from the narrowest to the widest."""

    exact_scores: Vectors
    exact_rows: Rows
    rungs: Sequence[Rung]


def measure(index: Index, empty: Index, vectors: Vectors, queries: Vectors, share: float = 1.0) -> Measured:
    """Search a segment up to where a wider search finds nothing more, and exactly, in its own vectors.

    `empty` is the index that it was filled from, `share` its part of all vectors, which come to it at random.
    """
    flat = Index.flat(index.design.dim)
    flat.add(vectors)
    exact = _batched(queries, lambda batch: flat.search(batch, K, Effort()))
    wanted = exact[1][:, : Effort(again=K).of_share(share).again]
    rungs: list[Rung] = []
    recalls: list[float] = []
    for efforts in _steps(index.design):
        rungs.append(_rung(index, empty, efforts, queries, share))
        recalls.append(_hit(wanted, rungs[-1].rows))
        if recalls[-1] >= ENOUGH or (len(recalls) > 4 and recalls[-1] - recalls[-3] < STALLED):
            break
    return Measured(*exact, rungs)


def _steps(design: Design) -> list[tuple[Effort, ...]]:
    """Efforts that look equally wide, from the narrowest to the widest."""
    return list(zip(*ann.ladders(design), strict=True))


def _rung(index: Index, empty: Index, efforts: Sequence[Effort], queries: Vectors, share: float) -> Rung:
    own = [effort.of_share(share) for effort in efforts]
    few, k = queries[:TIMED], Effort(again=K).of_share(share).again
    timed = [_seconds(few, lambda batch, e=effort: index.search(batch, k, e)) for effort in own]  # type: ignore[misc]
    idle = _seconds(few, lambda batch: empty.probe(batch, own[0]))
    if index.design.refine == "none":
        scores, rows = _batched(queries, lambda batch: index.search(batch, K, own[-1]))
        return Rung(scores, rows, None, timed, idle)
    codes, rows = _batched(queries, lambda batch: index.candidates(batch, own[-1]))
    there = np.maximum(rows, 0)
    scores, _ = _batched(np.arange(len(queries)), lambda at: (index.scores(queries[at], there[at]), rows[at]))
    return Rung(scores, rows, codes, timed, idle)


def _batched(of: NDArray[Any], search: Callable[[NDArray[Any]], tuple[Vectors, Rows]]) -> tuple[Vectors, Rows]:
    found, rows = zip(*(search(of[at : at + BATCH]) for at in range(0, len(of), BATCH)), strict=True)
    return np.concatenate(found), np.concatenate(rows)


def _seconds(queries: Vectors, search: Callable[[Vectors], object]) -> float:
    """The least of three times, of one query."""
    times = []
    for _ in range(3):
        started = time.process_time()
        for at in range(0, len(queries), BATCH):
            search(queries[at : at + BATCH])
        times.append(time.process_time() - started)
    return min(times) / len(queries)


def save(path: Path, measured: Measured) -> None:
    """Keep what was measured of a segment as an .npz file."""
    arrays: dict[str, NDArray[Any]] = {"exact_scores": measured.exact_scores, "exact_rows": measured.exact_rows}
    for step, rung in enumerate(measured.rungs):
        arrays |= {f"{step}.scores": rung.scores, f"{step}.rows": rung.rows}
        if rung.codes is not None:
            arrays[f"{step}.codes"] = rung.codes
    arrays["seconds"] = np.array([rung.seconds for rung in measured.rungs])
    arrays["idle"] = np.array([rung.idle for rung in measured.rungs])
    np.savez(path, **arrays)  # type: ignore[arg-type]


class Setting(NamedTuple):
    """An effort with what it gives over the whole catalogue, and the processor seconds that a query takes."""

    effort: Effort
    recall: Mapping[int, float]  # at 10 and at 100
    seconds: float


def settings(design: Design, paths: Sequence[Path]) -> list[Setting]:
    """Put together what was measured of all segments: recall and cost of every effort over them joined to one."""
    parts = [np.load(path) for path in paths]
    exact = _rows(parts, ["exact_rows"] * len(parts))
    truth = _best(_scores(parts, ["exact_scores"] * len(parts), exact), exact)
    lengths, found = [len(part["idle"]) for part in parts], []
    for step, efforts in enumerate(_steps(design)[: max(lengths)]):
        at = [min(step, length - 1) for length in lengths]  # at its last a segment has found what it has at all
        rows = _rows(parts, [f"{a}.rows" for a in at])
        scores = _scores(parts, [f"{a}.scores" for a in at], rows)
        codes = None if design.refine == "none" else _scores(parts, [f"{a}.codes" for a in at], rows)
        taken = np.array([part["seconds"][a] for part, a in zip(parts, at, strict=True)])
        idle = np.array([part["idle"][a] for part, a in zip(parts, at, strict=True)])[:, None]
        joined = design.kind != "hnsw"  # graphs are searched one by one
        seconds = np.maximum(taken - idle, 0).sum(axis=0) + idle.max() if joined else taken.sum(axis=0)
        for effort, cost in zip(efforts, seconds.tolist(), strict=True):
            kept = scores if codes is None else np.where(_first(codes, effort.again), scores, -np.inf)
            best = _best(kept, rows)
            found.append(Setting(effort, {k: _hit(truth[:, :k], best[:, :k]) for k in (10, K)}, cost))
    return found


def _rows(parts: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str]) -> Rows:
    """The rows that each segment has under its name, side by side, told from those of other segments."""
    numbers = [part[name] for part, name in zip(parts, names, strict=True)]
    return np.concatenate([np.where(own < 0, -1, own + (n << 40)) for n, own in enumerate(numbers)], axis=1)


def _scores(parts: Sequence[Mapping[str, NDArray[Any]]], names: Sequence[str], rows: Rows) -> Vectors:
    """The scores that each segment has under its name, side by side; -inf where there is no row."""
    scores = np.concatenate([part[name] for part, name in zip(parts, names, strict=True)], axis=1)
    return np.where(rows < 0, -np.inf, scores).astype(np.float32)


def _first(codes: Vectors, count: int) -> NDArray[np.bool_]:
    """Which of (Q, M) are among each row's `count` greatest."""
    if count >= codes.shape[1]:
        return np.ones(codes.shape, dtype=np.bool_)
    least = -np.partition(-codes, count - 1, axis=1)[:, [count - 1]]
    return codes >= least


def _best(scores: Vectors, rows: Rows) -> Rows:
    """The rows of the K greatest scores; -1 where there are fewer."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    none = np.isneginf(np.take_along_axis(scores, order, 1))
    best: Rows = np.where(none, -1, np.take_along_axis(rows, order, 1))
    return best


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


def _hit(wanted: Rows, found: Rows) -> float:
    """The mean share of each query's wanted rows, of those that exist, that are among those found."""
    shares = [np.isin(w[w >= 0], f).mean() for w, f in zip(wanted, found, strict=True)]
    return float(np.mean(shares))
