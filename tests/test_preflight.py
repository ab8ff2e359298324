"""A machine that cannot hold askew is told so in one line, by whichever Python it has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from askew import preflight
from askew.preflight import refusal

FINE = {"version": (3, 11), "installed": False, "disk_gib": 50.0, "memory_gib": 16.0, "has_venv": True}


@pytest.mark.parametrize(
    "change", [{}, {"version": (3, 12)}, {"disk_gib": 3.0, "installed": True}, {"memory_gib": None}]
)
def test_a_machine_that_will_do(change: dict[str, object]) -> None:
    assert refusal(**FINE | change) == ""


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": (3, 8)}, "wanted Python 3.11 or 3.12; found 3.8;"),
        ({"version": (3, 13)}, "wanted Python 3.11 or 3.12; found 3.13;"),
        ({"has_venv": False}, "wanted Python's venv and pip; found none;"),
        ({"disk_gib": 3.21}, "wanted 12 GiB of free disk here; found 3.2;"),
        ({"memory_gib": 1.5}, "wanted 6 GiB of free memory; found 1.5;"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, object], found: str) -> None:
    assert refusal(**FINE | change).startswith(found)


def test_an_old_python_can_read_it() -> None:
    ast.parse(Path(preflight.__file__).read_text(), feature_version=(3, 6))


def test_the_script_runs_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-I", preflight.__file__]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2)
    assert done.returncode == 0 or done.stderr.startswith("askew: error: wanted ")
    assert "Traceback" not in done.stderr
