"""Building the index of a version that has none, as a Ray job of its own, which everyone can follow."""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import Field
from ray.job_submission import JobStatus, JobSubmissionClient

from askew import artifacts, following
from askew.config import Settings
from askew.errors import StageError


class BuildSettings(Settings):
    """What the index of a version that has none is built from."""

    triplets: Path
    root: Path
    index: dict[str, Any] = Field(default_factory=dict)  # more settings of the index stage; see jobs/index.yaml


def build(settings: BuildSettings, model: str, version: str, uri: str) -> None:
    """Run the index stage for a version, or follow the job that does already. Raises StageError when it fails."""
    values = {
        **settings.index, "model": model, "version": version, "tracking_uri": uri,
        "triplets": str(settings.triplets), "root": str(settings.root),
    }  # fmt: skip
    content = json.dumps(values, sort_keys=True)
    prefix = f"index-{model}-{version}-{hashlib.sha256(content.encode()).hexdigest()[:8]}-"
    client = JobSubmissionClient(ray.get_runtime_context().gcs_address)  # of the cluster that this runs in
    ours = [job for job in client.list_jobs() if str(job.submission_id).startswith(prefix)]
    under_way = [str(job.submission_id) for job in ours if not job.status.is_terminal()]
    if under_way:
        job = under_way[0]
    else:
        settings.root.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(path := settings.root / f"{prefix[:-1]}.yaml", yaml.safe_dump(values))
        command = f"{sys.executable} -m askew.indexing {path}"
        job = client.submit_job(entrypoint=command, submission_id=f"{prefix}{len(ours)}")
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if status != JobStatus.SUCCEEDED:
        found = following.reason(client.get_job_logs(job).splitlines()) or str(client.get_job_info(job).message)
        raise StageError(f"job {job} to build an index", f"{status}: {found}", "read its log in Ray's dashboard")
