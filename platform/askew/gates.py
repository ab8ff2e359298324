"""The gates that a release, a model with the index that it built, has to pass before it may be served.

Some are about what the files are: whole, of one another, and giving the vectors that they gave when they were
made; a release that fails one of these is never served. The others are about how good it is, and can be overruled.
Knows nothing of where releases come from or who serves them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from askew import artifacts
from askew.artifacts import Manifest
from askew.config import Settings
from askew.errors import ArtifactError
from askew.segments import Plan

MEASURE = "nDCG@10"
OWN = ("adaptive", "fused")  # the model's own ranking: the first of these that its evaluation has
GIB = 1 << 30


class GateSettings(Settings):
    """What a release has to hold; a bound of None holds always."""

    recall: float = Field(default=0.95, ge=0, le=1)  # recall@10 of the index, as measured when it was built
    alpha: float = Field(default=0.05, gt=0, lt=1)  # worse than the champion with a p below this is refused
    parity: float = Field(default=0.999, gt=0, le=1)  # cosine of the canaries' vectors then and now, at least
    max_query_ms: float | None = Field(
        default=None, gt=0
    )  # of a search of the index, as measured when it was built
    max_memory_gib: float | None = Field(default=None, gt=0)  # of the vectors of all items
    needs_evaluation: bool = True  # when the champion has one


class Verdict(Settings):
    """What a gate says of a release; one that fails a hard gate cannot be forced."""

    gate: str
    holds: bool
    hard: bool
    wanted: str
    found: str

    @property
    def told(self) -> str:
        """The verdict as a line."""
        return f"{self.gate}: wanted {self.wanted}; found {self.found}"

    @property
    def judged(self) -> str:
        """The verdict as a line, without its gate's name."""
        return f"{'passed' if self.holds else 'REFUSED'}: wanted {self.wanted}; found {self.found}"


def judge(
    model: Path, index: Path, settings: GateSettings, own: Path | None = None, champion: Path | None = None
) -> list[Verdict]:
    """Judge the release of a model's folder and an index's; a bad one is told in the verdicts, never raised.

    `own` and `champion` are the `queries.parquet` of the release's evaluation and of the champion's. Of files that
    are not whole, or not of one another, nothing else is judged.
    """
    whole = [
        _judged("checksums", True, "files as their manifests state them", lambda: _checksums(model, index)),
        _judged("identity", True, "an index that was built by this model", lambda: _identity(model, index)),
    ]
    if not all(verdict.holds for verdict in whole):
        return whole
    manifest = artifacts.read(index, "index", verify=False)
    same = f"a cosine of at least {settings.parity:g} with what it gave when it was saved"
    no_worse = f"{MEASURE} not below the champion's with p < {settings.alpha:g}"
    return [
        *whole,
        _judged("parity", True, same, lambda: _parity(model, settings.parity)),
        _judged("recall", False, f"at least {settings.recall:g}", lambda: _recall(manifest, settings.recall)),
        _judged("quality", False, no_worse, lambda: _quality(own, champion, settings)),
        _at_most("latency", settings.max_query_ms, "ms a query", lambda: _measured(manifest).get("query_ms")),
        _at_most("memory", settings.max_memory_gib, "GiB", lambda: _memory(manifest)),
    ]


def refusals(verdicts: Sequence[Verdict], force: bool = False) -> list[Verdict]:
    """The verdicts by which a release is refused; by force, only those of hard gates."""
    return [verdict for verdict in verdicts if not verdict.holds and (verdict.hard or not force)]


def _judged(gate: str, hard: bool, wanted: str, found: Callable[[], tuple[bool, str]]) -> Verdict:
    """The verdict of a gate that tells whether it holds, and what was found; an error is a refusal."""
    try:
        holds, told = found()
    except Exception as error:  # a damaged file makes torch, FAISS and Arrow raise whatever they stumble over
        holds, told = False, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Verdict(gate=gate, holds=holds, hard=hard, wanted=wanted, found=told)


def _checksums(model: Path, index: Path) -> tuple[bool, str]:
    artifacts.read(model, "model")
    files, plan = (
        artifacts.read(index, "index").files,
        Plan.read(index),
    )  # the first reads all of its segments, too
    for name in plan.segments:
        if f"{name}/{artifacts.MANIFEST}" not in files:
            raise ArtifactError(f"a segment {name} in {index}", "none", "build the index again")
        plan.open(name, verify=False)
    return True, f"all, of model, index and {len(plan.segments)} segments"


def _identity(model: Path, index: Path) -> tuple[bool, str]:
    key = artifacts.read(model, "model", verify=False).key
    made_by = artifacts.read(index, "index", verify=False).inputs.get("model", "none that is named")
    return made_by == key, f"model {key[:12]} and an index built by {made_by[:12]}"


def _parity(model: Path, least: float) -> tuple[bool, str]:
    from askew import models  # torch comes with it: only those who judge wait for that

    found = models.parity(model)
    return found >= least, f"{found:.6f}"  # a NaN does not hold


def _recall(index: Manifest, least: float) -> tuple[bool, str]:
    found = _measured(index).get("recall@10")
    if found is None:
        return True, "1, for it is exact" if index.details["design"]["kind"] == "flat" else "none measured"
    return found >= least, f"{found:g}"


def _at_most(gate: str, most: float | None, unit: str, figure: Callable[[], float | None]) -> Verdict:
    def found() -> tuple[bool, str]:
        value = figure()
        told = "none measured" if value is None else f"{value:.4g} {unit}"
        return most is None or value is None or value <= most, told

    return _judged(gate, False, "no bound" if most is None else f"at most {most:g} {unit}", found)


def _memory(index: Manifest) -> float | None:
    item_bytes = _measured(index).get("item_bytes")
    return None if item_bytes is None else item_bytes * index.counts["items"] / GIB


def _measured(index: Manifest) -> Mapping[str, float]:
    """What was measured of an index when it was built; of one that was built otherwise, nothing."""
    found: Mapping[str, float] = index.details.get("measured", {})
    return found


# --- quality -------------------------------------------------------------------------------------


def _quality(own: Path | None, champion: Path | None, settings: GateSettings) -> tuple[bool, str]:
    """Compare by the queries that both were asked: equal in id and words."""
    from askew import metrics  # ir-measures comes with it, and pandas

    if champion is None:
        return True, "no evaluation of a champion"
    if own is None:
        return not settings.needs_evaluation, "no evaluation of this model"
    ours, theirs = _values(own), _values(champion)
    shared = [query for query in ours if query in theirs]
    if len(shared) < metrics.LEAST_QUERIES:
        return True, f"{len(shared)} queries in common, too few to tell"
    a, b = (np.array([values[query] for query in shared]) for values in (ours, theirs))
    compared = metrics.paired_bootstrap(a, b)
    holds = compared["difference"] >= 0 or compared["p"] >= settings.alpha
    means = f"{a.mean():.4f}, where the champion has {b.mean():.4f}"
    return holds, f"{means}: {compared['difference']:+.4f}, p {compared['p']:.4f}, of {len(shared)} queries"


def _values(path: Path) -> dict[tuple[str, str], float]:
    """The measure of a model's own ranking for each query, by id and words."""
    adaptive, fused = (f"{ranking}/{MEASURE}" for ranking in OWN)
    column = adaptive if adaptive in pq.read_schema(path).names else fused
    table = pq.read_table(path, columns=["query_id", "query", column])
    queries = zip(table["query_id"].to_pylist(), table["query"].to_pylist(), strict=True)
    return dict(zip(queries, table[column].to_pylist(), strict=True))
