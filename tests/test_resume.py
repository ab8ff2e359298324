"""A prepare job that is killed goes on, and what it makes is what an unbroken one makes, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120


def started(data: Path, root: Path, log: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "jobs/prepare.py", "jobs/prepare.yaml", f"data={data}", f"root={root}"]
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT / "platform")}
    with log.open("ab") as out:
        return subprocess.Popen(
            [*command, "unit_bytes=3000", *settings], cwd=ROOT, env=environment, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip


def ended(job: subprocess.Popen[bytes]) -> None:
    """Kill a job and every process that it started, at once."""
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    job.wait()
    psutil.wait_procs(family, timeout=20)


def contents(root: Path) -> dict[str, bytes]:
    [folder] = root.glob("triplets-*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shop(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn catalogue as lines of JSON and a folder of pictures, which are cut into many units."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "images").mkdir()
    lines = []
    for path in sorted(drawn_folder.glob("items/*/*.parquet")):
        for row in pq.read_table(path).to_pylist():
            image = f"images/{row['item_id']}.jpg"
            (folder / image).write_bytes(row["image"])
            lines.append(json.dumps(row | {"image": image, "split": path.parent.name}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    asked, judged = [], []
    for path in sorted(drawn_folder.glob("*.queries.jsonl")):
        split = path.name.partition(".")[0]
        asked += [json.dumps(json.loads(line) | {"split": split}) for line in path.read_text().splitlines()]
        judged.append((drawn_folder / f"{split}.qrels.tsv").read_text())
    (folder / "queries.jsonl").write_text("\n".join(asked))
    (folder / "qrels.tsv").write_text("".join(judged))
    return folder


@pytest.fixture(scope="module")
def unbroken(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("unbroken")
    job = started(shop, root, root / "log")
    assert job.wait(PATIENCE_S) == 0, (root / "log").read_text()
    return contents(root)


@pytest.mark.parametrize("marks", [2, 45])
def test_a_killed_job_goes_on_to_the_same_bytes(
    shop: Path, unbroken: dict[str, bytes], tmp_path: Path, marks: int
) -> None:
    job = started(shop, tmp_path, tmp_path / "log")
    deadline = time.monotonic() + PATIENCE_S
    while len(found := list(tmp_path.glob(".triplets-*.draft/work/marks-*/*.json"))) < marks:
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    time.sleep(random.Random(marks).random() / 5)
    ended(job)
    done = {path: path.stat().st_mtime_ns for path in found}
    assert not list(tmp_path.glob("triplets-*"))
    again = started(shop, tmp_path, tmp_path / "log")
    while again.poll() is None:
        for path, stamp in done.items():  # what was done is not done again
            assert not path.exists() or path.stat().st_mtime_ns == stamp
        time.sleep(0.05)
    assert again.returncode == 0, (tmp_path / "log").read_text()
    assert contents(tmp_path) == unbroken
    ids = pq.read_table(next(tmp_path.glob("triplets-*")) / "items")["item_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 300
    assert json.loads(unbroken["manifest.json"])["counts"]["items"] == 300
