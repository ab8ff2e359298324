"""Status: what a cluster, its jobs, the model versions and the endpoint are doing now, on one screen.

Each part is asked at the same time as the others, by HTTP, and has a few seconds; one that does not answer is told
in its place. Asking and drawing know nothing of each other but what stands between them, which is `--json`.
"""

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from askew import dashboard

PATIENCE_S = 5
LATEST = 5  # jobs that are shown
START = {
    "cluster": "start one (make demo), or give its dashboard as --address",
    "jobs": "start one (make demo), or give the cluster's dashboard as --address",
    "models": "start MLflow (make demo), or give its address as --tracking-uri",
    "serve": "start a cluster (make demo), or give its dashboard as --address",
    "endpoint": "start it (make demo, or askew serve), or give its address as --endpoint",
}
COLOURS = {
    "RUNNING": "green", "HEALTHY": "green", "SUCCEEDED": "green", "ready": "green", "FAILED": "red",
    "DEPLOY_FAILED": "red", "UNHEALTHY": "red", "refused": "red", "STOPPED": "yellow",
}  # fmt: skip
Ask = Callable[[str], Awaitable[httpx.Response]]
Told = dict[str, Any]


# --- asking --------------------------------------------------------------------------------------


def asked(address: str, tracking_uri: str, endpoint: str, api_key: str = "") -> dict[str, Told]:
    """Ask all parts; returns for each what it told, or `wanted`, `found` and `do` where it did not answer.

    The key is shown to the endpoint alone.
    """
    return asyncio.run(_asked(address, tracking_uri, endpoint, api_key))


async def _asked(address: str, tracking_uri: str, endpoint: str, api_key: str) -> dict[str, Told]:
    key = {"authorization": f"Bearer {api_key}"} if api_key else {}
    shown = {**dict.fromkeys(("cluster", "jobs", "serve"), dashboard.headers()), "models": {}, "endpoint": key}
    places = {
        "cluster": (address, _cluster), "jobs": (address, _jobs), "models": (tracking_uri, _models),
        "serve": (address, _serve), "endpoint": (endpoint, _endpoint),
    }  # fmt: skip
    async with httpx.AsyncClient(timeout=PATIENCE_S - 1) as client:
        parts = [_part(client, name, url, ask, shown[name]) for name, (url, ask) in places.items()]
        return dict(zip(places, await asyncio.gather(*parts), strict=True))


async def _part(
    client: httpx.AsyncClient, name: str, url: str, part: Callable[[Ask], Awaitable[Told]],
    headers: Mapping[str, str],
) -> Told:  # fmt: skip
    async def ask(path: str) -> httpx.Response:
        return await client.get(f"{url.rstrip('/')}{path}", headers=headers)

    try:
        async with asyncio.timeout(PATIENCE_S):
            return {"at": url, **(await part(ask))}
    except TimeoutError:
        found = f"no answer within {PATIENCE_S} s"
    except httpx.HTTPStatusError as error:
        found = f"HTTP {error.response.status_code} at {error.request.url.path}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found = f"{type(error).__name__}: {error}".rstrip(": ")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"an answer of another make ({type(error).__name__}: {error})"
    return {"at": url, "wanted": f"{name} at {url}", "found": found, "do": START[name]}


async def _cluster(ask: Ask) -> Told:
    """Nodes, and what of them is used and free: processors and GPUs as Ray gives them out, memory as it is."""
    version, nodes, load = await asyncio.gather(
        ask("/api/version"), ask("/nodes?view=summary"), ask("/api/cluster_status")
    )
    version.raise_for_status()
    summary = nodes.raise_for_status().json()["data"]["summary"]
    alive = [one for one in summary if one["raylet"].get("state", "ALIVE") == "ALIVE"]
    status = load.raise_for_status().json()["data"].get("clusterStatus") or {}
    usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
    resources = {name: _amount(*usage[name]) for name in ("CPU", "GPU") if name in usage}
    total, free = (sum(one["mem"][n] for one in alive if one.get("mem")) for n in (0, 1))
    return {
        "ray": version.json()["ray_version"], "nodes": len(alive), "dead_nodes": len(summary) - len(alive),
        "resources": resources | {"memory": _amount(total - free, total)},
    }  # fmt: skip


def _amount(used: float, total: float) -> dict[str, float]:
    return {"used": round(used, 3), "free": round(total - used, 3), "total": total}


async def _jobs(ask: Ask) -> Told:
    """The latest jobs, newest first."""
    found = [one for one in (await ask("/api/jobs/")).raise_for_status().json() if one["submission_id"]]
    found.sort(key=lambda one: one["start_time"] or 0, reverse=True)
    keys = {"job": "submission_id", "state": "status", "started": "start_time", "ended": "end_time"}
    return {
        "count": len(found), "running": sum(one["status"] in ("PENDING", "RUNNING") for one in found),
        "latest": [{ours: one[theirs] for ours, theirs in keys.items()} for one in found[:LATEST]],
    }  # fmt: skip


async def _models(ask: Ask) -> Told:
    """Registered models, each with its newest version and its aliases."""
    answer = (await ask("/api/2.0/mlflow/registered-models/search?max_results=100")).raise_for_status().json()
    return {"models": [_model(one) for one in answer.get("registered_models", [])]}


def _model(found: Mapping[str, Any]) -> Told:
    aliases = {one["alias"]: one["version"] for one in found.get("aliases", [])}
    versions = [int(one["version"]) for one in found.get("latest_versions", [])]
    return {"name": found["name"], "newest": str(max(versions)) if versions else None, "aliases": aliases}


async def _serve(ask: Ask) -> Told:
    """Serve's applications, their deployments, and how many replicas of each are in which state."""
    told = (await ask("/api/serve/applications/")).raise_for_status().json()
    return {"applications": {name: _application(one) for name, one in told["applications"].items()}}


def _application(found: Mapping[str, Any]) -> Told:
    deployments = {name: _deployment(one) for name, one in found["deployments"].items()}
    return {"state": found["status"], "message": found.get("message", ""), "deployments": deployments}


def _deployment(found: Mapping[str, Any]) -> Told:
    states = [one["state"] for one in found["replicas"]]
    return {
        "state": found["status"], "message": found.get("message", ""), "wanted": found.get("target_num_replicas"),
        "replicas": {state: states.count(state) for state in sorted(set(states))},
    }  # fmt: skip


async def _endpoint(ask: Ask) -> Told:
    """Whether the endpoint lives and is ready, and which release it serves."""
    paths = ("/healthz", "/readyz", "/release")
    health, ready, release = await asyncio.gather(*map(ask, paths), return_exceptions=True)
    if isinstance(health, BaseException):
        raise health
    health.raise_for_status()
    why = _reason(ready)
    told = {"health": health.json()["status"], "ready": not why, "why_not": why, "release": None}
    if isinstance(release, httpx.Response) and release.is_success:
        return told | {"release": release.json()}
    return told | {"withheld": _reason(release)}


def _reason(answer: httpx.Response | BaseException) -> str:
    """Why an endpoint is not ready; empty when it is."""
    if isinstance(answer, BaseException):
        return f"{type(answer).__name__}: {answer}".rstrip(": ")
    if answer.is_success:
        return ""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"


# --- drawing -------------------------------------------------------------------------------------


def drawn(told: Mapping[str, Told]) -> Group:
    """Draw what the parts told, one below the other."""
    parts = {
        "cluster": _draw_cluster, "jobs": _draw_jobs, "models": _draw_models, "serve": _draw_serve,
        "endpoint": _draw_endpoint,
    }  # fmt: skip
    shown: list[RenderableType] = []
    for name, part in parts.items():
        shown.append(Text.assemble((name, "bold"), f"  {told[name]['at']}"))
        rows = _draw_silence(told[name]) if "do" in told[name] else part(told[name])
        shown += [*(Padding(row, (0, 0, 0, 2), expand=False) for row in rows), ""]
    return Group(*shown[:-1])


def _draw_silence(told: Told) -> Iterator[RenderableType]:
    yield Text.assemble(("no answer", "red"), f": {told['found']}; {told['do']}")


def _draw_cluster(told: Told) -> Iterator[RenderableType]:
    dead = f", {told['dead_nodes']} dead" if told["dead_nodes"] else ""
    yield Text(f"Ray {told['ray']}, {told['nodes']} node{'s' * (told['nodes'] != 1)}{dead}")
    table = _table("", "used", "free", "in all")
    for name, amount in told["resources"].items():
        table.add_row(name, *(_quantity(name, amount[key]) for key in ("used", "free", "total")))
    yield table


def _quantity(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if name == "memory" else f"{amount:g}"


def _draw_jobs(told: Told) -> Iterator[RenderableType]:
    yield Text(f"{told['running']} of {told['count']} under way")
    table = _table("job", "state", "started", "took")
    for one in told["latest"]:
        table.add_row(one["job"], _state(one["state"]), _when(one["started"]), _took(one["started"], one["ended"]))
    if told["latest"]:
        yield table


def _when(milliseconds: float | None) -> str:
    if not milliseconds:
        return ""
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _took(started: float | None, ended: float | None) -> str:
    return f"{(ended - started) / 1000:.0f} s" if started and ended else ""


def _draw_models(told: Told) -> Iterator[RenderableType]:
    table = _table("model", "newest", "aliases")
    for one in told["models"]:
        aliases = ", ".join(f"{alias} → {version}" for alias, version in sorted(one["aliases"].items()))
        table.add_row(one["name"], one["newest"] or "none", aliases or "none")
    yield table if told["models"] else Text("no model is registered yet: askew train registers one")


def _draw_serve(told: Told) -> Iterator[RenderableType]:
    if not told["applications"]:
        yield Text("nothing is deployed: askew serve deploys the endpoint")
    for name, application in told["applications"].items():
        yield Text.assemble(f"{name}: ", _state(application["state"]), _last(application["message"]))
        table = _table("deployment", "state", "replicas", "")
        for part, one in application["deployments"].items():
            counts = ", ".join(f"{count} {state}" for state, count in one["replicas"].items()) or "none"
            why = _last(one["message"]).strip()
            table.add_row(part, _state(one["state"]), f"{counts} of {one['wanted']}", why)
        yield table


def _last(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"  {lines[-1][:200]}" if lines else ""


def _draw_endpoint(told: Told) -> Iterator[RenderableType]:
    ready = _state("ready") if told["ready"] else Text.assemble(("not ready", "red"), f": {told['why_not']}")
    yield Text.assemble(f"lives ({told['health']}), ", ready)
    if not (live := told["release"]):
        yield Text(f"its release is not told: {told['withheld']}; where it wants a key, give one as ASKEW_API_KEY")
        return
    before = f", before it version {live['previous']}" if live.get("previous") else ""
    yield Text(f"{live['model']['name']} version {live['model']['version']} since {live['since']}{before}")
    yield Text(f"index {live['index_key'][:12]}: {live['items']:,} items in {live['shards']} shards")
    if candidate := live.get("candidate"):
        yield Text.assemble(f"version {candidate['version']}: ", _state(candidate["state"]))
        yield from (Text(f"  {reason}") for reason in candidate["reasons"])
    if live.get("note"):
        yield Text(f"note: {live['note']}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))
