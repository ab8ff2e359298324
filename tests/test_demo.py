"""What the demo says before it starts anything; the flow test runs it."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from askew import demo, tables

RUN = CliRunner()


def says(*arguments: str) -> str:
    """Run the demo's command, which must fail with 2 and one line; returns the line."""
    result = RUN.invoke(demo.app, list(arguments))
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("askew: error: wanted ")
    return line


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    line = says("up", "--home", str(tmp_path / "home"), "--data", str(tmp_path / "absent"))
    assert f"found no folder {tmp_path / 'absent'}; give its path as DATA=…" in line


def test_a_folder_that_is_no_catalogue(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "letter.txt").touch()
    line = says("up", "--home", str(tmp_path / "home"), "--data", str(data))
    assert f"wanted a known layout in {data}: " in line
    assert "items/<split>/*.parquet" in line
    assert "found letter.txt;" in line


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1.5 * 2**30))
    assert "wanted 4 GiB of free memory; found 1.5;" in says("up", "--home", str(tmp_path))


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.5 * 2**30))
    assert f"wanted 3 GiB of free disk at {tmp_path}; found 0.5;" in says("up", "--home", str(tmp_path))


def test_two_demos_do_not_meet_in_one_folder(tmp_path: Path) -> None:
    with demo._alone(tmp_path):
        assert f"wanted {tmp_path} for this demo alone" in says("stop", "--home", str(tmp_path))


def test_stop_without_a_start(tmp_path: Path) -> None:
    result = RUN.invoke(demo.app, ["stop", "--home", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, f"nothing was running from {tmp_path}\n")


@pytest.mark.parametrize("arguments", [["up", "--http-port", "0"], ["up", "--gcs-port", "70000"]])
def test_a_port_that_is_none(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "askew.demo", *arguments, "--home", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert arguments[1] in done.stderr


def test_queries_are_spread_over_those_of_evaluation(tmp_path: Path) -> None:
    queries = pa.table({"query": [f"query {n}" for n in range(40)]})
    tables.write(tmp_path / "queries" / "part-00000.parquet", queries)
    assert demo._sample(tmp_path) == ("query 0", "query 10", "query 20", "query 30")


def test_a_changed_catalogue_has_another_stamp(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = demo._stamp(tmp_path)
    assert demo._stamp(tmp_path) == first
    (tmp_path / "a").write_text("22")
    assert demo._stamp(tmp_path) != first
