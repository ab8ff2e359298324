"""The overview of triplets: counts that add up over chunks and machines, and one page that shows them.

Every quantity is a whole number counted into fixed bins, so that nothing has to be seen twice or kept. Knows
nothing of where the numbers come from; whatever text it is given, it only shows.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from askew import pages
from askew.errors import ArtifactError


def _series(highest: int) -> tuple[int, ...]:
    """Edges of bins that widen: 0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, then ten a decade up to `highest`."""
    steps = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8)
    edges = {int(step * 10**decade + 0.5) for decade in range(12) for step in steps}
    return (0, *sorted(edge for edge in edges if edge <= highest))


class Measure(NamedTuple):
    """A quantity: its name for people, its unit, and its bins' lower edges; the last bin has no upper one."""

    title: str
    unit: str
    edges: tuple[int, ...]


class Category(NamedTuple):
    """A count by label: its name for people, what its labels are, and the category that its shares are of."""

    title: str
    label: str
    of: str | None = None


MEASURES = {
    "query_words": Measure("Query length", "words", tuple(range(41))),
    "title_characters": Measure("Title length", "characters", _series(10**5)),
    "items_per_query": Measure("Judged items a query", "items", _series(10**6)),
    "positives_per_query": Measure("Positives a query", "items", _series(10**6)),
    "image_width": Measure("Image width", "pixels", _series(10**5)),
    "image_height": Measure("Image height", "pixels", _series(10**5)),
    "image_bytes": Measure("Image size", "bytes", _series(10**9)),
}
CATEGORIES = {
    "splits": Category("Splits", "split"),
    "grades": Category("Grades", "grade"),
    "negatives": Category("Kinds of negatives", "kind"),
    "has_image": Category("Items with an image", "image"),
    "missing": Category("Missing cells by column", "column", of="cells"),
    "quarantined": Category("Records set aside", "reason"),
    "cells": Category("Cells by column", "column"),
}
SHOWN = [name for name in CATEGORIES if name != "cells"]
QUANTILES = (0.05, 0.5, 0.95)
MAX_LABELS, MAX_NUMBER = 50, 10**12


# --- counts --------------------------------------------------------------------------------------


@dataclass
class Histogram:
    """Counts of one measure's values, a bin each, with what is exact beside them."""

    counts: NDArray[np.int64]
    missing: int = 0
    total: int = 0
    low: int | None = None
    high: int | None = None

    @property
    def size(self) -> int:
        """Number of values that are known."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values that are known; nan without any."""
        return self.total / self.size if self.size else float("nan")

    def merge(self, other: "Histogram") -> None:
        """Add another's counts of the same measure."""
        self.counts = self.counts + other.counts
        self.missing += other.missing
        self.total += other.total
        self.low = min((v for v in (self.low, other.low) if v is not None), default=None)
        self.high = max((v for v in (self.high, other.high) if v is not None), default=None)


@dataclass
class Tally:
    """Counts of triplets by measure and category; tallies of parts add up to the tally of the whole."""

    histograms: dict[str, Histogram] = field(default_factory=dict)
    categories: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, name: str, values: NDArray[np.number]) -> None:
        """Count (n,) values of a measure; nan and infinities count as missing."""
        edges = np.array(MEASURES[name].edges)
        known = values[np.isfinite(values)]
        whole = np.clip(np.floor(known), -MAX_NUMBER, MAX_NUMBER).astype(np.int64)
        at = np.clip(np.searchsorted(edges, whole, side="right") - 1, 0, None)
        one = Histogram(np.bincount(at, minlength=len(edges)), len(values) - len(known), int(whole.sum()))
        if len(whole):
            one.low, one.high = int(whole.min()), int(whole.max())
        self._histogram(name).merge(one)

    def count(self, name: str, counts: Mapping[str, int]) -> None:
        """Add counts by label to a category."""
        assert name in CATEGORIES, f"one of {', '.join(CATEGORIES)} is wanted, not {name}"
        self.categories.setdefault(name, Counter()).update(counts)

    def merge(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for name, histogram in other.histograms.items():
            self._histogram(name).merge(histogram)
        for name, counts in other.categories.items():
            self.count(name, counts)

    def quantile(self, name: str, fraction: float) -> int | None:
        """Estimate the value that `fraction` of a measure's values do not exceed; None without any.

        Exact where bins are one wide, else off by less than its bin's width.
        """
        histogram, edges = self.histograms.get(name), MEASURES[name].edges
        if histogram is None or histogram.low is None or histogram.high is None:
            return None
        before = np.cumsum(histogram.counts) - histogram.counts
        rank = max(int(np.ceil(fraction * histogram.size)), 1)
        at = int(np.flatnonzero(before < rank)[-1])
        upper = edges[at + 1] if at + 1 < len(edges) else histogram.high + 1
        inside = (rank - before[at] - 1) / histogram.counts[at]
        return int(np.clip(int(edges[at] + inside * (upper - edges[at])), histogram.low, histogram.high))

    def to_json(self) -> str:
        """Write the tally as JSON text, its keys sorted."""
        histograms = {n: vars(h) | {"counts": h.counts.tolist()} for n, h in self.histograms.items()}
        values = {"histograms": histograms, "categories": self.categories}
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Tally":
        """Read what `to_json` wrote. Raises ArtifactError when it is no tally of these measures and bins."""
        try:
            values = json.loads(text)
            tally = cls()
            for name, h in values["histograms"].items():
                counts = np.array(h.pop("counts"), dtype=np.int64)
                if counts.shape != (len(MEASURES[name].edges),):
                    raise ValueError(f"{len(counts)} bins of {name}")
                tally.histograms[name] = Histogram(counts, **h)
            tally.categories = {
                n: Counter(values["categories"][n]) for n in CATEGORIES if n in values["categories"]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError("a tally of triplets", f"{error!r}", "make the triplets again") from error
        return tally

    def _histogram(self, name: str) -> Histogram:
        assert name in MEASURES, f"one of {', '.join(MEASURES)} is wanted, not {name}"
        return self.histograms.setdefault(name, Histogram(np.zeros(len(MEASURES[name].edges), dtype=np.int64)))


# --- plots ---------------------------------------------------------------------------------------


def plots(tally: Tally) -> dict[str, bytes]:
    """Draw each measure that has values as an SVG file on white: file name to its bytes, always the same."""
    drawn = {name: _draw(tally, name, ink="#333333", bar="#3b6fb6", paper="white") for name in _measured(tally)}
    return {f"{name}.svg": svg.encode() for name, svg in drawn.items()}


def _measured(tally: Tally) -> list[str]:
    return [name for name in MEASURES if name in tally.histograms and tally.histograms[name].size]


def _draw(tally: Tally, name: str, ink: str, bar: str, paper: str) -> str:
    """Draw a histogram as SVG: a bar's area is its bin's share, on an axis that is logarithmic if bins widen."""
    measure, counts = MEASURES[name], tally.histograms[name].counts
    bins = np.arange(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1)
    left, right = _sides(measure)
    style = {"svg.hashsalt": name, "svg.fonttype": "none", "text.color": ink, "axes.labelcolor": ink}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.2, 2.3), layout="constrained", facecolor=paper)
        axes = figure.add_subplot(facecolor="none")
        width = (right - left)[bins]
        axes.bar(left[bins], counts[bins] / width, width=0.9 * width, align="edge", color=bar)
        axes.set_xlabel(f"{measure.title} ({measure.unit})")
        axes.set_xticks(*_ticks(measure, bins))
        axes.set_yticks([])
        axes.tick_params(colors=ink)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(ink)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return stream.getvalue()


def _sides(measure: Measure) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Place each bin's left and right side on the axis; the last is drawn as wide as the one before."""
    edges = np.array(measure.edges, dtype=np.float64)
    sides = edges if _even(measure) else np.log1p(edges)
    return sides, np.append(sides[1:], 2 * sides[-1] - sides[-2])


def _even(measure: Measure) -> bool:
    return measure.edges[-1] == len(measure.edges) - 1


def _ticks(measure: Measure, bins: NDArray[np.int64]) -> tuple[list[float], list[str]]:
    """Label at most eight bins: those of one number in their middle, wider ones at their lower edge."""
    (left, right), edges, show = _sides(measure), measure.edges, EngFormatter(sep="")
    round_numbers = bins if _even(measure) else [at for at in bins if str(edges[at]).rstrip("0") in ("", *"125")]
    shown = list(round_numbers if len(round_numbers) > 1 else bins)
    shown = shown[:: -(-len(shown) // 8)]
    single = [at + 1 < len(edges) and edges[at + 1] - edges[at] == 1 for at in shown]
    where = [
        float((left[at] + 0.9 * (right - left)[at] / 2) if one else left[at])
        for at, one in zip(shown, single, strict=True)
    ]
    last = len(edges) - 1
    return where, [("≥ " if at == last else "") + show(edges[at]) for at in shown]


# --- page ----------------------------------------------------------------------------------------


def page(tally: Tally, facts: Mapping[str, object]) -> str:
    """Make one HTML page of a tally and of facts by name: nothing is fetched or run, and the bytes are stable."""
    measures = _measured(tally)
    figures = "".join(_figure(tally, name) for name in measures) or "<p>Nothing was measured.</p>"
    categories = "".join(_category(tally, name) for name in SHOWN if tally.categories.get(name))
    return pages.document(
        "Overview of the triplets",
        f"""{_facts(facts)}
<h2>Counts</h2>
<div class="grid">{categories or "<p>Nothing was counted.</p>"}</div>
<h2>Distributions</h2>
<p>The area of a bar is its share of the values; where bins widen, the axis is logarithmic.</p>
<div class="grid">{figures}</div>
{_numbers(tally, measures) if measures else ""}
""",
    )


def _number(value: float | None) -> str:
    """Show a count or a mean: thousands apart, whole from 100 on."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:,.1f}"


def _facts(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><bdi>{pages.text(name)}</bdi></th>'
        f"<td><bdi>{_number(value) if type(value) is int else pages.text(value)}</bdi></td></tr>"
        for name, value in facts.items()
    )
    return (
        f'<table class="facts"><caption>What the triplets were made of</caption><tbody>{rows}</tbody></table>'
        if rows
        else ""
    )


def _category(tally: Tally, name: str) -> str:
    """Show a category as a table: labels, counts, and shares as bars."""
    category = CATEGORIES[name]
    rows = "".join(
        f'<tr><th scope="row"><bdi>{pages.text(label)}</bdi>'
        f'<span class="share" style="width:{share:.1%}"></span></th>'
        f'<td class="number">{_number(count)}</td><td class="number">{share:.1%}</td></tr>'
        for label, count, share in _shares(tally, name)
    )
    return (
        f"<section><h3>{category.title}</h3><table><thead><tr>"
        f'<th scope="col">{category.label.capitalize()}</th><th scope="col" class="number">Number</th>'
        f'<th scope="col" class="number">Share</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _shares(tally: Tally, name: str) -> Iterator[tuple[str, int, float]]:
    """Yield label, count, share: whole numbers in order, else by falling count, those beyond the last as one."""
    counts, of = tally.categories[name], CATEGORIES[name].of
    wholes = tally.categories.get(of, Counter()) if of else dict.fromkeys(counts, counts.total())
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in counts):
        ordered = sorted(counts.items(), key=lambda pair: int(pair[0]))
    else:
        ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    for label, count in ordered[:MAX_LABELS]:
        yield label, count, min(count / max(wholes.get(label, 0), count, 1), 1.0)
    if rest := ordered[MAX_LABELS:]:
        count, whole = sum(c for _, c in rest), sum(wholes.get(label, 0) for label, _ in rest)
        whole = whole if of else counts.total()
        yield f"{len(rest):,} others", count, count / max(whole, count, 1)


def _figure(tally: Tally, name: str) -> str:
    """Show a measure as a histogram with a caption that says the same in words."""
    measure, histogram = MEASURES[name], tally.histograms[name]
    middle, most = (_number(tally.quantile(name, fraction)) for fraction in (0.5, 0.95))
    caption = (
        f"{measure.title}: median {middle}, 95% at most {most} {measure.unit}; {_number(histogram.size)} known"
    )
    caption += f", {_number(histogram.missing)} missing." if histogram.missing else "."
    svg = _draw(tally, name, ink=pages.INK, bar=pages.BAR, paper="none")
    return pages.figure(svg, f"Histogram. {caption}", caption)


def _numbers(tally: Tally, names: list[str]) -> str:
    """Show the measures' quantiles as a table."""
    heads = ("Known", "Missing", "Least", *(f"{fraction:.0%} at most" for fraction in QUANTILES), "Most", "Mean")
    columns = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    rows = "".join(
        f'<tr><th scope="row">{MEASURES[name].title} ({MEASURES[name].unit})</th>'
        + "".join(f'<td class="number">{_number(value)}</td>' for value in _row(tally, name))
        + "</tr>"
        for name in names
    )
    return (
        f'<h2>In numbers</h2><div class="wide" tabindex="0" role="region" aria-label="Quantiles by measure">'
        f'<table class="measures"><caption>Quantiles are read off bins: exact for small numbers, '
        f"else within a quarter.</caption>"
        f'<thead><tr><th scope="col">Measure</th>{columns}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(tally: Tally, name: str) -> list[float | None]:
    h = tally.histograms[name]
    middle = [tally.quantile(name, fraction) for fraction in QUANTILES]
    return [h.size, h.missing, h.low, *middle, h.high, h.mean]
