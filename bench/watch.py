"""What a stack holds while it runs, and what it leaves behind: memory by processes, and leftovers.

Memory is that which a process has for itself and no file backs (resident less shared): what leaks, leaks there.
Processes are born and die meanwhile, and a young one grows until it is warm. So a slope is taken within each
process, from so many seconds after its birth; of all processes of a kind together it is the median of all slopes
between two points (Theil and Sen), with its 95 % interval. Points are medians of some seconds, since samples
beside each other tell the same. Knows nothing of what the processes do.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy import stats

LEAST = 4  # points; a process of fewer says nothing of a slope
SHARED = Path("/dev/shm")  # noqa: S108  # nosec B108
HOUR_S, MIB = 3600.0, 1 << 20
Floats = NDArray[np.float64]


class Slope(NamedTuple):
    """By how much memory grows, in MiB an hour, with the ends of its 95 % interval, and how much it is, in MiB."""

    slope: float
    low: float
    high: float
    mib: float


class Memory:
    """Samples of processes' memory, and every process that was ever seen."""

    def __init__(self, settle_s: float, block_s: float) -> None:
        """Of each process the first seconds do not count, and each point is of so many."""
        self._settle_s, self._block_s, self.seen = settle_s, block_s, set[psutil.Process]()
        self._samples: dict[tuple[str, psutil.Process], list[tuple[float, int]]] = defaultdict(list)

    def sample(self, processes: Mapping[psutil.Process, str], counts: bool = True) -> float:
        """Take the memory of processes, each of a kind; returns MiB of all. Without `counts`, for no slope."""
        total, now = 0, time.time()
        self.seen |= processes.keys()
        for process, kind in processes.items():
            with suppress(psutil.Error):
                told = process.memory_info()
                total += told.rss - told.shared
                if counts and now - process.create_time() >= self._settle_s:
                    self._samples[kind, process].append((now, told.rss - told.shared))
        return total / MIB

    def slopes(self) -> dict[str, Slope]:
        """The slope of each kind: that of one of its processes, times how many there were on average."""
        points: dict[str, list[tuple[Floats, Floats]]] = defaultdict(list)
        for (kind, _), samples in self._samples.items():
            at, mib = blocks(np.array(samples), self._block_s)
            if len(at) >= LEAST:
                points[kind].append((at, mib))
        span_s = max((at[-1] - at[0] for of in points.values() for at, _ in of), default=0.0)
        return {kind: slope_of(of, span_s) for kind, of in sorted(points.items())}


def blocks(samples: Floats, block_s: float) -> tuple[Floats, Floats]:
    """Medians (at, MiB) of blocks of seconds, of samples (N, 2) of a time and bytes."""
    number = (samples[:, 0] // block_s).astype(np.int64)
    each = [samples[number == one] for one in np.unique(number)]
    at, size = np.array([np.median(one, axis=0) for one in each]).T
    return at, size / MIB


def slope_of(processes: Iterable[tuple[Floats, Floats]], span_s: float) -> Slope:
    """The slope within processes of one kind, given as points (at, MiB), over a span in which they lived."""
    processes = list(processes)
    at = np.concatenate([one - one.mean() for one, _ in processes])
    mib = np.concatenate([one - np.median(one) for _, one in processes])
    count = sum(one[-1] - one[0] for one, _ in processes) / span_s
    slope, _, low, high = stats.theilslopes(mib, at / HOUR_S, 0.95)
    size = float(np.mean(np.concatenate([one for _, one in processes])))
    return Slope(*(float(count * value) for value in (slope, low, high, size)))


def together(slopes: Mapping[str, Slope]) -> Slope:
    """The slope of all kinds: their sum, with intervals that add up as independent ones do."""
    slope, low, high, mib = np.array([*slopes.values()]).T
    beneath, above = (float(np.sqrt(np.sum((slope - end) ** 2))) for end in (low, high))
    return Slope(float(slope.sum()), float(slope.sum() - beneath), float(slope.sum() + above), float(mib.sum()))


# --- what is left --------------------------------------------------------------------------------


@contextmanager
def own_temporary() -> Iterator[Path]:
    """Have all children of this process use a temporary folder of their own, which is removed at the end."""
    before, tempfile.tempdir = os.environ.get("TMPDIR"), tempfile.gettempdir()  # ours stays what it was
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


def alive(seen: Iterable[psutil.Process], patience_s: float = 10) -> list[str]:
    """Which of these processes still live after a while: their names."""
    _, left = psutil.wait_procs([one for one in seen if one.is_running()], timeout=patience_s)
    names = []
    for process in left:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(f"{process.name()} {process.pid}")
    return sorted(names)


def shared() -> set[str]:
    """The files of shared memory that there are."""
    return {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()


def unused(names: Iterable[str]) -> list[str]:
    """Which of these files of shared memory no process has mapped: somebody left them."""
    left = {str(SHARED / name) for name in names if (SHARED / name).exists()}
    for process in psutil.process_iter() if left else ():
        with suppress(psutil.Error, OSError):
            left -= {one.path for one in process.memory_maps()}
    return sorted(left)


def left_in(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def drafts(folder: Path) -> list[str]:
    """What somebody began below a folder and neither ended nor cleared: names that begin with a dot."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
