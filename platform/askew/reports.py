"""The evaluation's report for people: one page of tables, plots and product photos, which fetches nothing.

Knows nothing of how the numbers came about.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from askew import inputs, metrics, pages, tables
from askew.errors import DataError

PAGE = "report.html"
MAIN, PHOTO_SIDE, PHOTOS_A_ROW = "nDCG@10", 96, 10
NAMES = {
    "fused": "title and photo, fused", "adaptive": "title and photo, by the header P(q)", "text": "title alone",
    "image": "photo alone", "bm25": "BM25 over titles", "hybrid": "BM25 and the model, by rank",
    "shuffled": "control: another item's photo", "missing": "control: no photo",
}  # fmt: skip
GAINS = {
    "image": "what photos add to titles alone",
    "shuffled": "what other items' photos add to titles alone (a control: no more than nought)",
    "over_shuffled": "own photos over other items'",
    "over_missing": "photos over none, by the same model",
}
STYLE = """
.hits { display: flex; gap: .5rem; overflow-x: auto; margin: .3rem 0 } .hits figure { width: 6.2rem; flex: none }
.hits img { width: 5.4rem; height: 5.4rem; object-fit: contain; background: #fff; border: 3px solid var(--line) }
.hits .right img { border-color: #2e9e5b } .none { width: 5.4rem; height: 5.4rem; border: 3px dashed var(--line);
  display: grid; place-items: center; font-size: .75rem; color: var(--soft) }
.measures th, .measures td { padding-inline-start: .8rem } figure svg { max-width: 46rem }
.hits figcaption { font-size: .75rem; line-height: 1.25 } .best { font-weight: 700 } .pair { margin: 1.2rem 0 }
"""


def shown(numbers: Mapping[str, Any]) -> set[str]:
    """Name the items whose photos the page shows."""
    found = numbers.get("modality", {})
    examples = [*found.get("saved", ()), *found.get("hurt", ())]
    return {h["item_id"] for e in examples for key in ("hits", "by_text") for h in e[key][:PHOTOS_A_ROW]}


def photos(triplets: Path, item_ids: Iterable[str]) -> dict[str, str]:
    """Read items' photos, small, as addresses that hold them (`data:`); items without one are left out."""
    wanted, found = pa.array(sorted(item_ids), pa.string()), {}
    for path in tables.parts(triplets / "items") if len(wanted) else ():
        if "image" not in pq.read_schema(path).names:
            continue
        for batch in tables.batches([path], ["item_id", "image"], 1024):
            rows = batch.filter(pc.is_in(batch["item_id"], value_set=wanted))
            for item_id, image in zip(rows["item_id"].to_pylist(), rows["image"].to_pylist(), strict=True):
                if image and (small := _small(image)):
                    found[item_id] = small
    return found


def _small(image: bytes) -> str | None:
    stream = io.BytesIO()
    try:
        Image.fromarray(inputs.pixels(image, PHOTO_SIDE)).save(stream, "JPEG", quality=80)
    except DataError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def page(numbers: Mapping[str, Any], title: str, photos: Mapping[str, str]) -> str:
    """Make the page of an evaluation's numbers (`report.json`)."""
    body = [_facts(numbers), _systems(numbers), _modality(numbers, photos), _slices(numbers), _index(numbers), HOW]
    return pages.document(f"How well {title} searches", "\n".join(body), STYLE)


HOW = f"""<h2>How to read this</h2>
<p>Every ranking is of the same queries over the same items, exact, ties by item id. nDCG takes grades as they
are (linear gain); the other measures count an item as relevant from the grade that is named above; items that
nobody judged count as wrong, and Judged@10 says how many of the first ten were judged at all. Intervals are 95 %,
by bootstrap over queries; differences are paired; p is corrected by Holm's method over the comparisons of its
table; fewer than {metrics.LEAST_QUERIES} queries get no interval. F1@50 is the mean of each query's.</p>
"""


def _facts(numbers: Mapping[str, Any]) -> str:
    rows = {
        "queries judged": f"{numbers['queries']:,}",
        "queries left out, as nothing is relevant to them": f"{numbers['left_out']:,}",
        "items ranked": f"{numbers['items']:,}",
        "relevant from grade": numbers["relevant_from"],
        "the model is": NAMES[numbers["main"]],
        "titles read": numbers["text"],
    }
    cells = "".join(f'<tr><th scope="row">{n}</th><td>{pages.text(str(v))}</td></tr>' for n, v in rows.items())
    return f'<table class="facts"><caption>What was evaluated</caption><tbody>{cells}</tbody></table>'


def _name(system: str) -> str:
    return pages.text(NAMES.get(system, system))


def _spread(of: Sequence[float] | None) -> str:
    return "too few queries for an interval" if of is None else f"{of[0]:.3f} to {of[1]:.3f}"


# --- systems -------------------------------------------------------------------------------------


def _systems(numbers: Mapping[str, Any]) -> str:
    found, own = numbers["metrics"], numbers["main"]
    measures = list(next(iter(found.values())))
    best = {m: max(values[m] for values in found.values()) for m in measures}
    head = "".join(f'<th scope="col" class="number">{m}</th>' for m in measures)
    rows = []
    for system, values in found.items():
        cells = "".join(
            f'<td class="number{" best" if values[m] == best[m] else ""}" '
            f'title="{_spread(numbers["intervals"][system][m])}">{values[m]:.3f}</td>'
            for m in measures
        )
        span, against = numbers["intervals"][system][MAIN], numbers["comparisons"].get(f"{own} vs {system}")
        told = "" if against is None else _difference(against)
        rows.append(f'<tr><th scope="row">{_name(system)}</th>{cells}<td>{_spread(span)}</td><td>{told}</td></tr>')
    return (
        "<h2>All rankings</h2>"
        + _bars(numbers)
        + '<div class="wide" tabindex="0" role="region" aria-label="Measures by ranking"><table class="measures">'
        f'<thead><tr><th scope="col">ranking</th>{head}<th scope="col">{MAIN}, 95 %</th>'
        f'<th scope="col">the model’s lead in {MAIN}</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _difference(found: Mapping[str, float]) -> str:
    p = found.get("p_holm", found["p"])
    return f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}), p {_p(p)}"


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"= {value:.3f}".replace("0.", ".", 1)


def _bars(numbers: Mapping[str, Any]) -> str:
    systems = list(numbers["metrics"])
    values = [numbers["metrics"][n][MAIN] for n in systems]
    spans = [numbers["intervals"][n][MAIN] for n in systems]
    return _points(
        [NAMES.get(n, n) for n in systems], values, spans, f"{MAIN} with 95 % intervals", "systems", nought=False
    )


def _points(
    names: Sequence[str], values: Sequence[float], spans: Sequence[Sequence[float] | None], what: str, salt: str,
    nought: bool,
) -> str:  # fmt: skip
    """Draw a value and an interval for each name, one below the other."""
    style = {"svg.hashsalt": salt, "svg.fonttype": "none", "text.color": pages.INK, "axes.labelcolor": pages.INK}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(7, 0.6 + 0.28 * len(names)), layout="constrained", facecolor="none")
        axes, at = figure.add_subplot(facecolor="none"), np.arange(len(names))[::-1]
        for y, value, span in zip(at, values, spans, strict=True):
            if span is not None:
                axes.plot(span, [y, y], color=pages.BAR, linewidth=2)
            axes.plot([value], [y], "o", color=pages.BAR, markersize=5)
        if nought:
            axes.axvline(0, color=pages.INK, linewidth=0.8)
        axes.set_yticks(at, names)
        axes.set_xlabel(what)
        axes.tick_params(colors=pages.INK)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(pages.INK)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    told = "; ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
    return pages.figure(stream.getvalue(), f"{what}: {told}", f"{what}.")


# --- photos --------------------------------------------------------------------------------------


def _modality(numbers: Mapping[str, Any], photos: Mapping[str, str]) -> str:
    found = numbers.get("modality")
    if not found:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{GAINS[name]}</th><td>{_difference(gain)}</td></tr>'
        for name, gain in found["gains"].items()
    )
    brought, split = found["score_shares"], found["queries"]
    return (
        f'<h2>What photos bring</h2><table class="facts"><caption>{MAIN}, mean over queries</caption><tbody>{rows}'
        f'<tr><th scope="row">queries that the photo makes better, worse</th>'
        f"<td>{split['better']:,}, {split['worse']:,} of {numbers['queries']:,}</td></tr>"
        f'<tr><th scope="row">of a hit’s score, on average</th><td>{brought["text"]:.3f} from the title, '
        f"{brought['image']:.3f} from the photo, {brought['neither']:.3f} without either</td></tr></tbody></table>"
        + _examples("Queries that the photo saves", found["saved"], photos)
        + _examples("Queries that the photo hurts", found["hurt"], photos)
    )


def _examples(title: str, examples: Sequence[Mapping[str, Any]], photos: Mapping[str, str]) -> str:
    if not examples:
        return f"<h3>{title}</h3><p>None.</p>"
    told = "".join(
        f'<section class="pair"><h3>“{pages.text(e["query"])}”: {MAIN} {e["gain"]:+.3f}</h3><p>with photos</p>'
        f"{_hits(e['hits'], photos)}<p>by titles alone</p>{_hits(e['by_text'], photos)}</section>"
        for e in examples
    )
    return f"<h2>{title}</h2><p>Framed in green: relevant. Shares of a score are by title and by photo.</p>{told}"


def _hits(hits: Sequence[Mapping[str, Any]], photos: Mapping[str, str]) -> str:
    cells = []
    for hit in hits[:PHOTOS_A_ROW]:
        name, photo = pages.text(hit["text"]), photos.get(hit["item_id"])
        drawn = f'<img src="{photo}" alt="{name}">' if photo else '<div class="none">no photo</div>'
        shares = f"<br>{hit['from_text']:.2f} + {hit['from_image']:.2f}" if "from_text" in hit else ""
        right = ' class="right"' if hit["grade"] else ""
        cells.append(f"<figure{right}>{drawn}<figcaption>{name}{shares}</figcaption></figure>")
    return f'<div class="hits">{"".join(cells)}</div>'


# --- slices and the index ------------------------------------------------------------------------


def _slices(numbers: Mapping[str, Any]) -> str:
    parts = []
    for dimension, of in numbers["slices"].items():
        shown = [n for n in (numbers["main"], "text", "image", "bm25") if n in numbers["metrics"]]
        shown = list(dict.fromkeys(shown))
        head = "".join(f'<th scope="col" class="number">{_name(n)}</th>' for n in shown)
        rows = "".join(_slice(label, one, shown) for label, one in of.items())
        parts.append(
            f'<h3>by {pages.text(dimension)}</h3><div class="wide" tabindex="0" role="region" '
            f'aria-label="{MAIN} by {pages.text(dimension)}"><table class="measures"><thead><tr><th scope="col">'
            f'{pages.text(dimension)}</th><th scope="col" class="number">queries</th>{head}'
            f'<th scope="col">the photo’s gain</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )
    if not parts:
        return ""
    return (
        f"<h2>By kind of query</h2><p>{MAIN}; every measure stands in report.json.</p>{_gains(numbers)}"
        + "".join(parts)
    )


def _slice(label: str, one: Mapping[str, Any], shown: Sequence[str]) -> str:
    cells = "".join(
        f'<td class="number" title="{_spread(one["intervals"][n][MAIN])}">{one["metrics"][n][MAIN]:.3f}</td>'
        for n in shown
    )
    gain = one.get("image_gain")
    told = _difference(gain) if gain else "too few queries"
    return (
        f'<tr><th scope="row">{pages.text(label)}</th><td class="number">{one["queries"]:,}</td>{cells}'
        f"<td>{told}</td></tr>"
    )


def _gains(numbers: Mapping[str, Any]) -> str:
    """Draw the photo's gain in every slice that has one."""
    gains = {
        f"{dimension}: {label}": one["image_gain"]
        for dimension, of in numbers["slices"].items()
        for label, one in of.items()
        if one.get("image_gain")
    }
    if not gains:
        return ""
    spans = [(g["low"], g["high"]) for g in gains.values()]
    values = [g["difference"] for g in gains.values()]
    what = f"gain in {MAIN} over titles alone, with 95 % intervals"
    return _points(list(gains), values, spans, what, "gains", nought=True)


def _index(numbers: Mapping[str, Any]) -> str:
    if "index" not in numbers:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{pages.text(one["name"])}</th><td class="number">{one["recall@10"]:.4f}</td>'
        f'<td class="number">{one["recall@100"]:.4f}</td><td class="number">{one[MAIN]:.4f}</td>'
        f"<td>{_difference(one['loss']) if 'loss' in one else ''}</td></tr>"
        for one in numbers["index"]["settings"]
    )
    return (
        f"<h2>What the index loses</h2><table><thead><tr><th>setting</th><th>recall@10</th><th>recall@100</th>"
        f"<th>{MAIN}</th><th>over exact search</th></tr></thead><tbody>{rows}</tbody></table>"
    )
