"""Jobs: a stage as a Ray job, submitted from a checkout and followed to its end, by Ray's own commands.

Knows nothing of what the stages do.
"""

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from askew import dashboard, following
from askew.errors import StageError

BIN = Path(sys.executable).parent
NO_AGENT = "No available agent to submit job"  # Ray's words
ALIVE = ("PENDING", "RUNNING")


def listed(address: str) -> list[dict[str, Any]]:
    """List all jobs of a cluster, as its dashboard tells them."""
    return list(dashboard.ask(address, "/api/jobs/"))


def name(stage: str) -> str:
    """Make a job's id, which tells its stage and when it was made."""
    return f"{stage}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def submit(
    address: str, job: str, command: Sequence[str], root: Path, environment: Mapping[str, str], runtime_env: Path,
    on_line: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Run a command as a job, from the folder `root`, and follow it; returns the lines of its log."""
    words = ["submit", "--submission-id", job, "--runtime-env", str(runtime_env), "--", *command]
    return taken(_ray(address, words), root, environment, on_line)


def follow(
    address: str, job: str, root: Path, environment: Mapping[str, str], on_line: Callable[[str], None]
) -> list[str]:
    """Follow a job that runs; returns the lines of its log."""
    return taken(_ray(address, ["logs", "--follow", job]), root, environment, on_line)


def _ray(address: str, words: Sequence[str]) -> list[str]:
    return [str(BIN / "ray"), "job", words[0], "--address", address, *words[1:]]


def taken(
    command: Sequence[str], root: Path, environment: Mapping[str, str], on_line: Callable[[str], None],
    every_s: float = 2, tries: int = 30,
) -> list[str]:  # fmt: skip
    """Run a command of Ray's jobs; again, while a node that was just started has nobody to take a job yet.

    Returns the lines that it printed last.
    """
    lines: list[str] = []
    for _ in range(tries):
        lines = _heard(command, root, environment, on_line)
        if not any(NO_AGENT in line for line in lines):
            break
        time.sleep(every_s)
    return lines


def _heard(
    command: Sequence[str], root: Path, environment: Mapping[str, str], on_line: Callable[[str], None]
) -> list[str]:
    lines: list[str] = []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, cwd=root, text=True, errors="replace", **pipes) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                on_line(lines[-1])
        finally:
            process.terminate()
    return lines


def outcome(address: str, stage: str, job: str, lines: Sequence[str], do: str) -> dict[str, Any]:
    """Tell what a job whose log has ended came to: its result. Raises StageError with its last words."""
    for _ in range(20):
        found = next((one for one in listed(address) if one["submission_id"] == job), None)
        status = found["status"] if found else "not submitted"
        if status not in ALIVE:
            break
        time.sleep(0.5)
    made = following.result(lines)
    if status == "SUCCEEDED" and made is None:  # following it may have ended before its last words came
        made = following.result(dashboard.ask(address, f"/api/jobs/{job}/logs")["logs"].splitlines())
    if status == "SUCCEEDED" and made is not None:
        return made
    told = f"{status}: {following.reason(lines) or 'no result'}"
    error = StageError(f"stage {stage!r} to succeed", told, do)
    error.exit_code = (found or {}).get("driver_exit_code") or error.exit_code
    raise error


@contextmanager
def environment_file(root: Path) -> Iterator[Path]:
    """Meanwhile hold the file that says what travels with a job from this checkout."""
    with tempfile.TemporaryDirectory(prefix="askew-") as folder:
        path = Path(folder) / "runtime_env.yaml"
        path.write_text(yaml.safe_dump(runtime_env(root)), encoding="utf-8")
        yield path


def runtime_env(root: Path, without: Path | None = None) -> dict[str, Any]:
    """Read `jobs/runtime_env.yaml`: what travels with a job from a checkout, without a folder below it.

    The commit is told to the job, which cannot see it.
    """
    values = dict(yaml.safe_load((root / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8")))
    if without and without.is_relative_to(root):
        values["excludes"].append(f"/{without.relative_to(root)}")
    if commit := _commit(root):
        values["env_vars"] = {**values.get("env_vars", {}), "ASKEW_COMMIT": commit}
    return values


def _commit(root: Path) -> str:
    """The commit of a checkout; empty without git."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
