"""A training under way: a Ray job that draws a shop, prepares triplets and trains a tiny model, on and on.

Knows nothing of what happens to its workers; it tells how far it has come, and how many steps were done twice.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx

ITEMS, EVERY, STEPS = 300, 10, 1_000_000
TOWERS = {  # small, so that its checkpoints take no time
    "dim": 16, "text": {"width": 16, "heads": 2}, "fusion": "text", "image_size": 32, "query_length": 8,
    "title_length": 12,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "towers": TOWERS, "batch_size": 16, "bf16": False, "num_workers": 2, "report_every": 1,
    "checkpoint_every": EVERY, "max_failures": 100, "validation": {"queries": 0},
    "stages": {"all": {"steps": STEPS, "loss": {"fused": 1.0}}},
}  # fmt: skip


def submit(dashboard: str, root: Path, name: str) -> None:
    """Begin, or go on, as a job of this name."""
    command = ["nice", "-n", "19", sys.executable, "-c", f"import underway; underway.main({str(root)!r})"]
    wanted = {"entrypoint": shlex.join(command), "submission_id": name}
    httpx.post(f"{dashboard}/api/jobs/", json=wanted, timeout=30, trust_env=False).raise_for_status()


def status(dashboard: str, name: str) -> dict[str, Any]:
    """What Ray tells of a job: its "status", its last words as "message"."""
    told: dict[str, Any] = httpx.get(f"{dashboard}/api/jobs/{name}", timeout=10, trust_env=False).json()
    return told


def steps(root: Path) -> list[int]:
    """The steps that were done, in the order in which they were; those done twice stand there twice."""
    found = []
    for path in (root / "runs").glob("*.journal/metrics.jsonl"):
        *lines, _ = path.read_bytes().split(b"\n")  # the last is being written
        found += [int(json.loads(line)["step"]) for line in lines if b"train/loss" in line]
    return found


def redone(root: Path) -> int:
    """How many steps were done again."""
    done = steps(root)
    return len(done) - len({*done})


def main(folder: str) -> None:
    """Draw, prepare and train."""
    from askew import catalogue, triplets
    from askew.recipes import TrainSettings
    from askew.training import train

    root = Path(folder)
    shop = catalogue.draw(catalogue.DrawSettings(root=root, num_items=ITEMS))["artifact"]
    made = triplets.prepare(triplets.PrepareSettings(data=shop, root=root, image_size=32))["artifact"]
    train(TrainSettings.model_validate({**SETTINGS, "triplets": made, "root": root}))
