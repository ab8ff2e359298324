"""Draw the dashboard from a Prometheus: `python bench/dashboard.py http://127.0.0.1:9090 docs/dashboard.png`.

Asks every query of `serve_configs/grafana.json` over the last minutes, as Grafana does, and draws what comes in
the dashboard's places: to see that each query answers, and for a picture where there is no Grafana. A query that
has no answer is told.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib
import typer

matplotlib.use("agg")
import matplotlib.dates as dates
import matplotlib.pyplot as plt

DASHBOARD = Path(__file__).parent.parent / "serve_configs" / "grafana.json"
COLUMNS, WIDE, HIGH = 24, 0.58, 0.26  # of Grafana's grid, and inches of a unit of it
LONGEST = 24  # letters of a name in a legend


def ask(prometheus: str, minutes: float, step_s: int, end: float, query: str) -> list[dict[str, Any]]:
    """The series that a query finds over some minutes until `end`."""
    query = query.replace("$__rate_interval", f"{4 * step_s}s").replace("{}", "")
    how = {"query": query, "start": end - 60 * minutes, "end": end, "step": step_s}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=how, trust_env=False)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def name(series: dict[str, Any], legend: str) -> str:
    """What a series is called: by the target's legend, or by its labels."""
    labels = {key: value for key, value in series["metric"].items() if key != "__name__"}
    for key, value in labels.items():
        legend = legend.replace("{{" + key + "}}", value)
    told = legend or ", ".join(labels.values())
    return told if len(told) <= LONGEST else f"{told[: LONGEST - 1]}…"


def draw(axes: Any, panel: dict[str, Any], asked: Callable[[str], list[dict[str, Any]]]) -> None:
    """Draw a panel: its lines, or its last values as text."""
    axes.set_title(panel["title"], fontsize=8, loc="left")
    axes.tick_params(labelsize=6)
    rows = []
    for target in panel["targets"]:
        found = asked(target["expr"])
        if not found:
            print(f"no answer yet: {panel['title']}: {target['expr']}")
        for series in found:
            label = name(series, target.get("legendFormat", ""))
            at = [t / 86400 for t, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            rows.append((label, values[-1]))
            if panel["type"] == "timeseries":
                axes.plot(at, values, lw=1, label=label)
    if panel["type"] != "timeseries":
        axes.axis("off")
        axes.text(
            0, 0.5, "\n".join(f"{label}  {value:.4g}" for label, value in rows) or "–", fontsize=8, va="center"
        )
        return
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=5.5, frameon=False, ncols=2)


def main(
    prometheus: str,
    picture: Path,
    minutes: Annotated[float, typer.Option(help="so long back")] = 10,
    ago: Annotated[float, typer.Option(help="minutes since the end of what is drawn")] = 0,
    step_s: Annotated[int, typer.Option(help="seconds between two points")] = 5,
) -> None:
    """Draw the dashboard."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel.get("targets")]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(COLUMNS * WIDE, height * HIGH))
    asked = functools.partial(ask, prometheus, minutes, step_s, time.time() - 60 * ago)
    for panel in panels:
        place = panel["gridPos"]
        x, y = place["x"] / COLUMNS, 1 - (place["y"] + place["h"]) / height
        axes = figure.add_axes((x + 0.03, y + 0.025, place["w"] / COLUMNS - 0.045, place["h"] / height - 0.055))
        draw(axes, panel, asked)
    figure.savefig(picture, dpi=110)
    print(f"{picture}: {len(panels)} panels")


if __name__ == "__main__":
    typer.run(main)
