"""Ports: where askew's parts listen on this machine, and who holds a port now. Knows nothing of the parts."""

import socket
from contextlib import suppress

import psutil
from pydantic import Field

from askew.config import Settings
from askew.errors import MachineError

HOST = "127.0.0.1"
PURPOSES = {"http": "the search endpoint", "mlflow": "MLflow", "dashboard": "the Ray dashboard", "gcs": "Ray"}


class Ports(Settings):
    """Where the parts listen, all on 127.0.0.1."""

    http: int = Field(default=8000, ge=1, le=65535)
    mlflow: int = Field(default=5001, ge=1, le=65535)
    dashboard: int = Field(default=8266, ge=1, le=65535)
    gcs: int = Field(default=6390, ge=1, le=65535)

    def url(self, name: str) -> str:
        """Address of a part, by its name here."""
        return f"http://{HOST}:{getattr(self, name)}"


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def is_free(port: int) -> bool:
    """Whether a program could listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def check_free(port: int, name: str) -> None:
    """Refuse a port that is taken: raises MachineError, which names who has it."""
    if not is_free(port):
        raise MachineError(f"port {port} free for {PURPOSES[name]}", owner(port), other(name))


def other(name: str) -> str:
    """What to do about a part's port that is taken."""
    return f"stop it, or choose another: make demo {name.upper()}_PORT={free_ports(1)[0]}"


def owner(port: int) -> str:
    """Tell in words who listens on a port, as far as the system says."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
            if listens and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()}) listening on it"
    return "another process listening on it"
