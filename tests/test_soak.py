"""The soak holds what it promises, and each of its targets can fail: by a leak, a wrong answer, something left."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tests.fakes import HIT, FakeSearcher, serving

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
TARGETS = {"memory_slope", "wrong", "leftover_processes", "leftover_files"}
LEAK = """
import sys, time
held, every = [b"x" * (50 << 20)], int(sys.argv[1])
print("up", flush=True)
while True:
    held += [b"x" * every]
    time.sleep(0.1)
"""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("watch")


@pytest.fixture
def started() -> Iterator[Callable[[int], psutil.Process]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(bytes_each: int) -> psutil.Process:
        command = [sys.executable, "-c", LEAK, str(bytes_each)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert processes[-1].stdout is not None
        assert processes[-1].stdout.readline() == b"up\n"
        return psutil.Process(processes[-1].pid)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_in_a_short_soak_all_is_right_and_nothing_is_left() -> None:
    """How memory grows takes longer to tell: `make soak`."""
    command = [sys.executable, str(BENCH / "soak.py"), "--minutes", "0.4", "--items", "5000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    figures, targets = told["figures"], told["targets"]
    assert targets.keys() == TARGETS
    assert {name for name, target in targets.items() if target["holds"]} >= TARGETS - {"memory_slope"}, told
    assert figures["wrong"] == figures["lost"] == 0
    assert figures["ok"] > 500
    assert min(figures["switches"], figures["changes_found"]) >= 1
    assert figures["memory"]["all"][-1] > 1000  # MiB


# --- memory --------------------------------------------------------------------------------------


def test_a_process_that_leaks_is_told_from_one_that_does_not(
    watch: Any, started: Callable[[int], psutil.Process]
) -> None:
    memory = watch.Memory(0, 0.2)
    processes = {started(100_000): "leaky", started(0): "sound"}
    end = time.monotonic() + 4
    while time.monotonic() < end:
        assert memory.sample(processes) > 100  # MiB
        time.sleep(0.05)
    slopes = memory.slopes()
    assert 1500 < slopes["leaky"].low < 3600 < 1.2 * slopes["leaky"].high  # 1 MB a second is 3,433 MiB an hour
    assert abs(slopes["sound"].slope) < 30
    assert 50 < slopes["sound"].mib < 90
    assert watch.together(slopes).low > 1500


def test_what_dies_and_comes_again_is_no_leak_and_no_cure(watch: Any) -> None:
    """Each process grows by 100 MiB an hour from the same level: as a whole the kind stands still."""
    random, lives = np.random.default_rng(0), []
    for number in range(6):
        at = np.arange(0, 300, 10.0) + 300 * number
        lives.append((at, 200 + 100 * (at - at[0]) / 3600 + random.normal(size=len(at))))
    found = watch.slope_of(lives, 1800)
    assert found.low < 100 < found.high
    assert found.low > 50
    still = watch.slope_of([(at, 200 + random.normal(size=len(at))) for at, _ in lives], 1800)
    assert still.low < 0 < still.high


def test_the_young_do_not_count(watch: Any, started: Callable[[int], psutil.Process]) -> None:
    memory = watch.Memory(60, 0.01)
    process = started(0)
    for _ in range(10):
        memory.sample({process: "young"})
        time.sleep(0.02)
    assert memory.slopes() == {}
    assert memory.seen == {process}


# --- what is left --------------------------------------------------------------------------------


def test_what_still_lives_is_named(watch: Any, started: Callable[[int], psutil.Process]) -> None:
    left, ended = started(0), started(0)
    ended.kill()
    assert watch.alive([left, ended], 0.2) == [f"{left.name()} {left.pid}"]


def test_files_that_are_left_are_named(watch: Any) -> None:
    before = os.environ.get("TMPDIR")
    with watch.own_temporary() as folder:
        script = "import tempfile; tempfile.NamedTemporaryFile(prefix='left-', delete=False)"
        subprocess.run([sys.executable, "-c", script], check=True)
        (folder / "root" / ".draft").mkdir(parents=True)
        assert [name[:5] for name in watch.left_in(folder)] == ["left-", "root"]
        assert watch.drafts(folder) == ["root/.draft"]
    assert not folder.exists()
    assert watch.left_in(folder) == []
    assert os.environ.get("TMPDIR") == before


def test_shared_memory_that_nobody_uses_is_named(watch: Any) -> None:
    if not watch.SHARED.is_dir():
        pytest.skip("there is no /dev/shm")
    before = watch.shared()
    path = watch.SHARED / f"askew-test-{os.getpid()}"
    path.write_bytes(b"left")
    try:
        assert str(path) in watch.unused(watch.shared() - before)
        held = np.memmap(path, mode="r")
        assert str(path) not in watch.unused({path.name})
        del held
    finally:
        path.unlink()


# --- right and wrong -----------------------------------------------------------------------------


def told(*hits: tuple[str, float], answered: int = 2, version: str = "3") -> bytes:
    found = [{"item_id": item_id, "score": score} for item_id, score in hits]
    return json.dumps({"hits": found, "model": {"version": version}, "coverage": {"answered": answered}}).encode()


@pytest.mark.parametrize(
    ("body", "holds"),
    [
        (told(("a", 0.9), ("b", 0.8)), True),
        (told(("a", 0.9), ("new", 0.8)), True),
        (told(("new", 0.9), ("a", 0.8)), True),
        (told(("b", 0.9), ("a", 0.8)), False),
        (told(("a", 0.9), ("c", 0.8)), False),
        (told(("a", 0.9)), False),
        (told(("a", 0.9), ("a", 0.8)), False),
        (told(("a", 0.8), ("b", 0.9)), False),
        (told(("a", 0.9), ("b", 0.8), version="4"), False),
        (told(("x", 0.9), ("y", 0.8), version="4"), True),
        (told(("a", 0.9), ("c", 0.8), answered=1), True),
        (told(("b", 0.9), ("d", 0.8), answered=1), True),
        (told(("a", 0.9), ("b", 0.8), answered=1), False),
    ],
)
def test_an_answer_is_held_against_the_release_that_it_names(
    load: Any, tmp_path: Path, body: bytes, holds: bool
) -> None:
    right = {
        "3": {"mug": {"2": [["a", "b"]], "1": [["a", "c"], ["b", "d"]]}},
        "4": {"mug": {"2": [["x", "y"]], "1": []}},
    }
    (tmp_path / "right.json").write_text(json.dumps({"apart": ["new"], "right": right}))
    judge = load.Right(str(tmp_path / "right.json"))
    assert judge.holds("mug", 2, body) is holds
    assert not judge.holds("cap", 2, body)


@pytest.mark.parametrize(("item_id", "wrong"), [(HIT["item_id"], 0), ("another", 1)])
def test_a_load_counts_answers_that_are_not_right(load: Any, tmp_path: Path, item_id: str, wrong: int) -> None:
    right = {"3": {"red mug": {"2": [[item_id]]}}}
    (tmp_path / "right.json").write_text(json.dumps({"apart": [], "right": right}))
    with serving(FakeSearcher()) as url:
        wanted = load.Load(f"{url}/search", ["red mug"], 2, 50, 1, k=1, right=str(tmp_path / "right.json"))
        counts = load.start(wanted).wait().counts()
    assert counts["requests"] > 10
    assert (counts["wrong"], counts["ok"]) == ((counts["requests"], 0) if wrong else (0, counts["requests"]))
    assert (counts["hung"], counts["errors"]) == (0, {})
