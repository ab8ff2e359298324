"""Deploying: a Serve config is given to a cluster, as `serve deploy` does, and what becomes of it is awaited.

Knows nothing of what is served, beyond the settings that it must fit.
"""

import importlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from askew import config, dashboard
from askew.errors import ConfigError, MachineError, StageError
from askew.ports import HOST, check_free

BUILDER = "askew.serving:build"
APPLICATIONS = "/api/serve/applications/"
UNDER_WAY = ("DEPLOYING", "NOT_STARTED", "DELETING")
REASON = re.compile(r"wanted .+; found .+; .+")
LOOK = "look at it by: askew status"
TLS = (
    "give the name that its certificate has as --endpoint, and who signed that as SSL_CERT_FILE; "
    "behind HAProxy Ray Serve has no TLS (docs/security.md)"
)


def read(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a Serve config, and apply `dotted.key=value` changes to the arguments of askew's applications in it.

    Where it names no host, the endpoint listens on loopback: Ray's own default is every address.
    Raises ConfigError naming the settings that do not fit, before anything is deployed.
    """
    values = config.read_yaml(path)
    found = [one for one in values.get("applications") or () if one.get("import_path") == BUILDER]
    if not found:
        raise ConfigError(f"an application of {BUILDER} in {path}", "none", "take serve_configs/search.yaml")
    for application in found:
        arguments = application.setdefault("args", {})
        for change in changes:
            config.change(arguments, change)
        config.fitted(_settings(), arguments, f"{path}, or what is set beside it")
    values["http_options"] = {"host": HOST, **(values.get("http_options") or {})}
    return values


def _settings() -> type[config.Settings]:
    module, _, _ = BUILDER.partition(":")
    try:
        kind: type[config.Settings] = importlib.import_module(module).ServingSettings
    except ImportError as error:
        raise MachineError(f"the packages that {module} needs", f"{error}", "look by: askew doctor") from error
    return kind


def applications(address: str) -> dict[str, Any]:
    """What runs in a cluster's Serve, as its dashboard tells it."""
    return dict(dashboard.ask(address, APPLICATIONS))


def deploy(address: str, values: Mapping[str, Any], patience_s: float = 240, do: str = "read its log") -> None:
    """Give a config to a cluster's Serve, and wait until all its applications run.

    Serve does nothing for an application whose config it has already. Raises StageError with an application's own
    reason when it fails, or takes longer than `patience_s`.
    """
    dashboard.answered(address, "PUT", APPLICATIONS, values, timeout_s=120)
    names, deadline = [one["name"] for one in values["applications"]], time.monotonic() + patience_s
    while True:
        told = applications(address)["applications"]
        states = {name: told.get(name, {}).get("status", "NOT_STARTED") for name in names}
        if set(states.values()) == {"RUNNING"}:
            return
        failed = [name for name, state in states.items() if state not in ("RUNNING", *UNDER_WAY)]
        if failed or time.monotonic() > deadline:
            found = [f"{n}: {states[n]}: {reason(told.get(n, {}).get('message', ''))}" for n in failed or names]
            raise StageError("the endpoint to run", "; ".join(found).rstrip(": "), do)
        time.sleep(1)


def reason(message: str) -> str:
    """Find in what Serve says of an application why it failed: askew's own words, else the last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [found[0] for line in lines if (found := REASON.search(line))]
    return (ours or lines or [""])[-1][:600]


def check_port(address: str, values: Mapping[str, Any]) -> None:
    """Refuse a port of this machine that something other than Serve holds. Raises MachineError."""
    port = int((values.get("http_options") or {}).get("port", 8000))
    here = urlsplit(address).hostname in (HOST, "localhost")
    if here and not applications(address).get("proxies"):
        check_free(port, "http")


def url(address: str) -> str:
    """The address that a cluster's Serve answers requests at, as far as it can be told from here."""
    options = applications(address).get("http_options") or {}
    host, port = options.get("host") or HOST, options.get("port", 8000)
    host = urlsplit(address).hostname if host in ("0.0.0.0", "::") else host  # noqa: S104
    return f"{'https' if options.get('ssl_certfile') else 'http'}://{host}:{port}"


def await_ready(endpoint: str, patience_s: float = 60) -> None:
    """Wait until an endpoint answers searches. Raises StageError with what it said last."""
    found, deadline = "", time.monotonic() + patience_s
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{endpoint}/readyz", timeout=10)
            if answer.is_success:
                return
            found = f"HTTP {answer.status_code}: {answer.text[:300]}"
        except httpx.HTTPError as error:
            found = f"{type(error).__name__}: {error}"
        time.sleep(0.5)
    raise StageError(f"the endpoint at {endpoint} to be ready", found, TLS if "[SSL" in found else LOOK)
