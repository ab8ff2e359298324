"""What the tests share: a catalogue drawn small, and the triplets made of it, both real."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: a cluster that listens on loopback alone
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import httpx
import pytest
from cryptography.fernet import Fernet
from hypothesis import settings

from askew import catalogue, triplets

TINY = 300

# the same examples in each run, so that a failure is repeated; HYPOTHESIS_PROFILE=long looks for new ones
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of this test run alone, ended with it."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def drawn_folder(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up catalogue of 300 items."""
    wanted = catalogue.DrawSettings(root=tmp_path_factory.mktemp("catalogue"), num_items=TINY)
    return Path(catalogue.draw(wanted)["artifact"])


@pytest.fixture(scope="session")
def triplets_folder(cluster: None, drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of that catalogue."""
    wanted = triplets.PrepareSettings(data=drawn_folder, root=tmp_path_factory.mktemp("triplets"), image_size=32)
    return Path(triplets.prepare(wanted)["artifact"])


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server of this test run alone, ended with it."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


@pytest.fixture(scope="module")
def two_mlflows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of two MLflow servers of this module alone, which know nothing."""
    with (
        mlflow_server(tmp_path_factory.mktemp("mlflow")) as one,
        mlflow_server(tmp_path_factory.mktemp("mlflow")) as other,
    ):
        yield one, other


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """An MLflow server whose store and files are in this folder."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    environment = {
        **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield answering(f"http://127.0.0.1:{port}", folder / "log")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answering(uri: str, log: Path) -> str:
    for _ in range(300):
        try:
            httpx.get(f"{uri}/health", timeout=1).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return uri
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks' load, as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "bench")
    return importlib.import_module("load")
