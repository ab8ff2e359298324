"""Doctor: whether this machine, its packages, the parts that run and the data are what askew needs.

A check is a function of what it looks at. Heavy packages are imported by other processes, so that a broken one is
a finding and not the end of the doctor.
"""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
from rich.markup import escape
from rich.table import Table

from askew import dashboard, ports, preflight
from askew.errors import AskewError, DataError
from askew.ports import PURPOSES, Ports

PACKAGES = ("ray", "torch", "mlflow", "faiss", "pyarrow")
IMPORT_S, ANSWER_S = 90, 4
SAMPLE_BYTES, SAMPLE_CHUNKS = 1 << 20, 4
KINDS = {"items": "item", "queries": "query", "judgments": "judgment", "clicks": "click"}
INSTALL = "install it again: pip install -c constraints.txt -e ."
COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


class Check(NamedTuple):
    """What was looked at, and what to do where it is not as wanted."""

    name: str
    state: Literal["ok", "warn", "bad"]
    wanted: str
    found: str
    do: str = ""


class Asked(NamedTuple):
    """What a person wants to have looked at, beyond the machine; empty: not that."""

    home: Path = Path()
    ports: Ports = Ports()
    address: str = ""
    tracking_uri: str = ""
    endpoint: str = ""
    data: str = ""


# --- the machine ---------------------------------------------------------------------------------


def python(version: tuple[int, ...]) -> Check:
    """Check a Python's version, of which the first two numbers count."""
    oldest, newest = (".".join(map(str, one)) for one in (preflight.OLDEST, preflight.NEWEST))
    fits = preflight.OLDEST <= version[:2] <= preflight.NEWEST
    do = "" if fits else "make demo PYTHON=python3.11, after rm -r .venv"
    found = ".".join(map(str, version))
    return Check("Python", "ok" if fits else "bad", f"{oldest} to {newest}", found, do)


def memory(free_gib: float | None) -> Check:
    """Check how much memory a program could take now; None where the system does not tell."""
    wanted = f"{preflight.MEMORY_GIB} GiB free"
    if free_gib is None:
        return Check("memory", "warn", wanted, "the system does not tell", "look yourself")
    if free_gib >= preflight.MEMORY_GIB:
        return Check("memory", "ok", wanted, f"{free_gib:.1f} GiB")
    if free_gib >= preflight.LEAST_MEMORY_GIB:
        return Check("memory", "warn", wanted, f"{free_gib:.1f} GiB", "close other programs before a training")
    return Check("memory", "bad", f"at least {preflight.LEAST_MEMORY_GIB} GiB free", f"{free_gib:.1f} GiB",
                 "close other programs")  # fmt: skip


def disk(free_gib: float, folder: Path) -> Check:
    """Check how much is free on the disk that a folder is on: askew is installed, so it is for what it makes."""
    wanted = f"{preflight.LEAST_DISK_GIB} GiB free at {folder}"
    if free_gib >= preflight.LEAST_DISK_GIB:
        return Check("disk", "ok", wanted, f"{free_gib:.1f} GiB")
    return Check("disk", "bad", wanted, f"{free_gib:.1f} GiB", "free some, or work in another folder")


def port(name: str, number: int) -> Check:
    """Check that a part's port is free, or that this part answers there."""
    label, wanted = f"port {number}", f"free, or {PURPOSES[name]}"
    if ports.is_free(number):
        return Check(label, "ok", wanted, "free")
    if part := _part(name, number):
        return Check(label, "ok", wanted, part)
    owner = ports.owner(number)
    if name == "http" and any(sign in owner for sign in ("haproxy", "ray::")):
        return Check(label, "warn", wanted, f"Ray Serve, with no endpoint that answers ({owner})", "askew status")
    return Check(label, "bad", wanted, owner, ports.other(name))


def _part(name: str, number: int) -> str:
    """Which of askew's parts answers on a port; empty when none does."""
    url = f"http://{ports.HOST}:{number}"
    if name == "http" and _json(f"{url}/healthz") == {"status": "ok"}:
        return "askew's endpoint answers there"
    if name == "mlflow" and _is_mlflow(url):
        return "MLflow answers there"
    if name == "dashboard" and (told := _json(f"{url}/api/version")) and "ray_version" in told:
        return f"the dashboard of a Ray {told['ray_version']} answers there"
    if name == "gcs" and "gcs_server" in (owner := ports.owner(number)):
        return f"Ray is there: {owner}"
    return ""


# --- packages ------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """What importing a package came to: its version, else why not; of torch, which GPUs it sees."""

    version: str = ""
    error: str = ""
    gpus: tuple[str, ...] = ()


def probe(package: str) -> Probe:
    """Import a package in a process of its own."""
    gpus = "print(*(p.cuda.get_device_name(n) for n in range(p.cuda.device_count())), sep='\\n')"
    code = f"import {package} as p; print(p.__version__)" + (f"; {gpus}" if package == "torch" else "")
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_S)
    except subprocess.TimeoutExpired:
        return Probe(error=f"no end of its import within {IMPORT_S} s")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return Probe(lines[0], gpus=tuple(lines[1:]))
    said = done.stderr.strip().splitlines()
    return Probe(error=said[-1] if said else f"exit code {done.returncode} at its import")


def package(name: str, found: Probe) -> Check:
    """Check that a package can be imported."""
    if found.error:
        return Check(name, "bad", "can be imported", found.error, INSTALL)
    return Check(name, "ok", "can be imported", found.version)


def gpu(found: Probe) -> Check:
    """Tell which GPUs there are; none is no fault."""
    if found.gpus:
        return Check("GPU", "ok", "none needed", ", ".join(found.gpus), "to train on it: use_gpu=true")
    if found.error:
        return Check("GPU", "warn", "none needed", "unknown, as torch cannot be imported")
    return Check("GPU", "ok", "none needed", "none", "training and embedding run on the processor")


# --- parts that run ------------------------------------------------------------------------------


def cluster(address: str) -> Check:
    """Check that a Ray cluster's dashboard answers, with jobs taken."""
    wanted = f"a Ray cluster's dashboard at {address}"
    try:
        version = dashboard.ask(address, "/api/version", ANSWER_S)["ray_version"]
        dashboard.ask(address, "/api/jobs/", ANSWER_S)
    except AskewError as error:
        return Check("cluster", "bad", wanted, error.found, error.do)
    return Check("cluster", "ok", wanted, f"Ray {version}")


def mlflow(uri: str) -> Check:
    """Check that an MLflow server answers."""
    wanted = f"an MLflow server at {uri}"
    if _is_mlflow(uri):
        return Check("MLflow", "ok", wanted, "it answers")
    do = "start one (make demo does), or set MLFLOW_TRACKING_URI to the address of one"
    return Check("MLflow", "bad", wanted, _told(_get(f"{uri.rstrip('/')}/health")), do)


def _is_mlflow(uri: str) -> bool:
    answer = _get(f"{uri.rstrip('/')}/health")
    return isinstance(answer, httpx.Response) and answer.is_success and answer.text == "OK"


def endpoint(url: str) -> Check:
    """Check that an endpoint answers searches by every shard."""
    wanted = f"a search endpoint at {url}, ready"
    answer = _get(f"{url.rstrip('/')}/readyz")
    if isinstance(answer, httpx.Response) and answer.is_success:
        live = (_json(f"{url.rstrip('/')}/release") or {}).get("model", {})
        found = (
            f"{live['name']} version {live['version']} is live"
            if live
            else "ready, and tells no more without a key"
        )
        return Check("endpoint", "ok", wanted, found)
    do = "start one (make demo, or askew serve)" if isinstance(answer, str) else "askew status tells of its parts"
    return Check("endpoint", "bad", wanted, _told(answer), do)


def _get(url: str) -> httpx.Response | str:
    """What stands at a URL, or why nothing does."""
    try:
        return httpx.get(url, timeout=ANSWER_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}"


def _told(answer: httpx.Response | str) -> str:
    return answer if isinstance(answer, str) else f"HTTP {answer.status_code}: {answer.text[:200]}"


def _json(url: str) -> dict[str, Any] | None:
    answer = _get(url)
    try:
        found = answer.json() if isinstance(answer, httpx.Response) and answer.is_success else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# --- the data ------------------------------------------------------------------------------------


def data(folder: str) -> Check:
    """Check that a catalogue's layout is recognised, and that the first records of each table can be used."""
    wanted = f"a catalogue at {folder}"
    try:
        from askew import published

        layout = published.recognise(folder)
        found = [told for name in (*KINDS, "triplets") for table in getattr(layout, name)
                 if (told := _sampled(folder, name, table))]  # fmt: skip
    except ImportError as error:
        return Check("data", "bad", wanted, f"{error}", INSTALL)
    except DataError as error:
        return Check("data", "bad", error.wanted, error.found, error.do)
    return Check("data", "ok", wanted, "; ".join(found))


def _sampled(folder: str, name: str, table: Any) -> str:
    """Read the first records of a table. Raises DataError when a column is not there, or none can be used."""
    from askew import sources

    unit, *others = sources.units(table, folder, SAMPLE_BYTES)
    kind = KINDS.get(name, "triplet")
    read = sources.read_triplets(unit, table) if name == "triplets" else sources.read(unit, table, kind)
    chunks = list(itertools.islice(read, SAMPLE_CHUNKS))
    good, bad = sum(one.table.num_rows for one in chunks), [record for one in chunks for record in one.bad]
    if not good:
        found = f"none of the first: {bad[0].reason}: {bad[0].message}" if bad else "none"
        raise DataError(f"{name} in {unit['file']}", found, "mend the file; docs/sources.md tells what it holds")
    more = ", …" * any(one["file"] != unit["file"] for one in others)
    return f"{name} in {unit['file']}{more}" + (f" ({len(bad)} of the first set aside)" if bad else "")


# --- all of them ---------------------------------------------------------------------------------


def examine(asked: Asked) -> list[Check]:
    """Make all checks that are asked for, side by side."""
    home = next(folder for folder in (asked.home, *asked.home.absolute().parents) if folder.exists())
    free_gib = shutil.disk_usage(home).free / 2**30
    looks: list[Callable[[], Check]] = [
        partial(python, sys.version_info[:3]), partial(memory, preflight.free_memory_gib()),
        partial(disk, free_gib, asked.home),
        *(partial(port, name, getattr(asked.ports, name)) for name in PURPOSES),
    ]  # fmt: skip
    last: list[tuple[str, Callable[[str], Check]]] = [
        (asked.address, cluster), (asked.tracking_uri, mlflow), (asked.endpoint, endpoint), (asked.data, data),
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        probes = {name: pool.submit(probe, name) for name in PACKAGES}
        made = [pool.submit(look) for look in looks]
        rest = [pool.submit(look, what) for what, look in last if what]
        checks = [one.result() for one in made]
        checks += [package(name, one.result()) for name, one in probes.items()]
        return [*checks, gpu(probes["torch"].result()), *(one.result() for one in rest)]


def answering_endpoint(number: int) -> str:
    """The address of the endpoint that answers on a port of this machine; empty when none does."""
    return f"http://{ports.HOST}:{number}" if _part("http", number) else ""


def table(checks: list[Check]) -> Table:
    """Draw checks, one a row."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "check"):
        drawn.add_column(column, no_wrap=True)
    for column in ("wanted", "found", "do"):
        drawn.add_column(column, overflow="fold")
    for one in checks:
        state = f"[{COLOURS[one.state]}]{one.state}[/]"
        drawn.add_row(state, *map(escape, (one.name, one.wanted, one.found, one.do)))
    return drawn


def told(checks: list[Check]) -> dict[str, Any]:
    """What the checks found, as it is written in JSON."""
    return {"ok": all(one.state != "bad" for one in checks), "checks": [one._asdict() for one in checks]}
