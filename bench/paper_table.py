"""Train every row of both papers' tables under one budget, and write them side by side: `make paper-table DATA=…`.

Every row has the same data, steps, batch and seeds; what differs is the recipe. A row that was trained or
evaluated before is found done, so that it may be broken off and run again. The table goes to `--out` as Markdown,
and the figures beside it as JSON. What the papers report of their own data stands below it and cannot be compared.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ |= {  # before Ray is imported: the cluster listens on loopback alone, and is looked for there
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}

import numpy as np
import pyarrow.parquet as pq
import ray
import typer
import yaml
from numpy.typing import NDArray
from prepare import say

from askew import artifacts, evaluation, local, metrics, training, triplets
from askew.models import Model
from askew.recipes import TrainSettings

REPOSITORY = Path(__file__).parent.parent
MEASURES = ("nDCG@10", "R@50", "P@50", "F1@50", "R@100", "RR@10")
NUM_TIMED = 200
Recipe = dict[str, Any]
Rows = Mapping[str, list[dict[str, Any]]]

PAPERS = """## What the papers report, of their own data

None of this can be compared with the table above: other catalogues, queries and judgments, as read in accounts of
the papers.

| SMAR, JD.com's log (arXiv 2506.20330) | R@50 | P@50 | F1@50 |
|---|---|---|---|
| image only | .349 | .018 | .034 |
| text only (DPSR) | .641 | .031 | .059 |
| SMAR | .690 | .033 | .063 |

| Beyond Text, Target (arXiv 2603.04836; its first author's account) | R@100 | nDCG@10 |
|---|---|---|
| text only | 72.3 | 41.2 |
| and image, concatenated | 73.1 | 41.8 |
| and domain fine-tuning | 75.6 | 43.5 |
| and fusion | 77.4 | 45.1 |
"""


# --- rows ----------------------------------------------------------------------------------------


def read(name: str) -> Recipe:
    """Read a recipe of jobs/."""
    recipe: Recipe = yaml.safe_load((REPOSITORY / "jobs" / f"train.{name}.yaml").read_text())
    return recipe


def smar(stages: int, header: bool) -> Recipe:
    """SMAR in one stage, in two that both train S_m, or in two of which the second learns P(q)."""
    recipe = read("smar")
    recipe["towers"]["header"] = header
    if stages == 1:
        del recipe["stages"]["adapt"]
    elif not header:
        recipe["stages"]["adapt"] |= {"loss": {"text": 0.1, "image": 0.1, "fused": 1.0}, "rates": {}}
    return recipe


def beyond_text(without: str = "") -> Recipe:
    """Beyond Text, whole or without a stage."""
    recipe = read("beyond_text")
    recipe["stages"].pop(without, None)
    return recipe


ROWS: Mapping[str, Callable[[], Recipe]] = {
    "text only (as DPSR)": lambda: read("text"),
    "image only": lambda: read("image"),
    "mean": lambda: read("mean"),
    "concat": lambda: read("data"),
    "gated": lambda: read("gated"),
    "SMAR, one stage": lambda: smar(1, header=False),
    "SMAR, two stages": lambda: smar(2, header=False),
    "SMAR, two stages and P(q)": lambda: smar(2, header=True),
    "Beyond Text, without domain fine-tuning": lambda: beyond_text("domain"),
    "Beyond Text, without alignment": lambda: beyond_text("align"),
    "Beyond Text, whole": beyond_text,
}
TEXT_ONLY = "text only (as DPSR)"
PAIRS = (
    ("concat", TEXT_ONLY), ("concat", "image only"), ("SMAR, one stage", "concat"),
    ("SMAR, two stages", "SMAR, one stage"), ("SMAR, two stages and P(q)", "SMAR, two stages"),
    ("Beyond Text, whole", "concat"), ("Beyond Text, whole", "Beyond Text, without domain fine-tuning"),
    ("Beyond Text, whole", "Beyond Text, without alignment"),
)  # fmt: skip
RESAMPLES = 100_000  # so many that p can fall below 0.01 after a correction for a whole table


def budgeted(recipe: Recipe, steps: int) -> Recipe:
    """Share out the steps over the stages as the recipe does."""
    stages = recipe["stages"]
    whole = sum(stage["steps"] for stage in stages.values())
    left = steps
    for number, stage in enumerate(stages.values()):
        last = number == len(stages) - 1
        stage["steps"] = left if last else max(1, round(steps * stage["steps"] / whole))
        left -= stage["steps"]
    return recipe


# --- running -------------------------------------------------------------------------------------


class Table:
    """The rows' trainings and evaluations, kept below one folder."""

    def __init__(self, home: Path, prepared: Path, steps: int, texts: list[str], repeats: dict[str, int]) -> None:
        self.home, self.triplets, self.steps, self.texts, self.repeats = home, prepared, steps, texts, repeats

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Train and evaluate a row with a seed; returns its figures and the value of each query by measure."""
        recipe = budgeted(ROWS[name](), self.steps)
        recipe |= {
            "triplets": self.triplets, "root": self.home, "model": f"paper-{list(ROWS).index(name):02d}",
            "seed": seed, "texts": self.texts, "repeats": self.repeats, "validation": {"queries": 0},
            "checkpoint_every": 10**6,
        }  # fmt: skip
        trained = training.train(TrainSettings.model_validate(recipe))
        note = self.home / "seconds" / f"{Path(trained['artifact']).name}.json"
        if not trained["skipped"]:
            artifacts.write_text(note, json.dumps(trained["seconds"]["train"]))
        model = Model.load(Path(trained["artifact"]))
        return {
            "seconds": json.loads(note.read_bytes()) if note.exists() else float("nan"),
            "parameters": sum(p.numel() for p in model.towers.parameters()),
            "item_bytes": 4 * model.dim,
            "query_ms": query_ms(model, self.triplets),
            "by_text": {text: self.evaluated(trained, text) for text in self.texts},
        }

    def evaluated(self, trained: Mapping[str, Any], text: str) -> dict[str, NDArray[np.float64]]:
        """Evaluate a model by one kind of title; returns the value of each query by measure."""
        settings = evaluation.EvaluateSettings(
            model=trained["model"], version=trained["version"], root=self.home, triplets=self.triplets, text=text,
            modality=False, examples=0, resamples=100,
        )  # fmt: skip
        found = evaluation.evaluate(settings)
        rows = pq.read_table(Path(found["artifact"]) / evaluation.QUERIES)
        return {name: rows[f"{found['main']}/{name}"].to_numpy() for name in MEASURES}


def query_ms(model: Model, prepared: Path) -> float:
    """The median time to encode one query, in milliseconds."""
    texts = pq.read_table(prepared / "queries", columns=["query"])["query"].to_pylist()[:NUM_TIMED]
    taken = []
    for text in texts:
        start = time.perf_counter()
        model.queries([text])
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


# --- writing -------------------------------------------------------------------------------------


def averaged(rows: Rows, text: str) -> dict[str, NDArray[np.float64]]:
    """The value of each query by each measure, (Q, M), averaged over seeds."""
    return {
        name: np.stack([np.mean([r["by_text"][text][m] for r in runs], axis=0) for m in MEASURES], axis=1)
        for name, runs in rows.items()
    }


def summed_up(rows: Rows, text: str) -> dict[str, Any]:
    """Average each query over seeds; intervals and tests are over queries, p by Holm over rows and measures."""
    means, found = averaged(rows, text), dict[str, Any]()
    for name, values in means.items():
        spans = metrics.intervals(values)
        each = [[float(r["by_text"][text][m].mean()) for r in rows[name]] for m in MEASURES]
        found[name] = {
            m: {"mean": float(values[:, i].mean()), "interval": spans[i], "seeds": each[i]}
            for i, m in enumerate(MEASURES)
        }
    others = [name for name in means if name != TEXT_ONLY]
    differences = np.concatenate([means[name] - means[TEXT_ONLY] for name in others], axis=1)
    tests = metrics.bootstrapped(differences, RESAMPLES)
    corrected = metrics.holm([test["p"] for test in tests])
    for number, (test, p) in enumerate(zip(tests, corrected, strict=True)):
        name, measure = others[number // len(MEASURES)], MEASURES[number % len(MEASURES)]
        found[name][measure]["vs_text_only"] = {**test, "p_holm": p}
    return found


def against(rows: Rows, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What each step of the recipes brings in nDCG@10, p by Holm over all of these."""
    found = []
    for text in texts:
        means = averaged(rows, text)
        differences = np.stack([means[a][:, 0] - means[b][:, 0] for a, b in PAIRS], axis=1)
        tests = metrics.bootstrapped(differences, RESAMPLES)
        found += [{"text": text, "a": a, "b": b, **test} for (a, b), test in zip(PAIRS, tests, strict=True)]
    corrected = metrics.holm([one["p"] for one in found])
    return [{**one, "p_holm": p} for one, p in zip(found, corrected, strict=True)]


def cell(found: Mapping[str, Any]) -> str:
    """Show a mean with its interval, and whether it differs from text only."""
    against = found.get("vs_text_only")
    mark = "" if against is None or against["p_holm"] >= 0.01 else "▲" if against["difference"] > 0 else "▼"
    low, high = found["interval"]
    return f"{found['mean']:.3f}{mark} <sub>{low:.3f}–{high:.3f}</sub>"


def steps_brought(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what each step brings as a table."""
    out = [
        "## What each step brings, in nDCG@10",
        "",
        "| | over | titles | | 95 % | p, corrected |",
        "|---" * 6 + "|",
    ]
    for one in found:
        p = "< 0.001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}"
        span = f"{one['low']:+.3f} to {one['high']:+.3f}"
        out.append(f"| {one['a']} | {one['b']} | `{one['text']}` | {one['difference']:+.3f} | {span} | {p} |")
    return [*out, ""]


def markdown(rows: Rows, by_text: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], told: str) -> str:
    """Write the tables as Markdown."""
    out = ["# Every row under one budget", "", told, ""]
    for text, found in by_text.items():
        out += [f"## Titles: `{text}`", "", "| | " + " | ".join(MEASURES) + " |"]
        out.append("|---" * (len(MEASURES) + 1) + "|")
        out += [f"| {name} | " + " | ".join(cell(of[m]) for m in MEASURES) + " |" for name, of in found.items()]
        out.append("")
    out += steps_brought(steps)
    out += ["## Cost", "", "| | training, s | parameters | bytes of an item's vector | a query, ms |"]
    out.append("|---" * 5 + "|")
    for name, runs in rows.items():
        seconds, query = (statistics.median(r[key] for r in runs) for key in ("seconds", "query_ms"))
        out.append(
            f"| {name} | {seconds:.0f} | {runs[0]['parameters']:,} | {runs[0]['item_bytes']} | {query:.2f} |"
        )
    return "\n".join([*out, "", PAPERS])


def words(data: Path, steps: int, seeds: int, num_queries: int) -> str:
    """Say what was measured, where and when."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    return textwrap.fill(
        f"{steps:,} steps of 256 pairs for each row, {seeds} seeds, {num_queries:,} queries of `{data.name}`, "
        f"small towers from scratch; {datetime.date.today()}, commit {commit}, {machine}, no GPU. Small type: "
        "95 % intervals over queries, each averaged over seeds. ▲ and ▼: better or worse than text only, "
        "p < 0.01 by a paired bootstrap over queries after Holm's correction over the whole table. nDCG with "
        "linear gain. At this budget nothing is trained to its end: compare rows, and take no figure for the "
        "best that a recipe can do.",
        width=115,
    )


def main(
    data: Path,
    out: Path = Path("docs/results.md"),
    home: Path = Path("paper-table"),
    steps: int = 600,
    seeds: int = 3,
    texts: Annotated[str, typer.Option(help="kinds of titles, by commas")] = "text",
    repeats: Annotated[str, typer.Option(help="JSON: how often queries are asked, by pattern")] = "{}",
    note: Annotated[str, typer.Option(help="what a reader must know of the data")] = "",
    mlflow_port: int = 5002,
    dashboard_port: int = 8267,
    gcs_port: int = 6391,
    http_port: int = 8002,
) -> None:
    """Train, evaluate and write all rows."""
    ports = local.Ports(http=http_port, mlflow=mlflow_port, dashboard=dashboard_port, gcs=gcs_port)
    stack = local.start(home.resolve(), ports)
    try:
        os.environ |= stack.environment | {"RAY_ADDRESS": f"{local.HOST}:{gcs_port}"}
        root = stack.home / "artifacts"
        made = triplets.prepare(triplets.PrepareSettings(data=str(data.resolve()), root=root))
        table = Table(root, Path(made["artifact"]), steps, texts.split(","), json.loads(repeats))
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        for seed in range(seeds):
            for number, name in enumerate(ROWS, 1):
                rows[name].append(table.row(name, seed))
                say(f"seed {seed}: row {number} of {len(ROWS)}, {name}")
        by_text = {text: summed_up(rows, text) for text in table.texts}
        num_queries = len(rows[TEXT_ONLY][0]["by_text"][table.texts[0]][MEASURES[0]])
        told = words(data, steps, seeds, num_queries)
        steps_bring = against(rows, table.texts)
        told = f"{told}\n\n{textwrap.fill(note, width=115)}" if note else told
        artifacts.write_text(out, markdown(rows, by_text, steps_bring, told))
        costs = {n: [{k: v for k, v in r.items() if k != "by_text"} for r in runs] for n, runs in rows.items()}
        found = {"what": told, "rows": by_text, "steps": steps_bring, "costs": costs}
        artifacts.write_text(out.with_suffix(".json"), json.dumps(found, indent=1))
        say(f"{out} is written")
    finally:
        ray.shutdown()
        local.stop(stack.home)


if __name__ == "__main__":
    typer.run(main)
