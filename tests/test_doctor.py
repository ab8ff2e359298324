"""Machines, packages, parts and data that are not as wanted, each told with what to do."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from askew import doctor, ports
from askew.doctor import PACKAGES, Check, Probe

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port of a web server that is none of askew's parts."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def bad(check: Check) -> str:
    """What is told of a check that must be bad."""
    assert (check.state, bool(check.do)) == ("bad", True), check
    return f"wanted {check.wanted}; found {check.found}; {check.do}"


# --- the machine ---------------------------------------------------------------------------------


def test_an_old_python_and_one_too_new() -> None:
    assert bad(doctor.python((3, 8, 1))).startswith(
        "wanted 3.11 to 3.12; found 3.8.1; make demo PYTHON=python3.11"
    )
    assert "found 3.13.0" in bad(doctor.python((3, 13, 0)))
    assert {doctor.python(version).state for version in ((3, 11, 7), (3, 12, 0))} == {"ok"}


def test_too_little_memory() -> None:
    assert "wanted at least 4 GiB free; found 1.5 GiB; close" in bad(doctor.memory(1.5))
    assert [doctor.memory(free).state for free in (4.0, 5.9, 6.0, None)] == ["warn", "warn", "ok", "warn"]


def test_too_little_disk(tmp_path: Path) -> None:
    assert f"wanted 3 GiB free at {tmp_path}; found 2.9 GiB; free some" in bad(doctor.disk(2.9, tmp_path))
    assert doctor.disk(3.0, tmp_path).state == "ok"


@pytest.mark.parametrize("name", ["http", "mlflow", "dashboard", "gcs"])
def test_a_port_that_a_stranger_holds(stranger: int, name: str) -> None:
    told = bad(doctor.port(name, stranger))
    assert f"found process {os.getpid()}" in told
    assert f"make demo {name.upper()}_PORT=" in told


def test_a_free_port() -> None:
    [number] = ports.free_ports(1)
    assert doctor.port("http", number).state == "ok"


def test_a_silent_stranger_does_not_hold_the_doctor_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_S", 0.2)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        bad(doctor.port("mlflow", holder.getsockname()[1]))


# --- packages ------------------------------------------------------------------------------------


def test_a_package_is_imported_elsewhere() -> None:
    found = doctor.probe("yaml")
    assert (found.error, doctor.package("yaml", found).state) == ("", "ok")
    assert "No module named 'no_such_thing'" in bad(doctor.package("x", doctor.probe("no_such_thing")))


def test_no_gpu_is_no_fault() -> None:
    none, some, unknown = (doctor.gpu(one) for one in (Probe("2"), Probe("2", gpus=("A100",)), Probe(error="no")))
    assert [one.state for one in (none, some, unknown)] == ["ok", "ok", "warn"]
    assert ("processor" in none.do, some.found, "use_gpu=true" in some.do) == (True, "A100", True)


def test_broken_packages_are_findings_and_not_the_end(tmp_path: Path) -> None:
    """Through the real command: all heavy packages fail at their import, in a machine that lacks nothing else."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(
            f"raise ImportError('lib{name}.so: cannot open shared object file')\n"
        )
    numbers = [
        option
        for name, port in zip(("http", "mlflow", "dashboard", "gcs"), ports.free_ports(4), strict=True)
        for option in (f"--{name}-port", str(port))
    ]
    command = [sys.executable, "-m", "askew.cli", "doctor", "--json", "--data", str(tmp_path), *numbers]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'platform'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    found = {one["name"]: one for one in told["checks"]}
    assert not told["ok"]
    for name in PACKAGES:
        assert found[name]["state"] == "bad"
        assert f"lib{name}.so: cannot open" in found[name]["found"]
    assert "libpyarrow.so" in found["data"]["found"]
    assert (found["Python"]["state"], found["GPU"]["state"]) == ("ok", "warn")


# --- parts that run ------------------------------------------------------------------------------


def test_mlflow_that_is_not_up(stranger: int) -> None:
    assert f"wanted an MLflow server at {NOBODY}; found ConnectError" in bad(doctor.mlflow(NOBODY))
    assert "found HTTP 404" in bad(doctor.mlflow(f"http://127.0.0.1:{stranger}"))
    assert "UnsupportedProtocol" in bad(doctor.mlflow("mlruns"))


def test_mlflow_that_is_up(mlflow_uri: str) -> None:
    assert doctor.mlflow(mlflow_uri).state == "ok"
    port = urlsplit(mlflow_uri).port
    assert port is not None
    assert doctor.port("mlflow", port)[1:4:2] == ("ok", "MLflow answers there")
    bad(doctor.port("http", port))


def test_an_endpoint_and_a_cluster_that_are_not_up(stranger: int) -> None:
    assert "askew serve" in bad(doctor.endpoint(NOBODY))
    assert "found HTTP 404" in bad(doctor.endpoint(f"http://127.0.0.1:{stranger}"))
    assert f"wanted a Ray cluster's dashboard at {NOBODY}; found ConnectError" in bad(doctor.cluster(NOBODY))
    assert "HTTP 404" in bad(doctor.cluster(f"http://127.0.0.1:{stranger}"))
    assert doctor.answering_endpoint(stranger) == ""


# --- the data ------------------------------------------------------------------------------------


def shop(folder: Path, items: str, name: str = "items.csv", queries: str = "query_id,query\nq,mug\n") -> str:
    (folder / name).write_text(items)
    (folder / "queries.csv").write_text(queries)
    (folder / "judgments.csv").write_text("query_id,item_id,grade\nq,a,1\n")
    return str(folder)


def test_data_that_will_do(tmp_path: Path) -> None:
    found = doctor.data(shop(tmp_path, "item_id,title\na,mug\n"))
    assert (found.state, "items in items.csv" in found.found) == ("ok", True)


def test_no_data(tmp_path: Path) -> None:
    assert f"found no folder {tmp_path}/absent" in bad(doctor.data(f"{tmp_path}/absent"))
    assert "BEIR" in bad(doctor.data(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "items"),
    [("items.csv", "item_id,name\na,mug\n"), ("items.jsonl", '{"item_id": "a", "name": "mug"}\n')],
)
def test_a_wrong_column(tmp_path: Path, name: str, items: str) -> None:
    told = bad(doctor.data(shop(tmp_path, items, name)))
    assert "title" in told
    assert name in told


def test_records_of_which_none_can_be_used(tmp_path: Path) -> None:
    told = bad(doctor.data(shop(tmp_path, '{"item_id": "a", "ti\n{"item_id": "b"\n', "items.jsonl")))
    assert "wanted items in items.jsonl; found none of the first: broken_line: " in told
