"""Jobs of Ray: offered until they are taken. (The flow test submits real ones.)"""

import sys
from pathlib import Path

from askew import jobs


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
