"""A training that loses a worker, a node or its driver goes on, with the losses of one that lost none."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from askew.journal import Journal

ROOT = Path(__file__).parent.parent
STEPS, EVERY, PATIENCE_S = 24, 4, 240
TOWERS = {  # large enough that there is time to lose something in the middle
    "dim": 16, "text": {"width": 16, "heads": 2}, "photo": {"backbone": "resnet18"}, "image_size": 32,
    "query_length": 8, "title_length": 12,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "tracking_uri": "http://127.0.0.1:9", "towers": TOWERS, "batch_size": 64, "bf16": False, "num_workers": 2,
    "report_every": 1, "checkpoint_every": EVERY, "validation": {"every": EVERY},
    "stages": {
        "pretrain": {"steps": 10, "loss": {"text": 0.3, "fused": 1.0}, "warmup_steps": 2, "average": 0.5},
        "adapt": {"steps": STEPS - 10, "loss": {"fused": 1.0}, "rates": {"photo": 0.5}, "average": 0.9},
    },
}  # fmt: skip
SCRIPT = """
import json, sys, ray
from pathlib import Path
from ray.cluster_utils import Cluster
from askew import artifacts
from askew.errors import RegistryError
from askew.recipes import TrainSettings
from askew.training import train
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
raylets = [process.process.pid for process in nodes[1].all_processes["raylet"]]
artifacts.write_text(Path(sys.argv[2]), json.dumps(raylets))
try:
    train(TrainSettings.model_validate_json(sys.argv[1]))
except RegistryError:  # there is none: the model is on disk
    print("trained", flush=True)
ray.shutdown()
cluster.shutdown()
"""


def losses(root: Path) -> dict[int, float]:
    folders = list((root / "runs").glob("*.journal"))
    history = Journal(folders[0]).history() if folders else []
    return {step: values["train/loss"] for step, values in history if "train/loss" in values}


def entries(root: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in (root / "runs").glob("*.journal/metrics.jsonl"))


class Run:
    """A training on three Ray nodes of its own, in a process of its own."""

    def __init__(self, triplets: Path, root: Path, **other: Any) -> None:
        root.mkdir(exist_ok=True)
        settings = json.dumps(SETTINGS | {"triplets": str(triplets), "root": str(root)} | other)
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="askew-")  # short: sockets lie below it
        self.root, note = root, root / "raylets.json"
        note.unlink(missing_ok=True)
        with (root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, settings, str(note)], env=environment, stdout=log, stderr=log,
                start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        self._await(note.exists)
        self.raylets: list[int] = json.loads(note.read_bytes())

    def _await(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert self.process.poll() is None, (self.root / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def until(self, step: int) -> None:
        """Wait until a step is done."""
        self._await(lambda: max(losses(self.root), default=0) >= step)

    def until_saved(self) -> None:
        """Wait until Ray Train knows of a checkpoint: it is uploaded beside the steps that follow."""
        self._await(lambda: any((self.root / "runs").glob("model-*/checkpoint_manager_snapshot.json")))

    def family(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.family() if "RayTrainWorker" in " ".join(process.cmdline())]

    def ended(self) -> None:
        """Wait until it is trained, and nothing of it is left."""
        family = self.family()
        assert self.process.wait(PATIENCE_S) == 0, (self.root / "log").read_text()[-3000:]
        psutil.wait_procs(family, timeout=30)

    def killed(self) -> None:
        """Kill it with all that it started."""
        family = self.family()
        for process in family:
            process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def unbroken(triplets_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken")
    Run(triplets_folder, root).ended()
    assert list(losses(root)) == list(range(1, STEPS + 1))
    return root


def assert_alike(root: Path, unbroken: Path, rel: float) -> None:
    """Compare the losses of all steps, and the models that came out."""
    assert losses(root) == pytest.approx(losses(unbroken), rel=rel)
    found, wanted = (load_file(next(one.glob("model-*")) / "weights.safetensors") for one in (root, unbroken))
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=10 * rel), name


def lose_a_worker(run: Run) -> None:
    run.workers()[-1].send_signal(signal.SIGKILL)


def lose_a_node(run: Run) -> None:
    for pid in run.raylets:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("lose", "step"), [(lose_a_worker, 14), (lose_a_node, 6)])  # second stage, first stage
def test_a_training_that_loses_a_part_ends_with_the_same_losses(
    triplets_folder: Path, tmp_path: Path, unbroken: Path, lose: Callable[[Run], None], step: int
) -> None:
    run = Run(triplets_folder, tmp_path / "run")
    run.until(step)
    threading.Thread(target=lose, args=(run,)).start()
    run.ended()
    assert_alike(tmp_path / "run", unbroken, 1e-6)
    assert STEPS <= entries(tmp_path / "run") - STEPS // EVERY - 1 <= STEPS + 2 * EVERY  # little was done twice


def test_a_training_whose_driver_is_killed_goes_on_when_it_is_run_again(
    triplets_folder: Path, tmp_path: Path, unbroken: Path
) -> None:
    run = Run(triplets_folder, tmp_path / "run")
    run.until(9)
    run.until_saved()
    run.killed()
    first = entries(tmp_path / "run")
    Run(triplets_folder, tmp_path / "run").ended()
    assert_alike(tmp_path / "run", unbroken, 1e-6)
    assert entries(tmp_path / "run") - first < STEPS + STEPS // EVERY + 1


def test_with_a_worker_less_it_goes_on_at_the_same_batch(
    triplets_folder: Path, tmp_path: Path, unbroken: Path
) -> None:
    """The cluster keeps one CPU for workers: the other node does not come back."""
    run = Run(triplets_folder, tmp_path / "run", min_workers=1, cpus_per_worker=1)
    run.until(6)
    lose_a_node(run)
    run.ended()
    assert_alike(tmp_path / "run", unbroken, 1e-3)
