"""The demo: from a catalogue to a search answered, each stage a Ray job (`make demo`).

A stage that was done before, by the content of its settings and inputs, is skipped. Killed in the middle and
run again, the demo goes on; a job that is still running is followed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from askew import __version__, artifacts, deploying, following, local, published
from askew.errors import ArtifactError, AskewError, DataError, MachineError, RegistryError, StageError
from askew.preflight import LEAST_DISK_GIB, LEAST_MEMORY_GIB
from askew.registry import Registry
from askew.reports import NAMES, PAGE

MODEL = "askew-demo"
SHOWN_MEASURES = ("nDCG@10", "R@10", "R@100", "RR@10")
QUERIES = ("red striped mug", "blue dotted cushion", "yellow umbrella", "checked backpack")
ROOT = Path(__file__).parents[2]
KINDS = {"draw": "catalogue", "prepare": "triplets", "train": "model", "index": "index", "evaluate": "evaluation"}
Port = Annotated[int, typer.Option(min=1, max=65535)]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = Console(highlight=False)


class Demo:
    """One run of the demo in a home folder."""

    def __init__(self, home: Path, stack: local.Stack, drawn: bool) -> None:
        self.home, self.stack, self.drawn = home, stack, drawn
        self.memo: dict[str, Any] = _read_json(home / "state.json")
        self.stages: dict[str, dict[str, Any]] = {}

    def stage(
        self, name: str, settings: str, stamp: str = "", changes: Sequence[str] = (), **places: object
    ) -> dict[str, Any]:
        """Run a stage as a Ray job, or find it done; returns its result.

        `stamp` stands for what the stage reads beyond its settings and the artifacts that they name.
        """
        arguments = [*changes, *(f"{key}={value}" for key, value in places.items())]
        key = _fingerprint(ROOT / "jobs" / settings, [*arguments, stamp])
        memo = self.memo.get(name, {})
        if memo.get("key") == key and self._stands(name, memo["result"]):
            self._say(name, memo["result"], memo["seconds"], done_before=True)
            return dict(memo["result"])
        started = time.monotonic()
        with following.showing(console, name, plain=False) as on_line:
            command = ["python", f"jobs/{name}.py", f"jobs/{settings}", *arguments]
            result = local.submit(self.stack, name, key, command, ROOT, on_line)
        seconds = time.monotonic() - started
        self._remember(name, {"key": key, "result": result, "seconds": seconds})
        self._say(name, result, seconds, done_before=False)
        return result

    def _stands(self, name: str, result: dict[str, Any]) -> bool:
        """Whether what a stage made is still there and whole."""
        try:
            if name in KINDS:
                artifacts.read(Path(result["artifact"]), KINDS[name])
            if name == "train":
                Registry(self.stack.mlflow).resolve(result["model"], result["version"])
            if name == "promote":
                champion = Registry(self.stack.mlflow).resolve(result["model"], result["alias"])
                return champion.version == str(result["version"])
        except (ArtifactError, RegistryError):
            return False
        return True

    def _remember(self, name: str, memo: dict[str, Any]) -> None:
        self.memo[name] = memo
        artifacts.write_text(self.home / "state.json", json.dumps(self.memo, indent=1))

    def _say(self, name: str, result: dict[str, Any], seconds: float, done_before: bool) -> None:
        self.stages[name] = {"seconds": round(seconds, 1), "rows": result["rows"], "skipped": done_before}
        when = "done before" if done_before else f"{seconds:.0f} s"
        console.print(f"[green]✓[/] {name:<9} {result['rows']:>9,} rows   {when}")

    def deploy(self, version: str, triplets: str, root: Path) -> None:
        """Deploy the endpoint, unless it runs already, and wait until it serves this version.

        A version that the alias comes to later gets its index built from the same triplets.
        """
        started = time.monotonic()
        live = _release(self.stack)
        done_before = live is not None and live["model"]["version"] == version
        args = {
            "cache": str(self.home / "models"), "switch": {"build": {"triplets": triplets, "root": str(root)}},
        }  # fmt: skip
        with console.status("deploy …"):
            if live is None or self.memo.get("deploy") != args:
                local.deploy(self.stack, ROOT / "serve_configs" / "demo.yaml", f"{time.time():.0f}", args)
                self._remember("deploy", args)
            live = _await_release(self.stack, version)
            deploying.await_ready(self.stack.endpoint)
        assert live is not None
        self._say("deploy", {"rows": live["items"]}, time.monotonic() - started, done_before)
        self.stages["deploy"]["shards"] = live["shards"]

    def search(self, queries: tuple[str, ...]) -> list[dict[str, Any]]:
        """Ask the endpoint over HTTP and print what it answers."""
        answers = []
        for query in queries:
            response = httpx.post(f"{self.stack.endpoint}/search", json={"query": query, "k": 5}, timeout=30)
            response.raise_for_status()
            answers.append({"query": query, **response.json()})
        for answer in answers:
            model = answer["model"]
            caption = f"{model['name']} version {model['version']}, {answer['took_ms']:.0f} ms"
            table = Table(
                title=f"“{answer['query']}”", title_justify="left", caption=caption, caption_justify="left"
            )
            for column in ("score", "title", "its photo shows" if self.drawn else "item"):
                table.add_column(column)
            for hit in answer["hits"]:
                fields = hit["fields"]
                last = f"{fields['colour']}, {fields['pattern']}" if self.drawn else hit["item_id"]
                table.add_row(f"{hit['score']:.3f}", hit["title"], last)
            console.print(table)
        return answers


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="a catalogue's folder; without it the demo draws one")] = None,
    home: Annotated[Path, typer.Option(help="where everything is kept")] = Path("demo"),
    train: Annotated[list[str] | None, typer.Option(help="a training setting, as dotted.key=value")] = None,
    http_port: Port = 8000,
    mlflow_port: Port = 5001,
    dashboard_port: Port = 8266,
    gcs_port: Port = 6390,
    debug: bool = False,
) -> None:
    """Start everything, run the stages that are not done, and leave the endpoint up."""
    with _errors_in_a_line(home, debug):
        ports = local.Ports(http=http_port, mlflow=mlflow_port, dashboard=dashboard_port, gcs=gcs_port)
        run(home, ports, data, train or ())


@app.command()
def stop(home: Path = Path("demo"), debug: bool = False) -> None:
    """End exactly what `up` started; the artifacts stay."""
    with _errors_in_a_line(home, debug), _alone(home):
        count = local.stop(home)
        print(f"{count} processes ended" if count else f"nothing was running from {home}")


def run(home: Path, ports: local.Ports, data: Path | None = None, train: Sequence[str] = ()) -> dict[str, Any]:
    """Run the demo and return its report. `train` changes training settings, each as `dotted.key=value`."""
    started = time.monotonic()
    home = home.resolve()
    if data is not None:
        _checked(data)
    _check_machine(home)
    with _alone(home):
        with console.status("starting Ray and MLflow …"):
            stack = local.start(home, ports)
        console.print(f"[green]✓[/] Ray and MLflow on 127.0.0.1, logs in {home / 'logs'}")
        demo, root = Demo(home, stack, drawn=data is None), home / "artifacts"
        source = data.resolve() if data is not None else demo.stage("draw", "draw.yaml", root=root)["artifact"]
        stamp = _stamp(data) if data is not None else ""
        triplets = demo.stage("prepare", "prepare.yaml", stamp, root=root, data=source)
        settings = "train.demo.yaml" if data is None else "train.data.yaml"
        model = demo.stage("train", settings, changes=train, root=root, triplets=triplets["artifact"])
        which = {
            "root": root,
            "model": model["model"],
            "version": model["version"],
            "triplets": triplets["artifact"],
        }
        index = demo.stage("index", "index.yaml", **which)
        evaluation = demo.stage("evaluate", "evaluate.yaml", **which, index=index["artifact"])
        demo.stage("promote", "promote.yaml", model=model["model"], version=model["version"])
        demo.deploy(model["version"], triplets["artifact"], root)
        answers = demo.search(QUERIES if data is None else _sample(Path(triplets["artifact"])))
        report = _report(demo, data, triplets, model, index, evaluation, answers, time.monotonic() - started)
        artifacts.write_text(home / "report.json", json.dumps(report, indent=1))
        _print_report(report, stack, home)
    return report


def _report(
    demo: Demo, data: Path | None, triplets: dict[str, Any], model: dict[str, Any], index: dict[str, Any],
    evaluation: dict[str, Any], answers: list[dict[str, Any]], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    stages = {name: dict(stage) for name, stage in demo.stages.items()}
    stages["register"] = {
        "seconds": round(model["seconds"]["register"], 1),
        "rows": 1,
        "skipped": stages["train"]["skipped"],
    }
    keys = ("queries", "items", "metrics", "comparisons", "modality", "index", "text_ceiling")
    found = {key: evaluation[key] for key in keys if key in evaluation}
    return {
        "data": "drawn by the demo: a made-up shop" if data is None else str(data),
        "stages": stages,
        "metrics": found.pop("metrics"),
        "evaluation": found,
        "page": str(Path(evaluation["artifact"]) / PAGE),
        "cluster": {"nodes": model["nodes"], "workers": model["workers"]},
        "model": {"name": model["model"], "version": model["version"]},
        "index": {"shards": stages["deploy"].pop("shards"), "segments": index["segments"], "items": index["rows"]},
        "triplets": triplets["counts"],
        "searches": answers,
        "total_seconds": round(seconds, 1),
        "machine": {"cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30)},
    }  # fmt: skip


def _print_report(report: dict[str, Any], stack: local.Stack, home: Path) -> None:
    found = report["evaluation"]
    table = Table(title=f"{found['queries']} judged queries over {found['items']:,} items", title_justify="left")
    for column in ("", *SHOWN_MEASURES):
        table.add_column(column)
    for system, values in report["metrics"].items():
        table.add_row(NAMES[system], *(f"{values[name]:.3f}" for name in SHOWN_MEASURES))
    console.print(table)
    for pair, by in found["comparisons"].items():
        spread = f"[{by['low']:+.3f}, {by['high']:+.3f}]"
        console.print(f"{pair}: nDCG@10 {by['difference']:+.3f} {spread}, p = {by['p_holm']:.4f}", markup=False)
    if "text_ceiling" in found:
        console.print(f"titles alone could reach nDCG@10 {found['text_ceiling']['val']:.3f} on this made-up shop")
    console.print(f"\nsearch endpoint  {stack.endpoint}/docs\nMLflow UI        {stack.mlflow}")
    console.print(f"Ray dashboard    {stack.dashboard}\nevaluation       {report['page']}")
    console.print(f"figures          {home / 'report.json'}")
    console.print(f"in {report['total_seconds']:.0f} s; it stays up until `make stop`. Try:\n")
    body = json.dumps({"query": report["searches"][0]["query"], "k": 5}, separators=(",", ":"))
    print(f"curl -s -X POST {stack.endpoint}/search -H 'content-type: application/json' -d '{body}'")


# --- checks and small parts ----------------------------------------------------------------------


def _checked(data: Path) -> Path:
    if not data.is_dir():
        raise DataError("a catalogue's folder", f"no folder {data}", "give its path as DATA=…")
    published.recognise(str(data))
    return data


def _sample(triplets: Path) -> tuple[str, ...]:
    """Four queries spread over those of evaluation."""
    texts = pq.read_table(triplets / "queries", columns=["query"])["query"].to_pylist()
    return tuple(texts[:: max(1, len(texts) // 4)][:4])


def _stamp(data: Path | str) -> str:
    """Sizes and times of a catalogue's files, so that a changed one is prepared again."""
    files = sorted(p for p in Path(data).rglob("*") if p.is_file())
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _check_machine(home: Path) -> None:
    memory = psutil.virtual_memory().available / 2**30
    if memory < LEAST_MEMORY_GIB:
        raise MachineError(f"{LEAST_MEMORY_GIB} GiB of free memory", f"{memory:.1f}", "close other programs")
    home.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(home).free / 2**30
    if disk < LEAST_DISK_GIB:
        raise MachineError(
            f"{LEAST_DISK_GIB} GiB of free disk at {home}", f"{disk:.1f}", "free some, or set HOME_DIR=…"
        )


def _fingerprint(settings: Path, arguments: list[str]) -> str:
    made_of = [__version__, settings.read_text(encoding="utf-8"), sorted(arguments)]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _release(stack: local.Stack) -> dict[str, Any] | None:
    try:
        answer = httpx.get(f"{stack.endpoint}/release", timeout=10)
        return dict(answer.json()) if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def _await_release(stack: local.Stack, version: str, patience_s: float = 60) -> dict[str, Any]:
    """Wait until the endpoint answers with the version that was deployed."""
    deadline = time.monotonic() + patience_s
    while (live := _release(stack)) is None or live["model"]["version"] != version:
        if time.monotonic() > deadline:
            raise StageError(f"version {version} to be served", f"{live}", f"read {stack.home / 'logs'}")
        time.sleep(0.5)
    return live


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold the home folder's lock, so that two demos do not meet in it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = "another one at work in it"
            raise MachineError(f"{home} for this demo alone", found, "wait for it, or set HOME_DIR=…") from error
        yield


@contextmanager
def _errors_in_a_line(home: Path, debug: bool) -> Iterator[None]:
    try:
        yield
    except AskewError as error:
        if debug:
            raise
        print(f"askew: error: {error}", file=sys.stderr)
        sys.exit(2)
    except httpx.HTTPError as error:
        if debug:
            raise
        found = f"{type(error).__name__}: {error}"
        print(
            f"askew: error: wanted an answer from the demo's parts; found {found}; read {home}/logs",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; run it again and it goes on (make stop ends what is running)", file=sys.stderr)
        sys.exit(130)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


if __name__ == "__main__":
    app()
