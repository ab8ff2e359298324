"""Three machines on this one: Ray nodes whose network, processes and shared memory are their own.

As root each node lives in namespaces of Linux, on a bridge that can keep two of them apart; the bench is there,
in namespaces of its own, so that nothing that it starts outlives it or is seen by others. Files are common to all,
as a cluster's shared folder is. Elsewhere the nodes are raylets on loopback with one port for their proxies, and
what needs a network can't be done.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prepare import say

from askew import local

INSIDE = "ASKEW_CHAOS_INSIDE"
NETWORK, HERE_HOST = "10.99.0", 254
GCS, DASHBOARD, HTTP, MLFLOW = 6379, 8265, 8000, 5001
NUM_CPUS, STORE_BYTES, SHM_BYTES = 8, 100 << 20, 256 << 20  # processors as Ray counts them
SPARE = (  # ports that are a node's own where all are on one network
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
)  # fmt: skip
PLATFORM = Path(__file__).parents[1] / "platform"
PATIENCE_S = 120.0


def can_isolate() -> bool:
    """Whether this process may make namespaces."""
    tools = all(shutil.which(name) for name in ("ip", "unshare", "mount"))
    if sys.platform != "linux" or os.geteuid() != 0 or not tools:
        return False
    tried = ["unshare", "--mount", "--net", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


def enter() -> bool:
    """Go on in namespaces of our own, where that is allowed; returns whether this process is there.

    What was started here does not return: it runs again inside, and ends with what that ended with.
    """
    if os.environ.get(INSIDE):
        run("ip", "link", "set", "lo", "up")
        return True
    if not can_isolate():
        return False
    within = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    os.environ[INSIDE] = "1"
    os.execvp(within[0], [*within, sys.executable, *sys.argv])  # noqa: S606  # nosec B606
    return True


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass
class Node:
    """A machine: its number, its address, and what it runs."""

    number: int
    cluster: "Cluster"
    process: subprocess.Popen[bytes] | None = None

    @property
    def ip(self) -> str:
        """The address that others know it by."""
        return f"{NETWORK}.{10 + self.number}" if self.cluster.isolated else local.HOST

    @property
    def url(self) -> str:
        """Where its proxy answers."""
        return f"http://{self.ip}:{self.cluster.http}"

    def start(self) -> None:
        """Start Ray on it."""
        command = [str(local.BIN / "ray"), "start", "--block", "--disable-usage-stats", *self._options()]
        if self.cluster.isolated:
            temporary = self.cluster.temporary
            mounts = f"mount -t tmpfs -o size={SHM_BYTES} tmpfs /dev/shm && mount -t tmpfs tmpfs {temporary}"
            inside = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
            script = f'{mounts} && exec "$@"'
            command = ["ip", "netns", "exec", f"n{self.number}", *inside, "sh", "-c", script, "sh", *command]
        with (self.cluster.home / f"node-{self.number}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.cluster.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self.cluster.home,
            )  # fmt: skip

    def _options(self) -> list[str]:
        options = {"node-ip-address": self.ip, "num-cpus": NUM_CPUS, "object-store-memory": STORE_BYTES}
        if not self.cluster.isolated:
            options |= dict(zip(SPARE, local.free_ports(len(SPARE)), strict=True))
        if self.number == 0:
            options |= {"port": self.cluster.gcs, "include-dashboard": "true", "dashboard-host": self.ip}
            options |= {"dashboard-port": self.cluster.dashboard_port, "temp-dir": self.cluster.temporary}
            return ["--head", *(f"--{name}={value}" for name, value in options.items())]
        options |= {"address": f"{self.cluster.nodes[0].ip}:{self.cluster.gcs}"}
        return [f"--{name}={value}" for name, value in options.items()]

    def supervise(self) -> None:
        """Start Ray again where it ended by itself, as whatever watches over a machine's services does."""
        if self.process is not None and self.process.poll() is not None:
            self.cluster.restarts.append(self.number)
            self.start()

    def family(self) -> list[psutil.Process]:
        """Its living processes."""
        if self.process is None:
            return []
        with suppress(psutil.Error):
            return [p for p in psutil.Process(self.process.pid).children(recursive=True) if p.is_running()]
        return []

    def remove(self) -> None:
        """Take it away at once, with all that it runs."""
        for process in self.family()[::-1]:
            with suppress(psutil.Error):
                process.kill()
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None


@dataclass
class Cluster:
    """Nodes, and the wires between them."""

    home: Path
    isolated: bool
    nodes: list[Node] = field(default_factory=list)
    gcs: int = GCS
    dashboard_port: int = DASHBOARD
    http: int = HTTP
    mlflow_port: int = MLFLOW
    temporary: Path = Path("/nowhere")
    restarts: list[int] = field(default_factory=list)  # nodes on which Ray ended by itself
    mlflow_server: subprocess.Popen[bytes] | None = None

    @property
    def dashboard(self) -> str:
        """Address of the Ray dashboard."""
        return f"http://{self.nodes[0].ip}:{self.dashboard_port}"

    @property
    def here(self) -> str:
        """The address that the nodes know the bench by."""
        return f"{NETWORK}.{HERE_HOST}" if self.isolated else local.HOST

    @property
    def mlflow(self) -> str:
        """Address of the MLflow server."""
        return f"http://{self.here}:{self.mlflow_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What every process of a node finds in its environment."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return kept | {
            "PATH": f"{local.BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": f"{PLATFORM}{os.pathsep}{Path(__file__).parent}",
            "MLFLOW_TRACKING_URI": self.mlflow, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
            "RAY_worker_niceness": "0",
            "RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.home / "gcs"),  # a head knows what was
            "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def cut(self, one: int, other: int) -> None:
        """Let nothing pass between two nodes; all others they reach as before."""
        for number in (one, other):
            run("ip", "link", "set", "dev", f"v{number}", "type", "bridge_slave", "isolated", "on")

    def heal(self, *numbers: int) -> None:
        """Let all pass again."""
        for number in numbers:
            run("ip", "link", "set", "dev", f"v{number}", "type", "bridge_slave", "isolated", "off")

    def logs(self, node: Node) -> Path:
        """Where a node's logs are, as this process sees them."""
        inside = Path(f"/proc/{node.family()[0].pid}/root") if self.isolated else Path("/")
        [session] = (inside / self.temporary.relative_to("/")).glob("session_2*")  # the link leads elsewhere
        return session / "logs"

    def logged(self, words: str) -> list[str]:
        """The lines of Serve's logs with some words in them, of all nodes that run."""
        paths = [path for node in self.nodes if node.family() for path in self.logs(node).glob("serve/*.log")]
        lines = [line for path in paths for line in path.read_text(errors="replace").splitlines()]
        return [line for line in lines if words in line]

    def processes(self) -> list[psutil.Process]:
        """The living processes of all nodes."""
        return [process for node in self.nodes for process in node.family()]

    def named(self, *starts: str) -> list[psutil.Process]:
        """Those whose name begins so, by their number."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if process.name().startswith(starts) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)


def wire(count: int) -> None:
    """Make a bridge with this process on it, and so many network namespaces with a wire each."""
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "addr", "add", f"{NETWORK}.{HERE_HOST}/24", "dev", "br0")
    run("ip", "link", "set", "br0", "up")
    for number in range(count):
        space, wire = f"n{number}", f"v{number}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", wire, "master", "br0")
        run("ip", "link", "set", wire, "up")
        run("ip", "-n", space, "addr", "add", f"{NETWORK}.{10 + number}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        run("ip", "-n", space, "link", "set", "lo", "up")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """Let a folder be a disk of its own, of so many bytes."""
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        run("umount", "--lazy", str(folder))


@contextmanager
def cluster(home: Path, isolated: bool, count: int = 3) -> Iterator[Cluster]:
    """Start so many nodes and an MLflow server, and end them."""
    made = Cluster(home, isolated)
    made.nodes = [Node(number, made) for number in range(count)]
    made.temporary = Path(tempfile.mkdtemp(prefix="askew-"))
    if isolated:
        wire(count)
    else:
        made.gcs, made.dashboard_port, made.http, made.mlflow_port = local.free_ports(4)
    start_mlflow(made)
    try:
        made.nodes[0].start()
        await_true(lambda: answers(f"{made.dashboard}/api/version"), "the head node")
        for node in made.nodes[1:]:
            node.start()
        await_true(lambda: alive(made) == count, f"{count} nodes")
        await_true(lambda: answers(f"{made.mlflow}/health"), "MLflow")
        say(f"{count} nodes")
        yield made
    finally:
        for node in made.nodes[::-1]:
            node.remove()
        end_mlflow(made)
        shutil.rmtree(made.temporary, ignore_errors=True)


def start_mlflow(cluster: Cluster) -> None:
    """Start an MLflow server that the nodes reach."""
    folder = cluster.home / "mlflow"
    folder.mkdir(exist_ok=True)
    command = [
        str(local.BIN / "mlflow"), "server", "--host", cluster.here, "--port", str(cluster.mlflow_port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (cluster.home / "mlflow.log").open("ab") as log:
        cluster.mlflow_server = subprocess.Popen(
            command, env=cluster.environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def end_mlflow(cluster: Cluster) -> None:
    """Kill the MLflow server with its workers."""
    if cluster.mlflow_server:
        with suppress(ProcessLookupError):
            os.killpg(cluster.mlflow_server.pid, signal.SIGKILL)
        cluster.mlflow_server.wait()


def alive(cluster: Cluster) -> int:
    """How many nodes Ray takes for living."""
    with suppress(httpx.HTTPError, KeyError, ValueError):
        told = httpx.get(f"{cluster.dashboard}/nodes?view=summary", timeout=5, trust_env=False).json()
        return sum(one["raylet"].get("state") == "ALIVE" for one in told["data"]["summary"])
    return 0


def answers(url: str) -> bool:
    """Whether something answers there."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2, trust_env=False).is_success
    return False


def await_true(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until something is true; returns the seconds. Raises RuntimeError when it does not come true."""
    started = time.monotonic()
    while not true():
        if time.monotonic() > started + patience_s:
            raise RuntimeError(f"{what}: not after {patience_s:.0f} s")
        time.sleep(0.3)
    return time.monotonic() - started


def numbered(nodes: Sequence[Node], process: psutil.Process) -> int:
    """The number of the node that a process is of."""
    return next((node.number for node in nodes if process in node.family()), -1)
