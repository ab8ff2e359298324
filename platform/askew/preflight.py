"""What this machine must have before anything is installed (`make demo` and `make test` run this first).

Uses the standard library alone and runs on Python 3.6 and later, so that one too old gets a sentence, not a
traceback.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 12)
DISK_GIB, MEMORY_GIB = 12, 6
LEAST_DISK_GIB, LEAST_MEMORY_GIB = 3, 4  # to run what is installed


def refusal(version: tuple, installed: bool, disk_gib: float, memory_gib: "float | None", has_venv: bool) -> str:  # type: ignore[type-arg]
    """Say in one line why askew cannot be installed here; empty when it can.

    `version` holds the Python version's first two parts, `installed` says whether the packages are there already.
    """
    if not OLDEST <= tuple(version) <= NEWEST:
        found = ".".join(map(str, version))
        return f"wanted Python 3.11 or 3.12; found {found}; name another: make demo PYTHON=python3.11"
    if not has_venv:
        return "wanted Python's venv and pip; found none; install them (on Debian: apt install python3-venv)"
    if not installed and disk_gib < DISK_GIB:
        return f"wanted {DISK_GIB} GiB of free disk here; found {disk_gib:.1f}; free some or clone elsewhere"
    if memory_gib is not None and memory_gib < MEMORY_GIB:
        return f"wanted {MEMORY_GIB} GiB of free memory; found {memory_gib:.1f}; close other programs"
    return ""


def free_memory_gib() -> "float | None":
    """Memory that a program could take now, in GiB; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration, ValueError):
        return None


def main() -> None:
    """Check this machine; exits with 2 and one line when something is missing."""
    has_venv = find_spec("venv") is not None and find_spec("ensurepip") is not None
    installed = Path(".venv", "installed").exists()
    disk_gib = shutil.disk_usage(".").free / 2**30
    problem = refusal(sys.version_info[:2], installed, disk_gib, free_memory_gib(), has_venv)
    if problem:
        sys.stderr.write(f"askew: error: {problem}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
