"""Jobs of Ray: offered until they are taken. (The flow test submits real ones.)"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.fakes import dashboard

from askew import following, jobs
from askew.errors import StageError


def test_a_job_is_offered_again_until_there_is_an_agent_to_take_it(tmp_path: Path) -> None:
    script = f"""
import pathlib
times = pathlib.Path({str(tmp_path / "times")!r})
times.write_text(times.read_text() + "x" if times.exists() else "x")
print("RuntimeError: {jobs.NO_AGENT}, please try again later." if len(times.read_text()) < 3 else "taken")
"""
    command = [sys.executable, "-c", script]
    assert jobs.taken(command, tmp_path, {}, lambda line: None, every_s=0) == ["taken"]
    assert (tmp_path / "times").read_text() == "xxx"
    (tmp_path / "times").unlink()
    [refused] = jobs.taken(command, tmp_path, {}, lambda line: None, every_s=0, tries=1)
    assert jobs.NO_AGENT in refused


@contextmanager
def succeeded(log: str) -> Iterator[str]:
    """What a dashboard tells of a job that has succeeded, with this log; its address."""
    job = {"submission_id": "prepare-1", "status": "SUCCEEDED", "driver_exit_code": 0}
    with dashboard(lambda path: {"logs": log} if path == "/api/jobs/prepare-1/logs" else [job]) as port:
        yield f"http://127.0.0.1:{port}"


def test_last_words_that_did_not_come_while_it_was_followed_are_asked_for() -> None:
    with succeeded(f"begun\n{following.RESULT}{json.dumps({'rows': 3})}\n") as address:
        assert jobs.outcome(address, "prepare", "prepare-1", ["begun"], "read the log") == {"rows": 3}
    with (
        succeeded("begun\n") as address,
        pytest.raises(StageError, match="found SUCCEEDED: no result; read the log"),
    ):
        jobs.outcome(address, "prepare", "prepare-1", ["begun"], "read the log")
