"""The command line: `askew`.

What a command needs is imported when it runs, so that help and completion come at once, and `askew doctor` where
packages are broken. Knows of each part how it is asked, and nothing of what it does.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from askew import __version__, keys
from askew.errors import AskewError, ConfigError
from askew.ports import Ports

RUNS = "Stages"
ASKS = "The endpoint"
LOOKS = "Looking after it"
PORTS = Ports()
DASHBOARD, MLFLOW, ENDPOINT = map(PORTS.url, ("dashboard", "mlflow", "http"))
app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
errors = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Debug = Annotated[bool, typer.Option("--debug", help="show where an error came from")]
Cluster = Annotated[str, typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="of the Ray cluster's dashboard")]
TrackingUri = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="of MLflow")]
EndpointUrl = Annotated[str, typer.Option(envvar="ASKEW_ENDPOINT", help="of the search endpoint")]
ApiKey = Annotated[str, typer.Option(envvar="ASKEW_API_KEY", help="a key of the endpoint, if it wants one")]


def examples(*lines: str) -> str:
    """Make the end of a command's help: how it is used."""
    return "Examples:\n\n" + "\n".join(f"[cyan]{escape(line)}[/]" for line in lines)


def in_a_line(command: Callable[..., None]) -> Callable[..., None]:
    """Make what goes wrong in a command one line and an exit code; with `--debug` it is raised."""

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AskewError as error:
            if kwargs.get("debug"):
                raise
            print(f"askew: error: {error}", file=sys.stderr)
            raise typer.Exit(getattr(error, "exit_code", 2)) from None
        except KeyboardInterrupt:
            print("askew: stopped; run it again and it goes on where it was", file=sys.stderr)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if kwargs.get("debug"):
                raise
            found = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            do = "run it again with --debug, which shows where"
            print(f"askew: error: wanted an end without an error; found {found}; {do}", file=sys.stderr)
            raise typer.Exit(2) from None

    return told


def _version(wanted: bool) -> None:
    if wanted:
        print(f"askew {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Multimodal product search on Ray: train, serve, promote."""


# --- stages --------------------------------------------------------------------------------------

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="SETTINGS.yaml KEY=VALUE", help="a settings file, then changes to it"),
]
Address = Annotated[str, typer.Option(help="of a Ray cluster's dashboard: run it there as a job, not here")]


def _stage(name: str, doc: str, *lines: str) -> None:
    """Add the command of a stage."""

    @app.command(name, help=doc, epilog=examples(*lines), rich_help_panel=RUNS)
    @in_a_line
    def command(words: Words = None, address: Address = "", as_json: Json = False, debug: Debug = False) -> None:
        _run(name, words or [], address, as_json, debug)


def _run(name: str, words: list[str], address: str, as_json: bool, debug: bool) -> None:
    """Run a stage, and tell its result."""
    started = time.monotonic()
    result = _result(name, words, address, debug)
    if as_json:
        print(json.dumps(result))
        return
    rows, seconds = result.get("rows", 0), time.monotonic() - started
    when = "done before" if result.get("skipped") else f"{seconds:.0f} s"
    Console(highlight=False).print(f"[green]✓[/] {name:<9} {rows:>9,} rows   {when}")
    shown = {key: value for key, value in result.items() if isinstance(value, str) and key != "key"}
    for key, value in shown.items():
        print(f"  {key:<9} {value}")


def _result(name: str, words: list[str], address: str, debug: bool) -> dict[str, Any]:
    from askew import following, jobs, stages

    order = stages.order(name, words)
    settings = stages.settings(order)
    with following.showing(errors, name) as heard:

        def on_line(line: str) -> None:
            errors.print(line, markup=False, soft_wrap=True) if debug else heard(line)

        if not address:
            return stages.run(name, settings, on_line)
        job = jobs.name(name)
        try:
            return stages.submit(order, address, job, on_line)
        except KeyboardInterrupt:
            _left(address, job)
            raise typer.Exit(130) from None


def _left(address: str, job: str) -> None:
    """Tell what a job that nobody follows any more does, and how to follow or stop it."""
    print(f"\naskew: not followed any more: job {job} runs on, if it was submitted already", file=sys.stderr)
    print(f"  follow it   ray job logs --address {address} --follow {job}", file=sys.stderr)
    print(f"  stop it     ray job stop --address {address} {job}", file=sys.stderr)


_stage(
    "prepare",
    "Make triplets of a catalogue: query, product that fits, product that does not. Settings: jobs/prepare.yaml.",
    "askew prepare data=/abs/catalogue root=/abs/artifacts",
    "askew prepare jobs/prepare.yaml data=… root=… image_size=64 --address http://127.0.0.1:8266",
)
_stage(
    "train",
    "Train a model on triplets and register it in MLflow. Settings: jobs/train.data.yaml, or another recipe of "
    "jobs/train.*.yaml.",
    "askew train triplets=/abs/artifacts/triplets-… root=/abs/artifacts",
    "askew train jobs/train.smar.yaml triplets=… root=… num_workers=4 use_gpu=true",
)
_stage(
    "index",
    "Build the index of a model version. Settings: jobs/index.yaml.",
    "askew index version=1 triplets=/abs/artifacts/triplets-… root=/abs/artifacts",
)
_stage(
    "evaluate",
    "Rank the judged queries by a model version and by what it is compared with. Settings: jobs/evaluate.yaml.",
    "askew evaluate version=1 triplets=… index=… root=…",
)
_stage(
    "pipeline",
    "Run all stages, from a catalogue to a version that bears the alias challenger. Settings: jobs/pipeline.yaml.",
    "askew pipeline data=/abs/catalogue root=/abs/artifacts",
    "askew pipeline data=… root=… promote=champion --address http://127.0.0.1:8266 --json",
)
_stage(
    "update",
    "Put items that are new, have changed or are gone into the live index. Settings: jobs/update.yaml.",
    "askew update root=/abs/artifacts data=/abs/new-items deleted=/abs/ids.txt",
    "askew update root=/abs/artifacts compact=true",
)


@app.command(
    rich_help_panel=RUNS,
    epilog=examples(
        "askew promote askew-demo 8",
        "askew promote askew-demo challenger --force",
        "askew promote jobs/promote.yaml version=8 --address http://127.0.0.1:8266",
    ),
)
@in_a_line
def promote(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL VERSION | SETTINGS.yaml KEY=VALUE",
            help="a registered model, and a version's number or alias; or a settings file and changes to it",
        ),
    ],
    alias: Annotated[str, typer.Option(help="what the endpoint follows; champion by default")] = "",
    force: Annotated[bool, typer.Option(help="past the gates of quality, never past those of files")] = False,
    tracking_uri: TrackingUri = "",
    address: Address = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Move an alias to a version, as a person does in MLflow's page; the endpoint follows within seconds."""
    changes = [f"alias={json.dumps(alias)}"] * bool(alias) + ["force=true"] * force
    changes += [f"tracking_uri={json.dumps(tracking_uri)}"] * bool(tracking_uri)
    if all("=" in word or word.endswith((".yaml", ".yml")) for word in words):
        _run("promote", [*words, *changes], address, as_json, debug)
        return
    if len(words) != 2:
        raise ConfigError("a model and a version", " ".join(words), "write: askew promote MODEL VERSION")
    named = [f"{key}={json.dumps(word)}" for key, word in zip(("model", "version"), words, strict=True)]
    found = _result("promote", [*named, *changes], address, debug) if address else _promoted([*named, *changes])
    print(json.dumps(found) if as_json else f"{found['model']} version {found['version']} bears {found['alias']}")


def _promoted(changes: list[str]) -> dict[str, Any]:
    """Promote by what was named alone, without a settings file."""
    from askew import config
    from askew.promotion import PromoteSettings
    from askew.promotion import promote as promoted

    values: dict[str, Any] = {}
    for change in changes:
        config.change(values, change)
    return promoted(config.fitted(PromoteSettings, values, "what was named"))


# --- the endpoint --------------------------------------------------------------------------------


@app.command(
    rich_help_panel=ASKS,
    epilog=examples(
        "askew serve --set model=askew-demo",
        "askew serve serve_configs/search.cluster.yaml --address http://head:8265 --set num_shards=8",
    ),
)
@in_a_line
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="a Serve config; serve_configs/search.yaml by default")
    ] = None,
    address: Cluster = DASHBOARD,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an argument of the application")
    ] = None,
    patience: Annotated[float, typer.Option(min=1, help="seconds in which it must be ready")] = 240,
    endpoint: Annotated[
        str, typer.Option(help="where it answers, if not where the config says: behind a gateway, or by TLS")
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Deploy the search endpoint on a Ray cluster, and wait until it answers."""
    from askew import checkout, deploying

    path = config or checkout.find() / "serve_configs" / "search.yaml"
    values = deploying.read(path, change or ())
    with errors.status("deploy …"):
        deploying.check_port(address, values)
        deploying.deploy(address, values, patience, f"read the logs of Serve at {address}")
        url = endpoint.rstrip("/") or deploying.url(address)
        deploying.await_ready(url, patience)
    print(json.dumps({"endpoint": url}) if as_json else f"ready at {url}, with its page at {url}/docs")


@app.command(
    rich_help_panel=ASKS,
    epilog=examples(
        'askew search "red striped mug"',
        """askew search "striped mug" -k 5 --filter '{"colour": ["red", "blue"], "price": {"lt": 20}}'""",
    ),
)
@in_a_line
def search(
    query: Annotated[str, typer.Argument(help="what to search for")],
    endpoint: EndpointUrl = ENDPOINT,
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="how many products")] = 10,
    where: Annotated[str, typer.Option("--filter", metavar="JSON", help="conditions on fields")] = "",
    api_key: ApiKey = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search for products."""
    from askew.client import Client

    with Client(endpoint, api_key=api_key or None) as shop:
        answer = shop.search(query, k=k, filter=_filter(where))
    if as_json:
        print(answer.model_dump_json())
        return
    _print_hits(query, answer.model_dump())


def _filter(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if text else None
    except ValueError as error:
        raise ConfigError("a filter of JSON", f"{text!r}: {error}", "see docs/index.md") from None
    if found is not None and not isinstance(found, dict):
        raise ConfigError("a filter of fields and conditions", repr(text), "see docs/index.md")
    return found


def _print_hits(query: str, answer: Mapping[str, Any]) -> None:
    from rich.table import Table

    model = f"{answer['model']['name']} version {answer['model']['version']}, {answer['took_ms']:.0f} ms"
    missing = ", degraded: products may be missing" if answer["degraded"] else ""
    title, caption = escape(f"“{query}”"), escape(f"{model}{missing}")
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("score", "title", "item", "fields"):
        table.add_column(column, overflow="fold")
    for hit in answer["hits"]:
        fields = ", ".join(f"{name} {_short(value)}" for name, value in hit["fields"].items() if value is not None)
        table.add_row(f"{hit['score']:.3f}", *map(escape, (hit["title"], hit["item_id"], fields)))
    Console(highlight=False).print(table if answer["hits"] else f"nothing found for {title} ({caption})")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- looking after it ----------------------------------------------------------------------------


app.add_typer(
    keys.app, name="keys", rich_help_panel=LOOKS,
    epilog=examples(
        "askew keys add shop --scope search --rate 50 --file keys.yaml",
        "askew keys remove shop --file keys.yaml",
    ),
)  # fmt: skip


@app.command(
    rich_help_panel=LOOKS,
    epilog=examples("askew doctor", "askew doctor --data /path/to/catalogue --tracking-uri http://127.0.0.1:5001"),
)
@in_a_line
def doctor(
    data: Annotated[str, typer.Option(help="a catalogue's folder or URL")] = "",
    address: Annotated[str, typer.Option(help="of a Ray cluster's dashboard, to be looked at too")] = "",
    tracking_uri: TrackingUri = "",
    endpoint: Annotated[str, typer.Option(help="of a search endpoint, to be looked at too")] = "",
    home: Annotated[Path, typer.Option(help="where artifacts are kept")] = Path(),
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.http,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.mlflow,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.dashboard,
    gcs_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.gcs,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look whether this machine, its packages, what runs and the data are as wanted; exits with 1 when not."""
    from askew import doctor as doctors

    ports = Ports(http=http_port, mlflow=mlflow_port, dashboard=dashboard_port, gcs=gcs_port)
    endpoint = endpoint or doctors.answering_endpoint(http_port)
    with errors.status("looking …"):
        checks = doctors.examine(doctors.Asked(home, ports, address, tracking_uri, endpoint, data))
    told = doctors.told(checks)
    if as_json:
        print(json.dumps(told))
    else:
        Console(highlight=False).print(doctors.table(checks))
    raise typer.Exit(0 if told["ok"] else 1)


@app.command(
    rich_help_panel=LOOKS,
    epilog=examples("askew status", "askew status --address http://head:8265 --endpoint http://shop:8000 --json"),
)
@in_a_line
def status(
    address: Cluster = DASHBOARD,
    tracking_uri: TrackingUri = MLFLOW,
    endpoint: EndpointUrl = ENDPOINT,
    api_key: ApiKey = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show cluster, jobs, model versions and the endpoint on one screen."""
    from askew import status as statuses

    told = statuses.asked(address, tracking_uri, endpoint, api_key)
    if as_json:
        print(json.dumps(told))
    else:
        Console(highlight=False).print(statuses.drawn(told))


BackupFrom = Annotated[
    Path, typer.Argument(metavar="FROM", help="a backup, or the folder of backups: then the last")
]


@app.command(
    rich_help_panel=LOOKS,
    epilog=examples("askew backup /srv/askew/artifacts /backup/askew --tracking-uri http://mlflow.example:5000"),
)
@in_a_line
def backup(
    root: Annotated[Path, typer.Argument(help="the folder of the artifacts")],
    to: Annotated[Path, typer.Argument(help="the folder of backups; what did not change is linked")],
    tracking_uri: TrackingUri = MLFLOW,
    model: Annotated[list[str] | None, typer.Option(help="a registered model, again for others; else all")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copy artifacts, live changes and what MLflow knows into a new folder, while everything runs."""
    from askew import backup as backups

    done = backups.backup(root, tracking_uri, to, model or ())
    new = f"{done['copied_bytes']:,} bytes that the one before has not"
    _tell_backup(done, f"{done['artifacts']} artifacts, {done['versions']} versions, {new}", as_json)


@app.command(
    rich_help_panel=LOOKS,
    epilog=examples(
        "askew restore /backup/askew /srv/askew/artifacts --tracking-uri http://mlflow.example:5000",
        "askew restore /backup/askew /srv/askew/artifacts --only artifacts",
    ),
)
@in_a_line
def restore(
    from_: BackupFrom,
    root: Annotated[Path, typer.Argument(help="where the artifacts go")],
    tracking_uri: TrackingUri = MLFLOW,
    only: Annotated[str, typer.Option(help="artifacts or mlflow, where the other is as it should be")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put a backup back; nothing is overwritten, and run again after a kill it goes on."""
    from askew import backup as backups

    done = backups.restore(from_, root, tracking_uri, only)
    rows, versions = f"{done['artifacts']} artifacts in {done['root']}", f"{done['versions']} versions in MLflow"
    parts = {backups.ARTIFACTS: rows, backups.MLFLOW: versions}
    _tell_backup(done, ", ".join(told for part, told in parts.items() if only in ("", part)), as_json)


@app.command(rich_help_panel=LOOKS, epilog=examples("askew verify /backup/askew"))
@in_a_line
def verify(from_: BackupFrom, as_json: Json = False, debug: Debug = False) -> None:
    """Read all of a backup against its checksums."""
    from askew import backup as backups

    done = backups.verify(from_)
    _tell_backup(done, f"whole: {done['files']} files", as_json)


def _tell_backup(done: Mapping[str, Any], what: str, as_json: bool) -> None:
    for line in done["told"]:
        print(f"askew: warning: {line}", file=sys.stderr)
    print(json.dumps(done) if as_json else f"{done['backup']}: {what}")


@app.command(
    rich_help_panel=LOOKS,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("askew bench", "askew bench serve --quick", "askew bench index --help"),
)
@in_a_line
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="of a file in bench/; without one they are listed")] = "",
    debug: Debug = False,
) -> None:
    """Run a bench of a checkout; what stands after its name is given to it."""
    from askew import benches

    if not name:
        for one, does in benches.listed().items():
            print(f"{one:<12} {does}")
        return
    raise typer.Exit(benches.run(name, context.args))


if __name__ == "__main__":
    app()
